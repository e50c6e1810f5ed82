"""bfloat16 products computed in float32 equal those of bfloat16 kernels."""

import pytest
import torch
from tiny import TINY, Tiny, random_inputs

from prune_peak.models.bfloat16 import Rounding

FEW = [tiny for tiny in TINY if tiny.name in ("llama", "gpt2", "vit", "gpt_neox")]


@pytest.mark.parametrize("tiny", FEW, ids=lambda tiny: tiny.name)
def test_model_outputs(tiny: Tiny) -> None:
    model = tiny.build()
    inputs = random_inputs(model, 2, 16)
    reduce_rank = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.inference_mode():
        exact = model(**inputs)[0]
        own = model.bfloat16()(**reduce_rank)[0]
        with Rounding():
            ours = model(**reduce_rank)[0]
    assert ours.dtype is torch.bfloat16
    assert (ours - exact).norm() < 1.5 * (own - exact).norm()


def test_products_are_rounded_float32_products() -> None:
    values, weight = torch.randn(64, 512).bfloat16(), torch.randn(32, 512).bfloat16()
    wide = values.float() @ weight.float().T
    with Rounding():
        assert torch.equal(values @ weight.T, wide.bfloat16())
        assert torch.equal(torch.nn.functional.linear(values, weight), wide.bfloat16())
        assert torch.equal(values.float() @ weight.float().T, wide), "float32 is left alone"
