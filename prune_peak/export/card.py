"""The model card of a written folder: a template (`card.md`), the numbers of the recipe, and a picture.

It has no dates and no paths, so that the same recipe gives the same bytes.
"""

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
from yaml import YAMLError

from ..data.data_sets import is_repo_id
from ..evaluation.quality import PERPLEXITY, EvalResult
from ..io.side_files import CARD
from ..models.loading import Model
from ..option_fields import flag
from ..options import FULL, NO_FILL, SELF, CompressOptions, name_units
from ..sites.blocks import Blocks
from .recipe import describe_shares

log = logging.getLogger(__name__)

PICTURE = "prune_peak.png"
MADE = "pruned"  # the folder that the commands of a card write
# From the front matter of the source's card
INHERITED = ("license", "license_name", "license_link", "language", "base_model")

# Of the Hub's relations (finetune, adapter, merge, quantized), this one fits changed weights in plain dtypes
RELATION = "finetune"

# Side files, the class that loads them, and a variable name
LOADERS = {
    "tokenizer_config.json": ("AutoTokenizer", "tokenizer"),
    "preprocessor_config.json": ("AutoImageProcessor", "processor"),
}


def write_card(folder: Path, recipe: Mapping[str, Any], source: Model) -> None:
    """Write README.md, and its picture if matplotlib is installed.

    Args:
        folder: the written config, weights and side files.
        recipe: the content of prune_peak.json.
        source: the original, for its licence.
    """
    picture = _draw(folder / PICTURE, recipe)
    front_matter = _front_matter(recipe, source)
    card = ModelCard.from_template(
        front_matter,
        template_str=resources.files(__package__).joinpath("card.md").read_text(encoding="utf-8"),
        base=Path(source.label).name,
        model=_name_source(recipe),
        has_base=front_matter.base_model is not None,
        folder="." if recipe["source"]["revision"] is not None else MADE + "-healed" * ("healing" in recipe),
        local=_name_local(recipe),
        images=source.sees_images,
        shares=" and ".join(f"{share:.0%} of the {name_units(kind)}" for kind, share in _shares(recipe)),
        warnings=recipe["warnings"],
        healing=_describe_healing(recipe, source.sees_images),
        conclusion=_conclude(recipe),
        summary=_summarize(recipe),
        rows=list(_rows(recipe)),
        latency=source.meta_model.can_generate() and not source.reads_pairs,
        protocol=_describe_protocol(recipe["quality"]["before"]) if recipe["quality"]["before"] else None,
        picture=PICTURE if picture else None,
        refit=recipe["options"]["refit"],
        classes=sorted([*(name for name, _ in _loaders(folder)), recipe["output_class"]]),
        loaders=[(recipe["output_class"], "model"), *_loaders(folder)],
        output_class=recipe["output_class"],
        command=reproduce(recipe),
        heal_command=_reproduce_healing(recipe),
        versions=", ".join([f"prune-peak {recipe['prune_peak']}", *(" ".join(v) for v in recipe["versions"].items())]),
        calibration=_name_calibration(recipe),
    )
    (folder / CARD).write_text(f"{card}\n", encoding="utf-8")


def reproduce(recipe: Mapping[str, Any]) -> str:
    """The command that writes the same folder again, with every option."""
    values = {"revision": recipe["source"]["revision"], **recipe["options"]}
    words = [f"prune-peak compress {_name_source(recipe)}"]
    for item in fields(CompressOptions):
        value = values.get(item.name)
        if item.name not in values:
            continue
        if isinstance(item.default, bool):
            words += [flag(item.name) if value else flag(f"no_{item.name}")] if value != item.default else []
        elif isinstance(value, Mapping):
            words.append(f"{flag(item.name)} {','.join(f'{key}={number}' for key, number in value.items())}")
        elif item.metadata["parse"] == "data":
            words += [f"{flag(item.name)} {shlex.quote(data)}" for data in value or ()]
        elif value is not None:
            text = ",".join(value) if isinstance(value, list) else str(value)
            words.append(f"{flag(item.name)} {shlex.quote(text)}")
    words.append(f"--output {MADE}")
    return " \\\n  ".join(words)


def _name_source(recipe: Mapping[str, Any]) -> str:
    """The original as a word of a command: the Hub id, or a folder where the command runs."""
    name, revision = recipe["source"]["model"], recipe["source"]["revision"]
    return shlex.quote(name if revision is not None else f"./{name}")


def _name_local(recipe: Mapping[str, Any]) -> list[str]:
    """The files and folders that the commands read; they name no path to them."""
    source, options = recipe["source"], recipe["options"]
    data = [*options["calibration"], *(options["evaluate"] or ()), recipe.get("healing", {}).get("data", SELF)]
    names = [source["model"]] if source["revision"] is None else []
    return list(dict.fromkeys([*names, *(name for name in data if name != SELF and "/" not in name)]))


def _reproduce_healing(recipe: Mapping[str, Any]) -> str | None:
    if "healing" not in recipe:
        return None
    options = recipe["healing"]
    names = ("data", "dataset_config", "dataset_split", "text_column", "tokens", "method", "seed")
    words = {name: options[name] for name in names if options.get(name) is not None}
    given = " ".join(f"{flag(name)} {shlex.quote(str(value))}" for name, value in words.items())
    return f"prune-peak heal {MADE} --original {_name_source(recipe)} \\\n  {given}"


def _describe_healing(recipe: Mapping[str, Any], images: bool) -> str | None:
    """What healing did, in two sentences."""
    if "healing" not in recipe:
        return None
    healing = recipe["healing"]
    distance = healing["divergence"]
    what = "all weights" if healing["method"] == FULL else "adapters, merged into the weights"
    return (
        f"It was then trained on {healing['tokens']:,} {'patches' if images else 'tokens'} of {healing['source']} "
        f"{healing['aim']} ({what}). On held-out {'images' if images else 'windows'} of this data, its divergence from "
        f"the original ({healing['distance']}) went from {distance['before']:.3g} to {distance['after']:.3g}."
    )


def _front_matter(recipe: Mapping[str, Any], source: Model) -> ModelCardData:
    names = recipe["options"]["calibration"]
    inherited = _inherit(source)
    if recipe["source"]["revision"] is not None:
        inherited["base_model"] = recipe["source"]["model"]
    return ModelCardData(
        base_model_relation=RELATION if inherited.get("base_model") else None,
        library_name="transformers",
        pipeline_tag=find_task(getattr(transformers, recipe["output_class"])),
        tags=["prune-peak", "pruning", "peak-ablation", "arxiv:2408.17322"],
        datasets=[name for name in names if "/" in name and is_repo_id(name)] or None,
        **inherited,
    )


def _inherit(source: Model) -> dict[str, Any]:
    """Licence, languages, and the model that the source was made from, by its card or config."""
    try:
        theirs = metadata_load(source.folder / CARD) or {}
    except (OSError, ValueError, RecursionError, YAMLError):  # no card, or an invalid one
        theirs = {}
    theirs = {"license": getattr(source.config, "license", None)} | theirs
    found: dict[str, Any] = {}
    for key in INHERITED:
        value = theirs.get(key)
        items = value if isinstance(value, list) else [value]
        # YAML reads the code of Norwegian, no, as false
        if key == "language":
            items = ["no" if item is False else item for item in items]
        texts = [item for item in items if isinstance(item, str)]
        if key == "base_model":
            texts = list(filter(is_repo_id, texts))
        if texts:
            found[key] = texts if isinstance(value, list) else texts[0]
    return found


def find_task(model_class: type[PreTrainedModel]) -> str:
    """The Hub's task of a class."""
    task: str
    if model_class.__name__ in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        return "text2text-generation"
    for task, names in TASK_MAPPING.items():
        for found in names.values():
            if model_class.__name__ in ([found] if isinstance(found, str) else found):
                return task
    return "image-feature-extraction" if model_class.main_input_name == "pixel_values" else "feature-extraction"


def _shares(recipe: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The pruned kinds of site, and the share of the neurons that were pruned."""
    for kind, before in recipe["before"]["neurons"].items():
        after = recipe["after"]["neurons"][kind]
        if after < before and kind in recipe["options"]["sites"]:
            yield kind, 1 - after / before


def _name_calibration(recipe: Mapping[str, Any]) -> str:
    options = recipe["options"]
    names = ["text that the model generated itself" if name == "self" else name for name in options["calibration"]]
    text = " and ".join(names)
    if options["sequence_length"] is None:
        return f"{options['samples']} images of {text}"
    return f"{options['samples']} windows of {options['sequence_length']} tokens of {text}"


def _conclude(recipe: Mapping[str, Any]) -> str:
    """What it saves and what it costs, in one sentence."""
    before, after = (recipe[side]["bytes"] for side in ("before", "after"))
    saved = f"{1 - after / before:.0%} smaller than" if after < before else "as large as"
    metric = (recipe["quality"]["before"] or recipe.get("healing") or {}).get("metric", PERPLEXITY)
    rows = [row for row in _rows(recipe) if row[0].startswith(metric)]
    costs = [f"{name.partition(',')[0]} {second} instead of {first}" for name, first, second, _ in rows]
    if recipe["talk"]:
        first, second = (recipe["talk"][side] for side in ("before", "after"))
        costs.append(f"{second['loops']} of {second['prompts']} answers that loop instead of {first['loops']}")
    return f"It is {saved} the original{', with ' if costs else ''}{' and '.join(costs)}."


def _summarize(recipe: Mapping[str, Any]) -> str:
    options = recipe["options"]
    cut = describe_shares(options["ratio"], dict(_shares(recipe)), recipe.get("steps", {}))
    saved = 1 - recipe["after"]["parameters"] / recipe["before"]["parameters"]
    model = f" ({saved:.1%} of its parameters)" * (not options["keep_shape"])
    fills = "/".join(sorted({*recipe["fills"].values()} - {NO_FILL}))
    replaced = (
        f"Each was replaced by a constant, its {fills} activation over {_name_calibration(recipe)}. The constants "
        "were folded into the bias of the output projection."
        if fills
        else ""
    )
    if NO_FILL in recipe["fills"].values():
        replaced = f"{replaced} The router of every block chooses among the experts that are left.".strip()
    if removed := [block for site in recipe["sites"].values() for block in site.get("removed", ())]:
        replaced = (
            f"These left: {', '.join(map(str, removed))}, counted from 0. The output projection of the block before "
            f"them adds what they added, as measured over {_name_calibration(recipe)}."
        )
    refit = " The kept weights were refitted by least squares to compensate." if recipe["refits"] else ""
    checked = (
        ""
        if "healing" in recipe
        else (
            "It was compared with the original in which what was pruned is held "
            f"({len(recipe['verification'])} checks, all passed)."
        )
    )
    shape = " (set to zero in place: all shapes are the original's, and nothing is saved)" * options["keep_shape"]
    return (
        f"{cut[0].upper()}{cut[1:]} of `{recipe['source']['model']}` were pruned{model}"
        f"{', the same number in every block' * (not removed)}{shape}. {replaced}{refit} The result loads with stock "
        f"transformers. {checked}"
    )


def _rows(recipe: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    before, after = recipe["before"], recipe["after"]
    for key in ("parameters", "bytes"):
        yield key, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key] - 1:+.1%}"
    if before["cache"] != after["cache"]:
        change = f"{after['cache'] / before['cache'] - 1:+.1%}"
        yield "KV cache, bytes per token", f"{before['cache']:,}", f"{after['cache']:,}", change
    if "healing" in recipe:
        score, metric = recipe["healing"]["score"], recipe["healing"]["metric"]
        numbers = [score[name] for name in ("original", "after", "before")]
        change, digits = f"{numbers[2]:.4f} before healing", 4
        if PERPLEXITY in metric:
            change, digits = f"x{numbers[1] / numbers[0]:.3f} (x{numbers[2] / numbers[0]:.3f} before healing)", 2
        yield f"{metric}, held out", f"{numbers[0]:.{digits}f}", f"{numbers[1]:.{digits}f}", change
    if recipe["talk"]:
        before, after = recipe["talk"]["before"], recipe["talk"]["after"]
        prompts = before["prompts"]
        yield f"answers that loop, of {prompts}", *(f"{n}" for n in (before["loops"], after["loops"])), ""
        yield f"answers that end, of {prompts}", *(f"{n}" for n in (before["ends"], after["ends"])), ""
        yield "KL along the original's answers, nats per token", "0", f"{after['divergence']:.3f}", ""
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


def _describe_protocol(quality: Mapping[str, Any]) -> str:
    error = "; ± is the standard error over them." if quality["standard_error"] else "."
    return f"{quality['metric'].capitalize()} on {quality['text']}: {EvalResult(**quality).protocol}{error}"


def _loaders(folder: Path) -> list[tuple[str, str]]:
    return [loader for name, loader in LOADERS.items() if (folder / name).is_file()]


def _draw(path: Path, recipe: Mapping[str, Any]) -> bool:
    """Draw kept and pruned neurons, and the error, by block; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        log.warning("The card has no picture, because matplotlib is not installed: pip install 'prune-peak[plots]'.")
        return False
    kinds = [kind for kind, _ in _shares(recipe) if kind != Blocks.label]
    if not kinds:
        return False
    figure = Figure(figsize=(9, 2.8 * len(kinds)), dpi=100, layout="constrained")
    for row, kind in enumerate(kinds):
        sites = [(name, site) for name, site in recipe["sites"].items() if site["kind"] == kind]
        blocks = sorted({site["block"] for _, site in sites})

        def by_block(values: Mapping[str, float], sites: Sequence[tuple[str, Any]] = sites) -> list[float]:
            """The mean over the sites of every block."""
            found: dict[int, list[float]] = {}
            for name, site in sites:
                found.setdefault(site["block"], []).append(values[name])
            return [fmean(found[block]) for block in sorted(found)]

        widths, errors = (figure.add_subplot(len(kinds), 2, 2 * row + column) for column in (1, 2))
        kept = by_block({name: site["kept"] for name, site in sites})
        widths.bar(blocks, kept, color="#2a6f97", label="kept")
        cut = by_block({name: site["neurons"] - site["kept"] for name, site in sites})
        widths.bar(blocks, cut, bottom=kept, color="#e0a458", label="pruned")
        widths.set(title=f"{name_units(kind)}, at every site", xlabel="block")
        lost = by_block({name: site["lost"] for name, site in sites})
        errors.bar(blocks, lost, color="#e0a458", label="constants alone")
        if all(name in recipe["refits"] for name, _ in sites):
            left = by_block({name: site["lost"] * recipe["refits"][name]["error"] for name, site in sites})
            errors.bar(blocks, left, color="#2a6f97", label="after the refit")
        errors.set(title=f"{name_units(kind)}: error, as a share", xlabel="block")
        for axes in (widths, errors):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", frameon=False)
    figure.savefig(path, metadata={"Software": None})  # without the version of matplotlib
    return True
