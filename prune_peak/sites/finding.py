"""The registry of kinds of site, and the sites of a model."""

import re
from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import PrunePeakError, UsageError, spell
from ..models.families import Family, block_paths, blocks_path, find_blocks
from ..models.stream import MASKS
from ..options import HEAD
from .attention import Attention
from .blocks import Blocks
from .expert_mlp import ExpertMlp
from .experts import Experts
from .in_place import InPlaceAttention, InPlaceMlp
from .low_rank import NarrowHeads
from .mlp import Mlp
from .site import Site, SiteKind

# In the order that a block computes them
SITE_KINDS: list[SiteKind] = [
    Attention(),
    NarrowHeads(),
    InPlaceAttention(),
    Mlp(),
    InPlaceMlp(),
    ExpertMlp(),
    Experts(),
    Blocks(),
]

LARGE = 0.05  # share of a block's parameters
# Parts of blocks that no kind of site prunes, by the name of a class or of its tensors
MIXERS = {
    r"kv_b_proj": "multi-head latent attention",
    r"experts": "experts",
    r"DeltaNet|DeltaAttention|(?i:linear_?attention|lightning|retention)": "linear attention",
    r"(?i:mamba|ssm)|A_log": "Mamba",
    r"(?i)recurrent|rg_lru|lstm|rwkv": "a recurrent mixer",
    r"(?i)conv": "a convolution",
}


def labels(family: Family | None = None) -> list[str]:
    """The names of what can be pruned, in any model or in those of a family: mlp, blocks, attention, and experts."""
    return sorted(
        {kind.label for kind in SITE_KINDS if family is None or any(map(kind.exists_in, family.stacks))}, reverse=True
    )


def find_sites(
    model: PreTrainedModel,
    family: Family,
    wanted: Sequence[str] = ("mlp",),
    unit: str = HEAD,
    keep_shape: bool = False,
) -> list[Site]:
    """The sites of a model in the order they compute: block by block, attention before the MLP, then the pooler.

    Args:
        wanted: labels of kinds of site.
        unit: what leaves an attention together.
        keep_shape: fold in place.

    Raises:
        UsageError: an unknown label, or a unit that the family does not support.
        PrunePeakError: the model has no such site, or no stock class supports it smaller.
    """
    for label in wanted:
        if label not in labels():
            raise UsageError(f"{spell('sites', label)}: expected {', '.join(labels())}, or several with commas.")
    kinds = [kind for kind in SITE_KINDS if kind.label in wanted and kind.applies(unit, keep_shape)]
    if keep_shape and (lost := set(wanted) - {kind.label for kind in kinds}):
        raise UsageError(f"{spell('keep_shape', True)} cannot fold {', '.join(sorted(lost))} in place. Remove it.")
    if len(kinds) > 1 and any(kind.is_alone for kind in kinds):
        alone = next(kind.label for kind in kinds if kind.is_alone)
        raise UsageError(f"{alone} leave alone. Pass {spell('sites', alone)}, and prune the result again.")
    sites: list[Site] = []
    prefix, blocks = blocks_path(model, family).removesuffix(family.blocks), len(block_paths(model, family))
    first = 0
    able = {kind: _stacks_with(kind, model, family) for kind in kinds}
    for stack in family.stacks:
        path, count = blocks_path(model, stack), len(find_blocks(model, stack))
        pairs = [(kind, index) for index in range(count) for kind in kinds if stack in able[kind]]
        for kind, index in pairs:
            found = kind.find(model, stack, f"{path}.{index}", first + index, unit)
            sites += [replace(site, mask=MASKS[1]) for site in found] if stack.reads_decoder_ids else found
        first += count
    for stack in family.stacks:
        pooler = f"{prefix}{stack.pooler}"
        if pooler in dict(model.named_modules()):  # it has an MLP like those of the blocks
            mlps = [kind for kind in kinds if kind.label == Mlp.label]
            sites += [site for kind in mlps for site in kind.find(model, stack, pooler, blocks, unit)]
    return sites


def _stacks_with(kind: SiteKind, model: PreTrainedModel, family: Family) -> list[Family]:
    """The lists of blocks whose sites of a kind can be pruned.

    Raises:
        PrunePeakError, UsageError: there is none, with the reason for the first.
    """
    found, reasons = [], []
    for stack in family.stacks:
        try:
            kind.check(model, stack)
            found.append(stack)
        except PrunePeakError as reason:
            reasons.append(reason)
    if not found:
        raise reasons[0]
    return found


def prunable_kinds(
    model: PreTrainedModel, family: Family, unit: str = HEAD, keep_shape: bool = True
) -> tuple[str, ...]:
    """The labels of what a stock class supports smaller, or what can be folded in place; not those that go alone."""
    found = []
    for kind in SITE_KINDS:
        if kind.applies(unit, keep_shape) and not kind.is_alone:
            try:
                _stacks_with(kind, model, family)
            except PrunePeakError:
                continue
            found.append(kind.label)
    return tuple(sorted(found, reverse=True))


def find_every_site(model: PreTrainedModel, family: Family) -> list[Site]:
    """The sites of all kinds: those that can be folded in place, and those that can only be deleted."""
    in_place = prunable_kinds(model, family)
    others = [kind for kind in prunable_kinds(model, family, keep_shape=False) if kind not in in_place]
    return [*find_sites(model, family, in_place, keep_shape=True), *find_sites(model, family, others)]


def find_left_whole(model: PreTrainedModel, family: Family) -> dict[str, str]:
    """The mixers and other large parts of blocks that no site reaches, by their path in the block."""
    reached = {name for site in find_every_site(model, family) for name in site.slices}
    found: dict[tuple[str, str], int] = {}  # number of blocks
    paths = block_paths(model, family)
    for path in paths:
        block = model.get_submodule(path)
        size = sum(parameter.numel() for parameter in block.parameters())
        for name, part in block.named_children():
            names = [f"{path}.{name}.{inner}" for inner, _ in part.named_parameters()]
            linear = [inner for inner in part.modules() if isinstance(inner, nn.Linear | Conv1D)]
            is_large = sum(inner.weight.numel() for inner in linear) > LARGE * size
            words, class_name = _name_mixer(part), type(part).__name__
            if (words or is_large) and reached.isdisjoint(names):
                what = name, f"{words} ({class_name})" if words else class_name
                found[what] = found.get(what, 0) + 1
    whole: dict[str, str] = {}
    for (name, words), count in found.items():
        told = f"{words}, in {count} of {len(paths)} blocks"
        whole[name] = f"{whole[name]}; {told}" if name in whole else told
    return whole


def _name_mixer(part: nn.Module) -> str:
    """What a part of a block is, by the name of its class and those of its tensors; empty where neither tells."""
    text = " ".join([type(part).__name__, *(name for name, _ in part.named_parameters())])
    return next((words for pattern, words in MIXERS.items() if re.search(pattern, text)), "")
