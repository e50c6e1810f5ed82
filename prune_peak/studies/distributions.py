"""Distributions of every neuron's activations over text or images.

First tokens of windows are measured separately: they often are attention sinks, with activations far from all others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.loading import Model
from ..models.stream import Batch, Step
from ..models.whole import open_stream
from ..sites.site import Site
from ..stats.collection import Observer, observe_blocks
from ..stats.histogram import Stats, in_chunks

FIRST, REST = "first", "rest"
OFF_ZERO = 0.5  # deviations from zero beyond which a peak is not at zero
BIMODAL = 5 / 9  # Sarle's coefficient of a uniform distribution; above it, two modes or a heavy skew


@dataclass(frozen=True)
class NeuronMoments:
    """The distribution of each neuron of a site; tensors are (neurons,) float64, NaN for a constant neuron."""

    tokens: int
    peak: Tensor
    mean: Tensor
    median: Tensor
    deviation: Tensor
    skewness: Tensor
    kurtosis: Tensor  # excess: 0 for a normal distribution
    histogram: Tensor  # (neurons, bins), counts; the end bins also count everything beyond
    low: Tensor  # left edge of the first bin
    width: Tensor  # of a bin

    @property
    def bimodality(self) -> Tensor:
        """Sarle's coefficient, (skewness^2 + 1) / kurtosis: 1 for two points, 5/9 uniform, 1/3 normal."""
        return (self.skewness**2 + 1) / (self.kurtosis + 3)

    @property
    def peak_from_zero(self) -> Tensor:  # in deviations, signed
        return self.peak / self.deviation

    @property
    def peak_from_mean(self) -> Tensor:  # in deviations, signed
        return (self.peak - self.mean) / self.deviation


class MomentAccumulator:
    """The running sums of `NeuronMoments`: `Stats`, and sums for the third and fourth moments.

    Example:
        >>> accumulator = MomentAccumulator(neurons=1, tokens=4)
        >>> accumulator.add(torch.tensor([[0.0], [0.0], [0.0], [4.0]]))
        >>> moments = accumulator.moments()
        >>> round(moments.skewness.item(), 3), moments.peak.item()
        (1.155, 0.0)
    """

    def __init__(self, neurons: int, tokens: int) -> None:
        self.stats = Stats(neurons, tokens)
        self._cubes = torch.zeros(neurons, dtype=torch.float64)  # of x - pivot
        self._fourths = torch.zeros(neurons, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Add a batch of activations, (tokens, neurons)."""
        self.stats.add(values)
        for chunk in in_chunks(values):
            centred = chunk - self.stats.pivot
            squares = centred.square()
            self._cubes += (squares * centred).sum(0)
            self._fourths += squares.square_().sum(0)

    def moments(self) -> NeuronMoments:
        """The distributions of the tokens added so far."""
        stats, summary, count = self.stats, self.stats.summarize(), self.stats.count
        shift, second = stats.sum / count, stats.square_sum / count
        third, fourth = self._cubes / count, self._fourths / count
        variance = summary.variance
        # moments about the pivot, moved to the mean
        cube = third - 3 * shift * second + 2 * shift**3
        power = fourth - 4 * shift * third + 6 * shift**2 * second - 3 * shift**4
        return NeuronMoments(
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
    """The distributions of one site's neurons, over the first tokens of all windows and over the rest."""

    site: Site
    rest: NeuronMoments
    first: NeuronMoments

    @property
    def heads(self) -> int:
        """The number of heads of an attention site; 1 for an MLP."""
        groups, each, _ = self.site.heads
        return groups * each


def measure_distributions(
    source: Model, sites: Sequence[Site], batches: Sequence[Batch], dtype: torch.dtype
) -> Iterator[Distribution]:
    """The distributions of every site in the blocks over batches of full windows; PrunePeakError if not finite."""
    stream = open_stream(source, batches, dtype)
    windows = [len(next(iter(batch.values()))) for batch in batches]

    def create(site: Site, step: Step) -> DistributionObserver:
        return DistributionObserver(site, windows, sum(step.rows(site.name)))

    for _, observers in observe_blocks(stream, sites, create, "analyze"):
        for observer in observers:
            yield Distribution(observer.site, observer.rest.moments(), observer.first.moments())


class DistributionObserver(Observer):
    """Gathers the distributions of one site; `windows` are the counts of each batch, `tokens` the count of all."""

    def __init__(self, site: Site, windows: Sequence[int], tokens: int) -> None:
        self.first = MomentAccumulator(site.neurons, sum(windows))
        self.rest = MomentAccumulator(site.neurons, tokens)
        super().__init__(site, self.rest.stats)
        self._windows, self._batch = windows, 0

    def start_batch(self, number: int) -> None:
        self._batch = number

    def add(self, neurons: Tensor, **_: Any) -> None:
        # OPT joins the tokens of all windows in one dimension
        by_window = neurons.reshape(self._windows[self._batch], -1, self.site.neurons)
        self.first.add(by_window[:, 0])
        self.rest.add(by_window[:, 1:].flatten(0, 1))


def describe(distribution: Distribution) -> list[dict[str, Any]]:
    """Table rows for a site and for each of its heads, over the rest of the tokens and over the first ones.

    `peak`, `mean`, `median`, `deviation`, `skewness`, `kurtosis` and `bimodality` are medians over the neurons, and so
    is `peak_from_mean`, the distance of the two in deviations. `peak_off_zero` is the share of neurons whose peak is
    more than half a deviation from zero, `bimodal` that of neurons more bimodal than a uniform distribution.
    """
    site, heads, rows = distribution.site, distribution.heads, []
    size = site.neurons // heads
    parts: list[tuple[int | None, slice]] = [(None, slice(None))]
    parts += [(head, slice(head * size, (head + 1) * size)) for head in range(heads if heads > 1 else 0)]
    for tokens, moments in ((REST, distribution.rest), (FIRST, distribution.first)):
        for head, part in parts:
            numbers = _describe_part(moments, part)
            rows.append({"site": site.label, "block": site.block, "head": head, "tokens": tokens} | numbers)
    return rows


def _describe_part(moments: NeuronMoments, part: slice) -> dict[str, Any]:
    def middle(values: Tensor) -> float | None:
        value = values[part].nanmedian().item()
        return None if value != value else value

    names = ("peak", "mean", "median", "deviation", "skewness", "kurtosis", "bimodality")
    is_off = moments.peak.abs() > OFF_ZERO * moments.deviation
    return {
        "neurons": len(moments.peak[part]),
        "counted": moments.tokens,
        **{name: middle(getattr(moments, name)) for name in names},
        "peak_off_zero": is_off[part].double().mean().item(),
        "peak_from_mean": middle(moments.peak_from_mean.abs()),
        "bimodal": (moments.bimodality > BIMODAL)[part].double().mean().item(),
    }


@dataclass(frozen=True)
class Neuron:
    """A neuron to plot, and the reason."""

    site: Site
    index: int
    label: str


def find_extreme_neurons(distributions: Sequence[Distribution], kind: str) -> list[Neuron]:
    """For a kind of site: a typical neuron of an early, a middle and a late block, and the most extreme of all blocks.

    The typical neuron has its peak at the median distance from zero. The extreme ones have the peak furthest from zero
    and from the mean (in deviations), the highest bimodality and skewness, and the heaviest tails. No neuron is listed
    twice.
    """
    of_kind = [distribution for distribution in distributions if distribution.site.label == kind]
    chosen = [
        Neuron(d.site, int(d.rest.peak_from_zero.abs().nan_to_num(0.0).argsort()[d.site.neurons // 2]), "typical")
        for d in (of_kind[index] for index in sorted({0, len(of_kind) // 2, len(of_kind) - 1}))
    ]
    extremes = {
        "peak furthest from zero": lambda moments: moments.peak_from_zero.abs(),
        "peak furthest from the mean": lambda moments: moments.peak_from_mean.abs(),
        "most bimodal": lambda moments: moments.bimodality,
        "most skewed": lambda moments: moments.skewness.abs(),
        "heaviest tails": lambda moments: moments.kurtosis,
    }
    for label, extreme in extremes.items():
        values = torch.stack([extreme(d.rest) for d in of_kind]).nan_to_num(-1.0, posinf=-1.0)
        for neuron in chosen:
            values[[d.site for d in of_kind].index(neuron.site), neuron.index] = -1.0
        block, index = divmod(int(values.argmax()), values.shape[1])
        chosen.append(Neuron(of_kind[block].site, index, label))
    return chosen


@dataclass(frozen=True)
class Drift:
    """Distances of one site's peaks and means between two texts, in deviations; (neurons,) each."""

    site: Site
    peak: Tensor
    mean: Tensor


def compare(first: Sequence[Distribution], second: Sequence[Distribution]) -> list[Drift]:
    """The drift of every site between two texts; the deviation is the root mean square of the two."""
    drifts = []
    for one, other in zip(first, second, strict=True):
        a, b = one.rest, other.rest
        deviation = ((a.deviation**2 + b.deviation**2) / 2).sqrt()
        drifts.append(Drift(one.site, (a.peak - b.peak).abs() / deviation, (a.mean - b.mean).abs() / deviation))
    return drifts
