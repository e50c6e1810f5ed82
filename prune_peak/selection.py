"""Which neurons stay: the width that a ratio asks for, and the score that ranks."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import PrunePeakError, UsageError
from .narrowing import Narrowing
from .sites import Site
from .stats import Summary

# "Kept widths are a multiple of" by default: quantized formats and GPU kernels work in blocks of 32
MULTIPLE, SMALL_MULTIPLE, SMALL_WIDTH = 32, 8, 512

FILLS = ("peak", "mean", "median", "zero")
AUTO = "auto"  # per site, the one that is best on held-out tokens
DEVIATION = "deviation"  # the score that ranks without the refit
NORM_ROWS = 64  # so that they stay in the processor's cache


@dataclass(frozen=True)
class Choice:
    """The plan for one site: sorted indices of the kept neurons, and the value every neuron would be held at."""

    keep: Tensor  # (kept,) int64
    fill: Tensor  # (neurons,) float32
    weight: Tensor | None = None  # (hidden, kept), the refitted reader, where it was refitted
    bias: Tensor | None = None  # (hidden,)
    narrowing: Narrowing | None = None  # of queries and keys, where the heads themselves get narrower

    def without_reader(self) -> "Choice":
        """The plan alone, once the refitted reader is written: what may be held of every site at once."""
        return replace(self, weight=None, bias=None)


def pack_plan(plan: Mapping[str, Choice]) -> dict[str, Tensor]:
    """Choices by the names of their sites as tensors to save: `<site>.keep`, `<site>.fill`; no refitted readers."""
    tensors: dict[str, Tensor] = {}
    for name, choice in plan.items():
        tensors |= {f"{name}.keep": choice.keep, f"{name}.fill": choice.fill}
        if choice.narrowing is not None:
            tensors |= {f"{name}.query": choice.narrowing.query, f"{name}.key": choice.narrowing.key}
    return tensors


def unpack_plan(tensors: Mapping[str, Tensor]) -> dict[str, Choice]:
    """What `pack_plan` was given.

    Raises:
        ValueError: these are other tensors.
    """
    names = [name.removesuffix(".keep") for name in tensors if name.endswith(".keep")]
    narrowed = {name for name in names if f"{name}.query" in tensors}
    expected = {f"{name}.{part}" for name in names for part in ("keep", "fill")}
    expected |= {f"{name}.{part}" for name in narrowed for part in ("query", "key")}
    if not names or set(tensors) != expected:
        raise ValueError(
            "expected <site>.keep and <site>.fill for every site, and <site>.query and <site>.key where heads are "
            "narrower"
        )
    narrowings = {name: Narrowing(tensors[f"{name}.query"], tensors[f"{name}.key"]) for name in narrowed}
    return {
        name: Choice(tensors[f"{name}.keep"], tensors[f"{name}.fill"], narrowing=narrowings.get(name)) for name in names
    }


def kept_width(width: int, ratio: float, step: int) -> int:
    """How many of `width` neurons stay when a share of `ratio` is cut: the nearest multiple of `step`.

    Raises:
        UsageError: a ratio that is not between 0 and 1.
        PrunePeakError: a ratio so small or large that nothing would be cut, or nothing kept.

    Example:
        >>> kept_width(1536, 0.3, 32)
        1088
    """
    if not 0 < ratio < 1:
        raise UsageError(f"ratio {ratio} is the share to cut; it must lie between 0 and 1.")
    kept = round(width * (1 - ratio) / step) * step
    if not 0 < kept < width:
        raise PrunePeakError(
            f"ratio {ratio} of {width} neurons, in multiples of {step}, would "
            f"{'keep none' if kept == 0 else 'cut none'}. Choose another ratio, or a smaller --multiple-of."
        )
    return kept


def width_step(site: Site, multiple: int | None = None) -> int:
    """The neurons by which a site gets narrower: one unit from every group, or a multiple of an MLP's width."""
    if site.kind == "attention":
        return site.unit * site.groups
    if multiple is None:
        multiple = MULTIPLE if site.neurons >= SMALL_WIDTH else SMALL_MULTIPLE
    if multiple < 1:
        raise UsageError(f"--multiple-of {multiple}: expected a whole number from 1.")
    return math.lcm(multiple, site.step)


def can_fill(site: Site, fill: str) -> str:
    """The fill, or zero where no bias takes the constants of the site."""
    return fill if site.constants is not None else "zero"


def choose_fill(summary: Summary, fill: str) -> Tensor:
    """The constants of a fill by its name, (neurons,) float32."""
    if fill == "zero":
        return torch.zeros_like(summary.mean, dtype=torch.float32)
    values = {"peak": summary.peak, "mean": summary.mean, "median": summary.median}
    return values[fill].float()


def score_deviation(summary: Summary, fill: Tensor, weight: Tensor) -> Tensor:
    """The squared error that is left when a neuron is held at its fill: E[(x - c)^2] * ||W_:j||^2."""
    return (summary.variance + (summary.mean - fill.double()) ** 2) * _norms(weight)


def score_activation_norm(summary: Summary, fill: Tensor, weight: Tensor) -> Tensor:
    """Wanda's criterion summed over the outputs: E[x^2] * ||W_:j||^2. The error left by a fill of zero."""
    return summary.second_moment * _norms(weight)


def score_variance(summary: Summary, fill: Tensor, weight: Tensor) -> Tensor:
    """FLAP's criterion: Var[x] * ||W_:j||^2. The error left by a fill of the mean."""
    return summary.variance * _norms(weight)


def score_weight_norm(summary: Summary, fill: Tensor, weight: Tensor) -> Tensor:
    """Magnitude, blind to what the neurons do: ||W_:j||^2."""
    return _norms(weight)


def lost_share(summary: Summary, choice: Choice, weight: Tensor) -> float:
    """Of the deviation of all neurons from their fills, as `score_deviation` weights it, the share of those cut."""
    deviation = score_deviation(summary, choice.fill, weight)
    return 1 - (deviation[choice.keep].sum() / deviation.sum().clamp_min(1e-300)).item()


def _norms(weight: Tensor) -> Tensor:
    """||W_:j||^2, a few rows at a time: on a copy of the whole, new pages cost ten times the arithmetic."""
    return torch.stack([rows.float().square().sum(0) for rows in weight.split(NORM_ROWS)]).double().sum(0)


# name: (summary, fill (neurons,), weight (hidden, neurons)) -> (neurons,), the higher the more worth keeping
SCORES: dict[str, Callable[[Summary, Tensor, Tensor], Tensor]] = {
    DEVIATION: score_deviation,
    "activation-norm": score_activation_norm,
    "variance": score_variance,
    "weight-norm": score_weight_norm,
}
RANDOM = "random"  # the one score that needs a generator, not a function


def select(
    site: Site, summary: Summary, weight: Tensor, kept: int, fill: str, score: str = DEVIATION, seed: int = 0
) -> Choice:
    """Keep the units whose loss would hurt most, as many of every group; ties go to the lower index.

    Args:
        site: says which neurons leave together.
        weight: (hidden, neurons), the output projection.
        score: a name of `SCORES`, or "random".
        seed: of the random score; give every site its own.
    """
    values = choose_fill(summary, can_fill(site, fill))
    if score == RANDOM:
        scores = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed))
    else:
        scores = SCORES[score](summary, values, weight)
    return Choice(keep=keep_best(site, scores, kept), fill=values)


def keep_best(site: Site, scores: Tensor, kept: int) -> Tensor:
    """The sorted neurons of the units with the highest sums of scores, as many of every group: (kept,)."""
    units = scores.view(site.groups, -1, site.unit).sum(-1)
    best = units.argsort(dim=1, descending=True, stable=True)[:, : kept // (site.unit * site.groups)].sort().values
    first = torch.arange(site.groups)[:, None] * units.shape[1]
    return ((first + best).flatten()[:, None] * site.unit + torch.arange(site.unit)).flatten()
