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
NOBODY = -1  # owns the rows of a fused tensor that stay


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
    constants: str | None  # the bias that takes the constants; None where the class that is written has none
    bias_key: str | None = None  # the config key that opens it
    unit: int = 1
    groups: int = 1
    step: int = 1  # widths that the config can say are multiples of this
    fused: Mapping[str, Tensor] = field(default_factory=dict)  # tensors of several parts: the unit that owns each row
    in_place: bool = False  # nothing is deleted: what would be is zero
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # in place: what of the heads a tensor makes,
    by_group: bool = False  # and whether KV group by KV group
    heads: tuple[int, int, int] = (1, 1, 1)  # KV groups, heads of each, neurons of each head
    narrowed: tuple[str, ...] = ()  # paths of the modules of queries and keys, where heads get narrower

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        return f"{self.name}.bias"

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The reader's weight as (hidden, neurons), however it is stored."""
        return weight.T if self.transposed else weight

    def rows(self, name: str, keep: Tensor, size: int) -> Tensor:
        """The kept indices along the axis of a tensor in `cuts`, which is of `size`.

        Units divide the axis as they divide the neurons: with a KV group of three heads as the unit, keys and values
        have a third of the neurons' rows. In a fused tensor every row tells its unit.
        """
        if name in self.fused:
            owners = self.fused[name]
            return (torch.isin(owners, keep // self.unit) | (owners == NOBODY)).nonzero()[:, 0]
        each = size * self.unit // self.neurons
        units = keep[:: self.unit] // self.unit
        return (units[:, None] * each + torch.arange(each)).flatten()

    def size_at(self, name: str, size: int, kept: int) -> int:
        """How many indices of the axis of a cut tensor are left with `kept` neurons."""
        if self.in_place:
            return size
        staying = int((self.fused[name] == NOBODY).sum()) if name in self.fused else 0
        return staying + (size - staying) * kept // self.neurons

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
        elif name in self.fused:
            used = used[self.fused[name]]
        return (~used).nonzero()[:, 0]

    def settings_at(self, kept: int) -> dict[str, int]:
        """What the config says of this site when `kept` neurons are left."""
        return {
            key: value * kept // self.neurons if key in self.proportional else value
            for key, value in self.settings.items()
            if not self.in_place
        }


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
    if unit == NEURON and "attention" in kinds and not keep_shape and not (family.attention and family.attention.plain):
        raise UsageError(
            f"--unit {NEURON} makes heads narrower, for which queries and keys must meet as they are; in "
            f"{family.model_type} they are turned or normed first, or no stock class can hold it. Cut whole heads, or "
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


def tensors_by_block(model: PreTrainedModel, family: Family) -> dict[int | None, list[str]]:
    """The names of a model's tensors, twins apart: those of every block and of what follows them, and of all else."""
    path = f"{blocks_path(model, family)}."
    follower = path.removesuffix(f"{family.blocks}.") + f"{family.pooler}."
    twins = {twin for twin, first in model.all_tied_weights_keys.items() if twin != first}
    blocks = len(find_blocks(model, family))
    parts: dict[int | None, list[str]] = {None: [], **{block: [] for block in range(blocks)}}
    for name in model.state_dict():
        if name.startswith(path):
            parts[int(name.removeprefix(path).split(".")[0])].append(name)
        elif name not in twins:
            parts.setdefault(blocks if name.startswith(follower) else None, []).append(name)
    return parts


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
    cuts, fused = {f"{name}.weight": 0 if transposed else 1}, {}
    for maker in mlp.makers:
        for tensor, axis in _rows_of(model, f"{block}.{maker}").items():
            cuts[tensor] = axis
            size = model.get_parameter(tensor).shape[axis]
            if size != neurons:  # gate and up in one module
                fused[tensor] = torch.arange(neurons).repeat(size // neurons)
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
        constants=f"{block}.{mlp.constants or mlp.reader}.bias",
        bias_key=mlp.bias_key,
        step=neurons // said,
        fused=fused,
    )


def _find_attention(model: PreTrainedModel, attention: Attention, block: str, index: int, unit: str) -> Site:
    name = f"{block}.{attention.reader}"
    neurons, hidden, transposed = _measure_reader(model, name)
    pairs, each, head_dim = _measure_heads(model, attention, block)
    heads = pairs * each
    cuts = {f"{name}.weight": 0 if transposed else 1} | _rows_of(model, f"{block}.{attention.query}")
    if unit == NEURON:
        keys = _rows_of(model, f"{block}.{attention.key}")
        return Site(
            "attention",
            index,
            name,
            neurons,
            hidden,
            cuts | keys | _rows_of(model, f"{block}.{attention.value}"),
            transposed,
            {"num_attention_heads": heads, "head_dim": head_dim},
            frozenset({"head_dim"}),
            constants=f"{name}.bias",
            bias_key=attention.bias_key,
            groups=heads,
            narrowed=(f"{block}.{attention.query}", f"{block}.{attention.key}"),
        )
    proportional = {"num_attention_heads"}
    pairs_leave = unit == GROUP or pairs == heads
    if pairs_leave:
        cuts |= _rows_of(model, f"{block}.{attention.key}") | _rows_of(model, f"{block}.{attention.value}")
        cuts |= {f"{block}.{table}": 1 for table in attention.tables if f"{block}.{table}" in model.state_dict()}
        proportional.add("num_key_value_heads")
    fused = {}
    if attention.key == attention.query:
        owners = _owners(pairs, each, head_dim, pairs_leave, attention.by_group)
        fused = dict.fromkeys(_rows_of(model, f"{block}.{attention.query}"), owners)
    return Site(
        "attention",
        index,
        name,
        neurons,
        hidden,
        cuts,
        transposed,
        {"num_attention_heads": heads, "num_key_value_heads": pairs, "head_dim": head_dim},
        frozenset(proportional),
        constants=f"{name}.bias",
        bias_key=attention.bias_key,
        unit=neurons // pairs if pairs_leave else head_dim,
        groups=1 if pairs_leave else pairs,
        fused=fused,
    )


def _find_attention_in_place(model: PreTrainedModel, attention: Attention, block: str, index: int, unit: str) -> Site:
    """Any neurons, heads or groups: shapes stay, so they need not be regular."""
    name = f"{block}.{attention.reader}"
    neurons, hidden, transposed = _measure_reader(model, name)
    pairs, each, head_dim = _measure_heads(model, attention, block)
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
        constants=f"{name}.bias",
        bias_key=attention.bias_key,
        unit={NEURON: 1, HEAD: head_dim, GROUP: neurons // pairs}[unit],
        parts=parts,
        by_group=attention.by_group,
        heads=(pairs, each, head_dim),
    )


def _owners(pairs: int, each: int, head_dim: int, pairs_leave: bool, by_group: bool) -> Tensor:
    """The unit that owns each row of a module that makes queries, keys and values: (rows,)."""
    if pairs_leave:
        queries = torch.arange(pairs)[:, None].expand(pairs, each)
        keys = torch.arange(pairs)[:, None]
    else:
        queries, keys = torch.arange(pairs * each).view(pairs, each), torch.full((pairs, 1), NOBODY)
    parts = [queries, keys, keys]
    heads = torch.cat(parts, dim=1).flatten() if by_group else torch.cat([part.flatten() for part in parts])
    return heads.repeat_interleave(head_dim)


def _measure_heads(model: PreTrainedModel, attention: Attention, block: str) -> tuple[int, int, int]:
    """KV groups, heads of each, neurons of each head."""
    heads = model.config.num_attention_heads
    neurons, _, _ = _measure_reader(model, f"{block}.{attention.reader}")
    head_dim = neurons // heads
    weight = f"{block}.{attention.key}.weight"
    rows = model.get_parameter(weight).shape[_rows_of(model, f"{block}.{attention.key}")[weight]] // head_dim
    pairs = (rows - heads) // 2 if attention.key == attention.query else rows
    return pairs, heads // pairs, head_dim


def _measure_reader(model: PreTrainedModel, name: str) -> tuple[int, int, bool]:
    """Neurons, hidden size, and whether it is a Conv1D."""
    try:
        reader = model.get_submodule(name)
    except AttributeError:
        raise PrunePeakError(f"this {model.config.model_type} has no {name}: its blocks are of another kind.") from None
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
