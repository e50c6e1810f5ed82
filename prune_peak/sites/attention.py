"""Attention: whole heads are deleted (as many of every KV group), or whole KV groups."""

from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import PrunePeakError, spell
from ..models.config_keys import read_key
from ..models.families import Attention as Modules
from ..models.families import Family
from ..options import GROUP, NEURON
from .site import ALWAYS_KEPT, Site, SiteKind, Slice, has_module, measure_projection, rows_of


class Attention(SiteKind):
    """The attention of a block."""

    label: ClassVar[str] = "attention"

    def applies(self, unit: str, keep_shape: bool) -> bool:
        return unit != NEURON and not keep_shape

    def check(self, model: PreTrainedModel, family: Family) -> None:
        if family.attention is None and family.discovered:
            raise PrunePeakError(
                f"no attention whose heads can be pruned was found in {type(model).__name__} "
                f"({family.attention_unseen}). Prune its MLP ({spell('sites', 'mlp')})."
            )
        if family.attention is None or not family.attention.heads_prunable:
            instead = (
                ""
                if family.attention is None
                else f", or fold it in place at the same size ({spell('keep_shape', True)})"
            )
            raise PrunePeakError(
                f"no stock class supports fewer heads for the family {family.model_type}, so pruning them would save "
                f"nothing. Prune its MLP ({spell('sites', 'mlp')}){instead}."
            )

    def find(self, model: PreTrainedModel, family: Family, block: str, index: int, unit: str) -> list[Site]:
        attention = modules_of(family)
        name = f"{block}.{attention.output_projection}"
        if not has_module(model, name):
            return []
        groups, each, head_dim = heads = measure_heads(model, attention, block)
        whole_groups = unit == GROUP or each == 1
        query, key, value = (f"{block}.{part}" for part in (attention.query, attention.key, attention.value))
        if attention.key == attention.query:
            slices = rows_of(model, query, _owners(heads, whole_groups, attention.grouped_qkv))
        else:
            slices = rows_of(model, query) | (rows_of(model, key) | rows_of(model, value) if whole_groups else {})
        if whole_groups:
            state = model.state_dict()
            tables = [f"{block}.{table}" for table in attention.per_head_parameters]
            slices |= {table: Slice(1) for table in tables if table in state}
        for other in attention.other_inputs:
            slices |= rows_of(model, f"{block}.{other}")
        site = self.site(
            model,
            index,
            name,
            slices,
            bias_key=attention.bias_key,
            unit=each * head_dim if whole_groups else head_dim,
            groups=1 if whole_groups else groups,
            config_values={
                attention.heads_key: groups * each,
                **({attention.kv_heads_key: groups} if attention.kv_heads_key else {}),
                attention.head_dim_key: head_dim,
            },
            scaled_keys=frozenset({attention.heads_key, *([attention.kv_heads_key] if whole_groups else [])} - {None}),
            heads=heads,
        )
        return [site]

    def step(self, site: Site, multiple_of: int | None) -> int:
        return site.unit * site.groups


def modules_of(family: Family) -> Modules:
    """The module names of the family's attention."""
    assert family.attention is not None
    return family.attention


def measure_heads(model: PreTrainedModel, attention: Modules, block: str) -> tuple[int, int, int]:
    """KV groups, heads per group, neurons per head."""
    heads = read_key(model.config, attention.heads_key)
    neurons, *_ = measure_projection(model, f"{block}.{attention.output_projection}")
    head_dim = neurons // heads
    weight = f"{block}.{attention.key}.weight"
    rows = model.get_parameter(weight).shape[rows_of(model, f"{block}.{attention.key}")[weight].axis] // head_dim
    groups = (rows - heads) // 2 if attention.key == attention.query else rows
    return groups, heads // groups, head_dim


def _owners(heads: tuple[int, int, int], whole_groups: bool, grouped: bool) -> Tensor:
    """The unit of each row of a fused query-key-value projection: (rows,)."""
    groups, each, head_dim = heads
    if whole_groups:
        queries = torch.arange(groups)[:, None].expand(groups, each)
        keys = torch.arange(groups)[:, None]
    else:
        queries, keys = torch.arange(groups * each).view(groups, each), torch.full((groups, 1), ALWAYS_KEPT)
    parts = [queries, keys, keys]
    units = torch.cat(parts, dim=1).flatten() if grouped else torch.cat([part.flatten() for part in parts])
    return units.repeat_interleave(head_dim)
