"""SitePlan: kept neurons, constants and refitted weights of one site; its tensors on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..options import ELIMINATION


@dataclass(frozen=True)
class LowRankHeads:
    """The factors of the queries and keys of every head, (heads, width, head_dim) float32."""

    query: Tensor
    key: Tensor

    def projection(self) -> Tensor:
        """The factor of the original queries that gives the same scores, (heads, head_dim, head_dim)."""
        width, head_dim = self.query.shape[1:]
        projection: Tensor = self.key.double().mT @ self.query.double() * (head_dim / width) ** 0.5
        return projection


@dataclass(frozen=True)
class SitePlan:
    """The kept neurons of one site, and the constant of every neuron."""

    keep: Tensor  # (kept,) int64, sorted
    fill: Tensor  # (neurons,) float32
    weight: Tensor | None = None  # (hidden, kept), the refitted output projection
    bias: Tensor | None = None  # (hidden,), refitted
    low_rank: LowRankHeads | None = None  # for narrower heads

    def cpu(self) -> "SitePlan":
        """The plan in the memory of the processor, from which it is written."""
        low_rank = self.low_rank and LowRankHeads(self.low_rank.query.cpu(), self.low_rank.key.cpu())
        weight, bias = (tensor if tensor is None else tensor.cpu() for tensor in (self.weight, self.bias))
        return SitePlan(self.keep.cpu(), self.fill.cpu(), weight, bias, low_rank)

    def without_weights(self) -> "SitePlan":
        """The plan without the refitted weights, small enough to keep for every site."""
        return replace(self, weight=None, bias=None)


@dataclass(frozen=True)
class RefitResult:
    """How well the refit of one site went."""

    ridge: float | None  # None where the pure fold was best
    error: float  # held-out mean squared error of the output, relative to the pure fold


@dataclass(frozen=True)
class SiteResult:
    """The plan of one site, and how it was chosen."""

    plan: SitePlan
    fill: str
    lost: float  # the pruned neurons' share of the site's weighted deviation from the fills
    refit: RefitResult | None = None  # None without the refit
    scores_lost: float | None = None  # for narrower heads: share of the attention scores' variance
    score: str = ELIMINATION  # the score that ranked the neurons


def pack_plan(plan: Mapping[str, SitePlan]) -> dict[str, Tensor]:
    """Plans by site as tensors to save: `<site>.keep`, `<site>.fill`; refitted weights are not saved."""
    tensors: dict[str, Tensor] = {}
    for name, site_plan in plan.items():
        tensors |= {f"{name}.keep": site_plan.keep, f"{name}.fill": site_plan.fill}
        if site_plan.low_rank is not None:
            tensors |= {f"{name}.query": site_plan.low_rank.query, f"{name}.key": site_plan.low_rank.key}
    return tensors


def unpack_plan(tensors: Mapping[str, Tensor]) -> dict[str, SitePlan]:
    """The inverse of `pack_plan`.

    Raises:
        ValueError: other tensors.
    """
    names = [name.removesuffix(".keep") for name in tensors if name.endswith(".keep")]
    narrowed = {name for name in names if f"{name}.query" in tensors}
    expected = {f"{name}.{part}" for name in names for part in ("keep", "fill")}
    expected |= {f"{name}.{part}" for name in narrowed for part in ("query", "key")}
    if not names or set(tensors) != expected:
        raise ValueError(
            "expected <site>.keep and <site>.fill for every site, and <site>.query and <site>.key for narrower heads"
        )
    low_rank = {name: LowRankHeads(tensors[f"{name}.query"], tensors[f"{name}.key"]) for name in narrowed}
    return {
        name: SitePlan(tensors[f"{name}.keep"], tensors[f"{name}.fill"], low_rank=low_rank.get(name)) for name in names
    }
