"""Statistics of a model's sites over batches of calibration, block by block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from ..data.windows import into_batches
from ..errors import PrunePeakError, spell
from ..models.execution import ExecutionConfig
from ..models.families import Family
from ..models.loading import IMAGES, Model, open_model
from ..models.stream import Batch, Step, Stream
from ..models.streaming import BlockRun, BlockStream
from ..models.whole import open_stream
from ..progress import open_bar
from ..sites.blocks import BlocksSite
from ..sites.experts import ExpertsSite
from ..sites.routing import RoutingSample
from ..sites.site import Site
from .contributions import measure_contributions
from .covariance import ActivationBuffer, GramAccumulator, Moments, SplitGram
from .distributed import ALONE, ProcessGroup, current
from .expert_use import ExpertUse, UseSummary
from .histogram import Stats


@dataclass(frozen=True)
class SiteStats:
    """The statistics of one site."""

    site: Site
    stats: Stats
    accumulator: SplitGram | ActivationBuffer | None = None  # for the refit
    power: float | None = None  # for the refit: squared norm of a hidden state after the block, median over tokens
    outputs: tuple[Moments, ...] = ()  # of the observed outputs of the site
    use: UseSummary | None = None  # of whole experts


class Observer:
    """Measures one site while its block runs; a subclass gathers statistics in `add`."""

    def __init__(self, site: Site, stats: Stats) -> None:
        self.site = site
        self.stats = stats

    def start_batch(self, number: int) -> None:
        """Called before each batch runs."""

    def add(self, neurons: Tensor, *, tokens: Tensor | None = None, sample: RoutingSample | None = None) -> None:
        """Called with each input of the output projection, (..., neurons).

        Args:
            tokens: that it reads, if it reads only some.
            sample: of whole experts.
        """
        raise NotImplementedError

    def add_output(self, name: str, output: Tensor) -> None:
        """Called with each of the site's observed outputs."""

    def reduce(self) -> None:
        """Combine the statistics of all processes."""


AnyObserver = TypeVar("AnyObserver", bound=Observer)


def observe_blocks(
    stream: Stream, sites: Sequence[Site], create: Callable[[Site, Step], AnyObserver], description: str
) -> Iterator[tuple[Step, list[AnyObserver]]]:
    """Run all blocks up to the last one that has a site; yield each with the observers of its sites.

    Raises:
        PrunePeakError: activations that are not finite.
    """
    count = min(max(site.block for site in sites) + 1, stream.passes)
    done = min(count - 1, min(site.block for site in sites)) if stream.blocks_at_once == 1 else 0  # by a run before
    with open_bar(description, "block", count, done) as bar:
        for number, step in enumerate(islice(stream.steps(), count)):
            observers = [create(site, step) for site in sites if step.covers(site.block)]
            _observe(stream, observers, step.run())
            yield step, observers
            if number >= done:
                bar.update()


def _observe(stream: Stream, observers: Sequence[Observer], batches: Iterator[int]) -> None:
    """Run the batches with hooks on the observers' sites, then combine and check the statistics."""
    with ExitStack() as hooks:
        for observer in observers:
            hooks.enter_context(observer.site.observe(stream.model, observer.add))
            for name in observer.site.observed_outputs:
                module, add = stream.model.get_submodule(name), partial(observer.add_output, name)
                handle = module.register_forward_hook(lambda _, args, output, add=add: add(output))
                hooks.callback(handle.remove)
        for number in batches:
            for observer in observers:
                observer.start_batch(number)
    for observer in observers:
        _finish(stream, observer)


def _finish(stream: Stream, observer: Observer) -> None:
    """Combine and check the statistics of a site."""
    observer.reduce()
    if not observer.stats.count:
        raise PrunePeakError(
            f"no token of the calibration reaches {observer.site.name} of {stream.source.name}. Pass more "
            f"{spell('samples')}, or text of other kinds."
        )
    if not bool(torch.isfinite(observer.stats.square_sum).all()):
        raise PrunePeakError(
            f"{observer.site.name} of {stream.source.name} has activations that are not finite in {stream.dtype}. "
            f"Pass {spell('dtype', 'float32')}, or check the checkpoint."
        )


class SiteObserver(Observer):
    """Gathers the statistics of one site; `tokens` are the counts of all ranks, `masks` those of all batches."""

    def __init__(
        self,
        site: Site,
        tokens: Sequence[int],
        for_refit: bool,
        group: ProcessGroup = ALONE,
        masks: Sequence[Tensor | None] = (),
    ) -> None:
        super().__init__(site, Stats(site.neurons, sum(tokens), sum(tokens[: group.rank])))
        self.accumulator: SplitGram | ActivationBuffer | None = None
        self.outputs: dict[str, GramAccumulator] = {}  # of queries and keys
        self._has_few_tokens = sum(tokens) < site.neurons
        self.use = ExpertUse(site.neurons, site.groups) if isinstance(site, ExpertsSite) else None
        self._for_refit = for_refit and self.use is None
        self._group, self._masks = group, masks
        self._mask: Tensor | None = None  # of the batch that runs

    def start_batch(self, number: int) -> None:
        self._mask = self._masks[number] if self._masks else None

    def add_output(self, name: str, output: Tensor) -> None:
        flat = _summable(output.reshape(-1, self.site.neurons))
        if name not in self.outputs:
            self.outputs[name] = GramAccumulator(self._group.broadcast(flat.float().mean(0)))
        self.outputs[name].add(flat)

    def add(self, neurons: Tensor, *, tokens: Tensor | None = None, sample: RoutingSample | None = None) -> None:
        flat = neurons.reshape(-1, self.site.neurons)
        if self._mask is not None and (tokens is not None or len(flat) == self._mask.numel()):
            counts = self._mask.bool().view(-1)
            flat = flat[counts if tokens is None else counts[tokens]]
        flat = _summable(flat)
        if self.stats.count == 0:
            self.stats.begin(flat, self._group)
        self.stats.add(flat)
        if self.use is not None:
            self.use.add(flat, sample)
        if self._for_refit:
            if self.accumulator is None:
                self.accumulator = ActivationBuffer() if self._has_few_tokens else SplitGram(self.stats.pivot)
            self.accumulator.add(flat)

    def reduce(self) -> None:
        for part in (self.stats, self.accumulator, self.use, *self.outputs.values()):
            if part is not None:
                part.reduce(self._group)

    def site_stats(self, power: float | None = None) -> SiteStats:
        moments = tuple(self.outputs[name].moments() for name in self.site.observed_outputs)
        use = None if self.use is None else self.use.summarize()
        return SiteStats(self.site, self.stats, self.accumulator, power, moments, use)


def _summable(values: Tensor) -> Tensor:
    """Activations on a device that has float64, in which they are summed."""
    return values.cpu() if values.device.type == "mps" else values


def collect(
    source: Model,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    dtype: torch.dtype,
    for_refit: bool = False,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - frozen
    group: ProcessGroup = ALONE,
) -> Iterator[SiteStats]:
    """Statistics of every site over the batches, one block at a time; padding is not counted.

    Each process of a group runs its share of the batches, and all yield the statistics over all batches. The held-out
    tokens are a part of every batch, so they do not depend on the number of processes.

    Raises:
        PrunePeakError: activations that are not finite, or fewer batches than processes.
    """
    if not sites:
        return
    if len(batches) < group.world_size:
        raise PrunePeakError(
            f"{group.world_size} processes cannot share {len(batches)} batches of calibration; start fewer processes, "
            f"or pass more {spell('samples')}."
        )
    batches = batches[group.share(len(batches))]
    stream = open_stream(source, batches, dtype, execution)
    runs = [site for site in sites if isinstance(site, BlocksSite)]
    if runs:
        masks = [batch.get(runs[0].mask) for batch in batches]
        yield from _collect_contributions(stream, runs, masks, for_refit, group)
        return

    def create(site: Site, step: Step) -> SiteObserver:
        masks = [batch.get(site.mask) for batch in batches]
        moved = [None if mask is None else mask.to(execution.device) for mask in masks]
        rows = group.gather(sum(step.rows(site.name, masks)))
        return SiteObserver(site, [round(site.served * count) for count in rows], for_refit, group, moved)

    power = None
    for step, observers in observe_blocks(stream, sites, create, "calibrate"):
        if for_refit and isinstance(step, BlockRun):  # the median, because a few tokens have a far larger norm
            power = torch.cat(group.gather(step.powers())).median().item()
        for observer in observers:
            yield observer.site_stats(power)
    after_blocks = [site for site in sites if stream.follows(site.block)]  # of the pooling head
    if after_blocks:
        images = group.gather(sum(len(batch[IMAGES]) for batch in batches))
        observers = [SiteObserver(site, images, for_refit, group) for site in after_blocks]
        _observe(stream, observers, (number for number, _ in enumerate(stream.outputs())))
        for observer in observers:
            yield observer.site_stats(power)


def _collect_contributions(
    stream: Stream,
    sites: Sequence[BlocksSite],
    masks: Sequence[Tensor | None],
    for_refit: bool,
    group: ProcessGroup,
) -> Iterator[SiteStats]:
    """The statistics of blocks that leave, and of the projections that take over what they do."""
    assert isinstance(stream, BlockStream)
    with open_bar("calibrate", "block", stream.blocks) as bar:
        for step, ended in measure_contributions(stream, sites, masks):
            bar.update()
            for site, batches in ended:
                observer = SiteObserver(site, group.gather(sum(step.rows(site.name, masks))), for_refit, group)
                for rows in batches:
                    observer.add(rows)
                _finish(stream, observer)
                yield observer.site_stats()


@dataclass(frozen=True)
class CollectionRequest:
    """What all processes are to collect."""

    model: str
    revision: str | None
    family: Family
    sites: Sequence[Site]
    windows: Tensor
    dtype: torch.dtype
    for_refit: bool
    execution: ExecutionConfig

    def run(self, source: Model, group: ProcessGroup) -> Iterator[SiteStats]:
        batches = into_batches(self.windows, self.execution.batch_tokens)
        return collect(source, self.sites, batches, self.dtype, self.for_refit, self.execution, group)


def collect_together(
    source: Model,
    sites: Sequence[Site],
    windows: Tensor,
    dtype: torch.dtype,
    for_refit: bool,
    execution: ExecutionConfig,
) -> Iterator[SiteStats]:
    """`collect` over windows, shared between all processes that torchrun started; rank 0 calls this."""
    group = current()
    request = CollectionRequest(
        source.name, source.revision, source.family, sites, windows, dtype, for_refit, execution
    )
    if sites:
        group.broadcast(request)
    yield from request.run(source, group)


def run_worker(group: ProcessGroup) -> None:
    """Take part in every collection of rank 0, until it broadcasts None."""
    while (request := group.broadcast()) is not None:
        source = replace(open_model(request.model, request.revision), family=request.family)
        for _ in request.run(source, group):
            pass
