"""Refit: the kept columns and the bias take over, by least squares, what the cut neurons did.

With d = x_cut - c the deviation of the cut neurons from their fills, the folded output misses W_cut d. Ridge regression
of W_cut d on the kept neurons gives the correction of their columns and of the bias:

    Delta = W_cut Cov(cut, keep) (Cov(keep, keep) + r s I)^-1,      delta = W_cut E[d] / (1 + r)

where s is the mean variance of a neuron and r the ridge. An infinite r is the pure fold; r -> 0 is least squares. r is
chosen by the error on held-out tokens, and the pure fold is among the choices, so the refit is never worse there. Where
the output is wide, the error is taken on random projections of it.

Which neurons to keep is decided knowing of the refit: backward elimination on the inverse covariance, where neuron j
costs ||W_:j||^2 / [Cov^-1]_jj (the optimal brain surgeon's saliency, Hassibi and Stork 1993). Half of those that stay
are those of the highest activation norm, whatever the elimination says: what others can take over on the text of the
calibration, they may not on another.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .evidence import Evidence, Knowledge, Moments
from .folding import cut_mask, fold
from .selection import Choice
from .sites import Site

ELIMINATION = "elimination"  # the score's name
RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
USUAL_RIDGE = 1e-1
ELIMINATION_RIDGE = 1e-2
PROTECTED = 0.5  # of the neurons that stay, the share that the activation norm alone decides
ELIMINATION_STEPS = 16  # neurons leave in so many equal parts; between two, the inverse is brought up to date
PROJECTIONS = 128  # of the output, that the ridge is chosen on


@dataclass(frozen=True)
class Refit:
    """How well the refit of one site went."""

    ridge: float | None  # None where the pure fold was best
    error: float  # held-out mean squared error of the output, as a share of that of the pure fold


def eliminate(site: Site, weight: Tensor, moments: Moments, kept: int) -> Tensor:
    """The neurons to keep when the rest is refitted. Sorted indices, (kept,).

    Where single neurons leave, those of the highest activation norm, E[x^2] ||W_:j||^2, stay in any case.

    Args:
        site: says which neurons leave together.
        weight: (hidden, neurons).
        moments: of the neurons.
    """
    if site.unit > 1 or site.groups > 1:
        return _eliminate_units(site, weight, moments.covariance, kept)
    second_moments = moments.variance + moments.mean.float().square()
    norms = weight.float().square().sum(0) * second_moments
    order = norms.argsort(descending=True, stable=True)
    stays, free = order.tensor_split([int(PROTECTED * kept)])
    factor = torch.linalg.cholesky(_ridged(moments.covariance[order][:, order], ELIMINATION_RIDGE))
    inverse = torch.cholesky_inverse(factor[len(stays) :, len(stays) :])  # the part of the whole inverse
    columns = weight[:, free].to(inverse.dtype)
    is_left = torch.ones(len(free), dtype=torch.bool)
    left = site.neurons - kept
    for part in range(ELIMINATION_STEPS, 0, -1):
        leaving = math.ceil(left / part)
        left -= leaving
        saliency = torch.where(is_left, columns.square().sum(0) / inverse.diagonal(), math.inf)
        out = saliency.argsort(stable=True)[:leaving]
        rows = inverse[out]
        gain = torch.linalg.solve(rows[:, out], rows)
        columns.addmm_(columns[:, out], gain, alpha=-1)
        inverse.addmm_(rows.T, gain, alpha=-1)
        is_left[out] = False
    return torch.cat([stays, free[is_left]]).sort().values


def _eliminate_units(site: Site, weight: Tensor, covariance: Tensor, kept: int) -> Tensor:
    """One unit at a time: that of the least loss, tr W_S [Cov^-1]_SS^-1 W_S', among groups that may still lose one."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_ridged(covariance, ELIMINATION_RIDGE)))
    weight = weight.to(inverse.dtype, copy=True)
    units = torch.arange(site.neurons).view(-1, site.unit)
    left = set(range(len(units)))
    each = len(units) // site.groups
    may_leave = [each - kept // (site.unit * site.groups)] * site.groups
    for _ in range(sum(may_leave)):
        numbers = [number for number in sorted(left) if may_leave[number // each]]
        members = units[numbers]
        columns = weight.T[members]  # (units, neurons of a unit, hidden)
        blocks = inverse[members[:, :, None], members[:, None, :]]
        worst = numbers[(torch.linalg.solve(blocks, columns) * columns).sum((1, 2)).argmin()]
        out = units[worst]
        gain = torch.linalg.solve(inverse[out][:, out], inverse[out])
        weight -= weight[:, out] @ gain
        inverse -= inverse[:, out] @ gain
        left.remove(worst)
        may_leave[worst // each] -= 1
    return units[sorted(left)].flatten()


class Fitting:
    """The refit of a site, for any ridge.

    Args:
        weight: (hidden, neurons), the output projection.
        bias: (hidden,) or None.
        choice: which neurons stay, and the fills of the others.
        known: of the neurons.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, choice: Choice, known: Knowledge) -> None:
        keep, cut = choice.keep, cut_mask(weight.shape[1], choice.keep).nonzero()[:, 0]
        lost = weight[:, cut].float()
        self.columns, self.folded = weight[:, keep].float(), fold(weight, bias, choice.fill, keep)
        self.mean = known.mean[keep]
        self.missed = lost.double() @ (known.mean[cut] - choice.fill[cut].double())  # (hidden,), by the fold
        self._regression = known.regress(keep, cut, lost)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The kept columns, (hidden, kept), and the bias, (hidden,), that stand in for the whole, in float32.

        Args:
            ridge: as a share of the mean variance; infinity gives the pure fold.
        """
        if ridge == math.inf:
            return self.columns, self.folded
        change = self._regression(ridge)
        shift = self.missed / (1 + ridge) - change @ self.mean
        return (self.columns + change).float(), (self.folded + shift).float()


def refit_best(weight: Tensor, bias: Tensor | None, choice: Choice, evidence: Evidence) -> tuple[Choice, Refit]:
    """The refit with the ridge that is best on held-out tokens, then fitted on all of them."""
    sketch, sketched_bias = _project(weight, bias)
    fitting = Fitting(sketch, sketched_bias, choice, evidence.fitted)

    def error(ridge: float) -> float:
        columns, offset = fitting.solve(ridge)
        return output_error(sketch, sketched_bias, replace(choice, weight=columns, bias=offset), evidence.held_out)

    errors = _walk(error)
    best = min(errors, key=lambda ridge: errors[ridge])
    columns, offset = Fitting(weight, bias, choice, evidence.whole).solve(best)
    share = errors[best] / max(errors[math.inf], 1e-300)
    return replace(choice, weight=columns, bias=offset), Refit(None if best == math.inf else best, share)


def _walk(error: Callable[[float], float]) -> dict[float, float]:
    """The errors of the pure fold, and of ridges from the usual one onwards, up and down, while they get better."""
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
    """The output projection onto a few random directions of its output; squared errors keep their mean."""
    hidden = weight.shape[0]
    if hidden <= PROJECTIONS:
        return weight, bias
    directions = torch.randn(PROJECTIONS, hidden, generator=torch.Generator().manual_seed(0)) / PROJECTIONS**0.5
    return directions @ weight.float(), None if bias is None else directions @ bias.float()


def output_error(weight: Tensor, bias: Tensor | None, choice: Choice, known: Knowledge) -> float:
    """The mean squared error of a site's output, summed over the hidden size, when a choice takes its place."""
    columns = weight[:, choice.keep] if choice.weight is None else choice.weight
    offset = fold(weight, bias, choice.fill, choice.keep) if choice.bias is None else choice.bias
    change = weight.float().clone()
    change[:, choice.keep] -= columns.float()
    return known.error(change, (0 if bias is None else bias.double()) - offset.double())


def _ridged(matrix: Tensor, ridge: float) -> Tensor:
    """The matrix with a share of its mean diagonal added to the diagonal; dead neurons leave it invertible."""
    ridged = matrix.clone()
    ridged.diagonal().add_(ridge * matrix.diagonal().mean().clamp_min(1e-30))
    return ridged
