"""`verify()`: does a written folder compute what it must.

The folder must contain exactly the tensors that were written, load with the stock class with nothing missing,
unexpected or mismatched, and compute what the original computes with the pruned neurons held at their fills
(sites/hooks.py).
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from .conversion.choice import choose_conversion
from .conversion.layout import Conversion
from .errors import PrunePeakError, spell
from .export.digests import changed_files, changed_tensors
from .export.folder import prune_block
from .export.recipe import read_plan, read_recipe
from .export.tokenizer import behaves_alike
from .healing.objectives import find_objective, measure_distance
from .healing.training import into_batches
from .healing.windows import HELD_OUT_FILE, choose_data, load_data, recorded_reading
from .models.execution import CPU, ExecutionConfig
from .models.families import tensors_by_block
from .models.loading import Model, open_model
from .models.stacks import choose_stacks
from .options import SELF
from .probes import Hooks, Outputs, Whole, probe_batches, run_streamed
from .progress import next_stage, phase, stages, track
from .sites.blocks import BlocksSite, join_runs
from .sites.expert_mlp import ExpertSite
from .sites.finding import find_sites
from .sites.plan import SitePlan
from .sites.site import Site

log = logging.getLogger(__name__)

FLOAT32_BOUND = 2e-5  # largest difference, relative to the logits' largest magnitude
ROUNDING_BOUND = 1.2  # in a narrower dtype: distance to the exact result, relative to the source's own distance
TOLD_BOUND = 0.02  # share by which a healed model's divergence may differ from the recipe's, on another machine
PROBES, STREAMED_PROBES = 8, 4  # windows of random tokens to compare on; fewer for models that are streamed


@dataclass
class Verification:
    """The checks in order; each has a name, whether it passed, and what was measured."""

    checks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check["passed"] for check in self.checks)

    def add(self, name: str, passed: bool, seen: str) -> None:
        self.checks.append({"check": name, "passed": passed, "seen": seen})


def verify(
    folder: Path,
    original: Model | None = None,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - frozen
    data: str | None = None,
) -> Verification:
    """Check a folder that `compress` or `heal` wrote, against its own recipe and, where given, against the original.

    Args:
        folder: what was written.
        original: what it was compressed from.
        execution: the device and the memory to stay within.
        data: the text, or images, that a healed folder learned on, to measure what was held out again.

    Raises:
        PrunePeakError: prune-peak did not write the folder, or it belongs to another original.
    """
    recipe = read_recipe(folder)
    with stages(2 if original is None else 3 if "healing" in recipe else 4):
        return _verify(folder, recipe, original, execution, data)


def _verify(
    folder: Path, recipe: Mapping[str, Any], original: Model | None, execution: ExecutionConfig, data: str | None
) -> Verification:
    result = Verification()
    _check_digests(result, folder, recipe)
    next_stage()
    if not result.passed:
        return result
    written = open_model(str(folder))
    _check_loading(result, written, execution)
    next_stage()
    if result.passed and "healing" in recipe:
        _check_healing(result, folder, recipe, original, written, data)
    elif result.passed and original is not None:
        options = recipe["options"]
        original, written = (choose_stacks(model, options.get("stack")) for model in (original, written))
        sites = find_sites(
            original.meta_model, original.family, options["sites"], options["unit"], options["keep_shape"]
        )
        kept = {name: site["kept"] for name, site in recipe["sites"].items()}
        removed = {block for site in recipe["sites"].values() for block in site.get("removed", ())}
        sites = join_runs([site for site in sites if not isinstance(site, BlocksSite) or removed & {*site.removed}])
        plan: Mapping[str, SitePlan] = read_plan(folder)
        _check_plan(sites, plan, kept, original)
        conversion = choose_conversion(original, sites, kept, original.dtype, written.config.model_type)
        if options["refit"]:
            plan = RefittedPlan(plan, original, conversion, written, options)
        _check_tokenizer(result, original, written)
        _check_tensors(result, original, written, conversion, plan)
        if not result.checks[-1]["passed"] and original.digest != recipe["source"]["digest"]:
            raise PrunePeakError(f"{original.name} is not the original of this folder: its config or weights differ.")
        next_stage()
        _check_outputs(result, original, written, sites, plan, execution)
    return result


class RefittedPlan(Mapping[str, SitePlan]):
    """The plan with the refitted weights, which only the written folder has; each is read when it is needed.

    A bias that takes the constants of two sites counts as a whole for the site that it belongs to.
    """

    def __init__(
        self,
        plan: Mapping[str, SitePlan],
        original: Model,
        conversion: Conversion,
        written: Model,
        options: Mapping[str, Any],
    ) -> None:
        sites = find_sites(written.meta_model, written.family, options["sites"], options["unit"], options["keep_shape"])
        self._plan, self._original, self._written = plan, original, written
        if conversion.block_map is not None:
            sites = [
                site for site in sites if site.block in {conversion.block_map[one.block] for one in conversion.sites}
            ]
        self._pairs = pair_sites(conversion.sites, sites, plan)
        self._biases = {site.bias for site in conversion.sites}

    def __getitem__(self, name: str) -> SitePlan:
        plan, written = self._plan[name], self._written
        if name not in self._pairs:
            return plan
        site, written_site = self._pairs[name]
        weight = site.kind.reduce(written_site.read_projection(written)[0].float(), plan.keep)
        bias = torch.zeros(site.hidden)
        if site.folded_into == site.bias or (site.folded_into is not None and site.folded_into not in self._biases):
            assert written_site.folded_into is not None
            bias = written_site.read_constants(written).float()
            if site.folded_into != site.bias and site.folded_into in self._original.names:
                bias = bias - self._original.read(site.folded_into).float()
        written.checkpoint.release()
        return replace(plan, weight=weight, bias=bias)

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan)

    def __len__(self) -> int:
        return len(self._plan)


def pair_sites(
    sites: Sequence[Site], written: Sequence[Site], plan: Mapping[str, SitePlan]
) -> dict[str, tuple[Site, Site]]:
    """The sites with weights of their own that are still there, each with that of the written model, by name."""
    there = [
        site
        for site in sites
        if not isinstance(site, ExpertSite) or site.module not in plan or site.expert in plan[site.module].keep
    ]
    pairs = zip(there, written, strict=True)
    return {site.name: (site, other) for site, other in pairs if site.kind.holds_constants}


def _check_plan(sites: Sequence[Site], plan: Mapping[str, SitePlan], kept: Mapping[str, int], original: Model) -> None:
    for site in sites:
        site_plan = plan.get(site.name)
        if site_plan is None or site.name not in kept or not _fits(site_plan, site, kept[site.name]):
            raise PrunePeakError(
                f"{original.name} is not the original of this folder: its {site.name} does not fit the plan."
            )


def _fits(plan: SitePlan, site: Site, kept: int) -> bool:
    keep, fill = plan.keep, plan.fill
    if fill.shape != (site.neurons,) or fill.dtype is not torch.float32 or not bool(fill.isfinite().all()):
        return False
    if keep.dtype is not torch.int64 or keep.shape != (kept,) or not 0 <= keep[0] <= keep[-1] < site.neurons:
        return False
    return bool((keep.diff() > 0).all()) and site.kind.fits(site, plan)


def _check_digests(result: Verification, folder: Path, recipe: Mapping[str, Any]) -> None:
    """Every tensor, and every file that transformers reads besides, is byte for byte the one that was written."""
    tensors, files = recipe["tensors"], recipe["files"]
    for what, count, changed in (
        ("tensors", len(tensors), list(changed_tensors(folder, tensors))),
        ("files", len(files), changed_files(folder, files)),
    ):
        seen = f"{count} {what} as written" if not changed else f"changed since written: {', '.join(changed[:3])}"
        result.add(f"{what} are those that were written", not changed, seen)


def _check_healing(
    result: Verification,
    folder: Path,
    recipe: Mapping[str, Any],
    original: Model | None,
    written: Model,
    data: str | None,
) -> None:
    """Learned weights have no law to follow: they are finite, in the shapes of the parent, and as near as is told."""
    healing = recipe["healing"]
    same = healing["parent_tensors"].keys() == set(written.checkpoint.names)
    finite = all(bool(written.read(name).isfinite().all()) for name in written.tensor_names)
    written.checkpoint.release()
    seen = "the parent's names, all values finite" if same and finite else "other names, or values that are not finite"
    result.add("tensors are those of a healed model", same and finite, seen)
    if original is None:
        return
    if original.digest != recipe["source"]["digest"]:
        raise PrunePeakError(f"{original.name} is not the original of this folder.")
    _check_tokenizer(result, original, written)
    if healing["data"] == SELF:
        rows = load_data(folder / HELD_OUT_FILE).held_out
    elif data is not None:
        reading = recorded_reading(healing)
        rows = choose_data(original, recipe, data, healing["tokens"], healing["seed"], reading).held_out
    else:
        log.warning(
            "What was held out is not measured again: pass the data, %s, with %s.", healing["data"], spell("data")
        )
        return
    objective = find_objective(original)
    models = (original.load(torch.float32), written.load(torch.float32))
    found = measure_distance(objective, *models, into_batches(objective, rows, CPU)).divergence
    told = healing["divergence"]["after"]
    seen = f"divergence {found:.4f} on what was held out, told {told:.4f}; other promises of compress no longer hold"
    result.add("as near to the original as told", abs(found - told) <= TOLD_BOUND * told, seen)


def _check_tokenizer(result: Verification, original: Model, written: Model) -> None:
    """`AutoTokenizer` behaves alike on both folders."""
    alike = behaves_alike(original.folder, written.folder)
    if alike is not None:
        seen = "ids, texts, special tokens, sides and chat template " + ("are equal" if alike else "differ")
        result.add("tokenizer is the original's", alike, seen)


def _check_loading(result: Verification, written: Model, execution: ExecutionConfig) -> None:
    """Stock transformers loads the folder with no key left over."""
    with phase("load by transformers"):
        device = {} if written.size <= execution.whole_size else {"device_map": {"": "meta"}}  # reports without weights
    model, info = written.model_class.from_pretrained(written.folder, dtype="auto", output_loading_info=True, **device)
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    name = f"{written.model_class.__name__} of transformers {transformers.__version__}"
    seen = f"{name}: {wrong or 'nothing missing, unexpected or mismatched'}"
    result.add("loads with the stock class", not wrong, seen)
    del model


def _check_tensors(
    result: Verification, original: Model, written: Model, conversion: Conversion, plan: Mapping[str, SitePlan]
) -> None:
    """Copied tensors equal the original's, sliced and folded ones what the plan gives."""
    differing = []
    others = set(written.tensor_names)
    for block in track(tensors_by_block(original.meta_model, original.family), "compare tensors", "block"):
        for name, tensor in prune_block(original, conversion, plan, block).items():
            others.discard(name)
            found = written.read(name)
            if not torch.equal(found, tensor.to(found.dtype)):
                differing.append(name)
        original.checkpoint.release()
        written.checkpoint.release()
    differing += [name for name in sorted(others) if bool(written.read(name).any())]  # these must be zero biases
    seen = f"differ from the plan: {', '.join(differing[:3])}" if differing else "all as the plan gives them"
    result.add("tensors are the original's, sliced and folded", not differing, seen)


def _check_outputs(
    result: Verification,
    original: Model,
    written: Model,
    sites: Sequence[Site],
    plan: Mapping[str, SitePlan],
    execution: ExecutionConfig,
) -> None:
    """The function is the ablated original's, in prefill and in cached decoding."""
    whole = original.size <= execution.whole_size or not original.family.streamable
    batches = probe_batches(original, PROBES if whole else STREAMED_PROBES)
    hooks = Hooks(sites, plan)

    def run(model: Model, dtype: torch.dtype, hooks: Hooks | None, teacher: Outputs | None = None) -> Outputs:
        if whole:
            stock = Whole(model, dtype, hooks)
            with phase("compare outputs"):
                return stock.run(batches, teacher)
        return run_streamed(model, batches, dtype, hooks, execution)

    exact = run(original, torch.float32, hooks)
    if original.dtype is torch.float32:
        _add_float32(result, exact, run(written, torch.float32, None, exact))
        return
    dtype = original.dtype
    reference = run(original, dtype, hooks, exact)
    if not reference.finite:  # float16 files of a model that overflows in float16
        dtype = torch.bfloat16
        reference = run(original, dtype, hooks, exact)
    _add_rounding(result, exact, reference, run(written, dtype, None, exact))


def _add_float32(result: Verification, exact: Outputs, written: Outputs) -> None:
    for stage, expected in exact.logits.items():
        scale = max(expected.abs().max().item(), 1e-30)  # all outputs may be zero
        difference = (written.logits[stage] - expected).abs().max().item() / scale
        seen = f"largest difference {difference:.1e} of the largest logit, bound {FLOAT32_BOUND:.0e}"
        result.add(f"same function in float32, {stage}", difference < FLOAT32_BOUND, seen)
    if exact.decoded is not None and written.decoded is not None:
        # where the two best logits are closer than the bound, either token is greedy
        best = exact.logits["cached decoding"].topk(2).values
        clear = best[..., 0] - best[..., 1] > 2 * FLOAT32_BOUND * best.abs().max()
        equal = bool((exact.decoded == written.decoded)[clear].all())
        result.add("same greedy tokens", equal, f"{int(clear.sum())} tokens compared")


def _add_rounding(result: Verification, exact: Outputs, reference: Outputs, written: Outputs) -> None:
    for stage in exact.logits:
        own_error, error = (_typical_distance(outputs, exact, stage) for outputs in (reference, written))
        seen = f"distance to the exact result {error:.2e}, the original's own {own_error:.2e}, bound x{ROUNDING_BOUND}"
        result.add(f"same function except for rounding, {stage}", error <= ROUNDING_BOUND * own_error, seen)


def _typical_distance(outputs: Outputs, exact: Outputs, stage: str) -> float:
    """Root mean square over the vocabulary, then the geometric mean over tokens.

    An arithmetic mean over tokens is dominated by the few in which rounding tips an attention sink: over several
    sets of probes it put the same checkpoint at 0.7 to 1.8 times the original's own distance; this one, at 0.92 to 1.08
    (docs/log.md).
    """
    distances = (outputs.logits[stage] - exact.logits[stage]).square().mean(-1).sqrt()
    return math.exp(distances.clamp_min(1e-30).log().mean().item())
