"""The registry of kinds of site, and the sites of a model."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from ..errors import PrunePeakError, UsageError, spell
from ..models.families import Family, blocks_path, find_blocks
from ..options import HEAD
from .attention import Attention
from .in_place import InPlaceAttention, InPlaceMlp
from .low_rank import NarrowHeads
from .mlp import Mlp
from .site import Site, SiteKind

# In the order that a block computes them
SITE_KINDS: list[SiteKind] = [Attention(), NarrowHeads(), InPlaceAttention(), Mlp(), InPlaceMlp()]


def labels() -> list[str]:
    """The names of what can be pruned: mlp, attention."""
    return sorted({kind.label for kind in SITE_KINDS}, reverse=True)


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
    for kind in kinds:
        kind.check(model, family)
    path, blocks = blocks_path(model, family), len(find_blocks(model, family))
    pairs = [(kind, index) for index in range(blocks) for kind in kinds]
    sites = [site for kind, index in pairs for site in kind.find(model, family, f"{path}.{index}", index, unit)]
    pooler = f"{path.removesuffix(family.blocks)}{family.pooler}"
    if pooler in dict(model.named_modules()):  # it has an MLP like those of the blocks
        mlps = [kind for kind in kinds if kind.label == Mlp.label]
        sites += [site for kind in mlps for site in kind.find(model, family, pooler, blocks, unit)]
    return sites


def prunable_kinds(
    model: PreTrainedModel, family: Family, unit: str = HEAD, keep_shape: bool = True
) -> tuple[str, ...]:
    """The labels of what a stock class supports smaller, or what can be folded in place."""
    found = []
    for kind in SITE_KINDS:
        if kind.applies(unit, keep_shape):
            try:
                kind.check(model, family)
            except PrunePeakError:
                continue
            found.append(kind.label)
    return tuple(sorted(found, reverse=True))
