"""A row of the table resolved on one model: where its neurons are made, and where they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import PrunePeakError, UsageError
from .families import Attention, Family

KINDS = ("mlp", "attention")
HEAD, GROUP, NEURON = UNITS = ("head", "group", "neuron")  # what leaves an attention together


@dataclass(frozen=True)
class Site:
    """One output projection and the neurons it reads.

    Neurons leave in units (a head's, a KV group's; in an MLP each alone), and the same number of units leaves every one
    of `groups` equal parts, so that what is left has the regular shape that stock classes hold.
    """

    kind: str
    block: int  # the number of blocks, for what follows them
    name: str  # path of the reading module, as `model.get_submodule` takes it
    neurons: int
    hidden: int
    cuts: Mapping[str, int]  # every tensor with an axis that the units divide, and that axis
    transposed: bool  # the reader is a Conv1D, stored as (neurons, hidden)
    settings: Mapping[str, int]  # config keys of widths and counts, as they stand
    proportional: frozenset[str]  # those of them that shrink with the neurons
    bias_key: str | None = None  # the config key that opens the reader's bias
    unit: int = 1
    groups: int = 1
    step: int = 1  # widths that the config can say are multiples of this
    in_place: bool = False  # nothing is deleted: what would be is zero
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # in place: what of the heads a tensor makes,
    by_group: bool = False  # and whether KV group by KV group
    heads: tuple[int, int, int] = (1, 1, 1)  # KV groups, heads of each, neurons of each head

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        return f"{self.name}.bias"

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The reader's weight as (hidden, neurons), however it is stored."""
        return weight.T if self.transposed else weight

    def rows(self, keep: Tensor, size: int) -> Tensor:
        """The kept indices along an axis of `size` that the units divide, as they divide the neurons.

        Example: with a KV group of three heads as the unit, keys and values have a third of the neurons' rows.
        """
        each = size * self.unit // self.neurons
        units = keep[:: self.unit] // self.unit
        return (units[:, None] * each + torch.arange(each)).flatten()

    def idle(self, name: str, keep: Tensor) -> Tensor:
        """The indices of a tensor along its axis in `cuts` that serve cut neurons alone.

        Example: a value row of a KV group is idle where all heads of the group lose that neuron, a query row where the
        whole head goes, a key row where the whole group does.
        """
        used = torch.zeros(self.neurons, dtype=torch.bool)
        used[keep] = True
        if name in self.parts:
            heads = used.view(self.heads)
            queries = heads.any(2, keepdim=True).expand_as(heads)
            values = heads.any(1, keepdim=True)
            rows = {"query": queries, "key": queries.any(1, keepdim=True), "value": values}
            makes = [rows[part] for part in self.parts[name]]
            used = torch.cat(makes, dim=1).flatten() if self.by_group else torch.cat([part.flatten() for part in makes])
        return (~used).nonzero()[:, 0]

    def settings_at(self, kept: int) -> dict[str, object]:
        """What the config says of this site when `kept` neurons are left, with a bias to fold into."""
        settings: dict[str, object] = {
            key: value * kept // self.neurons if key in self.proportional else value
            for key, value in self.settings.items()
            if not self.in_place
        }
        return settings if self.bias_key is None else settings | {self.bias_key: True}


def find_sites(
    model: PreTrainedModel,
    family: Family,
    kinds: Sequence[str] = ("mlp",),
    unit: str = HEAD,
    keep_shape: bool = False,
) -> list[Site]:
    """The sites of a model in the order they compute: block by block, attention before the MLP, then the pooler.

    Args:
        kinds: of site.
        unit: what leaves an attention together.
        keep_shape: fold in place, where shapes put no limit on what is cut.

    Raises:
        UsageError: a kind or unit of another name, or a unit that would give every head its own width.
        PrunePeakError: no stock class can hold a narrower attention of this family.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"--sites {kind}: expected {', '.join(KINDS)}, or both with a comma between.")
    if unit not in UNITS:
        raise UsageError(f"--unit {unit}: expected one of {', '.join(UNITS)}.")
    if unit == NEURON and "attention" in kinds and not keep_shape:
        raise UsageError(
            f"--unit {NEURON} leaves heads of different widths, which no stock class can hold. Cut whole heads, or "
            "fold in place, at the same size (--keep-shape)."
        )
    path = blocks_path(model, family)
    modules = dict(model.named_modules())
    if f"{path}.0.{family.mlp.reader}" not in modules:
        raise PrunePeakError(
            f"this {family.model_type} has no {family.mlp.reader} in its blocks (an MLP of another kind, such as "
            "DINOv2's SwiGLU), which prune-peak does not know."
        )
    sites = []
    for index in range(len(find_blocks(model, family))):
        if "attention" in kinds:
            if family.attention is None or (family.attention.fixed and not keep_shape):
                raise PrunePeakError(_no_narrower(family))
            find = _find_attention_in_place if keep_shape else _find_attention
            sites.append(find(model, family.attention, f"{path}.{index}", index, unit))
        if "mlp" in kinds:
            sites.append(_find_mlp(model, family, f"{path}.{index}", index))
    pooler = f"{path.removesuffix(family.blocks)}{family.pooler}"
    if "mlp" in kinds and pooler in modules:
        sites.append(_find_mlp(model, family, pooler, index + 1))
    return [replace(site, in_place=True) for site in sites] if keep_shape else sites


def _no_narrower(family: Family) -> str:
    reason = f"no stock class can hold a narrower attention of the family {family.model_type}"
    instead = "" if family.attention is None else ", or fold it in place, at the same size (--keep-shape)"
    return f"{reason}, so nothing would be saved; cut its MLP (--sites mlp){instead}."


def cuttable_kinds(family: Family, keep_shape: bool = False) -> tuple[str, ...]:
    """The kinds of site that a stock class can hold smaller, or that can be folded in place."""
    if family.attention is None or (family.attention.fixed and not keep_shape):
        return ("mlp",)
    return KINDS


def _find_mlp(model: PreTrainedModel, family: Family, block: str, index: int) -> Site:
    mlp = family.mlp
    name = f"{block}.{mlp.reader}"
    neurons, hidden, transposed = _measure_reader(model, name)
    cuts = {f"{name}.weight": 0 if transposed else 1}
    for maker in mlp.makers:
        cuts |= _rows_of(model, f"{block}.{maker}")
    # DINOv2's config holds a ratio to the hidden size, and only whole ones
    said = getattr(model.config, mlp.width_key) or neurons
    return Site(
        "mlp",
        index,
        name,
        neurons,
        hidden,
        cuts,
        transposed,
        {mlp.width_key: said},
        frozenset({mlp.width_key}),
        bias_key=mlp.bias_key,
        step=neurons // said,
    )


def _find_attention(model: PreTrainedModel, attention: Attention, block: str, index: int, unit: str) -> Site:
    config = model.config
    name = f"{block}.{attention.reader}"
    neurons, hidden, transposed = _measure_reader(model, name)
    heads = config.num_attention_heads
    pairs = getattr(config, "num_key_value_heads", None) or heads  # of keys and values
    head_dim = neurons // heads
    cuts = {f"{name}.weight": 0 if transposed else 1} | _rows_of(model, f"{block}.{attention.query}")
    settings = {"num_attention_heads": heads, "head_dim": head_dim}
    if hasattr(config, "num_key_value_heads"):
        settings["num_key_value_heads"] = pairs
    proportional = {"num_attention_heads"}
    pairs_leave = unit == GROUP or pairs == heads
    if pairs_leave:
        cuts |= _rows_of(model, f"{block}.{attention.key}") | _rows_of(model, f"{block}.{attention.value}")
        cuts |= {f"{block}.{table}": 1 for table in attention.tables if f"{block}.{table}" in model.state_dict()}
        proportional.add("num_key_value_heads")
    return Site(
        "attention",
        index,
        name,
        neurons,
        hidden,
        cuts,
        transposed,
        settings,
        frozenset(proportional),
        bias_key=attention.bias_key,
        unit=neurons // pairs if pairs_leave else head_dim,
        groups=1 if pairs_leave else pairs,
    )


def _find_attention_in_place(model: PreTrainedModel, attention: Attention, block: str, index: int, unit: str) -> Site:
    """Any neurons, heads or groups: shapes stay, so they need not be regular."""
    config, name = model.config, f"{block}.{attention.reader}"
    neurons, hidden, transposed = _measure_reader(model, name)
    heads = config.num_attention_heads
    pairs = getattr(config, "num_key_value_heads", None) or heads  # of keys and values
    cuts = {f"{name}.weight": 0 if transposed else 1}
    parts: dict[str, tuple[str, ...]] = {}
    for part, maker in (("query", attention.query), ("key", attention.key), ("value", attention.value)):
        for tensor, axis in _rows_of(model, f"{block}.{maker}").items():
            cuts[tensor] = axis
            parts[tensor] = (*parts.get(tensor, ()), part)
    return Site(
        "attention",
        index,
        name,
        neurons,
        hidden,
        cuts,
        transposed,
        {},
        frozenset(),
        bias_key=attention.bias_key,
        unit={NEURON: 1, HEAD: neurons // heads, GROUP: neurons // pairs}[unit],
        parts=parts,
        by_group=attention.by_group,
        heads=(pairs, heads // pairs, neurons // heads),
    )


def _measure_reader(model: PreTrainedModel, name: str) -> tuple[int, int, bool]:
    """Neurons, hidden size, and whether it is a Conv1D."""
    reader = model.get_submodule(name)
    assert isinstance(reader.weight, nn.Parameter)
    transposed = isinstance(reader, Conv1D)
    neurons, hidden = reader.weight.shape if transposed else reader.weight.shape[::-1]
    return neurons, hidden, transposed


def _rows_of(model: PreTrainedModel, name: str) -> dict[str, int]:
    """The tensors of a module that makes neurons, with their axes."""
    maker = model.get_submodule(name)
    axes = {f"{name}.weight": 1 if isinstance(maker, Conv1D) else 0}
    return axes if maker.bias is None else axes | {f"{name}.bias": 0}


def blocks_path(model: PreTrainedModel, family: Family) -> str:
    """Path of the list of blocks from the model itself, which may or may not be its own body."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return prefix + family.blocks


def find_blocks(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """The list of blocks itself."""
    blocks = model.get_submodule(blocks_path(model, family))
    assert isinstance(blocks, nn.ModuleList)
    return blocks
