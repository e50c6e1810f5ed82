"""Site: the tensors and axes that are pruned together; SiteKind: what pruning them means."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import PrunePeakError
from ..models.families import Family
from ..models.loading import Model
from ..models.stream import MASKS
from .folding import cut, fold
from .hooks import held, observed
from .plan import SitePlan

ConfigValue = int | float | list[Any] | tuple[Any, ...]
ALWAYS_KEPT = -1  # owner of the rows of a fused tensor that always stay

Tensors = dict[str, Tensor]  # by their names in the class


class Slice(NamedTuple):
    """An axis of a tensor that the units of a site divide: evenly, or as `owners` says, the unit of every index."""

    axis: int
    owners: Tensor | None = None


@dataclass(frozen=True)
class Site:
    """One output projection and the neurons it reads.

    Neurons are pruned in units (a head, a KV group, or a single neuron of an MLP). Each of `groups` equal parts loses
    the same number of units, so that the rest has the regular shape that stock classes support.
    """

    kind: "SiteKind"
    block: int  # the number of blocks, for what follows them
    name: str  # path of the output projection, as `model.get_submodule` takes it
    neurons: int
    hidden: int
    transposed: bool  # the output projection is a Conv1D, stored as (neurons, hidden)
    slices: Mapping[str, Slice]  # by tensor
    folded_into: str | None  # the bias that takes the constants; None where the written class has none
    bias_key: str | None = None  # the config key that opens this bias
    unit: int = 1
    groups: int = 1
    config_values: Mapping[str, ConfigValue] = field(default_factory=dict)  # widths, ratios and counts in the config
    scaled_keys: frozenset[str] = frozenset()  # those of them that scale with the neurons
    heads: tuple[int, int, int] = (1, 1, 1)  # KV groups, heads per group, neurons per head
    observed_outputs: tuple[str, ...] = ()  # modules whose outputs are measured, besides the neurons
    served: float = 1.0  # the share of the tokens that it reads
    kernel: tuple[int, ...] = ()  # of an output projection that is a convolution of single pixels
    mask: str = MASKS[0]  # the input that says which of its tokens are padding
    always_kept: int = 0  # the first of its neurons, which are exactly those that stay; 0: a score chooses

    @property
    def label(self) -> str:
        """The kind of site in options, recipe and tables: mlp, attention."""
        return self.kind.label

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        return f"{self.name}.bias"

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The weight of the output projection as (hidden, neurons), and back."""
        if self.kernel:  # of a convolution
            return weight.flatten(1) if weight.dim() > 2 else weight.view(*weight.shape, *self.kernel)
        return weight.T if self.transposed else weight

    def widen(self, weight: Tensor) -> Tensor:
        """The matrix that all neurons of the site are multiplied by, (hidden, neurons), from that of the projection."""
        return weight

    def covers(self, block: int) -> bool:
        """Whether holding the neurons of the site changes a block."""
        return block == self.block

    def read_projection(self, model: Model) -> tuple[Tensor, Tensor | None]:
        """The weight, (hidden, neurons), and the bias, (hidden,), of the output projection."""
        bias = model.read(self.bias) if self.bias in model.names else None
        return self.widen(self.as_matrix(model.read(self.weight))), bias

    def read_constants(self, model: Model) -> Tensor:
        """The bias, (hidden,), that takes the constants in a written model."""
        assert self.folded_into is not None
        return model.read(self.folded_into)

    def hold(self, model: nn.Module, plan: SitePlan) -> AbstractContextManager[Any]:
        """Within the context, the original computes what the pruned checkpoint must compute."""
        return self.kind.hold(model, self, plan)

    def observe(self, model: nn.Module, callback: Callable[..., None]) -> AbstractContextManager[Any]:
        """Within the context, `callback` is called with the neurons of every batch, (..., neurons)."""
        return self.kind.observe(model, self, callback)

    def rows(self, name: str, keep: Tensor, size: int) -> Tensor:
        """The kept indices of a tensor along its axis of `size`.

        With a KV group of three heads as the unit, keys and values have a third of the rows of the neurons.
        """
        owners = self.slices[name].owners
        if owners is not None:
            return (torch.isin(owners, keep // self.unit) | (owners == ALWAYS_KEPT)).nonzero()[:, 0]
        each = size * self.unit // self.neurons
        units = keep[:: self.unit] // self.unit
        return (units[:, None] * each + torch.arange(each)).flatten()


class SiteKind(ABC):
    """A kind of site.

    `prune` is what is written, `hold` is the reference: the original with the pruned neurons held at their constants
    (or removed, and the output projection replaced by the refitted one). Both must compute the same function.
    """

    label: ClassVar[str]
    deletes: ClassVar[bool] = True  # otherwise weights become zero, and nothing is saved
    holds_constants: ClassVar[bool] = True  # otherwise what leaves is not replaced by constants
    is_alone: ClassVar[bool] = False  # its sites contain those of other kinds, which are not pruned with it

    def applies(self, unit: str, keep_shape: bool) -> bool:
        """Whether this kind prunes its part of a model under these options."""
        return not keep_shape

    def exists_in(self, family: Family) -> bool:
        """Whether the models of a family have such sites, prunable or not."""
        return True

    def check(self, model: PreTrainedModel, family: Family) -> None:  # noqa: B027 - most kinds refuse nothing
        """Refuse a model whose sites of this kind cannot be pruned.

        Raises:
            PrunePeakError, UsageError: with the reason.
        """

    @abstractmethod
    def find(self, model: PreTrainedModel, family: Family, block: str, index: int, unit: str) -> list[Site]:
        """The sites in the block at this path; none where the block has no such part."""

    @abstractmethod
    def step(self, site: Site, multiple_of: int | None) -> int:
        """The number of neurons by which the site becomes narrower."""

    def site(
        self,
        model: PreTrainedModel,
        index: int,
        name: str,
        slices: Mapping[str, Slice],
        site_class: type[Site] = Site,
        **fields: Any,
    ) -> Site:
        """The site of the output projection `name`, with the slices of its inputs and the other fields of a site."""
        neurons, hidden, transposed, kernel = measure_projection(model, name)
        every = {f"{name}.weight": Slice(0 if transposed else 1), **slices}
        fields = {"folded_into": f"{name}.bias", "kernel": kernel} | fields
        return site_class(self, index, name, neurons, hidden, transposed, every, **fields)

    def config(self, site: Site, kept: int) -> dict[str, ConfigValue]:
        """The config values of the smaller shape."""
        return {
            key: scale(value, kept, site.neurons) if key in site.scaled_keys else value
            for key, value in site.config_values.items()
        }

    def size(self, site: Site, name: str, size: int, kept: int) -> int:
        """The size of a tensor's axis with `kept` neurons."""
        owners = site.slices[name].owners
        staying = 0 if owners is None else int((owners == ALWAYS_KEPT).sum())
        return staying + (size - staying) * kept // site.neurons

    def complete(
        self, site: Site, plan: SitePlan, outputs: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[SitePlan, float | None]:
        """What the plan needs besides kept neurons and refit, and the share of the attention scores' variance lost.

        Args:
            outputs: mean and covariance of each of `site.observed_outputs`.
        """
        return plan, None

    def fits(self, site: Site, plan: SitePlan) -> bool:
        """Whether a plan from a file has the parts that this kind needs."""
        return plan.low_rank is None

    def prune_together(
        self, tensors: Mapping[str, Tensor], sites: Sequence[Site], plans: Mapping[str, SitePlan]
    ) -> Tensors:
        """The tensors of a block with all its sites of this kind pruned."""
        for site in sites:
            tensors = self.prune(tensors, site, plans[site.name])
        return dict(tensors)

    def prune(self, tensors: Mapping[str, Tensor], site: Site, plan: SitePlan) -> Tensors:
        """The tensors of a block, pruned. What changes is float32."""
        pruned = dict(tensors)
        weight, bias = site.widen(site.as_matrix(tensors[site.weight])), tensors.get(site.bias)
        for name, tensor in tensors.items():
            if name in site.slices:
                pruned[name] = self.prune_tensor(site, name, tensor, plan)
        if plan.weight is not None:
            pruned[site.weight] = site.as_matrix(self.expand(site, plan.weight, plan.keep))
        constant = fold(weight, bias, plan.fill, plan.keep) if plan.bias is None else plan.bias
        if site.folded_into == site.bias:
            pruned[site.bias] = constant
        elif site.folded_into is not None:
            pruned[site.folded_into] = constant + tensors.get(site.folded_into, torch.zeros(())).float()
        return pruned

    def prune_tensor(self, site: Site, name: str, tensor: Tensor, plan: SitePlan) -> Tensor:
        """One tensor of `site.slices`."""
        axis = site.slices[name].axis
        return cut(tensor, site.rows(name, plan.keep, tensor.shape[axis]), axis)

    def expand(self, site: Site, weight: Tensor, keep: Tensor) -> Tensor:
        """A refitted weight, (hidden, kept), in the written shape."""
        return weight

    def reduce(self, weight: Tensor, keep: Tensor) -> Tensor:
        """A written weight as the refitted one, (hidden, kept)."""
        return weight

    def hold(self, model: nn.Module, site: Site, plan: SitePlan) -> AbstractContextManager[Any]:
        """Within the context, the original computes what the pruned checkpoint must compute."""
        return held(model.get_submodule(site.name), plan)

    def observe(self, model: nn.Module, site: Site, callback: Callable[..., None]) -> AbstractContextManager[Any]:
        """Within the context, `callback` is called with the neurons of every batch, (..., neurons)."""
        return observed(model.get_submodule(site.name), callback)


def scale(value: ConfigValue, kept: int, neurons: int) -> ConfigValue:
    """A width, count or ratio of the config, or one for each stage, for the kept neurons.

    Example:
        >>> scale(4, 24, 32), scale(2.5, 24, 40), scale([8, 4], 24, 32)
        (3, 1.5, [6, 3])
    """
    if isinstance(value, list | tuple):
        return type(value)(each * kept // neurons if isinstance(each, int) else each * kept / neurons for each in value)
    if isinstance(value, int):
        return value * kept // neurons
    share = Fraction(kept, neurons)  # the same float for all sites of one share
    ratio = value * share.numerator / share.denominator
    return ratio if round(neurons / value) * ratio >= kept else math.nextafter(ratio, math.inf)


def has_module(model: nn.Module, name: str) -> bool:
    """Whether a model has a module at this path."""
    try:
        return model.get_submodule(name) is not None
    except AttributeError:
        return False


def measure_projection(model: PreTrainedModel, name: str) -> tuple[int, int, bool, tuple[int, ...]]:
    """Neurons, hidden size, whether the output projection is a Conv1D, and its kernel if it is a convolution.

    Raises:
        PrunePeakError: the model has no such module.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise PrunePeakError(
            f"this {model.config.model_type} has no {name}; its blocks differ from those of the family."
        ) from None
    assert isinstance(module.weight, nn.Parameter)
    transposed = isinstance(module, Conv1D)
    rows, columns, *kernel = module.weight.shape
    neurons, hidden = (rows, columns) if transposed else (columns, rows)
    return neurons, hidden, transposed, tuple(kernel)


def rows_of(model: PreTrainedModel, name: str, owners: Tensor | None = None) -> dict[str, Slice]:
    """The tensors of an input projection, with their axis of neurons."""
    module = model.get_submodule(name)
    slices = {f"{name}.weight": Slice(1 if isinstance(module, Conv1D) else 0, owners)}
    for running in ("running_mean", "running_var"):  # of a batch norm
        if getattr(module, running, None) is not None:
            slices[f"{name}.{running}"] = Slice(0, owners)
    return slices if getattr(module, "bias", None) is None else slices | {f"{name}.bias": Slice(0, owners)}
