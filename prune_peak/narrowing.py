"""Narrow heads: queries and keys of fewer dimensions, whose products are as near to those of the whole as any can be.

A head scores a query q against a key k by q'k / sqrt(d), and softmax does not see what is the same for all keys. So of
all products of rank r, the best one loses least of E[(q'(k - E k))^2] over queries and keys that were seen. With
E[q q'] = M M', Cov[k] = L L' and the singular values M'L = U S V', it is the one that keeps the first r columns of V:

    q -> V_r' L' q,     k -> V_r' L^-1 k

Both are linear in what q_proj and k_proj give, so they multiply weights and biases alike. The new scale, sqrt(r), is
made up for in the queries. Where queries or keys have no more than r directions, nothing is lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEGLIGIBLE = 1e-7  # share of the largest variance below which a direction is rounding


@dataclass(frozen=True)
class Narrowing:
    """What the queries and keys of every head are multiplied with, (heads, width, head_dim) float32."""

    query: Tensor
    key: Tensor

    def factors(self, modules: Sequence[str], tensor: str) -> Tensor | None:
        """What multiplies a tensor, given the paths of the modules of queries and keys; None where it is neither's."""
        return dict(zip(modules, (self.query, self.key), strict=True)).get(tensor.rpartition(".")[0])

    def projection(self) -> Tensor:
        """What the original's queries would be multiplied with to give the same scores, (heads, head_dim, head_dim)."""
        width, head_dim = self.query.shape[1:]
        projection: Tensor = self.key.double().mT @ self.query.double() * (head_dim / width) ** 0.5
        return projection


def narrow(queries: Tensor, keys: Tensor, width: int) -> tuple[Narrowing, float]:
    """The narrowing of all heads to `width` dimensions, and the share of the scores' variance that it loses.

    Args:
        queries: second moments of what q_proj gives, head by head, (heads, head_dim, head_dim) float64.
        keys: covariances of what k_proj gives, alike.

    Example:
        >>> moments = torch.tensor([[[1.0, 0.0], [0.0, 4.0]]], dtype=torch.float64)
        >>> narrowing, lost = narrow(moments, moments, width=1)
        >>> [round(value, 4) for value in narrowing.projection().flatten().tolist()], round(lost, 4)
        ([0.0, 0.0, 0.0, 1.0], 0.0588)
    """
    root_q, _ = _root(queries)
    root_k, inverse_k = _root(keys)
    _, values, right = torch.linalg.svd(root_q.mT @ root_k)
    first = right[:, :width]
    # queries and keys of the same size in every direction
    size = values[:, :width].clamp_min(1e-6 * values.max()).sqrt()[:, :, None]
    head_dim = values.shape[1]
    query = first @ root_k.mT / size * (width / head_dim) ** 0.5
    key = first @ inverse_k * size
    lost = values[:, width:].square().sum() / values.square().sum().clamp_min(1e-300)
    return Narrowing(query.float(), key.float()), lost.item()


def narrow_rows(tensor: Tensor, factors: Tensor) -> Tensor:
    """A weight, (heads * head_dim, hidden), or a bias, (heads * head_dim,), of fewer rows a head, in float64."""
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
