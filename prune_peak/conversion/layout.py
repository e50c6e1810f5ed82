"""Conversion: the class that is written; name, shape and dtype of every tensor to write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.families import FAMILIES, Family, blocks_path, computed_names, tensors_by_block
from ..models.loading import ModelSpec
from ..options import OWN
from ..sites.plan import SitePlan
from ..sites.site import Site
from .mappings import ClassMapping, ConfigDict, UnsupportedClass

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name: shape and dtype


@dataclass(frozen=True)
class Conversion:
    """The class and config that are written, and how the source's tensors are converted."""

    source: ModelSpec
    output_class: str  # a name of `OUTPUT_CLASSES`, or "own"
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    meta_model: PreTrainedModel  # the class without weights
    sites: tuple[Site, ...]  # that are pruned; without `folded_into` where the class has no bias for the constants
    kept: Mapping[str, int]  # neurons, by the name of the site
    mapping: ClassMapping | None = None
    config_dict: ConfigDict | None = None  # the source's config in the keys of the class
    reason: str = ""  # what the preferred classes lack; empty where this is the first
    block_map: Sequence[int | None] | None = None  # the new number of every block, None for a removed one; same numbers

    @property
    def family(self) -> Family:
        """What can be pruned in the class that is written."""
        return self.source.family if self.output_class == OWN else FAMILIES[self.config.model_type]

    @property
    def zero_filled(self) -> tuple[str, ...]:
        """The kinds of site whose constants must be zero, because the class has no bias for them."""
        return tuple(
            sorted({site.label for site in self.sites if site.folded_into is None and site.kind.holds_constants})
        )

    @cached_property
    def layout(self) -> Layout:
        """Name, shape and dtype of every tensor to write.

        Raises:
            UnsupportedClass: the class lacks a tensor, needs one that does not exist, or has another shape.
        """
        state = self.meta_model.state_dict()
        tied = {name: first for name, first in self.meta_model.all_tied_weights_keys.items() if name != first}
        converted: dict[str, Tensor] = {}
        source = self.source.meta_model.state_dict()
        for block, names in tensors_by_block(self.source.meta_model, self.source.family).items():
            converted |= self.convert(block, self._pruned_shapes(block, {name: source[name] for name in names}))
        layout: Layout = {}
        class_name = self.model_class.__name__
        for name, empty in state.items():
            if name in tied or name in computed_names(self.meta_model):
                continue
            shape = tuple(empty.shape)
            if name in converted:
                if shape != tuple(converted[name].shape):
                    raise UnsupportedClass(
                        f"{class_name} has {name} as {shape}, the pruned one is {tuple(converted[name].shape)}"
                    )
                dtype = converted[name].dtype
            elif name.endswith(".bias") and (weight := name.removesuffix("bias") + "weight") in {*converted, *tied}:
                dtype = converted[tied.get(weight, weight)].dtype
            else:
                raise UnsupportedClass(f"{class_name} needs {name}, which {self.source.name} does not have")
            layout[name] = (shape, dtype)
        lost = [name for name in converted if name not in layout and name not in tied]
        if lost:
            raise UnsupportedClass(f"{class_name} does not have {', '.join(lost[:3])}")
        return layout

    @property
    def layout_bytes(self) -> int:
        """The size of all tensors to write."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.layout.values())

    def _pruned_shapes(self, block: int | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The meta tensors of a block (None: outside the blocks) in their pruned shapes."""
        pruned = {name: tensor.to(self.source.dtype_of(name)) for name, tensor in tensors.items()}
        for site in self.sites:
            if site.block != block:
                continue
            for name, slice_ in site.slices.items():
                shape = list(pruned[name].shape)
                size = tensors[name].shape[slice_.axis]
                shape[slice_.axis] = site.kind.size(site, name, size, self.kept[site.name])
                pruned[name] = pruned[name].new_empty(shape)
            if site.folded_into is not None and site.folded_into not in pruned:
                pruned[site.folded_into] = pruned[site.weight].new_empty(site.hidden)
        return pruned

    def prune(
        self, block: int | None, tensors: Mapping[str, Tensor], plan: Mapping[str, SitePlan]
    ) -> dict[str, Tensor]:
        """The tensors of a source block (None: outside the blocks), pruned by a plan and converted."""
        sites = [site for site in self.sites if site.block == block]
        # a bias that also takes another site's constants takes its own first
        sites.sort(key=lambda site: site.folded_into != site.bias)
        for kind, alike in groupby(sites, lambda site: site.kind):
            tensors = kind.prune_together(tensors, list(alike), plan)
        return self.convert(block, tensors)

    def convert(self, block: int | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pruned tensors of a source block (None: outside the blocks), as the class has them."""
        family, written = self.source.family, self.family
        source_path, path = blocks_path(self.source.meta_model, family), blocks_path(self.meta_model, written)
        if block is None:
            source_path, path = source_path.removesuffix(family.blocks), path.removesuffix(written.blocks)
        else:
            is_mapped = self.block_map is not None and block < len(self.block_map)
            number = self.block_map[block] if is_mapped and self.block_map is not None else block
            if number is None:
                return {}
            source_path, path = f"{source_path}.{block}.", f"{path}.{number}."
        inside = {
            name.removeprefix(source_path): tensor for name, tensor in tensors.items() if name.startswith(source_path)
        }
        outside = {name: tensor for name, tensor in tensors.items() if not name.startswith(source_path)}  # the head
        if self.mapping is not None:
            assert self.config_dict is not None
            inside = self.mapping.outside(inside) if block is None else self.mapping.block(self.config_dict, inside)
        return {path + name: tensor for name, tensor in inside.items()} | outside
