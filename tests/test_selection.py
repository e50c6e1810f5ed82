import math

import pytest
import torch

from prune_peak.errors import PrunePeakError, UsageError
from prune_peak.options import Budget
from prune_peak.pruning.budget import kept_width
from prune_peak.pruning.scores import Candidates, score_deviation
from prune_peak.pruning.site_pruning import keep_best, select
from prune_peak.sites.attention import Attention
from prune_peak.sites.mlp import Mlp
from prune_peak.sites.site import Site, Slice
from prune_peak.stats.histogram import Stats


def site_of(neurons: int, unit: int = 1, groups: int = 1) -> Site:
    """A site without a model."""
    kind = Mlp() if unit == 1 else Attention()
    slices = {"keys": Slice(0)}
    return Site(kind, 0, "out", neurons, 6, False, slices, folded_into="out.bias", unit=unit, groups=groups)


@pytest.mark.parametrize(
    ("width", "ratio", "step", "kept"),
    [
        (1536, 0.3, 32, 1088),  # 1075.2, the nearest multiple of 32
        (1536, 0.3, 8, 1072),
        (384, 0.3, 8, 272),  # 268.8, the nearest multiple of 8
        (100, 0.5, 1, 50),
        (100, 0.1, 8, 88),  # the kept width is the multiple, whatever is cut
    ],
)
def test_kept_width(width: int, ratio: float, step: int, kept: int) -> None:
    assert kept_width(width, ratio, step) == kept


@pytest.mark.parametrize(("neurons", "multiple", "step"), [(1536, None, 32), (384, None, 8), (1536, 8, 8)])
def test_mlp_step(neurons: int, multiple: int | None, step: int) -> None:
    assert site_of(neurons).kind.step(site_of(neurons), multiple) == step


def test_whole_heads_of_every_group() -> None:
    site = site_of(24, unit=2, groups=3)  # three groups of four heads of two neurons
    assert site.kind.step(site, None) == 6
    scores = torch.tensor([5.0, 1, 0, 0, 2, 2, 9, 0, *[0.0] * 8, 1, 1, 0, 0, 3, 0, 0, 5])
    assert keep_best(site, scores, 12).tolist() == [0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23]
    assert site.rows("keys", torch.tensor([0, 1, 6, 7]), 12).tolist() == [0, 3]  # a tensor with half as many rows


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5, -0.1, math.nan, math.inf])
def test_ratio_outside_0_and_1(ratio: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        Budget(ratio={"mlp": ratio, "attention": 0.5})


@pytest.mark.parametrize(("ratio", "words"), [(0.001, "prune none"), (0.999, "keep none")])
def test_ratio_without_effect(ratio: float, words: str) -> None:
    with pytest.raises(PrunePeakError, match=words):
        kept_width(1024, ratio, 32)


def test_deviation_is_the_error_of_the_fold() -> None:
    values, weight, fill = torch.randn(500, 7) * torch.arange(1, 8) + 2, torch.randn(3, 7), torch.randn(7)
    stats = Stats(7, 500)
    stats.add(values)
    scores = score_deviation(Candidates(site_of(7), weight, stats.summarize(), fill))
    for neuron in range(7):
        error = (values[:, neuron] - fill[neuron])[:, None] * weight[:, neuron]
        assert scores[neuron].item() == pytest.approx(error.square().sum(1).mean().item(), rel=1e-4)


def test_important_neurons_are_kept() -> None:
    values = torch.randn(2000, 10) * torch.tensor([1.0, 9, 1, 1, 9, 1, 1, 1, 9, 1])
    stats = Stats(10, 2000)
    stats.add(values)
    choice = select(site_of(10), stats.summarize(), torch.ones(4, 10), kept=3, fill="mean")
    assert choice.keep.tolist() == [1, 4, 8]
    assert torch.allclose(choice.fill.double(), stats.summarize().mean, atol=1e-6)
