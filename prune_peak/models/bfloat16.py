"""Fast bfloat16 products on processors without bfloat16 kernels.

PyTorch emulates missing kernels: on AVX2, SmolLM2's forward takes six times as long as in float32 (docs/log.md).
bfloat16 kernels sum exact products in float32 and round once. Here the factors are converted to float32 and the result
is rounded: the same numbers, except for the order of summation.
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
    """Whether this processor multiplies bfloat16 faster than float32 (on x86: with AMX, not with AVX-512)."""
    return platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_amx_tile_supported()


def factor_type(dtype: torch.dtype) -> torch.dtype:
    """The dtype in memory of weights that are only factors of products, when computing in `dtype`."""
    return torch.float32 if dtype is torch.bfloat16 and not has_bfloat16() else dtype


def fast_products() -> AbstractContextManager[Any]:
    """A context in which bfloat16 products take the fastest route with the precision of bfloat16 kernels."""
    return nullcontext() if has_bfloat16() else Rounding()


class Rounding(TorchFunctionMode):
    """Computes bfloat16 products in float32 and rounds the results."""

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
