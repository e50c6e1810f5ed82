"""What can be cut from a model, what it would save and what it would take, before any of it is done.

`inspect` reads the config alone. `estimate` also opens the weights and times one block.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .blocks import BlockStream
from .budget import Budget, Ratio, count_parameters
from .calibration import BATCH_IMAGES, calibrate, into_batches, weigh
from .errors import PrunePeakError
from .families import FAMILIES
from .hosts import AUTO, ENGINES, choose_target
from .images import choose_images
from .machine import PROCESSOR, Machine, plan_machine
from .planning import Rules, choose
from .refit import ELIMINATION
from .selection import AUTO as FILL_AUTO
from .selection import DEVIATION, width_step
from .sites import HEAD, KINDS, Site, find_blocks, find_sites
from .source import Blueprint, Source, count_patches, open_blueprint, open_source
from .stats_file import Statistics, load_statistics
from .texts import (
    PASSAGES,
    SAMPLES,
    SELF,
    SEQUENCE_LENGTH,
    held_out_count,
    sample_own_text,
)

RATIO = 0.3  # what `inspect` reckons with where none is given

# What `estimate` adds to what it times
START_SECONDS = 10.0  # imports, digests, loading
VERIFIED_TOKENS = 5000  # verification, as tokens of a forward
SHORT_SAMPLE, LONGER_SAMPLE = 4, 20  # tokens


@dataclass(frozen=True)
class Cuttable:
    """The sites of one kind, and what a ratio leaves of each."""

    kind: str
    neurons: int  # at every site
    step: int  # neurons by which it gets narrower
    kept: int  # neurons; all of them where the kind is not cut
    written_as: str  # the class, where this kind alone is cut
    constants: str  # where they go then
    in_place: bool  # can only be zeroed, or shall be: nothing is saved


@dataclass(frozen=True)
class Inspection:
    """A model, what can be cut from it, and what a ratio would give."""

    model: str
    model_type: str
    model_class: str
    dtype: str
    blocks: int
    sites: tuple[Cuttable, ...]
    whole: Mapping[str, str]  # kinds of site that cannot be deleted, and why
    parameters: int
    bytes: int
    asked: str  # the ratio or target
    parameters_after: int
    bytes_after: int
    share: float  # of the parameters that would leave
    written_as: str
    why: str  # what the better hosts lack; empty where there is none better
    engines: tuple[str, ...]  # serving engines that read the written class

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(
    model: str,
    ratio: Ratio | None = None,
    *,
    target_params: float | None = None,
    target_bytes: int | None = None,
    sites: Sequence[str] | None = None,
    unit: str = HEAD,
    keep_shape: bool = False,
    multiple_of: int | None = None,
    host: str = AUTO,
    revision: str | None = None,
) -> Inspection:
    """Say what `compress` would do to a model, from its config; the ratio is 0.3 where nothing else is asked for.

    Where a target can be split over two kinds of site in several ways, the one that cuts them most evenly is reckoned
    with; `compress` measures which is best.

    Raises:
        PrunePeakError: the model type is not known, or the ratio does nothing.

    Example:
        >>> inspection = inspect("examples/llama-mini", 0.5)
        >>> [(site.kind, site.neurons, site.kept) for site in inspection.sites]
        [('mlp', 384, 192), ('attention', 128, 128)]
    """
    if target_params is None and target_bytes is None and ratio is None:
        ratio = RATIO
    budget = Budget(ratio, target_params, target_bytes, keep_shape)
    return _inspect(open_blueprint(model, revision), budget, sites, unit, multiple_of, host)


def _inspect(
    blueprint: Blueprint, budget: Budget, kinds: Sequence[str] | None, unit: str, multiple_of: int | None, host: str
) -> Inspection:
    dtype = blueprint.dtype
    cut = find_sites(blueprint.blank, blueprint.family, budget.kinds(kinds), unit, budget.keep_shape)
    first = {site.kind: site for site in cut}
    splits = budget.splits(blueprint, cut, multiple_of, host)
    kept = min(splits, key=lambda widths: max(1 - width / first[kind].neurons for kind, width in widths.items()))
    target = choose_target(blueprint, [site for site in cut if site.kind in kept], kept, dtype, host)
    before, after = count_parameters(blueprint.blank), count_parameters(target.blank)
    cuttable: list[Cuttable] = []
    whole: dict[str, str] = {}
    for kind in KINDS:
        for in_place in (True,) if budget.keep_shape else (False, True):
            try:
                cuttable.append(_inspect_kind(blueprint, kind, kept.get(kind), unit, in_place, multiple_of, host))
                break
            except PrunePeakError as reason:
                whole.setdefault(kind, str(reason))
    return Inspection(
        model=blueprint.name,
        model_type=blueprint.family.model_type,
        model_class=blueprint.model_class.__name__,
        dtype=str(dtype).removeprefix("torch."),
        blocks=len(find_blocks(blueprint.blank, blueprint.family)),
        sites=tuple(cuttable),
        whole=whole,
        parameters=before,
        bytes=before * dtype.itemsize,
        asked=budget.label,
        parameters_after=after,
        bytes_after=after * dtype.itemsize,
        share=1 - after / before,
        written_as=target.model_class.__name__,
        why=target.why,
        engines=ENGINES.get(target.config.model_type, ()),
    )


def _inspect_kind(
    blueprint: Blueprint, kind: str, kept: int | None, unit: str, in_place: bool, multiple_of: int | None, host: str
) -> Cuttable:
    """What becomes of a kind of site when it alone is cut, by one step where nothing is asked for.

    Raises:
        PrunePeakError: it cannot be cut.
    """
    sites = find_sites(blueprint.blank, blueprint.family, [kind], unit, in_place)
    site, step = sites[0], width_step(sites[0], multiple_of)
    if site.neurons <= step:
        raise PrunePeakError(f"{step} of {site.neurons} {kind} neurons leave together, and then none is left.")
    widths = {kind: kept or site.neurons - step}
    target = choose_target(blueprint, sites, widths, blueprint.dtype, host)
    constants = "nowhere: no bias takes them, so they are zero"
    if not target.zero_filled:
        there = find_sites(target.blank, FAMILIES[target.config.model_type], [kind], unit, in_place)[0]
        assert there.constants is not None
        module = there.constants.split(f".{there.block}.", 1)[1].removesuffix(".bias")
        constants = f"to the bias of {module}" + (f", opened by {there.bias_key}" if there.bias_key else "")
    name = target.model_class.__name__
    return Cuttable(kind, site.neurons, step, kept or site.neurons, name, constants, in_place)


@dataclass(frozen=True)
class Cost:
    """What a `compress` would take on this machine."""

    minutes: float
    memory: int  # bytes resident at most
    disk: int  # bytes written

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    model: str,
    ratio: Ratio | None = None,
    *,
    target_params: float | None = None,
    target_bytes: int | None = None,
    sites: Sequence[str] | None = None,
    unit: str = HEAD,
    keep_shape: bool = False,
    fill: str = "peak",
    refit: bool = True,
    multiple_of: int | None = None,
    host: str = AUTO,
    revision: str | None = None,
    calibration: str = SELF,
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    dtype: str | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    device: str = PROCESSOR,
    stats: str | Path | None = None,
) -> tuple[Inspection, Cost]:
    """Inspect a model and time one block of it, to say what `compress` would take.

    With statistics from a file, that is deciding what stays of the block, and calibrating it otherwise.

    Raises:
        PrunePeakError: what `compress` would refuse of the model, or of the memory.
    """
    source = open_source(model, revision)
    budget = Budget(ratio, target_params, target_bytes, keep_shape)
    inspection = _inspect(source, budget, sites, unit, multiple_of, host)
    kinds = [site.kind for site in inspection.sites if site.kept < site.neurons]
    cut = find_sites(source.blank, source.family, kinds, unit, keep_shape)
    rules = Rules(fill, ELIMINATION if refit else DEVIATION, refit, seed)
    statistics = None
    if stats is not None:
        statistics = load_statistics(Path(stats), source, cut)
        statistics.check(cut, refit, fill == FILL_AUTO)
        samples = statistics.options["samples"]
        load = statistics.weigh(source, cut, rules.needs_evidence)
    else:
        load = weigh(source, cut, calibration, samples, sequence_length, dtype, seed, rules.needs_evidence)
    machine = plan_machine(source, load, max_memory, device)
    if source.sees_images:
        held, embedding = 0, 0
        images = choose_images(calibration, source, BATCH_IMAGES, seed) if statistics is None else statistics.windows
        windows = images.calibration[:BATCH_IMAGES]
        length = count_patches(source)
    else:
        held, length = held_out_count(samples), load.length
        embedding = source.blank.get_input_embeddings().weight.numel()
        windows = torch.randint(source.config.vocab_size, (2 * max(1, machine.batch_tokens // length), length))
    block = find_blocks(source.blank, source.family)[0]
    # Seconds that a token takes in a block, with and without statistics, and in the head
    for_refit = rules.needs_evidence and statistics is None
    observed, bare = _time_block(source, cut, windows, length, load.dtype, for_refit, machine)
    head = bare * embedding / sum(parameter.numel() for parameter in block.parameters())
    forward = bare * inspection.blocks + head
    seconds = START_SECONDS
    if statistics is None:
        seconds += observed * inspection.blocks * samples * length
    else:
        seconds += _time_deciding(source, inspection, statistics, cut, rules) * inspection.blocks
    seconds += forward * (held * length * (2 - inspection.share) + VERIFIED_TOKENS)
    if load.samples_text:
        seconds += _time_sampling(source, seed) * (samples + held) * length
    return inspection, Cost(round(seconds / 60, 2), machine.needed, inspection.bytes_after)


def _time_block(
    source: Source,
    sites: Sequence[Site],
    windows: Tensor,
    length: int,
    dtype: torch.dtype,
    refit: bool,
    machine: Machine,
) -> tuple[float, float]:
    """Seconds a token takes in the first block: with its statistics taken, and without."""
    batches = into_batches(windows, machine.batch_tokens)
    sites = [site for site in sites if site.block == 0]
    began = time.perf_counter()
    for _ in calibrate(source, sites, batches, dtype, refit, machine):
        pass
    observed = time.perf_counter() - began
    steps = BlockStream(source, batches, dtype, machine).steps()  # named, for its weights leave with it
    step = next(steps)
    began = time.perf_counter()
    for _ in step.run():
        pass
    bare = time.perf_counter() - began
    tokens = len(windows) * length
    return max(observed, bare) / tokens, bare / tokens


def _time_deciding(
    source: Source, inspection: Inspection, statistics: Statistics, sites: Sequence[Site], rules: Rules
) -> float:
    """Seconds that it takes to decide what stays of the first block."""
    kept = {site.kind: site.kept for site in inspection.sites if site.kept < site.neurons}
    began = time.perf_counter()
    for site in sites:
        if site.block == 0 and site.kind in kept:
            choose(source, statistics.observed(site), kept[site.kind], rules)
    return time.perf_counter() - began


def _time_sampling(source: Source, seed: int) -> float:
    """Seconds a token of own text takes: the difference between a short and a longer sample."""
    seconds = []
    for length in (SHORT_SAMPLE, LONGER_SAMPLE):
        began = time.perf_counter()
        sample_own_text(source, PASSAGES, length, seed)
        seconds.append(time.perf_counter() - began)
    return max(0.0, seconds[1] - seconds[0]) / (LONGER_SAMPLE - SHORT_SAMPLE) / PASSAGES
