"""Fold in place (--keep-shape): pruned weights become zero, shapes stay, and nothing is saved.

This works for any neurons, heads or groups, and for attention that no stock class supports with fewer heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import PrunePeakError, spell
from ..models.families import Family
from ..options import GROUP, HEAD, NEURON
from .attention import measure_heads, modules_of
from .folding import clear
from .mlp import Mlp
from .plan import SitePlan
from .site import ConfigValue, Site, SiteKind, Slice, has_module, rows_of


class InPlace(SiteKind):
    """A site whose pruned weights become zero."""

    deletes: ClassVar[bool] = False

    def applies(self, unit: str, keep_shape: bool) -> bool:
        return keep_shape

    def config(self, site: Site, kept: int) -> dict[str, ConfigValue]:
        return {}

    def size(self, site: Site, name: str, size: int, kept: int) -> int:
        return size

    def prune_tensor(self, site: Site, name: str, tensor: Tensor, plan: SitePlan) -> Tensor:
        used = torch.zeros(site.neurons, dtype=torch.bool)
        used[plan.keep] = True
        return clear(tensor, (~self.used_rows(site, name, used)).nonzero()[:, 0], site.slices[name].axis)

    def used_rows(self, site: Site, name: str, used: Tensor) -> Tensor:
        """The rows of a tensor that a used neuron needs, given the used neurons: booleans."""
        owners = site.slices[name].owners
        return used if owners is None else used[owners]

    def expand(self, site: Site, weight: Tensor, keep: Tensor) -> Tensor:
        return torch.zeros(site.hidden, site.neurons).index_copy(1, keep, weight)

    def reduce(self, weight: Tensor, keep: Tensor) -> Tensor:
        return weight[:, keep]


class InPlaceMlp(InPlace, Mlp):
    """The MLP of a block, folded in place."""


@dataclass(frozen=True)
class InPlaceAttentionSite(Site):
    """An attention site that knows which part of the heads a tensor makes."""

    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # tensor: query, key, value
    grouped_qkv: bool = False  # the fused rows are ordered by KV group


class InPlaceAttention(InPlace):
    """The attention of a block, folded in place."""

    label: ClassVar[str] = "attention"

    def check(self, model: PreTrainedModel, family: Family) -> None:
        if family.attention is None:
            reason = family.attention_unseen or "its norms span all heads"
            raise PrunePeakError(
                f"the attention of the family {family.model_type} cannot be pruned: {reason}. Prune its MLP "
                f"({spell('sites', 'mlp')})."
            )

    def find(self, model: PreTrainedModel, family: Family, block: str, index: int, unit: str) -> list[Site]:
        attention = modules_of(family)
        name = f"{block}.{attention.output_projection}"
        if not has_module(model, name):
            return []
        _, each, head_dim = heads = measure_heads(model, attention, block)
        slices: dict[str, Slice] = {}
        parts: dict[str, tuple[str, ...]] = {}
        for part in ("query", "key", "value"):
            for tensor, slice_ in rows_of(model, f"{block}.{getattr(attention, part)}").items():
                slices[tensor] = slice_
                parts[tensor] = (*parts.get(tensor, ()), part)
        site = self.site(
            model,
            index,
            name,
            slices,
            InPlaceAttentionSite,
            bias_key=attention.bias_key,
            unit={NEURON: 1, HEAD: head_dim, GROUP: each * head_dim}[unit],
            heads=heads,
            parts=parts,
            grouped_qkv=attention.grouped_qkv,
        )
        return [site]

    def step(self, site: Site, multiple_of: int | None) -> int:
        return site.unit

    def used_rows(self, site: Site, name: str, used: Tensor) -> Tensor:
        """A value row is used by any head of its group, a query row by its head, a key row by its group."""
        assert isinstance(site, InPlaceAttentionSite)
        if name not in site.parts:
            return used
        heads = used.view(site.heads)
        queries = heads.any(2, keepdim=True).expand_as(heads)
        rows = {"query": queries, "key": queries.any(1, keepdim=True), "value": heads.any(1, keepdim=True)}
        made = [rows[part] for part in site.parts[name]]
        return torch.cat(made, dim=1).flatten() if site.grouped_qkv else torch.cat([part.flatten() for part in made])
