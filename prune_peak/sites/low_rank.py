"""Narrower heads: every head keeps fewer value neurons, and its query-key products are of lower rank.

A head scores a query q against a key k by q'k / sqrt(d), and softmax ignores what is the same for all keys. Of all
products of rank r, the best one minimizes E[(q'(k - E k))^2] over queries and keys of the calibration. With
E[q q'] = M M', Cov[k] = L L' and the singular values M'L = U S V', it keeps the first r columns of V:

    q -> V_r' L' q,     k -> V_r' L^-1 k

Both are linear in the outputs of q_proj and k_proj, so they multiply weights and biases alike. The queries also absorb
the new scale, sqrt(r). Where queries or keys have at most r directions, nothing is lost.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UsageError, spell
from ..models.families import Family
from ..options import NEURON
from .attention import Attention, measure_heads, modules_of
from .hooks import held, projected
from .plan import LowRankHeads, SitePlan
from .site import Site, rows_of

NEGLIGIBLE = 1e-7  # share of the largest variance below which a direction is rounding


class NarrowHeads(Attention):
    """The attention of a block, whose heads become narrower."""

    def applies(self, unit: str, keep_shape: bool) -> bool:
        return unit == NEURON and not keep_shape

    def check(self, model: PreTrainedModel, family: Family) -> None:
        if family.attention is None or not family.attention.head_dim_prunable:
            raise UsageError(
                f"{spell('unit', NEURON)} makes heads narrower, which requires attention without rotary positions and "
                f"norms of queries and keys; {family.model_type} has them, or no stock class supports it. Prune whole "
                f"heads, or fold in place at the same size ({spell('keep_shape', True)})."
            )

    def find(self, model: PreTrainedModel, family: Family, block: str, index: int, unit: str) -> list[Site]:
        attention = modules_of(family)
        name = f"{block}.{attention.output_projection}"
        groups, each, head_dim = heads = measure_heads(model, attention, block)
        query, key, value = (f"{block}.{part}" for part in (attention.query, attention.key, attention.value))
        site = self.site(
            model,
            index,
            name,
            rows_of(model, query) | rows_of(model, key) | rows_of(model, value),
            bias_key=attention.bias_key,
            groups=groups * each,
            config_values={"num_attention_heads": groups * each, "head_dim": head_dim},
            scaled_keys=frozenset({"head_dim"}),
            heads=heads,
            observed_outputs=(query, key),
        )
        return [site]

    def complete(
        self, site: Site, plan: SitePlan, outputs: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[SitePlan, float | None]:
        (query_mean, query_covariance), (_, key_covariance) = outputs
        means = query_mean.view(site.groups, -1)
        seconds = _by_head(query_covariance, site.groups) + means[:, :, None] * means[:, None, :]
        width = len(plan.keep) // site.groups
        low_rank, lost = reduce_rank(seconds, _by_head(key_covariance, site.groups), width)
        return replace(plan, low_rank=low_rank), lost

    def fits(self, site: Site, plan: SitePlan) -> bool:
        shape = (site.groups, len(plan.keep) // site.groups, site.neurons // site.groups)
        return plan.low_rank is not None and plan.low_rank.query.shape == plan.low_rank.key.shape == shape

    def prune_tensor(self, site: Site, name: str, tensor: Tensor, plan: SitePlan) -> Tensor:
        assert plan.low_rank is not None
        query, key = site.observed_outputs
        factors = {query: plan.low_rank.query, key: plan.low_rank.key}.get(name.rpartition(".")[0])
        return super().prune_tensor(site, name, tensor, plan) if factors is None else project_rows(tensor, factors)

    @contextmanager
    def hold(self, model: nn.Module, site: Site, plan: SitePlan) -> Iterator[None]:
        """The queries are projected, so that they score the keys as the narrower ones do."""
        assert plan.low_rank is not None
        query = model.get_submodule(site.observed_outputs[0])
        with held(model.get_submodule(site.name), plan), projected(query, plan.low_rank.projection()):
            yield


def reduce_rank(queries: Tensor, keys: Tensor, width: int) -> tuple[LowRankHeads, float]:
    """The best factors of `width` dimensions for all heads, and the share of the scores' variance that is lost.

    Args:
        queries: second moments of the output of q_proj by head, (heads, head_dim, head_dim) float64.
        keys: covariances of the output of k_proj, alike.

    Example:
        >>> moments = torch.tensor([[[1.0, 0.0], [0.0, 4.0]]], dtype=torch.float64)
        >>> low_rank, lost = reduce_rank(moments, moments, width=1)
        >>> [round(value, 4) for value in low_rank.projection().flatten().tolist()], round(lost, 4)
        ([0.0, 0.0, 0.0, 1.0], 0.0588)
    """
    root_q, _ = _root(queries)
    root_k, inverse_k = _root(keys)
    _, values, right = torch.linalg.svd(root_q.mT @ root_k)
    first = right[:, :width]
    # gives queries and keys the same size in every direction
    size = values[:, :width].clamp_min(1e-6 * values.max()).sqrt()[:, :, None]
    head_dim = values.shape[1]
    query = first @ root_k.mT / size * (width / head_dim) ** 0.5
    key = first @ inverse_k * size
    lost = values[:, width:].square().sum() / values.square().sum().clamp_min(1e-300)
    return LowRankHeads(query.float(), key.float()), lost.item()


def project_rows(tensor: Tensor, factors: Tensor) -> Tensor:
    """A weight, (heads * head_dim, hidden), or a bias, (heads * head_dim,), with fewer rows per head, in float64."""
    heads, _, head_dim = factors.shape
    rows = factors.double() @ tensor.double().view(heads, head_dim, -1)
    return rows.flatten(0, 1).view(-1, *tensor.shape[1:])


def _root(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """L with L L' = A, and its (pseudo-)inverse."""
    values, vectors = torch.linalg.eigh(matrices)
    kept = values > NEGLIGIBLE * values.amax(1, keepdim=True)
    roots = values.clamp_min(0).sqrt() * kept
    inverses = torch.where(kept, 1 / roots.clamp_min(1e-300), 0.0)
    return vectors * roots[:, None, :], inverses[:, :, None] * vectors.mT


def _by_head(matrix: Tensor, heads: int) -> Tensor:
    """The diagonal blocks of single heads, (heads, head_dim, head_dim) float64."""
    head_dim = len(matrix) // heads
    blocks = matrix.view(heads, head_dim, heads, head_dim)
    return torch.stack([blocks[head, :, head] for head in range(heads)]).double()
