"""What the refit knows of a site's neurons: how they vary together over the tokens of the calibration.

With enough tokens, `Moments`: means and covariances, gathered as sums of products; their size does not grow with the
tokens. With fewer tokens than neurons, `Rows`: the activations themselves, smaller then, and cheaper to solve with.
Ridge regression gives the same from either; in terms of tokens it is

    X_k (X_k' X_k + t r s I)^-1 = (X_k X_k' + t r s I)^-1 X_k          (t tokens)
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .ranks import Ranks

TRIANGLE_BLOCK = 256  # columns
ROWS_AT_ONCE = 256  # so that they stay in the processor's cache
HELD_OUT = 6  # the last of so many parts of every batch chooses the ridge

# ridge, as a share of the mean variance -> the change of the kept columns, (hidden, kept) float64
Solve = Callable[[float], Tensor]


class Knowledge(Protocol):
    """What is known of the neurons over some tokens."""

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

    def about_zero(self) -> "Knowledge":
        """The same, reckoned about zero in place of the mean: for where there is no bias to shift."""


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
        """What `vars` gave.

        Raises:
            KeyError, ValueError: a tensor is missing, or not what it should be.
        """
        _check(tensors, mean=((neurons,), torch.float64), covariance=((neurons, neurons), torch.float32))
        return cls(tensors["mean"], tensors["covariance"])

    def about_zero(self) -> "Moments":
        narrow = self.mean.float()
        return Moments(torch.zeros_like(self.mean), self.covariance.addr(narrow, narrow))


@dataclass(frozen=True)
class Rows:
    """The activations of all neurons of a site, token by token."""

    values: Tensor  # (tokens, neurons), in the type they were computed in
    is_centred: bool = True  # about the mean; otherwise about zero

    @cached_property
    def mean(self) -> Tensor:
        total = torch.zeros(self.values.shape[1], dtype=torch.float64)
        if self.is_centred:
            for part in self.values.split(ROWS_AT_ONCE):
                total += part.float().sum(0)
        return total / len(self.values)

    @property
    def variance(self) -> Tensor:
        total = torch.zeros(self.values.shape[1], dtype=torch.float64)
        for part in self.values.split(ROWS_AT_ONCE):
            total += (part.float() - self.mean.float()).square_().sum(0)
        return (total / len(self.values)).float()

    def error(self, change: Tensor, constant: Tensor) -> float:
        return float((self.values.float() @ change.T + constant.float()).square().sum(1).mean())

    def regress(self, keep: Tensor, cut: Tensor, lost: Tensor) -> Solve:
        kept = self._deviations(keep)
        products = torch.zeros(len(kept), len(kept))
        _add_products(products, kept.T)
        kernel, target = _mirror(products), self._deviations(cut) @ lost.T
        scale = _scale(self) * len(kept)

        def solve(ridge: float) -> Tensor:
            factor = _factor(kernel, ridge * scale)
            weights = torch.cholesky_solve(target.to(factor.dtype), factor)  # (tokens, hidden)
            return (weights.T.float() @ kept).double()

        return solve

    def about_zero(self) -> "Rows":
        return Rows(self.values, is_centred=False)

    def _deviations(self, neurons: Tensor) -> Tensor:
        return self.values[:, neurons].to(torch.float32, copy=True).sub_(self.mean[neurons].float())


def _scale(knowledge: Knowledge) -> float:
    """The mean variance of a neuron; where all are dead, enough to leave a matrix invertible."""
    return max(float(knowledge.variance.mean()), 1e-30)


@dataclass(frozen=True)
class Evidence:
    """What is known over most tokens, over those held out, and over all."""

    fitted: Knowledge
    held_out: Knowledge
    whole: Knowledge

    def about_zero(self) -> "Evidence":
        return Evidence(self.fitted.about_zero(), self.held_out.about_zero(), self.whole.about_zero())


class Gram:
    """Sums and sums of products of all neurons of a site, about a pivot.

    Activations in bfloat16 are taken about zero: their products are then exact in a float32 sum, at the speed that the
    processor has for bfloat16.

    Example:
        >>> gram = Gram(torch.zeros(2))
        >>> gram.add(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> moments = gram.moments()
        >>> moments.mean.tolist(), moments.covariance.tolist()
        ([2.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, pivot: Tensor) -> None:
        self.pivot = pivot
        self.count = 0
        self.sum = torch.zeros(len(pivot), dtype=torch.float64)
        self.products = torch.zeros(len(pivot), len(pivot))  # the lower triangle; blocks above it are left out

    def add(self, values: Tensor) -> None:
        """Count a batch of activations, (tokens, neurons), always of one type."""
        if self.count == 0 and values.dtype is torch.bfloat16:
            self.pivot = torch.zeros_like(self.pivot)
        centred = values.float() - self.pivot
        self.count += len(values)
        self.sum += centred.sum(0, dtype=torch.float64)
        with _exact_products(values.dtype):
            _add_products(self.products, centred)

    def merged(self, other: "Gram") -> "Gram":
        """Both together; they must share the pivot."""
        both = Gram(self.pivot)
        both.count, both.sum = self.count + other.count, self.sum + other.sum
        both.products = self.products + other.products
        return both

    def add_up(self, ranks: Ranks) -> None:
        """Let the first process know the sums of all; they must share the pivot."""
        self.count = int(ranks.add_up(torch.tensor(self.count)))
        self.sum, self.products = ranks.add_up(self.sum), ranks.add_up(self.products)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything, as tensors to save; of the products, the blocks that are not left out."""
        products = torch.cat([block.flatten() for block in self._blocks()])
        return {"count": torch.tensor(self.count), "pivot": self.pivot, "sum": self.sum, "products": products}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], neurons: int) -> "Gram":
        """What `to_tensors` gave.

        Raises:
            KeyError, ValueError: a tensor is missing, or not what it should be.
        """
        _check(tensors, pivot=((neurons,), torch.float32), sum=((neurons,), torch.float64), count=((), torch.int64))
        gram = cls(tensors["pivot"])
        gram.count, gram.sum = int(tensors["count"]), tensors["sum"]
        blocks = gram._blocks()
        _check(tensors, products=((sum(block.numel() for block in blocks),), torch.float32))
        if gram.count < 1:
            raise ValueError(f"count is {gram.count}")
        for block, values in zip(blocks, tensors["products"].split([block.numel() for block in blocks]), strict=True):
            block.copy_(values.view_as(block))
        return gram

    def _blocks(self) -> list[Tensor]:
        """The parts of the products that are reckoned, as views."""
        starts = range(0, len(self.pivot), TRIANGLE_BLOCK)
        return [self.products[start:, start : start + TRIANGLE_BLOCK] for start in starts]

    def moments(self) -> Moments:
        shift = self.sum / self.count
        narrow = shift.float()
        covariance = _mirror(self.products).div_(self.count).addr_(narrow, narrow, alpha=-1)
        return Moments(self.pivot.double() + shift, covariance)


class Grams:
    """Gathers `Moments`."""

    def __init__(self, pivot: Tensor) -> None:
        self.fitted, self.held_out = Gram(pivot), Gram(pivot)

    def add(self, values: Tensor) -> None:
        """Count a batch of activations, (tokens, neurons)."""
        fitted, held_out = _parted(values)
        self.fitted.add(fitted)
        self.held_out.add(held_out)

    def evidence(self) -> Evidence:
        return Evidence(self.fitted.moments(), self.held_out.moments(), self.fitted.merged(self.held_out).moments())

    def add_up(self, ranks: Ranks) -> None:
        """Let the first process know the sums of all."""
        self.fitted.add_up(ranks)
        self.held_out.add_up(ranks)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything, as tensors to save."""
        return {
            f"{part}/{name}": value
            for part, gram in (("fitted", self.fitted), ("held_out", self.held_out))
            for name, value in gram.to_tensors().items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], neurons: int) -> "Grams":
        """What `to_tensors` gave.

        Raises:
            KeyError, ValueError: a tensor is missing, or not what it should be.
        """
        grams = cls(torch.zeros(0))
        grams.fitted, grams.held_out = (
            Gram.from_tensors(_under(tensors, part), neurons) for part in ("fitted/", "held_out/")
        )
        return grams


class Tape:
    """Gathers `Rows`."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Keep a batch of activations, (tokens, neurons)."""
        self.batches.append(values)

    def evidence(self) -> Evidence:
        fitted, held_out = zip(*map(_parted, self.batches), strict=True)
        return Evidence(*(Rows(torch.cat(parts)) for parts in (fitted, held_out, self.batches)))

    def add_up(self, ranks: Ranks) -> None:
        """Let the first process know the batches of all, in their order."""
        self.batches = [batch for batches in ranks.gather(self.batches) for batch in batches]

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything, as tensors to save: which batch a row belongs to says what is held out."""
        return {"rows": torch.cat(self.batches), "batches": torch.tensor([len(batch) for batch in self.batches])}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], neurons: int) -> "Tape":
        """What `to_tensors` gave.

        Raises:
            KeyError, ValueError: a tensor is missing, or not what it should be.
        """
        rows, batches = tensors["rows"], tensors["batches"]
        _check(tensors, rows=((len(rows), neurons), rows.dtype), batches=((batches.numel(),), torch.int64))
        if not rows.is_floating_point() or int(batches.min()) < HELD_OUT or int(batches.sum()) != len(rows):
            raise ValueError(f"{len(rows)} rows of {rows.dtype} in batches of {batches.tolist()[:3]}")
        tape = cls()
        tape.batches = list(rows.split(batches.tolist()))
        return tape


def _check(tensors: Mapping[str, Tensor], **expected: tuple[tuple[int, ...], torch.dtype]) -> None:
    for name, (shape, dtype) in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.numel() and not all(math.isfinite(bound) for bound in tensor.aminmax()):
            raise ValueError(f"{name} is not finite")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _add_products(products: Tensor, values: Tensor) -> None:
    """Add values.T @ values, (n, n), to the lower triangle; most of what lies above it is left out."""
    for start in range(0, len(products), TRIANGLE_BLOCK):
        columns = slice(start, start + TRIANGLE_BLOCK)
        products[start:, columns].addmm_(values[:, start:].T, values[:, columns])


def _mirror(triangle: Tensor) -> Tensor:
    """The symmetric matrix of which this is the lower triangle."""
    whole = triangle.tril()
    return whole.add_(whole.tril(-1).T)


def _factor(matrix: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of matrix + ridge I: in float32; in float64 where that cannot tell the ridge from nothing."""
    factor: Tensor
    for dtype in (torch.float32, torch.float64):
        ridged = matrix.to(dtype, copy=True)
        ridged.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(ridged, check_errors=dtype is torch.float64)
        if not failed:
            break
    return factor


def _parted(values: Tensor) -> Sequence[Tensor]:
    """What the refit is fitted on, and what is held out."""
    return values.tensor_split([len(values) * (HELD_OUT - 1) // HELD_OUT])


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products of what came from bfloat16, and so loses nothing by it, run as bfloat16 ones."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if dtype is torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
