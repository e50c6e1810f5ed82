"""Running statistics of every neuron of a site: exact moments, and a histogram that knows where its peak is.

Moments are exact over all tokens. The histogram is taken from a share of them: its edges are fixed by the first batch
(a robust range, so one outlier cannot stretch it), every later token is one addition, and two histograms over the same
edges merge by adding. Memory is that of the histogram, whatever the number of tokens.

The peak (mode) is the value that more than a tenth of the tokens share exactly, where there is one (the zero of ReLU);
otherwise the top of the density: the histogram smoothed, over a narrower width where that shows a significantly higher
hump, and once more inside that hump. `tests/test_stats.py` holds it to distributions whose mode is known.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from .ranks import Ranks

BINS = 256
RANGE = (0.02, 0.98)  # quantiles of the first batch that the bins span; beyond, tokens are counted in the end bins
REACH = (
    10  # times the distance of the quartiles that they span at most, beyond those: attention sinks can be 3 % of tokens
)
PILOT = 1024  # tokens of the first batch that fix the edges
POINT_MASS = 0.1  # a value that this share of the tokens has exactly is the peak
HISTOGRAM_TOKENS = 8192  # enough for the stated error; more buys little
FINER, SIGNIFICANT = 4, 5.0  # halvings of the smoothing width, each taken if the top rises by so many standard errors
CHUNK = 2**19  # numbers at a time, so that they stay in the processor's cache, and need no fresh pages of memory
FEWEST_TOKENS = 64  # of a chunk, for every neuron's bins come into the cache as well
SORTED_AT_ONCE = 256  # neurons, for the same reason

# The fields of `Stats`: numbers that add up, tensors that add up, and what must be the same for that
COUNTS = ("count", "sampled")
SUMS = ("sum", "square_sum", "histogram", "repeats")
EDGES = ("pivot", "low", "width", "common")
ONE = torch.ones((), dtype=torch.int32)


@dataclass(frozen=True)
class Summary:
    """What a plan needs to know of each neuron; all (neurons,) and float64."""

    count: int
    mean: Tensor
    variance: Tensor
    median: Tensor
    peak: Tensor
    second_moment: Tensor  # E[x^2]


class Stats:
    """The running sums for one site.

    Args:
        neurons: how many.
        tokens: how many tokens are to come; the histogram takes about `HISTOGRAM_TOKENS` of them, evenly.
        before: how many of them come before the first one here, in the shares of other processes.

    Example:
        >>> stats = Stats(neurons=1, tokens=4)
        >>> stats.add(torch.tensor([[0.0], [0.0], [0.0], [2.0]]))
        >>> summary = stats.summarize()
        >>> summary.peak.item(), summary.mean.item()
        (0.0, 0.5)
    """

    def __init__(self, neurons: int, tokens: int, before: int = 0) -> None:
        self.neurons = neurons
        self.before = before
        self.stride = max(1, tokens // HISTOGRAM_TOKENS)
        self.count = 0
        self.sampled = 0
        self.sum = torch.zeros(neurons, dtype=torch.float64)  # of x - pivot
        self.square_sum = torch.zeros(neurons, dtype=torch.float64)  # of (x - pivot)^2
        self.histogram = torch.zeros(neurons, BINS, dtype=torch.int32)
        self.repeats = torch.zeros(neurons, dtype=torch.int64)  # sampled tokens that equal `common`
        # set by the first batch
        self.pivot = torch.full((neurons,), torch.nan)  # a middle value, subtracted before squaring: no cancellation
        self.low = torch.zeros(neurons)
        self.width = torch.zeros(neurons)  # of one bin; 0 where the neuron hardly moves
        self.common = torch.zeros(neurons)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything, as tensors to save."""
        counts = torch.tensor([self.stride, *(getattr(self, name) for name in COUNTS)])
        return {"counts": counts} | {name: getattr(self, name) for name in SUMS + EDGES}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Stats":
        """What `to_tensors` gave.

        Raises:
            ValueError: a tensor is missing, or of another shape.
        """
        if set(tensors) != {"counts", *SUMS, *EDGES} or tensors["counts"].shape != (1 + len(COUNTS),):
            raise ValueError(f"expected the tensors counts, {', '.join(SUMS + EDGES)}")
        stats = cls(len(tensors["pivot"]), 0)
        stats.stride, *counts = tensors["counts"].tolist()
        for name, count in zip(COUNTS, counts, strict=True):
            setattr(stats, name, count)
        for name in SUMS + EDGES:
            tensor, expected = tensors[name], getattr(stats, name)
            if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
                raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} is not finite")
            setattr(stats, name, tensor)
        if not 0 < stats.sampled <= stats.count or stats.stride < 1:
            raise ValueError(f"counts are {tensors['counts'].tolist()}")
        return stats

    def begin(self, values: Tensor, ranks: Ranks) -> None:
        """Fix the edges by the first batch of all, which is in the share of the first process."""
        if ranks.is_first:
            self._fix_edges(values)
        for name in EDGES:
            setattr(self, name, ranks.agree(getattr(self, name)))

    def add_up(self, ranks: Ranks) -> None:
        """Let the first process know what all have counted."""
        counts = ranks.add_up(torch.tensor([getattr(self, name) for name in COUNTS]))
        for name, count in zip(COUNTS, counts.tolist(), strict=True):
            setattr(self, name, count)
        for name in SUMS:
            setattr(self, name, ranks.add_up(getattr(self, name)))

    def add(self, values: Tensor) -> None:
        """Count a batch of activations, (tokens, neurons), in any float type."""
        if self.pivot.isnan().all():
            self._fix_edges(values)
        for chunk in in_chunks(values):
            self._add_chunk(chunk)

    def _fix_edges(self, values: Tensor) -> None:
        pilot = values[:: max(1, len(values) // PILOT)]
        edges = [_find_edges(part.float().T) for part in pilot.split(SORTED_AT_ONCE, dim=1)]
        for name, parts in zip(EDGES, zip(*edges, strict=True), strict=True):
            setattr(self, name, torch.cat(parts))

    def _add_chunk(self, values: Tensor) -> None:
        offset = -(self.before + self.count) % self.stride
        self.count += len(values)
        sample = values[offset :: self.stride]
        if len(sample):
            self.sampled += len(sample)
            self.repeats += (sample == self.common).sum(0)
            bins = (sample - self.low).div_(self.width).nan_to_num_(0.0).clamp_(0, BINS - 1).long().T
            self.histogram.scatter_add_(1, bins, ONE.expand(bins.shape))
        centred = values - self.pivot
        self.sum += centred.sum(0)
        self.square_sum += centred.square_().sum(0)

    def summarize(self) -> Summary:
        """The statistics of what was added so far."""
        if self.count == 0:
            raise ValueError("no token was added")
        pivot = self.pivot.double()
        shift = self.sum / self.count
        variance = (self.square_sum / self.count - shift**2).clamp_min(0)
        mean = pivot + shift
        return Summary(
            count=self.count,
            mean=mean,
            variance=variance,
            median=self._quantile(0.5),
            peak=self._peak(),
            second_moment=variance + mean**2,
        )

    def _quantile(self, share: float) -> Tensor:
        """Linear inside the bin where the cumulative count crosses."""
        below = self.histogram.cumsum(1).double()
        wanted = share * self.sampled
        bin_ = (below < wanted).sum(1, keepdim=True).clamp_max(BINS - 1)
        inside = self.histogram.gather(1, bin_).double()
        before = below.gather(1, bin_) - inside
        position = bin_ + (wanted - before) / inside.clamp_min(1)
        value = self.low.double() + position[:, 0] * self.width.double()
        return torch.where(self.repeats > 0.5 * self.sampled, self.common.double(), value)

    def _peak(self) -> Tensor:
        # The end bins also hold everything beyond the range: no peak is looked for there
        density = self.histogram.float()
        density[:, 0] = density[:, -1] = 0
        quartiles = (self._quantile(0.75) - self._quantile(0.25)).float() / self.width.clamp_min(1e-38) / 1.349
        width = (0.9 * self.sampled ** (-1 / 7) * quartiles).clamp(0.5, BINS / 8)  # balances a mode's bias and variance
        spectrum = torch.fft.rfft(density, 2 * BINS)  # padded, so that the ends do not meet
        smooth = _smooth(spectrum, width)
        rising = torch.arange(self.neurons)
        for _ in range(FINER):
            narrower = (width[rising] / 2).clamp_min(0.5)
            finer = _smooth(spectrum[rising], narrower)
            height = finer.amax(1)
            noise = (height / (2 * torch.pi**0.5 * narrower)).clamp_min(0).sqrt()
            higher = height - smooth[rising].amax(1) > SIGNIFICANT * noise
            rising = rising[higher]
            if not len(rising):
                break
            smooth[rising], width[rising] = finer[higher], narrower[higher]
        # Once more inside the highest hump, by the hump's own width (half height, as that of a normal density)
        top = smooth.argmax(1, keepdim=True)
        hump = _run_around(smooth >= smooth.gather(1, top) / 2, top)
        spread = 0.9 * self.sampled ** (-1 / 7) * hump.sum(1) / 2.355
        fine = _smooth(spectrum, torch.minimum(spread, width).clamp_min(0.5)).masked_fill(~hump, 0)
        position = _parabola_top(fine)
        value = self.low.double() + (position + 0.5) * self.width.double()
        point_mass = self.repeats > POINT_MASS * self.sampled
        return torch.where(point_mass | (self.width == 0), self.common.double(), value)


def in_chunks(values: Tensor) -> Iterator[Tensor]:
    """A batch of activations, (tokens, neurons), as float32, a few tokens at a time."""
    for chunk in values.split(max(FEWEST_TOKENS, CHUNK // values.shape[1])):
        yield chunk.float()


def _find_edges(values: Tensor) -> tuple[Tensor, ...]:
    """What `EDGES` names, of some neurons' first tokens, (neurons, tokens)."""
    ordered = torch.from_numpy(numpy.sort(values.contiguous().numpy(), axis=1))  # eight times as fast as torch's
    last = ordered.shape[1] - 1
    low, quarter, middle, three, high = (ordered[:, round(last * at)] for at in (RANGE[0], 0.25, 0.5, 0.75, RANGE[1]))
    reach = REACH * (three - quarter)
    reach[reach == 0] = torch.inf  # most tokens are alike, as after ReLU
    low, high = torch.maximum(low, quarter - reach), torch.minimum(high, three + reach)
    return middle, low, (high - low) / BINS, _most_repeated(ordered)


def _most_repeated(ordered: Tensor) -> Tensor:
    """The value of the longest run in each sorted row."""
    values = ordered.numpy()
    position = numpy.broadcast_to(numpy.arange(values.shape[1], dtype=numpy.int32), values.shape)
    is_start = numpy.ones(values.shape, dtype=bool)
    is_start[:, 1:] = values[:, 1:] != values[:, :-1]
    run_start = numpy.maximum.accumulate(numpy.where(is_start, position, 0), axis=1)
    longest = (position - run_start).argmax(axis=1)
    return torch.from_numpy(numpy.take_along_axis(values, longest[:, None], axis=1)[:, 0])


def _smooth(spectrum: Tensor, deviations: Tensor) -> Tensor:
    """Each row of counts, given by its spectrum, convolved with a normal density of its own deviation, in bins."""
    frequency = torch.fft.rfftfreq(2 * BINS)
    exponent = -2 * (torch.pi * frequency * deviations[:, None]) ** 2
    kernel = exponent.clamp_min_(-80).exp_()  # below, results are subnormal, which takes many times as long
    smooth: Tensor = torch.fft.irfft(spectrum * kernel, 2 * BINS)
    return smooth[:, :BINS]


def _run_around(mask: Tensor, top: Tensor) -> Tensor:
    """Of a row's true bins, those connected to its top."""
    gaps = (~mask).cumsum(1)
    return mask & (gaps == gaps.gather(1, top))


def _parabola_top(density: Tensor) -> Tensor:
    """Where the parabola through the highest bin and its neighbours is highest, in bins."""
    top = density.argmax(1, keepdim=True).clamp(1, density.shape[1] - 2)
    left, middle, right = (density.gather(1, top + step)[:, 0] for step in (-1, 0, 1))
    curve = left - 2 * middle + right
    offset = torch.where(curve < 0, 0.5 * (left - right) / curve, 0.0)
    return top[:, 0] + offset.clamp(-0.5, 0.5)
