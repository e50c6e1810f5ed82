"""How every neuron's activations are distributed over text or images, the first token apart from the rest.

The first token of a window is apart because it often is an attention sink, whose activations are unlike all others.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .blocks import Batch, BlockStream
from .calibration import observing
from .errors import PrunePeakError
from .sites import Site
from .source import Source
from .stats import Stats, in_chunks

FIRST, REST = "first", "rest"
OFF_ZERO = 0.5  # deviations from zero beyond which a peak is not at zero
BIMODAL = 5 / 9  # Sarle's coefficient of a uniform distribution; above it, two modes or a heavy skew


@dataclass(frozen=True)
class Shape:
    """The distribution of each neuron of a site; tensors are (neurons,) float64, NaN where a neuron never moves."""

    tokens: int
    peak: Tensor
    mean: Tensor
    median: Tensor
    deviation: Tensor
    skewness: Tensor
    kurtosis: Tensor  # excess: 0 for a normal distribution
    histogram: Tensor  # (neurons, bins), counts; the end bins also hold everything beyond
    low: Tensor  # left edge of the first bin
    width: Tensor  # of a bin

    @property
    def bimodality(self) -> Tensor:
        """Sarle's coefficient, (skewness^2 + 1) / kurtosis: 1 for two points, 5/9 uniform, 1/3 normal."""
        return (self.skewness**2 + 1) / (self.kurtosis + 3)

    @property
    def peak_from_zero(self) -> Tensor:
        """In deviations, signed."""
        return self.peak / self.deviation

    @property
    def peak_from_mean(self) -> Tensor:
        """In deviations, signed."""
        return (self.peak - self.mean) / self.deviation


class Shaping:
    """The running sums of a `Shape`: what `Stats` holds, and the third and fourth moments.

    Example:
        >>> shaping = Shaping(neurons=1, tokens=4)
        >>> shaping.add(torch.tensor([[0.0], [0.0], [0.0], [4.0]]))
        >>> shape = shaping.shape()
        >>> round(shape.skewness.item(), 3), shape.peak.item()
        (1.155, 0.0)
    """

    def __init__(self, neurons: int, tokens: int) -> None:
        self.stats = Stats(neurons, tokens)
        self._cubes = torch.zeros(neurons, dtype=torch.float64)  # of x - pivot
        self._fourths = torch.zeros(neurons, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Count a batch of activations, (tokens, neurons)."""
        self.stats.add(values)
        for chunk in in_chunks(values):
            centred = chunk - self.stats.pivot
            squares = centred.square()
            self._cubes += (squares * centred).sum(0)
            self._fourths += squares.square_().sum(0)

    def shape(self) -> Shape:
        """The distributions of what was added so far."""
        stats, summary = self.stats, self.stats.summarize()
        count = stats.count
        shift, second = stats.sum / count, stats.square_sum / count
        third, fourth = self._cubes / count, self._fourths / count
        variance = summary.variance
        # moments about the pivot, moved to the mean
        cube = third - 3 * shift * second + 2 * shift**3
        power = fourth - 4 * shift * third + 6 * shift**2 * second - 3 * shift**4
        return Shape(
            tokens=count,
            peak=summary.peak,
            mean=summary.mean,
            median=summary.median,
            deviation=variance.sqrt(),
            skewness=cube / variance**1.5,
            kurtosis=power / variance**2 - 3,
            histogram=stats.histogram,
            low=stats.low.double(),
            width=stats.width.double(),
        )


@dataclass(frozen=True)
class Distribution:
    """The shapes of one site's neurons."""

    site: Site
    rest: Shape
    first: Shape

    @property
    def heads(self) -> int:
        """How many heads an attention site has; 1 for an MLP."""
        groups, each, _ = self.site.heads
        return groups * each


def measure_distributions(
    source: Source, sites: Sequence[Site], batches: Sequence[Batch], dtype: torch.dtype
) -> Iterator[Distribution]:
    """The distributions of every site of the blocks over batches of full windows, one block at a time.

    Raises:
        PrunePeakError: activations that are not finite.
    """
    stream = BlockStream(source, batches, dtype)
    windows = [len(next(iter(batch.values()))) for batch in batches]
    for step in tqdm(stream.steps(), total=stream.blocks, desc="analyze", unit="block"):
        watches = [Watch(site, sum(windows), sum(step.tokens)) for site in sites if site.block == step.index]
        with ExitStack() as hooks:
            for watch in watches:
                hooks.enter_context(observing(stream.model.get_submodule(watch.site.name), watch.see))
            for number in step.run():
                for watch in watches:
                    watch.windows = windows[number]
        for watch in watches:
            if not bool(torch.isfinite(watch.rest.stats.square_sum).all()):
                raise PrunePeakError(
                    f"{watch.site.name} of {source.name} is given activations that are not finite in {dtype}. "
                    "Try --dtype float32, or check the checkpoint."
                )
            yield Distribution(watch.site, watch.rest.shape(), watch.first.shape())


class Watch:
    """What one site is seen to do while its block runs, the first token of every window apart."""

    def __init__(self, site: Site, windows: int, tokens: int) -> None:
        self.site = site
        self.first = Shaping(site.neurons, windows)
        self.rest = Shaping(site.neurons, tokens)
        self.windows = 0  # of the batch that runs

    def see(self, neurons: Tensor) -> None:
        # OPT lays the tokens of all windows end to end
        apart = neurons.reshape(self.windows, -1, self.site.neurons)
        self.first.add(apart[:, 0])
        self.rest.add(apart[:, 1:].flatten(0, 1))


def describe(distribution: Distribution) -> list[dict[str, Any]]:
    """Rows of numbers for a site and for each of its heads, the first token and the rest apart.

    `peak`, `mean`, `median`, `deviation`, `skewness`, `kurtosis` and `bimodality` are medians over the neurons, and so
    is `peak_from_mean`, the distance of the two in deviations; `peak_off_zero` is the share of neurons whose peak lies
    more than half a deviation from zero, `bimodal` that of neurons more bimodal than a uniform distribution.
    """
    site, heads = distribution.site, distribution.heads
    rows = []
    for tokens, shape in ((REST, distribution.rest), (FIRST, distribution.first)):
        whole: list[tuple[int | None, slice]] = [(None, slice(None))]
        size = site.neurons // heads
        parts = [(head, slice(head * size, (head + 1) * size)) for head in range(heads)] if heads > 1 else []
        for head, part in whole + parts:
            numbers = _describe_part(shape, part)
            rows.append({"site": site.kind, "block": site.block, "head": head, "tokens": tokens} | numbers)
    return rows


def _describe_part(shape: Shape, part: slice) -> dict[str, Any]:
    def middle(values: Tensor) -> float | None:
        value = values[part].nanmedian().item()
        return None if value != value else value

    names = ("peak", "mean", "median", "deviation", "skewness", "kurtosis", "bimodality")
    is_off = shape.peak.abs() > OFF_ZERO * shape.deviation
    return {
        "neurons": len(shape.peak[part]),
        "counted": shape.tokens,
        **{name: middle(getattr(shape, name)) for name in names},
        "peak_off_zero": is_off[part].double().mean().item(),
        "peak_from_mean": middle(shape.peak_from_mean.abs()),
        "bimodal": (shape.bimodality > BIMODAL)[part].double().mean().item(),
    }


@dataclass(frozen=True)
class Neuron:
    """One neuron to look at, and why."""

    site: Site
    index: int
    why: str


def find_striking(distributions: Sequence[Distribution], kind: str) -> list[Neuron]:
    """For a kind of site: a typical neuron of an early, a middle and a late block, and the most extreme of all.

    Typical is the neuron whose peak lies at the median distance from zero; extreme are those whose peak is furthest
    from zero and from the mean (in deviations), the most bimodal, the most skewed and the one of the heaviest tails.
    Each neuron is taken once.
    """
    of_kind = [distribution for distribution in distributions if distribution.site.kind == kind]
    chosen = [
        Neuron(d.site, int(d.rest.peak_from_zero.abs().nan_to_num(0.0).argsort()[d.site.neurons // 2]), "typical")
        for d in (of_kind[index] for index in sorted({0, len(of_kind) // 2, len(of_kind) - 1}))
    ]
    extremes = {
        "peak furthest from zero": lambda shape: shape.peak_from_zero.abs(),
        "peak furthest from the mean": lambda shape: shape.peak_from_mean.abs(),
        "most bimodal": lambda shape: shape.bimodality,
        "most skewed": lambda shape: shape.skewness.abs(),
        "heaviest tails": lambda shape: shape.kurtosis,
    }
    for why, extreme in extremes.items():
        values = torch.stack([extreme(d.rest) for d in of_kind]).nan_to_num(-1.0, posinf=-1.0)
        for neuron in chosen:
            values[[d.site for d in of_kind].index(neuron.site), neuron.index] = -1.0
        block, index = divmod(int(values.argmax()), values.shape[1])
        chosen.append(Neuron(of_kind[block].site, index, why))
    return chosen


@dataclass(frozen=True)
class Move:
    """How far one site's neurons move from one text to another, in deviations; (neurons,) each."""

    site: Site
    peak: Tensor
    mean: Tensor


def compare(one: Sequence[Distribution], other: Sequence[Distribution]) -> list[Move]:
    """The moves of every site between two texts; the deviation is the root mean square of the two."""
    moves = []
    for first, second in zip(one, other, strict=True):
        a, b = first.rest, second.rest
        deviation = ((a.deviation**2 + b.deviation**2) / 2).sqrt()
        moves.append(Move(first.site, (a.peak - b.peak).abs() / deviation, (a.mean - b.mean).abs() / deviation))
    return moves
