"""What older releases of transformers make of the checkpoints that are written with the newest:

    python bench/readers.py write DIR                     # every tiny config of the tests, cut, and what it answers
    OTHER-ENVIRONMENT/bin/python bench/readers.py read DIR   # needs torch and some transformers, and nothing else
    python bench/readers.py table DIR > docs/readers.md   # all that have read

A class that a release does not know is refused by it, which is well; so is one that it finds other names of tensors in,
which it says. What is read without a word and computes something else is not: then `read` exits with 1.
"""

import argparse
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

EXPECTED, FOUND = "expected.safetensors", "read-{}.json"
BOUND = 1e-4  # of the largest logit, in float32: releases order their sums in other ways
LENGTH = 48  # tokens; more than the windows and the first positions of the tiny configs


def write(folder: Path) -> None:
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from test_law import ALL, NARROWER, cut_tiny
    from tiny import VISION

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cases = [(tiny, ("mlp",)) for tiny in ALL] + [(tiny, ("attention",)) for tiny in NARROWER]
    for tiny, kinds in cases:
        name = f"{tiny.name}, {kinds[0]}"
        source = tiny.save(folder / "source")
        cut_tiny(source, folder / name, "mean", kinds=kinds)
        shutil.rmtree(source)
        model, wrong = load(folder / name)
        assert not wrong, wrong
        generator = torch.Generator().manual_seed(1)
        if tiny.family in VISION:
            size = model.config.image_size
            given = {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
        else:
            given = {"input_ids": torch.randint(3, model.config.vocab_size, (2, LENGTH), generator=generator)}
        save_file(given | {"answer": answer(model, given)}, folder / name / EXPECTED)
        print(name)


def load(folder: Path) -> tuple[Any, str]:
    """The model of a folder, and what was wrong with it."""
    written_as = json.loads((folder / "config.json").read_text())["architectures"][0]
    stock = getattr(transformers, written_as)
    # eager, for older releases leave Gemma 2's softcap out of the others
    model, info = stock.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    lost = [f"{len(names)} {kind}, such as {sorted(map(str, names))[0]}" for kind, names in info.items() if names]
    return model.eval(), "; ".join(lost)


@torch.inference_mode()
def answer(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(**given)[0].float()
    return logits.contiguous()


def read(folder: Path) -> bool:
    """Whether every case that can be read at all gives the same answers."""
    rows = []
    for path in sorted(folder.glob(f"*/{EXPECTED}")):
        case = path.parent
        given = load_file(path)
        expected = given.pop("answer")
        row: dict[str, Any] = {
            "case": case.name,
            "written as": json.loads((case / "config.json").read_text())["architectures"][0],
        }
        try:
            model, wrong = load(case)
            ours = answer(model, given)
        except Exception as error:  # whatever a release raises where it does not know a class or a shape
            row |= {"refused": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        else:
            difference = ((ours - expected).abs().max() / expected.abs().max()).item()
            row |= {"difference": difference, "wrong": wrong}
        rows.append(row)
        print(json.dumps(row))
    version = transformers.__version__
    (folder / FOUND.format(version)).write_text(json.dumps({"transformers": version, "rows": rows}, indent=2))
    return not any(is_silent(row) for row in rows)


def is_silent(row: dict[str, Any]) -> bool:
    return "difference" in row and not row["wrong"] and not row["difference"] <= BOUND


def table(folder: Path) -> None:
    """One row for every class that is written, one column for every release that has read; its worst case counts."""
    found = {}
    for path in folder.glob(FOUND.format("*")):
        read = json.loads(path.read_text())
        trials: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in read["rows"]:
            trials[row["written as"]].append(row)
        found[read["transformers"]] = trials
    versions = sorted(found, key=lambda version: [int(part) for part in version.split(".")])
    print(INTRODUCTION.format(bound=BOUND))
    print("|", " | ".join(["written as", "cases", *versions]), "|")
    print("|", " | ".join(["---"] * (len(versions) + 2)), "|")
    for name in sorted(found[versions[-1]]):
        told = [tell(found[version][name]) for version in versions]
        print("|", " | ".join([name, str(len(found[versions[-1]][name])), *told]), "|")


def tell(rows: list[dict[str, Any]]) -> str:
    same = [row["difference"] for row in rows if "difference" in row and not row["wrong"]]
    silent = sum(map(is_silent, rows))
    said = [f"**{silent} wrong**" if silent else f"{max(same):.0e}"] if same else []
    for what, key in (("refuses", "refused"), ("misses tensors of", "wrong")):
        count = sum(bool(row.get(key)) for row in rows)
        said += [f"{what} {'all' if count == len(rows) else count}"] if count else []
    return ", ".join(said)


INTRODUCTION = """# Who reads what is written

The largest difference between the logits of older releases of transformers and those of the newest, as a share of the
largest logit, over all tiny configs of the tests, cut in the MLP or in attention (float32, eager attention, 48 tokens;
bound {bound:.0e}). A release refuses a class that it does not have, or a shape that it cannot hold; it misses tensors
where it calls them by other names, and says so. `make readers` prints it.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", "read", "table"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if options.what == "read":
        sys.exit(not read(options.folder))
    {"write": write, "table": table}[options.what](options.folder)


if __name__ == "__main__":
    main()
