"""MLPs: single neurons are deleted from the input projections and the output projection."""

import math
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from ..errors import PrunePeakError
from ..models.families import Family, blocks_path
from .site import Site, SiteKind, Slice, measure_projection, rows_of

# Kept widths are multiples of this by default: quantized formats and GPU kernels work in blocks of 32
MULTIPLE, SMALL_MULTIPLE, SMALL_WIDTH = 32, 8, 512


class Mlp(SiteKind):
    """The MLP of a block."""

    label: ClassVar[str] = "mlp"

    def check(self, model: PreTrainedModel, family: Family) -> None:
        path = f"{blocks_path(model, family)}.0.{family.mlp.output_projection}"
        if path not in dict(model.named_modules()):
            raise PrunePeakError(
                f"this {family.model_type} has no {family.mlp.output_projection} in its blocks: its MLP is of a kind "
                "(such as DINOv2's SwiGLU) that is not supported. Prune its attention (--sites attention)."
            )

    def find(self, model: PreTrainedModel, family: Family, block: str, index: int, unit: str) -> Site:
        mlp = family.mlp
        name = f"{block}.{mlp.output_projection}"
        neurons, _, _ = measure_projection(model, name)
        slices: dict[str, Slice] = {}
        for projection in mlp.input_projections:
            for tensor, slice_ in rows_of(model, f"{block}.{projection}").items():
                size = model.get_parameter(tensor).shape[slice_.axis]
                fused = size != neurons  # gate and up in one module
                owners = torch.arange(neurons).repeat(size // neurons) if fused else None
                slices[tensor] = Slice(slice_.axis, owners)
        # DINOv2's config has an integer ratio to the hidden size
        width = getattr(model.config, mlp.width_key) or neurons
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
        widths = [site.neurons // value for value in site.config_values.values()]
        return math.lcm(multiple, *widths)
