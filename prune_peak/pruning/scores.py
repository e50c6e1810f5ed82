"""Importance scores: which neurons are worth keeping. Imports no torch, because `--help` lists them.

A score is one function under `@register("name")`. `compress(score="name")` and `--score name` then use it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError, spell
from ..options import DEVIATION, ELIMINATION, FILLS, FREQUENCY, RANDOM, REAP, SCORES

if TYPE_CHECKING:
    from torch import Tensor

    from ..sites.site import Site
    from ..stats.covariance import Moments
    from ..stats.histogram import Summary

NORM_ROWS = 64  # rows that fit a processor's cache


@dataclass(frozen=True)
class Candidates:
    """What a score knows about the neurons of one site."""

    site: "Site"
    weight: "Tensor"  # (hidden, neurons), the output projection
    summary: "Summary"
    fill: "Tensor"  # (neurons,), the constants that pruned neurons are held at
    kept: int = 0  # neurons to keep
    seed: int = 0  # every site has its own
    moments: "Moments | None" = None  # with the refit, where there are more tokens than neurons


Score = Callable[[Candidates], "Tensor"]  # (neurons,): the higher, the more worth keeping


def register(name: str) -> Callable[[Score], Score]:
    """Make a score available by its name."""

    def decorate(score: Score) -> Score:
        SCORES[name] = score
        return score

    return decorate


@register(ELIMINATION)
def score_elimination(neurons: Candidates) -> "Tensor":
    """Backward elimination, given that the kept neurons are refitted; 1 for every neuron to keep, else 0."""
    from .elimination import eliminate

    assert neurons.moments is not None
    keep = eliminate(neurons.site, neurons.weight, neurons.moments, neurons.kept)
    return neurons.fill.new_zeros(neurons.fill.shape).index_fill(0, keep, 1)


@register(DEVIATION)
def score_deviation(neurons: Candidates) -> "Tensor":
    """The squared error of holding a neuron at its fill: E[(x - c)^2] * ||W_:j||^2."""
    summary = neurons.summary
    return (summary.variance + (summary.mean - neurons.fill.double()) ** 2) * _norms(neurons.weight)


@register("activation-norm")
def score_activation_norm(neurons: Candidates) -> "Tensor":
    """Wanda's criterion, summed over the outputs: E[x^2] * ||W_:j||^2. The error of a fill of zero."""
    return neurons.summary.second_moment * _norms(neurons.weight)


@register("variance")
def score_variance(neurons: Candidates) -> "Tensor":
    """FLAP's criterion: Var[x] * ||W_:j||^2. The error of a fill of the mean."""
    return neurons.summary.variance * _norms(neurons.weight)


@register("weight-norm")
def score_weight_norm(neurons: Candidates) -> "Tensor":
    """Magnitude, without activations: ||W_:j||^2."""
    return _norms(neurons.weight)


@register(REAP)
def score_reap(neurons: Candidates) -> "Tensor":
    """REAP's criterion, of whole experts: the mean of weight times norm of the output, over the tokens it serves."""
    raise _for_experts(REAP)


@register(FREQUENCY)
def score_frequency(neurons: Candidates) -> "Tensor":
    """The number of tokens that an expert serves."""
    raise _for_experts(FREQUENCY)


@register(RANDOM)
def score_random(neurons: Candidates) -> "Tensor":
    """A random order."""
    import torch

    drawn = torch.rand(neurons.weight.shape[1], generator=torch.Generator().manual_seed(neurons.seed))
    return drawn.to(neurons.weight.device)


def rank_neurons(score: str, site: "Site", weight: "Tensor", summary: "Summary", fill: str) -> "Tensor":
    """The scores of the single neurons of a site, (neurons,)."""
    values: Tensor = SCORES[score](Candidates(site, weight, summary, FILLS[fill](summary).float()))
    return values


def _for_experts(score: str) -> UsageError:
    return UsageError(
        f"{spell('score', score)} ranks whole experts ({spell('sites', 'experts')}). Choose another score."
    )


def _norms(weight: "Tensor") -> "Tensor":
    """||W_:j||^2, a few rows at a time: new pages for a copy of the whole would take ten times the arithmetic."""
    import torch

    return torch.stack([rows.float().square().sum(0) for rows in weight.split(NORM_ROWS)]).double().sum(0)
