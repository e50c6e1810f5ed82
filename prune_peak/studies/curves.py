"""Degradation curves, the areas under them, and their standard errors over windows and seeds.

A degradation is the paired change from the unchanged model on the same windows, so differences between windows cancel.
Two fills are compared on the same windows and the same neurons.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..evaluation.quality import WindowScores
from .trials import BASELINE, Trial

CROSS_ENTROPY, TOP1 = "cross_entropy", "top1"
METRICS = (CROSS_ENTROPY, TOP1)
SIGNIFICANT = 3.0  # standard errors that a significant difference exceeds; strict, because many pairs are compared


@dataclass(frozen=True)
class Curve:
    """How a model degrades as more neurons of one kind of site are held at one fill."""

    site: str
    fill: str
    metric: str
    fractions: tuple[float, ...]
    changes: Tensor  # (fractions, seeds, windows): cross-entropy gained in nats, or top-1 accuracy lost

    def points(self) -> list[tuple[float, float | None]]:
        """Mean and standard error at every fraction."""
        return [mean_and_error(change) for change in self.changes]

    def areas(self) -> Tensor:
        """The area under the curve by trapezoids, (seeds, windows)."""
        area: Tensor = torch.trapezoid(self.changes, torch.tensor(self.fractions, dtype=torch.float64), dim=0)
        return area


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean over seeds and windows, (seeds, windows), and its standard error; None for a single value.

    Both are random effects: with S seeds and W windows the variance of the mean is v_seed / S + v_window / W + v / SW,
    estimated from the mean squares of the crossed layout without replication.

    Example:
        >>> mean_and_error(torch.tensor([[1.0, 3.0], [1.0, 3.0]]))
        (2.0, 1.0)
    """
    values = values.double()
    seeds, windows = values.shape
    by_seed, by_window, mean = values.mean(1, keepdim=True), values.mean(0, keepdim=True), values.mean()
    squares = [
        count * ((means - mean) ** 2).sum() / (means.numel() - 1)
        for means, count in ((by_seed, windows), (by_window, seeds))
        if means.numel() > 1
    ]
    if not squares:
        return mean.item(), None
    total = max(squares)
    if len(squares) == 2:
        rest = ((values - by_seed - by_window + mean) ** 2).sum() / ((seeds - 1) * (windows - 1))
        total = max(total, sum(squares) - rest)  # the difference of noisy squares may fall below either
    return mean.item(), math.sqrt(float(total) / values.numel())


def build_curves(
    results: Mapping[Trial, WindowScores],
    sites: Sequence[str],
    fills: Sequence[str],
    fractions: Sequence[float],
    seeds: Sequence[int],
) -> list[Curve]:
    """A curve for every site, fill and metric."""
    baseline = results[BASELINE]

    def change(site: str, fill: str, fraction: float, seed: int, metric: str) -> Tensor:
        scores = results[Trial(site, fill, fraction, seed)] if fraction else baseline
        return scores.losses - baseline.losses if metric == CROSS_ENTROPY else baseline.hits - scores.hits

    return [
        Curve(
            site,
            fill,
            metric,
            tuple(fractions),
            torch.stack(
                [torch.stack([change(site, fill, fraction, seed, metric) for seed in seeds]) for fraction in fractions]
            ),
        )
        for site in sites
        for fill in fills
        for metric in METRICS
    ]


def compare_areas(curves: Sequence[Curve]) -> list[tuple[Curve, Curve, float, float | None]]:
    """Every two fills of a site and metric: the area of the second minus that of the first, and its standard error."""
    pairs = [(a, b) for a, b in combinations(curves, 2) if (a.site, a.metric) == (b.site, b.metric)]
    return [(a, b, *mean_and_error(b.areas() - a.areas())) for a, b in pairs]


def is_significant(difference: float, error: float | None) -> bool:
    """Whether a difference exceeds three standard errors."""
    return error is not None and abs(difference) > SIGNIFICANT * error
