import math

import pytest
import torch

from prune_peak.errors import PrunePeakError, UsageError
from prune_peak.selection import kept_width, score_deviation, select
from prune_peak.stats import Stats


@pytest.mark.parametrize(
    ("width", "ratio", "multiple", "kept"),
    [
        (1536, 0.3, None, 1088),  # 1075.2, the nearest multiple of 32
        (1536, 0.3, 8, 1072),
        (384, 0.3, None, 272),  # 268.8, the nearest multiple of 8
        (100, 0.5, 1, 50),
        (100, 0.1, 8, 88),  # the kept width is the multiple, whatever is cut
    ],
)
def test_kept_width(width: int, ratio: float, multiple: int | None, kept: int) -> None:
    assert kept_width(width, ratio, multiple) == kept


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5, -0.1, math.nan, math.inf])
def test_a_ratio_outside_is_wrong_usage(ratio: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        kept_width(1024, ratio)


@pytest.mark.parametrize(("ratio", "words"), [(0.001, "cut none"), (0.999, "keep none")])
def test_a_ratio_that_does_nothing_is_refused(ratio: float, words: str) -> None:
    with pytest.raises(PrunePeakError, match=words):
        kept_width(1024, ratio)


def test_the_score_is_the_error_left_after_folding() -> None:
    values, weight, fill = torch.randn(500, 7) * torch.arange(1, 8) + 2, torch.randn(3, 7), torch.randn(7)
    stats = Stats(7, 500)
    stats.add(values)
    scores = score_deviation(stats.summarize(), fill, weight)
    for neuron in range(7):
        error = (values[:, neuron] - fill[neuron])[:, None] * weight[:, neuron]
        assert scores[neuron].item() == pytest.approx(error.square().sum(1).mean().item(), rel=1e-4)


def test_the_neurons_that_matter_stay() -> None:
    values = torch.randn(2000, 10) * torch.tensor([1.0, 9, 1, 1, 9, 1, 1, 1, 9, 1])
    stats = Stats(10, 2000)
    stats.add(values)
    choice = select(stats.summarize(), torch.ones(4, 10), kept=3, fill="mean")
    assert choice.keep.tolist() == [1, 4, 8]
    assert torch.allclose(choice.fill.double(), stats.summarize().mean, atol=1e-6)
