"""Statistics of distributions whose mode and moments are known."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prune_peak.stats.histogram import HISTOGRAM_TOKENS, Stats, Summary

NEURONS = 64
SMOOTH_BOUND = 0.15  # of the interquartile range, from 8192 tokens, where the density is smooth at its mode
EDGE_BOUND = 0.25  # where the mode is an edge of the density, which smoothing blurs

Sampler = Callable[[int], Tensor]


def normal(tokens: int) -> Tensor:
    return torch.randn(tokens, NEURONS)


def gamma(shape: float) -> Sampler:
    return lambda tokens: torch._standard_gamma(torch.full((tokens, NEURONS), shape))


def either(share: float, first: Sampler, second: Sampler) -> Sampler:
    return lambda tokens: torch.where(torch.rand(tokens, NEURONS) < share, first(tokens), second(tokens))


def with_outlier(tokens: int) -> Tensor:
    values = normal(tokens)
    values[0] *= 1000
    return values


def with_sinks(tokens: int) -> Tensor:
    """The first token of every 32 is an attention sink: 3 % of all tokens."""
    values = normal(tokens)
    values[::32] = 3000
    return values


# name: sampler, its mode, bound
MODES: dict[str, tuple[Sampler, float, float]] = {
    "normal": (normal, 0.0, SMOOTH_BOUND),
    "normal far from zero": (lambda n: normal(n) + 1000, 1000.0, SMOOTH_BOUND),
    "gamma 2": (gamma(2.0), 1.0, SMOOTH_BOUND),
    "gamma 1.5": (gamma(1.5), 0.5, SMOOTH_BOUND),
    "lognormal 1": (lambda n: normal(n).exp(), math.exp(-1), SMOOTH_BOUND),
    "lognormal 0.5": (lambda n: (normal(n) / 2).exp(), math.exp(-0.25), SMOOTH_BOUND),
    "two humps": (either(0.6, lambda n: normal(n) / 2 - 2, lambda n: normal(n) / 2 + 2), -2.0, SMOOTH_BOUND),
    "narrow hump beside a wide one": (
        either(0.3, lambda n: normal(n) / 10 - 2, lambda n: normal(n) + 2),
        -2.0,
        SMOOTH_BOUND,
    ),
    "heavy tails": (lambda n: normal(n) * torch.nn.functional.silu(normal(n)), 0.0, SMOOTH_BOUND),
    "one outlier of a thousand": (with_outlier, 0.0, SMOOTH_BOUND),
    "attention sinks": (with_sinks, 0.0, SMOOTH_BOUND),
    "float16": (lambda n: normal(n).half(), 0.0, SMOOTH_BOUND),
    "tiny float16": (lambda n: (normal(n) * 1e-4).half(), 0.0, SMOOTH_BOUND),
    "exponential": (lambda n: torch.rand(n, NEURONS).log().neg(), 0.0, EDGE_BOUND),
    "gelu of a normal": (lambda n: torch.nn.functional.gelu(normal(n)), -0.17, EDGE_BOUND),
    "relu of a normal": (lambda n: normal(n).relu(), 0.0, 0.0),
    "constant": (lambda n: torch.full((n, NEURONS), 3.7), 3.7, 0.0),
}


def gather(sampler: Sampler, tokens: int, batch: int = 1024) -> tuple[Stats, Tensor]:
    stats = Stats(NEURONS, tokens)
    batches = [sampler(batch) for _ in range(tokens // batch)]
    for values in batches:
        stats.add(values)
    return stats, torch.cat(batches).double()


def spread(values: Tensor) -> Tensor:
    low, high = (torch.quantile(values[:8192], share, dim=0) for share in (0.25, 0.75))
    return (high - low).clamp_min(1e-12)


@pytest.mark.parametrize("tokens", [8192, 24576])
@pytest.mark.parametrize("name", MODES)
def test_peak_of_known_distributions(name: str, tokens: int) -> None:
    sampler, mode, bound = MODES[name]
    stats, values = gather(sampler, tokens)
    error = (stats.summarize().peak - torch.tensor(mode, dtype=torch.float32).double()).abs() / spread(values)
    assert error.max() <= bound, f"{name}: {error.max():.3f} of the interquartile range"


@pytest.mark.parametrize("name", MODES)
def test_moments_and_median(name: str) -> None:
    stats, values = gather(MODES[name][0], 16384)
    summary = stats.summarize()
    deviation = values.std(0).clamp_min(1e-9)
    assert ((summary.mean - values.mean(0)).abs() / deviation).max() < 1e-4
    assert torch.allclose(summary.variance, values.var(0, correction=0), rtol=1e-3, atol=1e-12)
    middle = torch.quantile(values[:, :], 0.5, dim=0) if len(values) < 2**18 else values.median(0).values
    assert ((summary.median - middle).abs() / spread(values)).max() < 0.1


def test_counts_do_not_depend_on_the_batches() -> None:
    values = torch.randn(4096, NEURONS)
    whole, parts = Stats(NEURONS, 4096 * 4), Stats(NEURONS, 4096 * 4)
    for stats, size in ((whole, 1024), (parts, 1024)):
        stats.add(values[:1024])
        for part in values[1024:].split(size if stats is whole else 100):
            stats.add(part)
    assert torch.equal(whole.histogram, parts.histogram)
    assert whole.sampled == parts.sampled
    assert_close(whole.summarize(), parts.summarize())


def assert_close(first: Summary, second: Summary) -> None:
    for name in ("mean", "variance", "median", "peak"):
        assert torch.allclose(getattr(first, name), getattr(second, name), rtol=1e-5, atol=1e-7), name


def test_memory_does_not_grow_with_tokens() -> None:
    def size(stats: Stats) -> int:
        return sum(value.nbytes for value in vars(stats).values() if isinstance(value, Tensor))

    few, many = Stats(NEURONS, 1024), Stats(NEURONS, 64 * 1024)
    few.add(torch.randn(1024, NEURONS))
    for _ in range(64):
        many.add(torch.randn(1024, NEURONS))
    assert size(few) == size(many)
    assert many.sampled <= HISTOGRAM_TOKENS


def test_summary_without_tokens() -> None:
    with pytest.raises(ValueError, match="no token"):
        Stats(1, 1).summarize()
