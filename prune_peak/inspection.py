"""`inspect()` and `estimate()`: what can be pruned, what it saves, and what it takes, before any of it is done.

`inspect` reads the config only. `estimate` (--dry-run) also opens the weights and times one block.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .conversion.choice import choose_conversion
from .conversion.classes import ENGINES
from .data.chat import find_template
from .data.self_generated import generate_tokens
from .data.texts import load_tokenizer
from .data.windows import held_out_count, into_batches, own_samples
from .errors import PrunePeakError
from .export.recipe import describe_shares, describe_steps, measure_shares
from .job import Job, convert, plan_widths, prepare
from .models.families import block_paths, find_blocks
from .models.loading import Model, ModelSpec, count_patches, open_model, open_model_spec
from .models.stacks import choose_stacks
from .models.whole import open_stream
from .option_fields import takes
from .options import Budget, CompressOptions, InspectOptions, Ratio
from .pruning.block_choice import SCORED_TOKENS
from .pruning.budget import Widths, count_parameters, match_width
from .pruning.site_pruning import plan_site
from .sites.blocks import CHOICE_TOKENS, Blocks, BlocksSite, removed_blocks
from .sites.finding import find_left_whole, find_sites, labels
from .sites.site import Site
from .stats.collection import collect

# What `estimate` adds to what it times
START_SECONDS = 10.0  # imports, digests, loading
VERIFIED_TOKENS = 5000  # verification, as tokens of a forward pass
TALK_TOKENS = 15_000  # answers of two models to 16 prompts, likewise
SHORT_SAMPLE, LONGER_SAMPLE = 4, 20  # tokens


@dataclass(frozen=True)
class PrunableSites:
    """The sites of one kind, and what a budget leaves of each."""

    kind: str
    blocks: int  # that have one
    neurons: int  # at every site
    step: int  # neurons by which it becomes narrower
    kept: int  # neurons; all of them where the kind is not pruned
    written_as: str  # the class, where this kind alone is pruned
    folded_into: str  # the bias that takes the constants then
    in_place: bool  # weights can only be set to zero, which saves nothing


@dataclass(frozen=True)
class Inspection:
    """A model, what can be pruned from it, and what a budget would give."""

    model: str
    model_type: str
    model_class: str
    dtype: str
    blocks: int
    stacks: Mapping[str, int]  # the blocks of each list of blocks that is pruned, by its name
    sites: tuple[PrunableSites, ...]
    lacking: Mapping[str, str]  # weights, tokenizer: what a local folder lacks for `compress`
    unprunable: Mapping[str, str]  # kinds of site that cannot be made smaller, and parts left whole, with the reason
    parameters: int
    bytes: int
    budget: str  # the ratio or target
    parameters_after: int
    bytes_after: int
    share: float  # of the parameters that would be deleted
    pruned: str  # the shares of the neurons in words, with what was asked for
    written_as: str
    reason: str  # what the preferred classes lack; empty where the first one is written
    engines: tuple[str, ...]  # serving engines that have run the written class, with versions

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@takes(InspectOptions)
def inspect(model: str, ratio: Ratio | None = None, **options: Any) -> Inspection:
    """Describe what `compress` would do to a model, from its config; at a ratio of 0.3 by default.

    Of whole blocks only if they are asked for.

    For a size target over several kinds of site, the allocation that prunes them most evenly is shown; `compress`
    measures which one is best.

    Args:
        model: a folder or a Hub id.
        {options}

    Raises:
        PrunePeakError: the model type is not supported, or nothing would be pruned.

    Example:
        >>> inspection = inspect("examples/llama-mini", 0.5)
        >>> [(site.kind, site.neurons, site.kept) for site in inspection.sites]
        [('mlp', 384, 192), ('attention', 128, 128)]
    """
    given = InspectOptions(ratio=ratio, **options)
    spec = choose_stacks(open_model_spec(model, given.revision), given.stack)
    return _inspect(spec, given, given.output_class)


def _inspect(spec: ModelSpec, budget: Budget, output_class: str) -> Inspection:
    sites, allocations = plan_widths(spec, budget, output_class)
    named = {site.name: site for site in sites}

    def most_pruned(widths: Widths) -> float:
        return max(1 - width / site.neurons for site, width in ((named[name], width) for name, width in widths.items()))

    widths = min(allocations, key=most_pruned)
    conversion = convert(spec, sites, widths, output_class)
    before, after = count_parameters(spec.meta_model), count_parameters(conversion.meta_model)
    shares = measure_shares([site for site in sites if site.name in widths], widths)
    prunable: list[PrunableSites] = []
    unprunable: dict[str, str] = {}
    kept = {site.label: _count_kept(site, widths) for site in reversed(sites) if site.name in widths}
    for kind in (each for each in labels(spec.family) if each != Blocks.label or each in budget.kinds):
        for in_place in (True,) if budget.keep_shape else (False, True):
            try:
                prunable.append(_inspect_kind(spec, budget, output_class, kind, kept.get(kind), in_place))
                break
            except PrunePeakError as reason:
                unprunable.setdefault(kind, str(reason))
    whole = find_left_whole(spec.meta_model, spec.family) | dict(spec.family.left_whole)
    unprunable |= {f"left whole: {part}": reason for part, reason in whole.items()}
    return Inspection(
        model=spec.name,
        model_type=spec.family.model_type,
        model_class=spec.model_class.__name__,
        dtype=str(spec.dtype).removeprefix("torch."),
        blocks=len(block_paths(spec.meta_model, spec.family)),
        stacks={name: len(find_blocks(spec.meta_model, each)) for name, each in spec.family.named_stacks.items()},
        sites=tuple(prunable),
        lacking=dict(_find_lacking(spec)),
        unprunable=unprunable,
        parameters=before,
        bytes=before * spec.dtype.itemsize,
        budget=budget.label,
        parameters_after=after,
        bytes_after=after * spec.dtype.itemsize,
        share=1 - after / before,
        pruned=describe_shares(budget.ratio, shares, describe_steps(sites, budget.multiple_of)),
        written_as=conversion.model_class.__name__,
        reason=conversion.reason,
        engines=ENGINES.get(conversion.config.model_type, ()),
    )


def _find_lacking(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """What is missing or damaged of a local folder; of a model of the Hub, only the config is fetched."""
    checks: list[tuple[str, Callable[[], object]]] = []
    if spec.revision is None and not isinstance(spec, Model):
        checks.append(("weights", lambda: open_model(spec.name)))
    if spec.revision is None and not spec.sees_images:
        checks.append(("tokenizer", lambda: load_tokenizer(spec)))
    for part, check in checks:
        try:
            check()
        except PrunePeakError as error:
            yield part, str(error)


def _inspect_kind(
    spec: ModelSpec, budget: Budget, output_class: str, kind: str, kept: int | None, in_place: bool
) -> PrunableSites:
    """What becomes of a kind of site when it alone is pruned; by one step where nothing is asked for.

    Raises:
        PrunePeakError: it cannot be pruned.
    """
    sites = find_sites(spec.meta_model, spec.family, [kind], budget.unit, in_place)
    if isinstance(sites[0], BlocksSite):
        return _inspect_blocks(spec, output_class, sites, kept)
    site, step = sites[0], sites[0].kind.step(sites[0], budget.multiple_of)
    if site.neurons <= step:
        raise PrunePeakError(
            f"the {kind} has {site.neurons} neurons and loses {step} at a time, so none would be left."
        )
    width = kept or site.neurons - step
    widths = {one.name: match_width(one, site, width, budget.multiple_of) for one in sites}
    conversion = choose_conversion(spec, sites, widths, spec.dtype, output_class)
    folded_into = "nowhere: no bias takes them, so they are zero"
    if not site.kind.holds_constants:
        folded_into = "nowhere: the router chooses among the experts that are left"
    elif not conversion.zero_filled:
        folded_into = _name_bias(find_sites(conversion.meta_model, conversion.family, [kind], budget.unit, in_place)[0])
    written_as = conversion.model_class.__name__
    blocks = len({one.block for one in sites if one.block < len(block_paths(spec.meta_model, spec.family))})
    kept = kept or site.neurons
    return PrunableSites(kind, blocks, site.neurons, step, kept, written_as, folded_into, in_place)


def _inspect_blocks(spec: ModelSpec, output_class: str, sites: Sequence[Site], kept: int | None) -> PrunableSites:
    """What becomes of the blocks."""
    able = [site for site in sites if removed_blocks([site])]
    if not able:
        raise PrunePeakError(f"no block can leave: the first one stays, and {len(sites)} have an MLP.")
    blocks = len(find_blocks(spec.meta_model, spec.family))
    leaving = able[-(blocks - kept) if kept else -1 :]
    widths = {site.name: site.always_kept for site in leaving}
    conversion = choose_conversion(spec, leaving, widths, spec.dtype, output_class)
    folded_into = "nowhere: no bias takes them, so they are zero"
    if not conversion.zero_filled:
        folded_into = _name_bias(find_sites(conversion.meta_model, conversion.family, [Blocks.label])[0])
    written_as = conversion.model_class.__name__
    return PrunableSites(Blocks.label, blocks, blocks, 1, kept or blocks, written_as, folded_into, False)


def _name_bias(written: Site) -> str:
    """Where constants go, from a site of the written class."""
    assert written.folded_into is not None
    module = written.folded_into.split(f".{written.block}.", 1)[1].removesuffix("bias").rstrip("._")
    return f"to the bias of {module}" + (f", opened by {written.bias_key}" if written.bias_key else "")


def _count_kept(site: Site, widths: Widths) -> int:
    """The neurons that stay at a site, or the blocks of the model."""
    return site.blocks - len(widths) if isinstance(site, BlocksSite) else widths[site.name]


@dataclass(frozen=True)
class Cost:
    """What a `compress` would take on this machine."""

    minutes: float
    memory: int  # bytes resident at most
    disk: int  # bytes written

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@takes(CompressOptions)
def estimate(model: str, ratio: Ratio | None = None, **options: Any) -> tuple[Inspection, Cost]:
    """Inspect a model and time one block of it, to say what `compress` would take.

    Args:
        model: a folder or a Hub id.
        {options}

    Raises:
        PrunePeakError: options, a model, statistics or a memory budget that `compress` would refuse. The output folder
            and the calibration data are not checked.
    """
    job = prepare(model, CompressOptions(ratio=ratio, **options))
    inspection = _inspect(job.source, job.options, job.options.output_class)
    pruning, forward = _time_block(job)
    head = forward * _head_share(job.source)
    leaving = len(job.allocations[0]) if Blocks.label in job.options.kinds else 0
    # of blocks, each run that leaves is measured once; to choose, every block is left out for a few tokens
    seconds = START_SECONDS + pruning * (leaving or inspection.blocks)
    if leaving:
        seconds += forward * inspection.blocks * (job.workload.tokens + CHOICE_TOKENS)
        seconds += (forward * inspection.blocks / 2 + head) * SCORED_TOKENS * inspection.blocks
    seconds += (forward * inspection.blocks + head) * (
        _evaluated_tokens(job) * (2 - inspection.share) + VERIFIED_TOKENS + TALK_TOKENS * _talks(job)
    )
    if job.workload.samples_text:
        seconds += _time_sampling(job) * job.workload.length * own_samples(job.options.samples, job.options.calibration)
    return inspection, Cost(round(seconds / 60, 2), job.execution.needed, inspection.bytes_after)


def _talks(job: Job) -> bool:
    return job.execution.talks and find_template(job.source) is not None


def _head_share(source: Model) -> float:
    """The time of the head, in blocks, by the parameters of both; images have classes only."""
    if source.sees_images:
        return 0.0
    block = find_blocks(source.meta_model, source.family)[0]
    embedding: int = source.meta_model.get_input_embeddings().weight.numel()
    return embedding / sum(parameter.numel() for parameter in block.parameters())


def _evaluated_tokens(job: Job) -> int:
    """Tokens (or patches) of the evaluation set."""
    if job.eval_set is not None:
        windows = sum(len(targets) for targets in job.eval_set.targets)
    else:
        windows = 0 if job.source.sees_images else held_out_count(job.options.samples)
    return windows * (count_patches(job.source) if job.source.sees_images else job.workload.length)


def _time_block(job: Job) -> tuple[float, float]:
    """Seconds to measure and plan one block, and seconds of its forward pass per token."""
    source, execution, workload = job.source, job.execution, job.workload
    calibration = job.calibrate() if job.statistics or source.sees_images else None
    if calibration is not None:
        windows = calibration.windows.calibration
    else:
        count = 2 * max(1, execution.batch_tokens // workload.length)
        shape = (count, 2, workload.length) if source.reads_pairs else (count, workload.length)
        windows = torch.randint(source.vocabulary, shape)
    batches = into_batches(windows, execution.batch_tokens)[:2]
    stream = open_stream(source, batches, workload.dtype, execution)
    steps = stream.steps()  # named, because its weights leave memory with it
    step = next(steps)
    tokens = sum(step.rows(job.sites[0].name))
    bare = _seconds(lambda: list(step.run())) / tokens / stream.blocks_at_once
    sites = [site for site in job.sites if site.block == job.sites[0].block]
    widths = job.allocations[0]
    began = time.perf_counter()
    if job.statistics is not None:
        stats = list(job.statistics.read_sites(sites, job.options.needs_covariances))
    else:
        stats = list(collect(source, sites, batches, workload.dtype, job.options.needs_covariances, execution))
    observed = time.perf_counter() - began
    pruned = [each for each in stats if each.site.name in widths]
    planned = _seconds(lambda: [plan_site(source, each, widths[each.site.name], job.options) for each in pruned])
    if job.statistics is None:
        observed *= workload.tokens / tokens * (2 if len(job.allocations) > 1 else 1)  # allocations are measured first
    return observed + planned, bare


def _time_sampling(job: Job) -> float:
    """Seconds per generated token: the difference between a short and a longer sample."""
    passages, seed = job.execution.passages, job.options.seed
    short, longer = (
        _seconds(lambda length=length: generate_tokens(job.source, passages, length, seed, job.execution))  # type: ignore[misc]
        for length in (SHORT_SAMPLE, LONGER_SAMPLE)
    )
    return max(0.0, longer - short) / (LONGER_SAMPLE - SHORT_SAMPLE) / passages


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
