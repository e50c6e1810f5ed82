"""Whether this checkout writes byte for byte what an older one writes:

    python bench/same_bytes.py OLD_CHECKOUT --keep FOLDER

Both checkouts compress the same models with the same options: tiny random models of every family (the older checkout's
`tests/tiny.py`) and the trained ones of `examples/`. Each checkout runs in a process of its own, with one thread. Of
every folder written, the tensors (names, types, shapes, bytes), config.json and the side files must be equal; so must
the recipe, under the names that `RECIPE_KEYS` maps, and the tables and numbers of the model card, whose words may
change. No pictures are drawn. With --keep, models and results of the older checkout are kept for the next run.
With --processes, two processes must also give what one gives: the same plan, and weights that differ by at most 1e-6.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tqdm import tqdm

HERE = Path(__file__).resolve()
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
BOUND = 1e-6  # of the largest value of a tensor, between two processes and one

# Cases give options their new names. Where a checkout has the older name, it gets that.
OLD_OPTIONS = {"output_class": "host", "covariances": "gram"}
OLD_FUNCTIONS = {"calibrate": "save_statistics"}
# Paths in the recipe: older name -> newer name, or None for what is not compared
RECIPE_KEYS: dict[str, str | None] = {
    "host": "output_class",
    "options.host": "options.output_class",
    "options.calibration.0": "options.calibration",
    "options.evaluate.0": "options.evaluate",
    "kept": None,
    "prune_peak": None,
}
NEWER_FILES = {Path("generation_config.json")}  # written also where the source has its settings in config.json
# Patterns of the paths whose words may change, but not their numbers
RECIPE_WORDS = (r"warnings\.\d+", r"quality\.(before|after)\.text", r"verification\.\d+\.(check|seen)")
NUMBER = re.compile(r"(?<![\w.])[-+x]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?%?")

CALIBRATION = {"calibration": "text.txt", "samples": 6, "sequence_length": 64}
IMAGES = {"calibration": "digits/calibration", "samples": 24}
BOTH = {"mlp": 0.3, "attention": 0.5}
SITES = ["mlp", "attention"]
MINI = ("llama-mini", "mistral-mini", "opt-mini", "roberta-mini", "vit-mini")
ONE_GROUP = ("llama-one-group", "falcon-7b", "falcon-7b-biased-untied", "gemma-wide-heads")
NARROW = ("cohere", "falcon-40b", "gemma", "gemma2", "gpt-neox-parallel", "gptj", "phi3", "llama-tied", "vit")
FILLS, SCORES = ("mean", "zero", "auto"), ("random", "deviation", "activation-norm")
# Models, what is done with each, options: beside what `list_cases` does with all
MORE: list[tuple[tuple[str, ...], str, dict[str, Any]]] = [
    *((("llama-biased", "gpt2", "bert", "vit"), f"mlp.{fill}", {"ratio": 0.3, "fill": fill}) for fill in FILLS),
    (("starcoder2", "deit"), "both.fold.auto", {"ratio": BOTH, "fill": "auto", "refit": False}),
    *((("llama-tied", "opt"), f"mlp.{score}", {"ratio": 0.3, "score": score, "seed": 1}) for score in SCORES),
    (("llama-untied", "opt", "bert"), "target", {"target_params": 0.85}),
    (("gemma", "deit", "llama-mini", "vit-mini"), "target.both", {"target_params": 0.8, "sites": SITES}),
    (("qwen3",), "target.bytes", {"target_bytes": 120_000, "sites": SITES, "unit": "group"}),
    (("opt", "phi"), "multiple", {"ratio": 0.3, "multiple_of": 16}),
    (("falcon-40b", "mistral"), "both.in-place.neurons", {"ratio": BOTH, "keep_shape": True, "unit": "neuron"}),
    (("llama-untied",), "both.in-place.groups", {"ratio": BOTH, "keep_shape": True, "unit": "group"}),
    (("phi3", "mistral", "gemma"), "own", {"ratio": BOTH, "output_class": "own"}),
    (("llama-tied", "gemma"), "granite", {"ratio": BOTH, "output_class": "granite"}),
    (tuple(f"{name}-bfloat16" for name in NARROW), "both", {"ratio": BOTH}),
    (("opt-bfloat16", "bert-bfloat16", "llama-tied-bfloat16"), "mlp.fold", {"ratio": 0.3, "refit": False}),
    (("llama-tied-float16", "qwen2-sharded"), "both", {"ratio": BOTH}),
    (("llama-mini",), "computed-in-bfloat16", {"ratio": BOTH, "dtype": "bfloat16"}),
    (("llama-tied", "roberta-mini"), "evaluate", {"ratio": 0.3, "evaluate": "text.txt"}),
    (("vit-mini",), "evaluate", {"ratio": 0.3, "evaluate": "digits/held-out"}),
    (("llama-mini", "gpt2"), "self", {"ratio": 0.3, "calibration": "self"}),
    (("llama-tied", "opt"), "few-tokens", {"ratio": 0.3, "samples": 2, "sequence_length": 16}),
    (("llama-untied", "vit", "mistral-mini"), "stats", {"ratio": BOTH, "stats": "of-the-side"}),
    (("opt-mini",), "refused", {"ratio": BOTH}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT")
    parser.add_argument("--new", type=Path, default=HERE.parent.parent, metavar="CHECKOUT", help="in place of this one")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where models and results stay")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of the names of the cases to run")
    parser.add_argument("--processes", action="store_true", help="also compare two processes with one")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    old, new = options.old.resolve(), options.new.resolve()
    if options.worker:
        work_on(old, options.worker, options.only)
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(options.keep or scratch).resolve()
        names = [name for name in make_cases(old, work) if options.only in name]
        for side, checkout in ((work / "old", old), (work / "new", new)):
            began = time.perf_counter()
            run(checkout, side, str(HERE), str(checkout), "--worker", str(side), "--only", options.only)
            print(f"{side.name}: {time.perf_counter() - began:.0f} s", flush=True)
        verdicts = Counter(tell(name, *compare(work / "old" / name, work / "new" / name)) for name in names)
        if options.processes:
            verdicts += Counter(tell(*seen) for seen in compare_processes(old, new, work))
    same, different, refused = (verdicts[key] for key in ("same", "DIFFERENT", "refused by both"))
    print(f"{verdicts.total()} cases: {same} same, {different} different, {refused} refused by both")
    sys.exit(different > 0)


def run(checkout: Path, side: Path, *words: str) -> None:
    """Run Python with the package of a checkout, in the folder that holds the models."""
    paths = {"PYTHONPATH": str(checkout), "HF_HOME": str(side / "hf-home")}
    environment = os.environ | ONE_THREAD | paths | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    side.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-P", *words], env=environment, cwd=side.parent, stdout=subprocess.DEVNULL, check=True
    )


def make_cases(old: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Save the models that are not there yet, and a list of what to do with them."""
    import torch

    sys.path[:0] = [str(old), str(old / "tests")]
    tiny, families = import_module("tiny"), import_module("prune_peak.families").FAMILIES
    (work / "models").mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(topics[name] for name in sorted(topics))[:60_000]
    (work / "text.txt").write_text(text)
    shutil.copytree(old / "examples" / "digits", work / "digits", dirs_exist_ok=True)
    for name in MINI:
        shutil.copytree(old / "examples" / name, work / "models" / name, dirs_exist_ok=True)
    cases = list_cases(tiny, families)
    kinds: dict[str, dict[str, Any]] = {"bfloat16": {"dtype": torch.bfloat16}, "float16": {"dtype": torch.float16}}
    kinds["sharded"] = {"max_shard_size": "30KB"}
    known = {each.name: each for each in tiny.TINY + tiny.MORE_HEADS}
    for case in tqdm(cases.values(), desc="models"):
        folder = work / case["model"]
        if not folder.exists():
            name, _, kind = folder.name.rpartition("-")
            each = known[name if kind in kinds else folder.name]
            partial = each.save(folder.with_name("partial"), **kinds.get(kind, {}))
            save_preprocessor(partial, text, tiny.IMAGE if each.family in tiny.VISION else None)
            partial.rename(folder)
    (work / "cases.json").write_text(json.dumps(cases, indent=2) + "\n")
    return cases


def save_preprocessor(folder: Path, text: str, image: int | None) -> None:
    """An image processor; or a tokenizer of single characters, for the tiny models know 97 tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

    if image is not None:
        ViTImageProcessorPil(size={"height": image, "width": image}).save_pretrained(folder)
        return
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>", "unk_token": "?"}
    common = [letter for letter, _ in Counter(text.replace("?", "")).most_common(97 - len(special))]
    words = {word: number for number, word in enumerate([*special.values(), *common])}  # numbered as in `tests/tiny.py`
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def list_cases(tiny: Any, families: Any) -> dict[str, dict[str, Any]]:
    """The options of `compress` by the name of the case: most for the first tiny model of every family."""
    cases: dict[str, dict[str, Any]] = {}
    images = {each.name for each in tiny.TINY + tiny.MORE_HEADS if each.family in tiny.VISION} | {"vit-mini"}
    fills = itertools.cycle(("peak", "mean", "median", "zero"))

    def add(model: str, what: str, **options: Any) -> None:
        seen = IMAGES if model.removesuffix("-bfloat16") in images else CALIBRATION
        more = {"samples": 10} if model in MINI and model not in images else {}  # more tokens than neurons
        cases[f"{model}.{what}"] = {"model": f"models/{model}"} | seen | more | options

    def add_both(model: str, what: str, **options: Any) -> None:
        add(model, what, **options)
        add(model, f"{what}.fold", refit=False, fill=next(fills), **options)

    models = [(name, families[name.removesuffix("-mini")], False) for name in MINI]
    models += [(each.name, families[each.configure().model_type], each.stiff) for each in tiny.TINY]
    seen_families: set[str] = set()
    for name, family, stiff in models:
        first = name in MINI or family.model_type not in seen_families
        seen_families |= set() if name in MINI else {family.model_type}
        add_all = add_both if first else add
        add_both(name, "mlp", ratio=0.3)
        if family.attention is None:
            continue
        if family.attention.fixed or stiff:
            add_all(name, "heads.in-place", ratio={"attention": 0.5}, keep_shape=True)
            if first:
                add(name, "both.in-place.neurons", ratio=BOTH, keep_shape=True, unit="neuron")
            continue
        add_all(name, "heads", ratio={"attention": 0.5})
        unit = "neuron" if family.attention.plain else "head" if name in ONE_GROUP else "group"
        add_all(name, f"both.{unit}s", ratio=BOTH, unit=unit)
    for each in tiny.MORE_HEADS:
        fixed = families[each.configure().model_type].attention.fixed
        add(each.name, "both", ratio=BOTH, keep_shape=fixed)
    for names, what, options in MORE:
        for name in names:
            add(name, what, **options)
    return cases


def work_on(checkout: Path, side: Path, only: str) -> None:
    """Run the cases with the package of one checkout. Results of the old side with the same code stay."""
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # no pictures
    import torch
    from transformers.utils import logging as transformers_logging

    prune_peak: Any = import_module("prune_peak")
    if Path(prune_peak.__file__).resolve().parent != checkout / "prune_peak":
        sys.exit(f"prune_peak was imported from {prune_peak.__file__}, not from {checkout}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("prune_peak").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    files = sorted((checkout / "prune_peak").rglob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    cases = json.loads((side.parent / "cases.json").read_text())
    for name, case in tqdm([pair for pair in cases.items() if only in pair[0]], desc=side.name, disable=False):
        record, kept, output = {"case": case, "code": code}, side / f"{name}.json", side / name
        if side.name == "old" and kept.exists() and record.items() <= json.loads(kept.read_text()).items():
            continue
        kept.unlink(missing_ok=True)
        for folder in (output, f"{output}.partial"):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            if "stats" in case:
                case = case | {"stats": str(output) + ".stats"}
                seen = {key: case[key] for key in ("calibration", "samples", "sequence_length") if key in case}
                more = {"output": case["stats"], "covariances": True, "force": True}
                call(prune_peak, "calibrate", model=case["model"], **seen, **more)
            call(prune_peak, "compress", **case, output=output)
            record["outcome"] = "written"
        except prune_peak.PrunePeakError as error:
            record |= {"outcome": "refused", "error": str(error)}
        except Exception as error:  # of a case, which the comparison shows
            record |= {"outcome": "crashed", "error": f"{type(error).__name__}: {error}"}
        kept.write_text(json.dumps(record, indent=2) + "\n")


def call(package: Any, name: str, **options: Any) -> None:
    """Call a function of the package, by the names that this checkout has for it and its options."""
    function = getattr(package, name, None) or getattr(package, OLD_FUNCTIONS[name])
    known = inspect.signature(function).parameters
    older = {key: OLD_OPTIONS[key] for key in options if OLD_OPTIONS.get(key) in known}
    function(**{older.get(key, key): value for key, value in options.items()})


def compare(old: Path, new: Path) -> tuple[list[str], str, str]:
    """What differs between two written folders, files that differ in bytes alone, and another verdict, if any."""
    records = [json.loads(Path(f"{folder}.json").read_text()) for folder in (old, new)]
    outcomes = [record["outcome"] for record in records]
    if outcomes == ["refused", "refused"]:
        return [], "", "refused by both"
    if outcomes != ["written", "written"]:
        told = [f"{record['outcome']} ({record.get('error', '')})" for record in records]
        return [f"the old one {told[0]}; the new one {told[1]}"], "", ""
    files = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (old, new)]
    lost, notes = [f"{path} is in one folder only" for path in sorted((files[0] ^ files[1]) - NEWER_FILES)], []
    for path in sorted(files[0] & files[1]):
        pair = (old / path).read_bytes(), (new / path).read_bytes()
        if pair[0] == pair[1]:
            continue
        reader = read_tensors if path.suffix == ".safetensors" else READERS.get(path.name)
        first, second = map(reader, pair) if reader else ({"bytes": "theirs"}, {"bytes": "others"})
        keys = [key for key in first | second if first.get(key, ...) != second.get(key, ...)]
        lost += [f"{path}: {key}: {first.get(key, '-')!s:.90} -> {second.get(key, '-')!s:.90}" for key in keys]
        notes += [] if keys else [str(path)]
    return lost, ", ".join(notes), ""


def read_tensors(data: bytes) -> dict[str, Any]:
    """Type, shape and digest of every tensor of a safetensors file."""
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, of in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = of["data_offsets"]
            digest = hashlib.sha256(data[start + first : start + last]).hexdigest()[:16]
            tensors[name] = (of["dtype"], of["shape"], digest)
    return tensors


def read_recipe(data: bytes) -> dict[str, Any]:
    """The values of the recipe by their path, under the newer names; words that may change as their numbers."""
    values: dict[str, Any] = {}
    for path, value in flatten(json.loads(data)):
        older = next((key for key in RECIPE_KEYS if path == key or path.startswith(f"{key}.")), None)
        newer = None if older is None else RECIPE_KEYS[older]
        if older is not None and newer is None:
            continue
        path = path if older is None else f"{newer}{path.removeprefix(older)}"
        changes = isinstance(value, str) and any(re.fullmatch(words, path) for words in RECIPE_WORDS)
        values[path] = NUMBER.findall(value) if changes else json.dumps(value)
    return values


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON value, by their dotted path."""
    if not isinstance(value, dict | list) or not value:
        yield path, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from flatten(part, f"{path}.{key}" if path else str(key))


def read_card(data: bytes) -> dict[str, Any]:
    """The rows of the card's tables, cell by cell as their numbers; and the numbers of the rest, each once."""
    lines = re.sub(r"prune-peak \d\S*", "", data.decode()).splitlines()  # its version
    rows = [[NUMBER.findall(cell) for cell in line.split("|")] for line in lines if line.startswith("|")]
    rest = {number for line in lines if not line.startswith("|") for number in NUMBER.findall(line)}
    return {f"row {number}": row for number, row in enumerate(rows)} | {"numbers": sorted(rest)}


READERS = {"prune_peak.json": read_recipe, "README.md": read_card}


def tell(name: str, lost: list[str], notes: str, verdict: str = "") -> str:
    """Print the line of a case; returns its verdict."""
    verdict = verdict or ("DIFFERENT" if lost else "same")
    what = f": {'; '.join(lost[:3])}" + (f"; and {len(lost) - 3} more" if len(lost) > 3 else "") if lost else ""
    print(f"{name}: {verdict}{what}" + (f" (other bytes, same content: {notes})" if notes else ""), flush=True)
    return verdict


def compare_processes(old: Path, new: Path, work: Path) -> Iterator[tuple[str, list[str], str]]:
    """Two processes and one, in each checkout."""
    from safetensors.torch import load_file

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = ("compress", "--model", "models/llama-mini", "--ratio", "mlp=0.3", "--samples", "40", "--force", "-q")
    for side, checkout in ((work / "old", old), (work / "new", new)):
        outputs = [side / f"processes-{name}" for name in ("two", "one")]
        for output, launcher in zip(outputs, (torchrun, ()), strict=True):
            more = ("--calibration", "text.txt", "--output", str(output))
            run(checkout, side, *launcher, "-m", "prune_peak", *words, *more)
        two, one = (load_file(output / "prune_peak_plan.safetensors") for output in outputs)
        lost = [f"{key} of the plan" for key in one if not one[key].equal(two[key])]
        two, one = (load_file(output / "model.safetensors") for output in outputs)
        largest = {key: one[key].abs().max().clamp_min(1e-30) for key in one}  # some biases are zero
        far = {key: ((two[key] - one[key]).abs().max() / largest[key]).item() for key in one}
        lost += [f"{key} differs by {share:.0e}" for key, share in far.items() if not share < BOUND]
        print(f"two processes and one, {side.name}: weights differ by at most {max(far.values()):.1e}", flush=True)
        yield f"processes.{side.name}", lost, ""


if __name__ == "__main__":
    main()
