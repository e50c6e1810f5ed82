"""MLPs: single neurons are deleted from the input projections and the output projection."""

import math
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from ..errors import PrunePeakError, spell
from ..models.config_keys import read_key
from ..models.families import MLP, Family, find_blocks
from .site import Site, SiteKind, Slice, has_module, measure_projection, rows_of

# Kept widths are multiples of this by default: quantized formats and GPU kernels work in blocks of 32
MULTIPLE, SMALL_MULTIPLE, SMALL_WIDTH = 32, 8, 512


class Mlp(SiteKind):
    """The MLP of a block."""

    label: ClassVar[str] = "mlp"

    def check(self, model: PreTrainedModel, family: Family) -> None:
        blocks = find_blocks(model, family)
        if family.mlp is None:
            raise PrunePeakError(
                f"every MLP of this {family.model_type} is an expert. Make its experts narrower "
                f"({spell('sites', 'expert-mlp')}), or remove whole experts ({spell('sites', 'experts')})."
            )
        if not any(has_module(block, mlp.output_projection) for mlp in family.mlps for block in blocks):
            raise PrunePeakError(
                f"this {family.model_type} has no {family.mlp.output_projection} in its blocks: its MLP is of a kind "
                f"(such as DINOv2's SwiGLU) that is not supported. Prune its attention ({spell('sites', 'attention')})."
            )

    def find(self, model: PreTrainedModel, family: Family, block: str, index: int, unit: str) -> list[Site]:
        return [
            self.find_one(model, mlp, block, index)
            for mlp in family.mlps
            if all(has_module(model, f"{block}.{name}") for name in (*mlp.input_projections, mlp.output_projection))
        ]

    def find_one(self, model: PreTrainedModel, mlp: MLP, block: str, index: int) -> Site:
        """The site of one MLP of a block."""
        name = f"{block}.{mlp.output_projection}"
        neurons, *_ = measure_projection(model, name)
        slices: dict[str, Slice] = {}
        for projection in mlp.input_projections:
            for tensor, slice_ in rows_of(model, f"{block}.{projection}").items():
                path, _, leaf = tensor.rpartition(".")
                size = getattr(model.get_submodule(path), leaf).shape[slice_.axis]
                fused = size != neurons  # gate and up in one module
                owners = None
                if fused:
                    units = torch.arange(neurons)
                    parts = size // neurons
                    owners = units.repeat_interleave(parts) if mlp.interleaved else units.repeat(parts)
                slices[tensor] = Slice(slice_.axis, owners)
        # DINOv2's config has an integer ratio to the hidden size
        width = read_key(model.config, mlp.width_key) or neurons  # GPT-2's default is None
        return self.site(
            model,
            index,
            name,
            slices,
            folded_into=f"{block}.{mlp.bias_module or mlp.output_projection}.bias",
            bias_key=mlp.bias_key,
            config_values={mlp.width_key: width},
            scaled_keys=frozenset({mlp.width_key}),
        )

    def step(self, site: Site, multiple_of: int | None) -> int:
        multiple = multiple_of or (MULTIPLE if site.neurons >= SMALL_WIDTH else SMALL_MULTIPLE)
        stages = [value if isinstance(value, list | tuple) else [value] for value in site.config_values.values()]
        whole = [math.gcd(*values) for values in stages if all(isinstance(value, int) for value in values)]
        widths = [site.neurons // math.gcd(site.neurons, value) for value in whole]  # whose config value is an integer
        return math.lcm(multiple, *widths)
