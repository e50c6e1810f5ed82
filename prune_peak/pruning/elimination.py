"""Backward elimination (optimal brain surgeon): which neurons to keep, given the refit.

Neuron j costs ||W_:j||^2 / [Cov^-1]_jj, the saliency of Hassibi and Stork (1993). Half of the kept neurons are those
with the highest activation norm, because a redundancy seen on the calibration text may not exist on other text.
"""

import math

import torch
from torch import Tensor

from ..sites.site import Site
from ..stats.covariance import Moments

ELIMINATION_RIDGE = 1e-2
PROTECTED = 0.5  # share of the kept neurons that the activation norm decides
ELIMINATION_STEPS = 16  # equal parts in which neurons are removed; the inverse is updated after each


def eliminate(site: Site, weight: Tensor, moments: Moments, kept: int) -> Tensor:
    """The neurons to keep, given that they are refitted: sorted indices, (kept,).

    For single neurons, those with the highest activation norm, E[x^2] ||W_:j||^2, are always kept.

    Args:
        site: its units and groups.
        weight: (hidden, neurons).
        moments: of the activations.
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
    is_left = torch.ones(len(free), dtype=torch.bool, device=free.device)
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
    """One unit at a time: that with the least loss, tr W_S [Cov^-1]_SS^-1 W_S', of the groups that still lose one."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_ridged(covariance, ELIMINATION_RIDGE)))
    weight = weight.to(inverse.dtype, copy=True)
    units = torch.arange(site.neurons, device=weight.device).view(-1, site.unit)
    is_left = torch.ones(len(units), dtype=torch.bool, device=weight.device)
    each = len(units) // site.groups
    may_leave = is_left.new_full((site.groups,), each - kept // (site.unit * site.groups), dtype=torch.int64)
    for _ in range(site.groups * (each - kept // (site.unit * site.groups))):
        numbers = (is_left & (may_leave > 0).repeat_interleave(each)).nonzero()[:, 0]
        members = units[numbers]
        columns = weight.T[members]  # (units, neurons of a unit, hidden)
        blocks = inverse[members[:, :, None], members[:, None, :]]
        losses = (torch.linalg.solve(blocks, columns) * columns).sum((1, 2))
        worst = numbers[losses.argmin(0, keepdim=True)]
        out = units[worst][0]
        gain = torch.linalg.solve(inverse[out][:, out], inverse[out])
        weight -= weight[:, out] @ gain
        inverse -= inverse[:, out] @ gain
        is_left[worst] = False
        may_leave[worst // each] -= 1
    return units[is_left].flatten()


def _ridged(matrix: Tensor, ridge: float) -> Tensor:
    """The matrix plus a share of its mean diagonal on the diagonal, invertible even with dead neurons."""
    ridged = matrix.clone()
    ridged.diagonal().add_(ridge * matrix.diagonal().mean().clamp_min(1e-30))
    return ridged
