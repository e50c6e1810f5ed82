"""Second-order statistics of a site's neurons over the calibration tokens, for the refit.

`SplitGram` accumulates sums of products and gives `Moments` (means and covariances); its size does not depend on the
number of tokens. With fewer tokens than neurons, `ActivationBuffer` keeps the activations and gives `RawActivations`,
which are smaller then, and faster to solve with. Ridge regression gives the same result from both; with t tokens

    X_k (X_k' X_k + t r s I)^-1 = (X_k X_k' + t r s I)^-1 X_k
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .distributed import ProcessGroup
from .histogram import check_tensors

TRIANGLE_BLOCK = 256  # columns
ROWS_AT_ONCE = 256  # fit in the processor's cache
HELD_OUT = 6  # the last of six parts of every batch chooses the ridge

# ridge, as a share of the mean variance -> the change of the kept columns, (hidden, kept) float64
Solve = Callable[[float], Tensor]


class SecondOrderStats(Protocol):
    """Second-order statistics of the neurons over some tokens."""

    @property
    def mean(self) -> Tensor:
        """(neurons,) float64."""

    @property
    def variance(self) -> Tensor:
        """(neurons,) float32."""

    def error(self, change: Tensor, constant: Tensor) -> float:
        """The mean over tokens of the squared norm of change @ x + constant; (hidden, neurons) and (hidden,)."""

    def regress(self, keep: Tensor, cut: Tensor, lost: Tensor) -> Solve:
        """Ridge regression of lost @ x_cut on x_keep; lost is (hidden, cut) float32."""

    def about_zero(self) -> "SecondOrderStats":
        """The same statistics about zero instead of the mean, for an output projection without a bias."""


@dataclass(frozen=True)
class Moments:
    """Means and covariances of all neurons of a site."""

    mean: Tensor  # (neurons,) float64
    covariance: Tensor  # (neurons, neurons) float32

    @property
    def variance(self) -> Tensor:
        return self.covariance.diagonal()

    def error(self, change: Tensor, constant: Tensor) -> float:
        shift = change.double() @ self.mean + constant
        return float(((change @ self.covariance) * change).sum() + shift.square().sum())

    def regress(self, keep: Tensor, cut: Tensor, lost: Tensor) -> Solve:
        rows = self.covariance[keep]
        matrix, target = rows[:, keep].double(), (rows[:, cut] @ lost.T).double()
        scale = _scale(self)

        def solve(ridge: float) -> Tensor:
            ridged = matrix.clone()
            ridged.diagonal().add_(ridge * scale)
            return torch.cholesky_solve(target, torch.linalg.cholesky(ridged)).T

        return solve

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], neurons: int) -> "Moments":
        """Load the tensors of `vars`; raise KeyError or ValueError if one is missing or invalid."""
        check_tensors(tensors, mean=((neurons,), torch.float64), covariance=((neurons, neurons), torch.float32))
        return cls(tensors["mean"], tensors["covariance"])

    def about_zero(self) -> "Moments":
        narrow = self.mean.float()
        return Moments(torch.zeros_like(self.mean), self.covariance.addr(narrow, narrow))


@dataclass(frozen=True)
class RawActivations:
    """The activations of all neurons of a site, token by token."""

    values: Tensor  # (tokens, neurons), in the type they were computed in
    is_centred: bool = True  # about the mean; otherwise about zero

    @cached_property
    def mean(self) -> Tensor:
        total = self.values.new_zeros(self.values.shape[1], dtype=torch.float64)
        if self.is_centred:
            for part in self.values.split(ROWS_AT_ONCE):
                total += part.float().sum(0)
        return total / len(self.values)

    @property
    def variance(self) -> Tensor:
        total = self.values.new_zeros(self.values.shape[1], dtype=torch.float64)
        for part in self.values.split(ROWS_AT_ONCE):
            total += (part.float() - self.mean.float()).square_().sum(0)
        return (total / len(self.values)).float()

    def error(self, change: Tensor, constant: Tensor) -> float:
        return float((self.values.float() @ change.T + constant.float()).square().sum(1).mean())

    def regress(self, keep: Tensor, cut: Tensor, lost: Tensor) -> Solve:
        kept = self._deviations(keep)
        products = torch.zeros(len(kept), len(kept), device=kept.device)
        _add_products(products, kept.T)
        kernel, target = _mirror(products), self._deviations(cut) @ lost.T
        scale = _scale(self) * len(kept)

        def solve(ridge: float) -> Tensor:
            factor = _factor(kernel, ridge * scale)
            weights = torch.cholesky_solve(target.to(factor.dtype), factor)  # (tokens, hidden)
            return (weights.T.float() @ kept).double()

        return solve

    def about_zero(self) -> "RawActivations":
        return RawActivations(self.values, is_centred=False)

    def _deviations(self, neurons: Tensor) -> Tensor:
        return self.values[:, neurons].to(torch.float32, copy=True).sub_(self.mean[neurons].float())


def _scale(stats: SecondOrderStats) -> float:
    """The mean variance of a neuron; if all are dead, enough to keep the matrix invertible."""
    return max(float(stats.variance.mean()), 1e-30)


@dataclass(frozen=True)
class SecondOrderSplit:
    """Statistics over the tokens to fit on, over those held out, and over all."""

    fitted: SecondOrderStats
    held_out: SecondOrderStats
    whole: SecondOrderStats

    def about_zero(self) -> "SecondOrderSplit":
        return SecondOrderSplit(self.fitted.about_zero(), self.held_out.about_zero(), self.whole.about_zero())


class GramAccumulator:
    """Sums and sums of products of all neurons of a site, about a pivot.

    Activations in bfloat16 are taken about zero: their products are then exact in a float32 sum, at the speed of the
    processor's bfloat16 products.

    Example:
        >>> gram = GramAccumulator(torch.zeros(2))
        >>> gram.add(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> moments = gram.moments()
        >>> moments.mean.tolist(), moments.covariance.tolist()
        ([2.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, pivot: Tensor) -> None:
        self.pivot = pivot
        self.count = 0
        self.sum = pivot.new_zeros(len(pivot), dtype=torch.float64)
        # the lower triangle; blocks above the diagonal stay zero
        self.products = torch.zeros(len(pivot), len(pivot), device=pivot.device)

    def add(self, values: Tensor) -> None:
        """Add a batch of activations, (tokens, neurons); all batches are of one type."""
        if self.count == 0 and values.dtype is torch.bfloat16:
            self.pivot = torch.zeros_like(self.pivot)
        centred = values.float() if values.dtype is torch.bfloat16 else values.float() - self.pivot
        self.count += len(values)
        for part in centred.split(ROWS_AT_ONCE):
            self.sum += part.sum(0)
        with _exact_products(values.dtype):
            _add_products(self.products, centred)

    def merged(self, other: "GramAccumulator") -> "GramAccumulator":
        """The sums of both accumulators, which must have the same pivot."""
        both = GramAccumulator(self.pivot)
        both.count, both.sum = self.count + other.count, self.sum + other.sum
        both.products = self.products + other.products
        return both

    def reduce(self, group: ProcessGroup) -> None:
        """Sum over all processes, which must have the same pivot."""
        self.count = int(group.reduce_sum(torch.tensor(self.count)))
        self.sum, self.products = group.reduce_sum(self.sum), group.reduce_sum(self.products)

    def to_tensors(self) -> dict[str, Tensor]:
        """Tensors to save; of the products only the computed blocks."""
        products = torch.cat([block.flatten() for block in self._blocks()])
        return {"count": torch.tensor(self.count), "pivot": self.pivot, "sum": self.sum, "products": products}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], neurons: int) -> "GramAccumulator":
        """Load the tensors of `to_tensors`; raise KeyError or ValueError if one is missing or invalid."""
        check_tensors(
            tensors, pivot=((neurons,), torch.float32), sum=((neurons,), torch.float64), count=((), torch.int64)
        )
        gram = cls(tensors["pivot"])
        gram.count, gram.sum = int(tensors["count"]), tensors["sum"]
        blocks = gram._blocks()
        check_tensors(tensors, products=((sum(block.numel() for block in blocks),), torch.float32))
        if gram.count < 1:
            raise ValueError(f"count is {gram.count}")
        for block, values in zip(blocks, tensors["products"].split([block.numel() for block in blocks]), strict=True):
            block.copy_(values.view_as(block))
        return gram

    def _blocks(self) -> list[Tensor]:
        """Views of the computed blocks of the products."""
        starts = range(0, len(self.pivot), TRIANGLE_BLOCK)
        return [self.products[start:, start : start + TRIANGLE_BLOCK] for start in starts]

    def moments(self) -> Moments:
        shift = self.sum / self.count
        narrow = shift.float()
        covariance = _mirror(self.products).div_(self.count).addr_(narrow, narrow, alpha=-1)
        return Moments(self.pivot.double() + shift, covariance)


class SplitGram:
    """Accumulates `Moments` of the tokens to fit on and of those held out."""

    def __init__(self, pivot: Tensor) -> None:
        self.fitted, self.held_out = GramAccumulator(pivot), GramAccumulator(pivot)

    def add(self, values: Tensor) -> None:
        """Add a batch of activations, (tokens, neurons)."""
        fitted, held_out = _split(values)
        self.fitted.add(fitted)
        self.held_out.add(held_out)

    def second_order(self) -> SecondOrderSplit:
        whole = self.fitted.merged(self.held_out)
        return SecondOrderSplit(self.fitted.moments(), self.held_out.moments(), whole.moments())

    def reduce(self, group: ProcessGroup) -> None:
        """Sum over all processes."""
        self.fitted.reduce(group)
        self.held_out.reduce(group)

    def to_tensors(self) -> dict[str, Tensor]:
        """Tensors to save."""
        parts = {"fitted": self.fitted.to_tensors(), "held_out": self.held_out.to_tensors()}
        return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], neurons: int) -> "SplitGram":
        """Load the tensors of `to_tensors`; raise KeyError or ValueError if one is missing or invalid."""
        gram = cls(torch.zeros(0))
        for part in ("fitted", "held_out"):
            fields = {name.removeprefix(f"{part}/"): value for name, value in tensors.items()}
            setattr(gram, part, GramAccumulator.from_tensors(fields, neurons))
        return gram


class ActivationBuffer:
    """Keeps the activations of every batch, for `RawActivations`."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Keep a batch of activations, (tokens, neurons)."""
        self.batches.append(values)

    def second_order(self) -> SecondOrderSplit:
        fitted, held_out = zip(*map(_split, self.batches), strict=True)
        return SecondOrderSplit(*(RawActivations(torch.cat(parts)) for parts in (fitted, held_out, self.batches)))

    def reduce(self, group: ProcessGroup) -> None:
        """Gather the batches of all processes, in their order."""
        self.batches = [batch for batches in group.gather(self.batches) for batch in batches]

    def to_tensors(self) -> dict[str, Tensor]:
        """Tensors to save; the lengths of the batches determine which rows are held out."""
        return {"rows": torch.cat(self.batches), "batches": torch.tensor([len(batch) for batch in self.batches])}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], neurons: int) -> "ActivationBuffer":
        """Load the tensors of `to_tensors`; raise KeyError or ValueError if one is missing or invalid."""
        rows, batches = tensors["rows"], tensors["batches"]
        check_tensors(tensors, rows=((len(rows), neurons), rows.dtype), batches=((batches.numel(),), torch.int64))
        if not rows.is_floating_point() or int(batches.min()) < HELD_OUT or int(batches.sum()) != len(rows):
            raise ValueError(f"{len(rows)} rows of {rows.dtype} in batches of {batches.tolist()[:3]}")
        buffer = cls()
        buffer.batches = list(rows.split(batches.tolist()))
        return buffer


def _add_products(products: Tensor, values: Tensor) -> None:
    """Add values.T @ values, (n, n), to the lower triangle; most blocks above the diagonal are skipped."""
    for start in range(0, len(products), TRIANGLE_BLOCK):
        columns = slice(start, start + TRIANGLE_BLOCK)
        products[start:, columns].addmm_(values[:, start:].T, values[:, columns])


def _mirror(triangle: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle."""
    whole = triangle.tril()
    return whole.add_(whole.tril(-1).T)


def _factor(matrix: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of matrix + ridge I in float32, or in float64 where the ridge is too small for float32."""
    factor: Tensor
    for dtype in (torch.float32, torch.float64):
        ridged = matrix.to(dtype, copy=True)
        ridged.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(ridged, check_errors=dtype is torch.float64)
        if not failed:
            break
    return factor


def _split(values: Tensor) -> Sequence[Tensor]:
    """The tokens to fit on, and those held out."""
    return values.tensor_split([len(values) * (HELD_OUT - 1) // HELD_OUT])


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Compute float32 products of values that came from bfloat16 as bfloat16 products, which is exact."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if dtype is torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
