"""The model card of a written folder: a template (`card.md`), the numbers of the recipe, and a picture.

No dates and no paths: the same recipe gives the same bytes, and tells nothing of the machine it was made on.
"""

import logging
import shlex
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING
from yaml import YAMLError

from .evaluation import PERPLEXITY, Quality
from .source import CARD, Source

log = logging.getLogger(__name__)

PICTURE = "prune_peak.png"
INHERITED = ("license", "license_name", "license_link", "language")  # of the front matter of the source's card

# The Hub knows finetune, adapter, merge and quantized; of these, changed weights in plain types are a finetune
RELATION = "finetune"

NAMES = {"mlp": "MLP"}  # of the kinds of site, in prose

# What lies beside the weights, and what opens it
LOADERS = {
    "tokenizer_config.json": ("AutoTokenizer", "tokenizer"),
    "preprocessor_config.json": ("AutoImageProcessor", "processor"),
}


def write_card(folder: Path, recipe: Mapping[str, Any], source: Source) -> None:
    """Write README.md, and its picture where matplotlib is installed, into a folder that holds all else.

    Args:
        folder: what was written: config, weights, side files.
        recipe: what was done and measured, as prune_peak.json tells it.
        source: the original, for its licence.
    """
    picture = _draw(folder / PICTURE, recipe)
    card = ModelCard.from_template(
        _front_matter(recipe, source),
        template_str=resources.files(__package__).joinpath("card.md").read_text(encoding="utf-8"),
        base=Path(source.label).name,
        model=source.label,
        shares=" and ".join(f"{share:.0%} of the {NAMES.get(kind, kind)} neurons" for kind, share in _shares(recipe)),
        warnings=recipe["warnings"],
        summary=_summarize(recipe),
        rows=list(_rows(recipe)),
        latency=source.blank.can_generate(),
        protocol=_tell_protocol(recipe["quality"]["before"]) if recipe["quality"]["before"] else None,
        picture=PICTURE if picture else None,
        refit=recipe["options"]["refit"],
        classes=sorted([*(name for name, _ in _loaders(folder)), recipe["host"]]),
        loaders=[(recipe["host"], "model"), *_loaders(folder)],
        host=recipe["host"],
        command=reproduce(recipe),
        versions=", ".join([f"prune-peak {recipe['prune_peak']}", *(" ".join(v) for v in recipe["versions"].items())]),
        calibration=_name_calibration(recipe),
    )
    (folder / CARD).write_text(f"{card}\n", encoding="utf-8")


def reproduce(recipe: Mapping[str, Any]) -> str:
    """The command that gives the same folder again, every option spelled out."""
    options = {"model": recipe["source"]["model"], "revision": recipe["source"]["revision"], **recipe["options"]}
    words = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if value is True:
            words.append(f"--{flag}")
        elif value is False and key == "refit":  # the one switch that is on where nothing is said
            words.append("--no-refit")
        elif value is not None and value is not False:
            words.append(f"--{flag} {shlex.quote(_spell(value))}")
    return " \\\n  ".join(["prune-peak compress", *words])


def _spell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={number}" for key, number in value.items())
    return ",".join(value) if isinstance(value, list) else str(value)


def _front_matter(recipe: Mapping[str, Any], source: Source) -> ModelCardData:
    calibration = recipe["options"]["calibration"]
    return ModelCardData(
        base_model=source.label if _is_repo_id(source.label) else None,
        base_model_relation=RELATION,
        library_name="transformers",
        pipeline_tag=find_task(getattr(transformers, recipe["host"])),
        tags=["prune-peak", "pruning", "peak-ablation", "arxiv:2408.17322"],
        datasets=[calibration] if "/" in calibration else None,
        **_inherit(source),
    )


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _inherit(source: Source) -> dict[str, Any]:
    """The licence and the languages, from the source's card, or its config."""
    try:
        theirs = metadata_load(source.folder / CARD) or {}
    except (OSError, ValueError, RecursionError, YAMLError):  # no card, or one that is not well-formed
        theirs = {}
    theirs = {"license": getattr(source.config, "license", None)} | theirs
    lists = {key: value if isinstance(value, list) else [value] for key, value in theirs.items()}
    return {key: theirs[key] for key in INHERITED if key in lists and all(isinstance(item, str) for item in lists[key])}


def find_task(model_class: type[PreTrainedModel]) -> str:
    """The Hub's name of what a class does."""
    task: str
    for task, names in TASK_MAPPING.items():
        for found in names.values():
            if model_class.__name__ in ([found] if isinstance(found, str) else found):
                return task
    return "image-feature-extraction" if model_class.main_input_name == "pixel_values" else "feature-extraction"


def _shares(recipe: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The kinds of site that were cut, and the share of the neurons that left."""
    for kind, before in recipe["before"]["neurons"].items():
        after = recipe["after"]["neurons"][kind]
        if after < before:
            yield kind, 1 - after / before


def _name_calibration(recipe: Mapping[str, Any]) -> str:
    options = recipe["options"]
    text = "text that the model wrote itself" if options["calibration"] == "self" else options["calibration"]
    if options["sequence_length"] is None:
        return f"{options['samples']} images of {text}"
    return f"{options['samples']} windows of {options['sequence_length']} tokens of {text}"


def _summarize(recipe: Mapping[str, Any]) -> str:
    options = recipe["options"]
    cut = " and ".join(f"{share:.1%} of the {NAMES.get(kind, kind)} neurons" for kind, share in _shares(recipe))
    fills = "/".join(sorted(set(recipe["fills"].values())))
    refit = ", and the kept weights were refitted by least squares to make up for them" if options["refit"] else ""
    shape = " (zeroed in place: all shapes are the original's, and nothing is saved)" if options["keep_shape"] else ""
    return (
        f"{cut[0].upper()}{cut[1:]} of `{recipe['source']['model']}` were cut, as many in every block{shape}. Each was "
        f"held at a constant, its {fills} activation over {_name_calibration(recipe)}, folded into the bias of the "
        f"projection that read it{refit}. What is left loads with stock transformers, and was compared with the "
        f"original whose neurons are held so ({len(recipe['verification'])} checks, all passed)."
    )


def _rows(recipe: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    before, after = recipe["before"], recipe["after"]
    for key in ("parameters", "bytes"):
        yield key, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key] - 1:+.1%}"
    if before["cache"] != after["cache"]:
        change = f"{after['cache'] / before['cache'] - 1:+.1%}"
        yield "KV cache, bytes a token", f"{before['cache']:,}", f"{after['cache']:,}", change
    first, second = recipe["quality"]["before"], recipe["quality"]["after"]
    if first:
        yield first["metric"], _with_error(first), _with_error(second), _compare(first, second)


def _with_error(quality: Mapping[str, Any]) -> str:
    pattern = "{:.2f}" if quality["metric"] == PERPLEXITY else "{:.1%}"
    error = quality["standard_error"]
    return " ± ".join(pattern.format(number) for number in (quality["value"], error) if number is not None)


def _compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if before["metric"] == PERPLEXITY:
        return f"x{after['value'] / before['value']:.3f}"
    return f"{100 * (after['value'] - before['value']):+.1f} points"


def _tell_protocol(quality: Mapping[str, Any]) -> str:
    error = "; ± is the standard error over them." if quality["standard_error"] else "."
    return f"{quality['metric'].capitalize()} on {quality['text']}: {Quality(**quality).protocol}{error}"


def _loaders(folder: Path) -> list[tuple[str, str]]:
    return [loader for name, loader in LOADERS.items() if (folder / name).is_file()]


def _draw(path: Path, recipe: Mapping[str, Any]) -> bool:
    """Draw neurons kept and cut, and the error, by block; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        log.warning("The card has no picture, for matplotlib is missing: pip install 'prune-peak[plots]'.")
        return False
    kinds = [kind for kind, _ in _shares(recipe)]
    figure = Figure(figsize=(9, 2.8 * len(kinds)), dpi=100, layout="constrained")
    for row, kind in enumerate(kinds):
        sites = [(name, site) for name, site in recipe["sites"].items() if site["kind"] == kind]
        blocks = [site["block"] for _, site in sites]
        widths, errors = (figure.add_subplot(len(kinds), 2, 2 * row + column) for column in (1, 2))
        kept = [site["kept"] for _, site in sites]
        widths.bar(blocks, kept, color="#2a6f97", label="kept")
        cut = [site["neurons"] - site["kept"] for _, site in sites]
        widths.bar(blocks, cut, bottom=kept, color="#e0a458", label="cut")
        widths.set(title=f"{NAMES.get(kind, kind)}: neurons", xlabel="block")
        lost = [site["lost"] for _, site in sites]
        errors.bar(blocks, lost, color="#e0a458", label="constants alone")
        if recipe["refits"]:
            left = [site["lost"] * recipe["refits"][name]["error"] for name, site in sites]
            errors.bar(blocks, left, color="#2a6f97", label="after the refit")
        errors.set(title=f"{NAMES.get(kind, kind)}: error, as a share", xlabel="block")
        for axes in (widths, errors):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, metadata={"Software": None})  # which would name the version
    return True
