"""`verify`: whether a written folder is what it claims to be.

It is the law. The folder must hold the very tensors that were written, load with the stock class with nothing missing,
unexpected or mismatched, and compute what the original computes with the cut neurons held at their fills
(`ablation.py`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from .ablation import ablated
from .arithmetic import fast_products
from .blocks import Batch, BlockStream
from .checkpoint import Checkpoint, digest_tensor, load_tensors
from .errors import PrunePeakError
from .export import PLAN_FILE, RECIPE_FILE, tell_block
from .hosts import Target, choose_target
from .machine import CPU, Machine
from .selection import Choice, unpack_plan
from .sites import KINDS, UNITS, Site, find_sites, tensors_by_block
from .source import IMAGES, Source, open_source
from .strangers import check_folder, read_json

FLOAT32_BOUND = 2e-5  # largest difference, as a share of the logits' largest magnitude
ROUNDING_BOUND = 1.2  # in a narrow type: distance to the exact result over the source's own distance
PROBES, STREAMED_PROBES = 8, 4  # windows of random tokens to compare on; fewer where memory is what counts
DECODED = 24  # tokens generated in cached decoding


@dataclass
class Verification:
    """What was checked, in order; each check has a name, whether it holds, and what was seen."""

    checks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check["passed"] for check in self.checks)

    def note(self, name: str, passed: bool, seen: str) -> None:
        self.checks.append({"check": name, "passed": passed, "seen": seen})


def verify(
    folder: Path,
    original: Source | None = None,
    machine: Machine = Machine(),  # noqa: B008 - frozen
) -> Verification:
    """Check a folder that `compress` wrote, against its own recipe and, where given, against the original.

    Raises:
        PrunePeakError: the folder is not one that prune-peak wrote.
    """
    recipe = read_recipe(folder)
    result = Verification()
    _check_digests(result, folder, recipe)
    if result.passed:
        _check_loading(result, folder)
    if result.passed and original is not None:
        plan: Mapping[str, Choice] = read_plan(folder)
        options = recipe["options"]
        sites = find_sites(original.blank, original.family, options["sites"], options["unit"], options["keep_shape"])
        _check_plan(sites, plan, recipe["kept"], original)
        written = open_source(str(folder))
        target = choose_target(original, sites, recipe["kept"], original.dtype, written.config.model_type)
        if options["refit"]:
            plan = RefittedPlan(plan, target, written, options)
        _check_tensors(result, folder, target, plan)
        _check_outputs(result, folder, original, sites, plan, machine)
    return result


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a folder that prune-peak wrote."""
    try:
        check_folder(folder)
        recipe = dict(read_json(folder / RECIPE_FILE))
        options = recipe["options"]
        flags = (options["refit"], options.setdefault("keep_shape", False))  # the second is newer than some folders
        well_formed = isinstance(recipe["tensors"], dict) and all(isinstance(flag, bool) for flag in flags)
        sites = options["sites"]
        if not well_formed or not isinstance(sites, list) or not sites or not set(sites) <= set(KINDS):
            raise TypeError("tensors, options.refit, options.keep_shape, options.sites")
        if options["unit"] not in UNITS or set(recipe["kept"]) != set(sites):
            raise TypeError("options.unit, kept")
        if not all(type(kept) is int and kept > 0 for kept in recipe["kept"].values()):
            raise TypeError("kept")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PrunePeakError(f"{folder} is not a folder that prune-peak wrote: no readable {RECIPE_FILE}.") from None
    return recipe


def read_plan(folder: Path) -> dict[str, Choice]:
    """The plan of a written folder: a `Choice` for every site, by the site's name."""
    tensors, _ = load_tensors(folder / PLAN_FILE)
    try:
        return unpack_plan(tensors)
    except ValueError as error:
        raise PrunePeakError(f"{folder / PLAN_FILE} is not a plan: {error}.") from None


class RefittedPlan(Mapping[str, Choice]):
    """The plan with the refitted readers, which only the written folder knows, read one by one as they are asked for.

    A bias that takes the constants of two sites counts whole for the site that it belongs to.
    """

    def __init__(self, plan: Mapping[str, Choice], target: Target, written: Source, options: Mapping[str, Any]) -> None:
        assert isinstance(target.source, Source)
        theirs = find_sites(written.blank, written.family, options["sites"], options["unit"], options["keep_shape"])
        self._plan, self._written, self._original = plan, written, target.source
        self._pairs = {site.name: (site, read) for site, read in zip(target.sites, theirs, strict=True)}
        self._own = {site.bias for site in target.sites}

    def __getitem__(self, name: str) -> Choice:
        site, read = self._pairs[name]
        choice, weight = self._plan[name], read.as_matrix(self._written.read(read.weight)).float()
        if site.in_place:
            weight = weight[:, choice.keep]
        bias = torch.zeros(site.hidden)
        if site.constants == site.bias or (site.constants is not None and site.constants not in self._own):
            assert read.constants is not None
            bias = self._written.read(read.constants).float()
            if site.constants != site.bias and site.constants in self._original.names:
                bias = bias - self._original.read(site.constants).float()
        self._written.checkpoint.release()
        return replace(choice, weight=weight, bias=bias)

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan)

    def __len__(self) -> int:
        return len(self._plan)


def _check_plan(sites: Sequence[Site], plan: Mapping[str, Choice], kept: Mapping[str, int], original: Source) -> None:
    for site in sites:
        choice = plan.get(site.name)
        if choice is None or not _fits(choice, site, kept[site.kind]):
            raise PrunePeakError(f"{original.name} is not the original of this folder: its {site.name} does not fit.")


def _fits(choice: Choice, site: Site, kept: int) -> bool:
    keep, fill, narrowing = choice.keep, choice.fill, choice.narrowing
    if fill.shape != (site.neurons,) or fill.dtype is not torch.float32 or not bool(fill.isfinite().all()):
        return False
    if keep.dtype is not torch.int64 or keep.shape != (kept,) or not 0 <= keep[0] <= keep[-1] < site.neurons:
        return False
    if not bool((keep.diff() > 0).all()):
        return False
    if narrowing is None or not site.narrowed:
        return narrowing is None and not site.narrowed
    shape = (site.groups, kept // site.groups, site.neurons // site.groups)
    return narrowing.query.shape == narrowing.key.shape == shape


def _check_digests(result: Verification, folder: Path, recipe: Mapping[str, Any]) -> None:
    """Every tensor is, byte for byte, the one that was written."""
    checkpoint = Checkpoint(folder)
    expected = recipe["tensors"]
    changed = sorted(expected.keys() ^ set(checkpoint.names))
    for name in tqdm(sorted(expected.keys() & set(checkpoint.names)), desc="verify bytes", unit="tensor"):
        if digest_tensor(checkpoint.read(name)) != expected[name]:
            changed.append(name)
        checkpoint.release()
    seen = f"{len(expected)} tensors as written" if not changed else f"changed since written: {', '.join(changed[:3])}"
    result.note("tensors are those that were written", not changed, seen)


def _check_loading(result: Verification, folder: Path) -> None:
    """Stock transformers opens the folder with nothing left over."""
    source = open_source(str(folder))
    model, info = source.model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    name = f"{source.model_class.__name__} of transformers {transformers.__version__}"
    result.note(
        "loads with the stock class",
        not wrong,
        f"{name}: nothing missing, unexpected or mismatched" if not wrong else f"{name}: {wrong}",
    )
    del model


def _check_tensors(result: Verification, folder: Path, target: Target, plan: Mapping[str, Choice]) -> None:
    """What was copied is the original's; what was cut or folded is what the plan makes of it."""
    original, written = target.source, open_source(str(folder))
    assert isinstance(original, Source)
    differing = []
    unsaid = set(written.names)
    for block in tensors_by_block(original.blank, original.family):
        for name, tensor in tell_block(target, plan, block).items():
            unsaid.discard(name)
            if not torch.equal(written.read(name), tensor.to(written.read(name).dtype)):
                differing.append(name)
        original.checkpoint.release()
        written.checkpoint.release()
    differing += [name for name in sorted(unsaid) if bool(written.read(name).any())]
    seen = "all as the plan makes them" if not differing else f"not what the plan makes: {', '.join(differing[:3])}"
    result.note("tensors are the original's, cut and folded", not differing, seen)


def _check_outputs(
    result: Verification,
    folder: Path,
    original: Source,
    sites: Sequence[Site],
    plan: Mapping[str, Choice],
    machine: Machine,
) -> None:
    """The function is the ablated original's, in prefill and in cached decoding."""
    whole = original.size <= machine.whole_size
    batches = probe_batches(original, PROBES if whole else STREAMED_PROBES)
    hooks = Hooks(sites, plan)
    written = open_source(str(folder))

    def run(source: Source, dtype: torch.dtype, hooks: Hooks | None, teacher: Outputs | None = None) -> Outputs:
        if whole:
            return Whole(source, dtype, hooks).run(batches, teacher)
        return _stream(source, batches, dtype, hooks, machine)

    exact = run(original, torch.float32, hooks)
    if original.dtype is torch.float32:
        _note_float32(result, exact, run(written, torch.float32, None, exact))
        return
    dtype = original.dtype
    theirs = run(original, dtype, hooks, exact)
    if not theirs.finite:  # float16 files of a model that overflows in float16
        dtype = torch.bfloat16
        theirs = run(original, dtype, hooks, exact)
    _note_rounding(result, exact, theirs, run(written, dtype, None, exact))


@dataclass(frozen=True)
class Hooks:
    """The ablation to run the original under."""

    sites: Sequence[Site]
    plan: Mapping[str, Choice]

    def on(self, model: PreTrainedModel, block: int | None = None) -> AbstractContextManager[None]:
        """The hooks of one block, or of all."""
        return ablated(model, [site for site in self.sites if block in (None, site.block)], self.plan)


@dataclass
class Outputs:
    """Logits of the real (not padded) tokens, by stage, and the tokens that were decoded."""

    logits: dict[str, Tensor]
    decoded: Tensor | None = None

    @property
    def finite(self) -> bool:
        return all(bool(logits.isfinite().all()) for logits in self.logits.values())


def probe_batches(source: Source, probes: int) -> list[Batch]:
    """What to compare outputs on: noise for images; or random tokens, in full windows and left-padded ones."""
    generator, config = torch.Generator().manual_seed(0), source.config
    if source.sees_images:
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return [{IMAGES: torch.randn(probes, config.num_channels, height, width, generator=generator)}]
    longest = source.positions or 128
    length = max(2, min(96, longest - DECODED))
    full = torch.randint(config.vocab_size, (probes, length), generator=generator)
    padded = torch.randint(config.vocab_size, (probes, length // 2), generator=generator)
    mask = (torch.arange(length // 2) >= torch.arange(probes)[:, None] * length // (4 * probes)).long()
    return [{"input_ids": full}, {"input_ids": padded, "attention_mask": mask}]


class Whole:
    """A model held whole, by stock transformers, under its hooks."""

    def __init__(self, source: Source, dtype: torch.dtype, hooks: Hooks | None = None) -> None:
        self.model = source.model_class.from_pretrained(source.folder, dtype=dtype).eval()
        self.hooks = hooks

    @torch.inference_mode()
    def run(self, batches: Sequence[Batch], teacher: Outputs | None = None) -> Outputs:
        """Prefill of every batch; then greedy decoding with a cache after the first, along the teacher's tokens."""
        with fast_products(), self.hooks.on(self.model) if self.hooks else nullcontext():
            logits = _tell_prefills(batches, [self.model(**batch) for batch in batches])
            if not self.model.can_generate():
                return Outputs(logits)
            cache = DynamicCache(config=self.model.config)
            output = self.model(batches[0]["input_ids"], past_key_values=cache, use_cache=True)
            steps, tokens = [], []
            for step in range(DECODED):
                steps.append(output.logits[:, -1].float())
                tokens.append(steps[-1].argmax(-1))
                fed = tokens[-1] if teacher is None or teacher.decoded is None else teacher.decoded[:, step]
                output = self.model(fed[:, None], past_key_values=cache, use_cache=True)
            logits["cached decoding"] = torch.stack(steps, dim=1)
            return Outputs(logits, torch.stack(tokens, dim=1))


def _stream(
    source: Source, batches: Sequence[Batch], dtype: torch.dtype, hooks: Hooks | None, machine: Machine
) -> Outputs:
    stream = BlockStream(source, batches, dtype, replace(machine, spills=False, device=CPU))  # few tokens, and exact
    for step in tqdm(stream.steps(), total=stream.blocks, desc="verify", unit="block"):
        with hooks.on(stream.model, step.index) if hooks else nullcontext():
            for _ in step.run():
                pass
    with hooks.on(stream.model, stream.blocks) if hooks else nullcontext():
        outputs = list(stream.outputs())
    return Outputs(_tell_prefills(batches, outputs))


def _tell_prefills(batches: Sequence[Batch], outputs: Sequence[Any]) -> dict[str, Tensor]:
    """What a model answers to every batch; also what it pools, where that comes after what it answers first."""
    told = {}
    for number, (batch, output) in enumerate(zip(batches, outputs, strict=True)):
        told[f"prefill {number}"] = _real(batch, output)
        if getattr(output, "pooler_output", None) is not None:
            told[f"pooled {number}"] = output.pooler_output.float()
    return told


def _real(batch: Batch, output: Any) -> Tensor:
    logits: Tensor = (output.logits if hasattr(output, "logits") else output[0]).float()
    mask = batch.get("attention_mask")
    per_token = logits.dim() == 3  # a classifier answers once a window
    return logits[mask.bool()] if mask is not None and per_token else logits


def _note_float32(result: Verification, exact: Outputs, ours: Outputs) -> None:
    for stage, expected in exact.logits.items():
        scale = max(expected.abs().max().item(), 1e-30)  # a model may answer nothing but zeros
        difference = (ours.logits[stage] - expected).abs().max().item() / scale
        seen = f"largest difference {difference:.1e} of the largest logit, bound {FLOAT32_BOUND:.0e}"
        result.note(f"same function in float32, {stage}", difference < FLOAT32_BOUND, seen)
    if exact.decoded is not None and ours.decoded is not None:
        # where the two best logits are closer than the bound, either token is the greedy one
        best = exact.logits["cached decoding"].topk(2).values
        clear = best[..., 0] - best[..., 1] > 2 * FLOAT32_BOUND * best.abs().max()
        equal = bool((exact.decoded == ours.decoded)[clear].all())
        result.note("same greedy tokens", equal, f"{int(clear.sum())} tokens compared")


def _note_rounding(result: Verification, exact: Outputs, theirs: Outputs, ours: Outputs) -> None:
    for stage in exact.logits:
        own_error, error = (_typical_distance(outputs, exact, stage) for outputs in (theirs, ours))
        seen = f"distance to the exact result {error:.2e}, the original's own {own_error:.2e}, bound x{ROUNDING_BOUND}"
        result.note(f"same function but for rounding, {stage}", error <= ROUNDING_BOUND * own_error, seen)


def _typical_distance(outputs: Outputs, exact: Outputs, stage: str) -> float:
    """Root mean square over the vocabulary, then the geometric mean over tokens.

    A mean over tokens would be that of the few in which rounding happens to tip an attention sink: over several sets
    of probes it put one and the same checkpoint at 0.7 to 1.8 times the original's own distance; this one, at 0.92 to
    1.08 (docs/log.md).
    """
    distances = (outputs.logits[stage] - exact.logits[stage]).square().mean(-1).sqrt()
    return math.exp(distances.clamp_min(1e-30).log().mean().item())
