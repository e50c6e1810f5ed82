"""bfloat16 products on processors that have none.

Without kernels of its own a processor emulates them: on AVX2, SmolLM2's forward then takes six times as long as in
float32 (docs/log.md). What bfloat16 kernels give is the float32 sum of exact products, rounded once; so the factors
become float32, and the result is rounded: the same numbers, but for the order of the sum.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

PRODUCTS = frozenset({
    functional.linear,
    functional.scaled_dot_product_attention,
    torch.addmm,
    torch.baddbmm,
    torch.bmm,
    torch.conv2d,
    torch.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.bmm,
    torch.Tensor.matmul,
})  # fmt: skip


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32; of x86 those with AMX do, AVX-512 does not."""
    return platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_amx_tile_supported()


def factor_type(dtype: torch.dtype) -> torch.dtype:
    """The type to hold weights in that are factors of products and nothing else, where one computes in `dtype`."""
    return torch.float32 if dtype is torch.bfloat16 and not has_bfloat16() else dtype


def fast_products() -> AbstractContextManager[Any]:
    """Within it, products of bfloat16 take the fastest way that gives what bfloat16 kernels give."""
    return nullcontext() if has_bfloat16() else Rounding()


class Rounding(TorchFunctionMode):
    """Computes products of bfloat16 in float32, and rounds them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or not _is_narrow(args[0]):
            return func(*args, **kwargs)
        wide = {name: _widen(value) for name, value in kwargs.items()}
        return func(*map(_widen, args), **wide).bfloat16()


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.bfloat16 and value.device.type == "cpu"


def _widen(value: Any) -> Any:
    return value.float() if _is_narrow(value) else value
