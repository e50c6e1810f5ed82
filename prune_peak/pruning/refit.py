"""Refit: ridge regression of the kept columns and the bias on what the pruned neurons contributed.

With d = x_cut - c the deviation of the pruned neurons from their fills, the folded output lacks W_cut d. Ridge
regression of W_cut d on the kept neurons gives the correction of their columns and of the bias:

    Delta = W_cut Cov(cut, keep) (Cov(keep, keep) + r s I)^-1,      delta = W_cut E[d] / (1 + r)

where s is the mean variance of a neuron and r the ridge. An infinite r is the pure fold; r -> 0 is least squares. r has
the smallest error on held-out tokens. The pure fold is among the candidates, so the refit is never worse there. For a
wide output, the error is measured on random projections of it.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..sites.folding import cut_mask, fold
from ..sites.plan import RefitResult, SitePlan
from ..stats.covariance import SecondOrderSplit, SecondOrderStats

RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
USUAL_RIDGE = 1e-1
PROJECTIONS = 128  # of the output, to choose the ridge on


class RefitSolver:
    """The refit of a site, for any ridge.

    Args:
        weight: (hidden, neurons), the output projection.
        bias: (hidden,) or None.
        plan: the kept neurons, and the fills of the others.
        stats: of the neurons.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, plan: SitePlan, stats: SecondOrderStats) -> None:
        keep, cut = plan.keep, cut_mask(weight.shape[1], plan.keep).nonzero()[:, 0]
        lost = weight[:, cut].float()
        self.columns, self.folded = weight[:, keep].float(), fold(weight, bias, plan.fill, keep)
        self.mean = stats.mean[keep]
        self.missed = lost.double() @ (stats.mean[cut] - plan.fill[cut].double())  # (hidden,), by the fold
        self._regression = stats.regress(keep, cut, lost)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The kept columns, (hidden, kept), and the bias, (hidden,), that replace the full projection, in float32.

        Args:
            ridge: as a share of the mean variance; infinity gives the pure fold.
        """
        if ridge == math.inf:
            return self.columns, self.folded
        change = self._regression(ridge)
        shift = self.missed / (1 + ridge) - change @ self.mean
        return (self.columns + change).float(), (self.folded + shift).float()


def refit_best(
    weight: Tensor, bias: Tensor | None, plan: SitePlan, second_order: SecondOrderSplit
) -> tuple[SitePlan, RefitResult]:
    """The refit with the best ridge on held-out tokens, fitted on all tokens."""
    sketch, sketched_bias = _project(weight, bias)
    fitting = RefitSolver(sketch, sketched_bias, plan, second_order.fitted)

    def error(ridge: float) -> float:
        columns, offset = fitting.solve(ridge)
        return output_error(sketch, sketched_bias, replace(plan, weight=columns, bias=offset), second_order.held_out)

    errors = _walk(error)
    best = min(errors, key=lambda ridge: errors[ridge])
    columns, offset = RefitSolver(weight, bias, plan, second_order.whole).solve(best)
    share = errors[best] / max(errors[math.inf], 1e-300)
    return replace(plan, weight=columns, bias=offset), RefitResult(None if best == math.inf else best, share)


def _walk(error: Callable[[float], float]) -> dict[float, float]:
    """The errors of the pure fold, and of ridges up and down from the usual one, while they decrease."""
    errors = {ridge: error(ridge) for ridge in (math.inf, USUAL_RIDGE)}
    start = RIDGES.index(USUAL_RIDGE)
    for way in (RIDGES[start + 1 :], RIDGES[:start][::-1]):
        before = errors[USUAL_RIDGE]
        for ridge in way:
            errors[ridge] = error(ridge)
            if errors[ridge] >= before:
                break
            before = errors[ridge]
    return errors


def _project(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The projection of the output onto a few random directions, which keeps the mean of squared errors."""
    hidden = weight.shape[0]
    if hidden <= PROJECTIONS:
        return weight, bias
    directions = _directions(hidden, weight.device)
    return directions @ weight.float(), None if bias is None else directions @ bias.float()


@lru_cache(maxsize=1)  # of all sites
def _directions(hidden: int, device: torch.device) -> Tensor:
    drawn: Tensor = torch.randn(PROJECTIONS, hidden, generator=torch.Generator().manual_seed(0)) / PROJECTIONS**0.5
    return drawn.to(device)


def output_error(weight: Tensor, bias: Tensor | None, plan: SitePlan, stats: SecondOrderStats) -> float:
    """The mean squared error of a site's output under a plan, summed over the hidden size."""
    columns = weight[:, plan.keep] if plan.weight is None else plan.weight
    offset = fold(weight, bias, plan.fill, plan.keep) if plan.bias is None else plan.bias
    change = weight.float().clone()
    change[:, plan.keep] -= columns.float()
    return stats.error(change, (0 if bias is None else bias.double()) - offset.double())
