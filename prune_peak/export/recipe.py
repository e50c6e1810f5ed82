"""The recipe (prune_peak.json) and the plan file: write, read and check."""

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ..conversion.layout import Conversion
from ..data.windows import Windows
from ..errors import PrunePeakError
from ..io.tensor_files import load_tensors
from ..io.untrusted import check_folder, read_json
from ..models.families import find_blocks
from ..models.loading import Model
from ..options import UNITS, Ratio, name_units
from ..sites.blocks import Blocks, BlocksSite, removed_blocks
from ..sites.experts import ExpertsSite
from ..sites.finding import find_every_site, labels
from ..sites.plan import SitePlan, SiteResult, unpack_plan
from ..sites.site import Site
from ..version import __version__

VISIBLE = 0.0005  # difference of two shares that one decimal of a per cent shows
RECIPE_FILE = "prune_peak.json"
PLAN_FILE = "prune_peak_plan.safetensors"
VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}


@dataclass(frozen=True)
class Size:
    """How large a checkpoint is."""

    neurons: Mapping[str, int]  # by the kind of site, over all blocks; and the number of blocks
    parameters: int
    bytes: int
    cache: int  # bytes of the KV cache per token; 0 without one


def measure_size(model: Model, zeroed: Mapping[tuple[str, int], int]) -> Size:
    """The size of a model; `zeroed` neurons, by label and block of the site, do not count."""
    neurons: Counter[str] = Counter()
    cache = 0
    neurons[Blocks.label] = len(find_blocks(model.meta_model, model.family))
    for site in find_every_site(model.meta_model, model.family):
        neurons[site.label] += site.neurons - zeroed.get((site.label, site.block), 0)
        groups, _, head_dim = site.heads
        if head_dim > 1 and model.meta_model.can_generate():  # an attention
            cache += 2 * groups * head_dim * model.dtype.itemsize
    return Size(dict(neurons), model.parameters, model.size, cache)


def measure_shares(sites: Sequence[Site], kept: Mapping[str, int]) -> dict[str, float]:
    """The shares of the neurons (experts, blocks) that are pruned at these sites, by their kind."""
    shares = {site.label: 1 - kept[site.name] / site.neurons for site in sites}
    for site in sites:
        if isinstance(site, BlocksSite):
            shares[site.label] = len(removed_blocks(sites)) / site.blocks
    return shares


def describe_steps(sites: Sequence[Site], multiple_of: int | None) -> dict[str, str]:
    """What leaves a site together, by the kind of site: why another share is pruned than was asked for."""
    return {site.label: _describe_step(site, multiple_of) for site in reversed(sites)}


def _describe_step(site: Site, multiple_of: int | None) -> str:
    _, each, head_dim = site.heads
    if isinstance(site, ExpertsSite | BlocksSite):
        return f"whole {site.label}"
    if site.unit == 1:
        return f"multiples of {site.kind.step(site, multiple_of)}"
    if site.groups > 1:
        return "whole heads, as many of every KV group"
    return "whole KV groups" if each > 1 and site.unit == each * head_dim else "whole heads"


def describe_shares(ratio: Ratio | None, shares: Mapping[str, float], steps: Mapping[str, str]) -> str:
    """What is pruned, and what was asked for where that differs.

    Args:
        ratio: as it was asked for; None for a size target.
        shares: of the neurons, by the kind of site.
        steps: from `describe_steps`.

    Example:
        >>> describe_shares(0.3, {"attention": 0.5, "mlp": 0.3}, {"attention": "whole heads", "mlp": "multiples of 8"})
        '50.0% of the attention neurons (asked 30%: whole heads) and 30.0% of the MLP neurons'
    """
    parts = []
    for kind, share in shares.items():
        asked = ratio.get(kind) if isinstance(ratio, Mapping) else ratio
        differs = asked is not None and abs(asked - share) >= VISIBLE
        reason = f" (asked {100 * asked:.3g}%: {steps[kind]})" if differs and asked and kind in steps else ""
        parts.append(f"{share:.1%} of the {name_units(kind)}{reason}")
    return " and ".join(parts)


def describe_sites(sites: Sequence[Site], results: Mapping[str, SiteResult]) -> dict[str, Any]:
    """What became of every site: the parts `sites`, `fills` and `refits` of the recipe."""
    described: dict[str, dict[str, Any]] = {"sites": {}, "fills": {}, "refits": {}}
    for site in sites:
        result = results[site.name]
        described["fills"][site.name] = result.fill
        described["sites"][site.name] = {
            "kind": site.label,
            "block": site.block,
            "neurons": site.neurons,
            "kept": len(result.plan.keep),
            "lost": result.lost,
            "score": result.score,
        } | ({} if result.scores_lost is None else {"scores_lost": result.scores_lost})
        if isinstance(site, BlocksSite):
            described["sites"][site.name]["removed"] = site.removed
        if result.refit is not None:
            described["refits"][site.name] = asdict(result.refit)
    return described


def describe_run(source: Model, conversion: Conversion, options: Mapping[str, Any], windows: Windows) -> dict[str, Any]:
    """What was pruned, and how. It holds no dates and times, so that the same command gives the same bytes."""
    model, revision = source.origin
    return {
        "prune_peak": __version__,
        "source": {"model": model, "revision": revision, "digest": source.digest},
        "options": dict(options),
        "calibration_digest": windows.digest,
        "output_class": conversion.model_class.__name__,
        "versions": VERSIONS,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a folder that prune-peak wrote."""
    if not folder.exists():
        raise PrunePeakError(f"{folder} does not exist. Pass a folder that prune-peak wrote.")
    try:
        check_folder(folder)
        recipe = dict(read_json(folder / RECIPE_FILE))
        options = recipe["options"]
        flags = (options["refit"], options["keep_shape"])
        digests = (recipe["tensors"], recipe["files"])
        well_formed = all(isinstance(each, dict) for each in digests) and all(isinstance(flag, bool) for flag in flags)
        sites = options["sites"]
        if not well_formed or not isinstance(sites, list) or not sites or not set(sites) <= set(labels()):
            raise TypeError("tensors, files, options.refit, options.keep_shape, options.sites")
        if options["unit"] not in UNITS:
            raise TypeError("options.unit")
        healing = recipe.get("healing", {"parent_tensors": {}, "data": "", "tokens": 1, "seed": 0})
        kinds = {"parent_tensors": dict, "data": str, "tokens": int, "seed": int}
        if not all(type(healing[key]) is kind for key, kind in kinds.items()):
            raise TypeError("healing")
        if not all(type(site["kept"]) is int and site["kept"] > 0 for site in recipe["sites"].values()):
            raise TypeError("sites.kept")
        if not all(type(block) is int for site in recipe["sites"].values() for block in site.get("removed", ())):
            raise TypeError("sites.removed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PrunePeakError(f"{folder} is not a folder that prune-peak wrote: no readable {RECIPE_FILE}.") from None
    return recipe


def read_plan(folder: Path) -> dict[str, SitePlan]:
    """The plan of a written folder: a `SitePlan` for every site, by the site's name."""
    tensors, _ = load_tensors(folder / PLAN_FILE)
    try:
        return unpack_plan(tensors)
    except ValueError as error:
        raise PrunePeakError(f"{folder / PLAN_FILE} is not a plan: {error}.") from None
