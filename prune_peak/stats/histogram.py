"""Running statistics of every neuron of a site: exact moments, and a histogram from which the peak is computed.

Moments are exact over all tokens. The histogram counts a subset of them. The first batch fixes its edges (a robust
range, which one outlier cannot stretch); histograms with the same edges can be added. Memory does not depend on the
number of tokens.

The peak (mode) is the value that more than a tenth of the tokens have exactly, such as the zero of ReLU. Otherwise it
is the top of the density: the smoothed histogram, with a narrower width if that shows a significantly higher hump, and
once more inside that hump. `tests/test_stats.py` tests it on distributions whose mode is known.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from ..options import PROCESSOR
from .distributed import ALONE, ProcessGroup

BINS = 256
RANGE = (0.02, 0.98)  # quantiles of the first batch that the bins span; the end bins count the tokens beyond
REACH = 10  # interquartile ranges beyond the quartiles, where the bins end: attention sinks can be 3 % of tokens
PILOT = 1024  # tokens of the first batch that fix the edges
POINT_MASS = 0.1  # a value that this share of the tokens has exactly is the peak
HISTOGRAM_TOKENS = 8192  # enough for the stated error; more improve it little
FINER, SIGNIFICANT = 4, 5.0  # halvings of the smoothing width, each if the top rises by this many standard errors
CHUNK = 2**19  # numbers at a time: they stay in the processor's cache, and reuse pages of memory
DEVICE_CHUNK = 2**24  # on another device: few kernels
FEWEST_TOKENS = 64  # of a chunk, because every neuron's bins must enter the cache as well
SORTED_AT_ONCE = 256  # neurons, to stay in the cache

# The fields of `Stats`: numbers to add, tensors to add, and tensors that must be equal for that
COUNTS = ("count", "sampled")
SUMS = ("sum", "square_sum", "histogram", "repeats")
EDGES = ("pivot", "low", "width", "common")


@dataclass(frozen=True)
class Summary:
    """The statistics of each neuron that a plan needs; tensors are (neurons,) float64."""

    count: int
    mean: Tensor
    variance: Tensor
    median: Tensor
    peak: Tensor
    second_moment: Tensor  # E[x^2]


class Stats:
    """The running sums of one site.

    Args:
        neurons: number of neurons.
        tokens: number of tokens of all processes; the histogram counts about `HISTOGRAM_TOKENS` of them, evenly spaced.
        before: number of these tokens in the shares of lower ranks.

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
        self._allocate(torch.device(PROCESSOR))

    def _allocate(self, device: torch.device) -> None:
        neurons = self.neurons
        self.sum = torch.zeros(neurons, dtype=torch.float64, device=device)  # of x - pivot
        self.square_sum = torch.zeros(neurons, dtype=torch.float64, device=device)  # of (x - pivot)^2
        self.histogram = torch.zeros(neurons, BINS, dtype=torch.int32, device=device)
        self.repeats = torch.zeros(neurons, dtype=torch.int64, device=device)  # sampled tokens that equal `common`
        # set by the first batch
        self.pivot = torch.full((neurons,), torch.nan, device=device)  # median, subtracted to avoid cancellation
        self.low = torch.zeros(neurons, device=device)
        self.width = torch.zeros(neurons, device=device)  # of one bin; 0 where the neuron hardly moves
        self.common = torch.zeros(neurons, device=device)

    def to_tensors(self) -> dict[str, Tensor]:
        """Tensors to save."""
        counts = torch.tensor([self.stride, *(getattr(self, name) for name in COUNTS)])
        return {"counts": counts} | {name: getattr(self, name) for name in SUMS + EDGES}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Stats":
        """Load the tensors of `to_tensors`; raise ValueError if one is missing or invalid."""
        if set(tensors) != {"counts", *SUMS, *EDGES} or tensors["counts"].shape != (1 + len(COUNTS),):
            raise ValueError(f"expected the tensors counts, {', '.join(SUMS + EDGES)}")
        stats = cls(len(tensors["pivot"]), 0)
        stats.stride, *counts = tensors["counts"].tolist()
        vars(stats).update(zip(COUNTS, counts, strict=True))
        expected = {name: getattr(stats, name) for name in SUMS + EDGES}
        check_tensors(tensors, **{name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()})
        vars(stats).update({name: tensors[name] for name in expected})
        if not 0 < stats.sampled <= stats.count or stats.stride < 1:
            raise ValueError(f"counts are {tensors['counts'].tolist()}")
        return stats

    def begin(self, values: Tensor, group: ProcessGroup) -> None:
        """Fix the edges by the first batch of rank 0, for all ranks; the sums go to the device of the batch."""
        self._allocate(values.device)
        if group.rank == 0:
            self._fix_edges(values)
        vars(self).update(group.broadcast({name: getattr(self, name) for name in EDGES}))

    def reduce(self, group: ProcessGroup) -> None:
        """Sum over all processes."""
        for name in COUNTS:
            setattr(self, name, int(group.reduce_sum(torch.tensor(getattr(self, name)))))
        for name in SUMS:
            setattr(self, name, group.reduce_sum(getattr(self, name)))

    def add(self, values: Tensor) -> None:
        """Add a batch of activations, (tokens, neurons), in any float type."""
        if self.count == 0 and self.pivot.isnan().all():
            self.begin(values, ALONE)
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
            self.histogram.scatter_add_(1, bins, self.histogram.new_ones(()).expand(bins.shape))
        centred = values - self.pivot
        self.sum += centred.sum(0)
        self.square_sum += centred.square_().sum(0)

    def summarize(self) -> Summary:
        """The statistics of the tokens added so far."""
        if self.count == 0:
            raise ValueError("no token was added")
        pivot = self.pivot.double()
        shift = self.sum / self.count
        variance = (self.square_sum / self.count - shift**2).clamp_min(0)
        mean = pivot + shift
        median, peak = self._quantile(0.5), self._peak()
        return Summary(self.count, mean, variance, median, peak, second_moment=variance + mean**2)

    def _quantile(self, share: float) -> Tensor:
        """Interpolated linearly in the bin where the cumulative count crosses."""
        below = self.histogram.cumsum(1).double()
        wanted = share * self.sampled
        bin_ = (below < wanted).sum(1, keepdim=True).clamp_max(BINS - 1)
        inside = self.histogram.gather(1, bin_).double()
        before = below.gather(1, bin_) - inside
        position = bin_ + (wanted - before) / inside.clamp_min(1)
        value = self.low.double() + position[:, 0] * self.width.double()
        return torch.where(self.repeats > 0.5 * self.sampled, self.common.double(), value)

    def _peak(self) -> Tensor:
        # The end bins also count everything beyond the range, so they cannot hold the peak
        density = self.histogram.float()
        density[:, 0] = density[:, -1] = 0
        quartiles = (self._quantile(0.75) - self._quantile(0.25)).float() / self.width.clamp_min(1e-38) / 1.349
        width = (0.9 * self.sampled ** (-1 / 7) * quartiles).clamp(0.5, BINS / 8)  # balances bias and variance
        spectrum = torch.fft.rfft(density, 2 * BINS)  # padded, so that the ends do not wrap around
        smooth = _smooth(spectrum, width)
        rising = torch.arange(self.neurons, device=density.device)
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
        # Once more inside the highest hump, by its width at half height, as of a normal density
        top = smooth.argmax(1, keepdim=True)
        hump = _run_around(smooth >= smooth.gather(1, top) / 2, top)
        spread = 0.9 * self.sampled ** (-1 / 7) * hump.sum(1) / 2.355
        fine = _smooth(spectrum, torch.minimum(spread, width).clamp_min(0.5)).masked_fill(~hump, 0)
        position = _parabola_top(fine)
        value = self.low.double() + (position + 0.5) * self.width.double()
        point_mass = self.repeats > POINT_MASS * self.sampled
        return torch.where(point_mass | (self.width == 0), self.common.double(), value)


def check_tensors(tensors: Mapping[str, Tensor], **expected: tuple[tuple[int, ...], torch.dtype]) -> None:
    """Raise KeyError or ValueError unless each tensor has the expected shape and type, and finite values."""
    for name, (shape, dtype) in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.numel() and not all(math.isfinite(bound) for bound in tensor.aminmax()):
            raise ValueError(f"{name} is not finite")


def in_chunks(values: Tensor) -> Iterator[Tensor]:
    """Split a batch of activations, (tokens, neurons), into float32 chunks of a few tokens."""
    numbers = CHUNK if values.device.type == PROCESSOR else DEVICE_CHUNK
    for chunk in values.split(max(FEWEST_TOKENS, numbers // values.shape[1])):
        yield chunk.float()


def _find_edges(values: Tensor) -> tuple[Tensor, ...]:
    """The tensors that `EDGES` names, from a sample of activations, (neurons, tokens)."""
    if values.device.type == PROCESSOR:
        ordered = torch.from_numpy(numpy.sort(values.contiguous().numpy(), axis=1))  # eight times as fast as torch's
    else:
        ordered = values.sort(1).values
    last = ordered.shape[1] - 1
    low, quarter, middle, three, high = (ordered[:, round(last * at)] for at in (RANGE[0], 0.25, 0.5, 0.75, RANGE[1]))
    reach = REACH * (three - quarter)
    reach[reach == 0] = torch.inf  # most tokens are equal, as after ReLU
    low, high = torch.maximum(low, quarter - reach), torch.minimum(high, three + reach)
    return middle, low, (high - low) / BINS, _most_repeated(ordered)


def _most_repeated(ordered: Tensor) -> Tensor:
    """The value of the longest run in each sorted row."""
    position = torch.arange(ordered.shape[1], device=ordered.device)
    is_start = torch.ones_like(ordered, dtype=torch.bool)
    is_start[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run_start = torch.where(is_start, position, 0).cummax(1).values
    longest = (position - run_start).argmax(1, keepdim=True)
    return ordered.gather(1, longest)[:, 0]


def _smooth(spectrum: Tensor, deviations: Tensor) -> Tensor:
    """Convolve each row, given by its spectrum, with a normal density; deviations are per row, in bins."""
    frequency = torch.fft.rfftfreq(2 * BINS, device=deviations.device)
    exponent = -2 * (torch.pi * frequency * deviations[:, None]) ** 2
    kernel = exponent.clamp_min_(-80).exp_()  # below, results are subnormal and many times slower
    smooth: Tensor = torch.fft.irfft(spectrum * kernel, 2 * BINS)
    return smooth[:, :BINS]


def _run_around(mask: Tensor, top: Tensor) -> Tensor:
    """The true bins of each row that are connected to its top."""
    gaps = (~mask).cumsum(1)
    return mask & (gaps == gaps.gather(1, top))


def _parabola_top(density: Tensor) -> Tensor:
    """The vertex of the parabola through the highest bin and its neighbours, in bins."""
    top = density.argmax(1, keepdim=True).clamp(1, density.shape[1] - 2)
    left, middle, right = (density.gather(1, top + step)[:, 0] for step in (-1, 0, 1))
    curve = left - 2 * middle + right
    offset = torch.where(curve < 0, 0.5 * (left - right) / curve, 0.0)
    return top[:, 0] + offset.clamp(-0.5, 0.5)
