"""Narrower experts: every expert of a block loses as many neurons, each its own."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import PrunePeakError, spell
from ..models.config_keys import read_key
from ..models.families import Experts, Family
from ..models.loading import Model
from .expert_forward import routed_through
from .folding import cut, cut_mask, fold
from .mlp import Mlp
from .plan import SitePlan
from .site import Site, Slice, Tensors, has_module

KERNEL_ROW = 8  # neurons; grouped products take rows of 16 bytes


def require_experts(family: Family) -> Experts:
    """The experts of a family.

    Raises:
        PrunePeakError: it has none.
    """
    if family.experts is None:
        raise PrunePeakError(
            f"this {family.model_type} has no stacked experts. Prune its MLP ({spell('sites', 'mlp')})."
        )
    return family.experts


@dataclass(frozen=True)
class ExpertSite(Site):
    """One expert of a stack."""

    module: str = ""  # path of the module with the stacked weights
    expert: int = 0
    output: str = ""  # its parameter of the output projections

    @property
    def weight(self) -> str:
        return f"{self.module}.{self.output}"

    @property
    def bias(self) -> str:
        return f"{self.module}.{self.output}_bias"

    def read_projection(self, model: Model) -> tuple[Tensor, Tensor | None]:
        bias = model.read(self.bias)[self.expert] if self.bias in model.tensor_names else None
        return self.as_matrix(model.read(self.weight)[self.expert]), bias

    def read_constants(self, model: Model) -> Tensor:
        return super().read_constants(model)[self.expert]


class SharedMlp(Mlp):
    """An MLP for every token whose width follows that of the experts."""

    label: ClassVar[str] = "expert-mlp"

    def step(self, site: Site, multiple_of: int | None) -> int:
        return math.lcm(KERNEL_ROW, super().step(site, multiple_of))


class ExpertMlp(SharedMlp):
    """The neurons inside the experts of a block."""

    shared = SharedMlp()

    def exists_in(self, family: Family) -> bool:
        return family.experts is not None

    def check(self, model: PreTrainedModel, family: Family) -> None:
        require_experts(family)

    def find(self, model: PreTrainedModel, family: Family, block: str, index: int, unit: str) -> list[Site]:
        experts = require_experts(family)
        has_experts = has_module(model, f"{block}.{experts.module}")
        shared = (mlp for mlp in experts.shared if has_module(model, f"{block}.{mlp.output_projection}"))
        return [
            *(_find_experts(self, model, experts, block, index) if has_experts else []),
            *(self.shared.find_one(model, mlp, block, index) for mlp in shared),
        ]

    def prune_together(
        self, tensors: Mapping[str, Tensor], sites: Sequence[Site], plans: Mapping[str, SitePlan]
    ) -> Tensors:
        """The stacks of a block with the neurons of every expert pruned. What changes is float32."""
        pruned = dict(tensors)
        for _, group in groupby(sites, lambda site: isinstance(site, ExpertSite) and site.module):
            experts = list(group)
            first = experts[0]
            assert isinstance(first, ExpertSite)
            chosen = [plans[site.name] for site in experts]
            for name, (axis, _) in first.slices.items():
                parts = zip(experts, tensors[name], chosen, strict=True)
                pruned[name] = torch.stack(
                    [
                        cut(part, site.rows(name, plan.keep, part.shape[axis - 1]), axis - 1)
                        for site, part, plan in parts
                    ]
                )
            pruned[first.weight] = torch.stack(
                [
                    part if plan.weight is None else first.as_matrix(plan.weight)
                    for part, plan in zip(pruned[first.weight], chosen, strict=True)
                ]
            )
            if first.folded_into is not None:
                rows = zip(tensors[first.weight], tensors[first.bias], chosen, strict=True)
                pruned[first.folded_into] = torch.stack(
                    [
                        fold(first.as_matrix(weight), bias, plan.fill, plan.keep) if plan.bias is None else plan.bias
                        for weight, bias, plan in rows
                    ]
                )
        return pruned

    def hold(self, model: nn.Module, site: Site, plan: SitePlan) -> AbstractContextManager[Any]:
        assert isinstance(site, ExpertSite)
        is_cut = cut_mask(site.neurons, plan.keep)

        def project(neurons: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor) -> Tensor:
            if plan.weight is None:
                return nn.functional.linear(torch.where(is_cut, plan.fill.to(neurons.dtype), neurons), weight, bias)
            offset = None if plan.bias is None or site.folded_into is None else plan.bias.to(neurons.dtype)
            return nn.functional.linear(neurons[:, plan.keep], plan.weight.to(neurons.dtype), offset)

        return routed_through(model.get_submodule(site.module), site.expert, project)

    def observe(self, model: nn.Module, site: Site, callback: Callable[..., None]) -> AbstractContextManager[Any]:
        assert isinstance(site, ExpertSite)

        def project(neurons: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
            callback(neurons, tokens=tokens)
            return nn.functional.linear(neurons, weight, bias)

        return routed_through(model.get_submodule(site.module), site.expert, project, measured=True)


def _find_experts(
    kind: ExpertMlp, model: PreTrainedModel, experts: Experts, block: str, index: int
) -> list[ExpertSite]:
    module = f"{block}.{experts.module}"
    stacks: Any = model.get_submodule(module)
    count, *matrix = getattr(stacks, experts.output).shape
    neurons, hidden = matrix if stacks.is_transposed else reversed(matrix)
    slices = {f"{module}.{experts.output}": Slice(1 if stacks.is_transposed else 2)}
    for name, axis in experts.inputs.items():
        size = getattr(stacks, name).shape[axis]
        owners = None
        if size != neurons:  # gate and up in one
            units = torch.arange(neurons)
            owners = units.repeat(2) if stacks.is_concatenated else units.repeat_interleave(2)
        slices[f"{module}.{name}"] = Slice(axis, owners)
    chosen = read_key(model.config, experts.chosen_key) if experts.chosen_key else count
    width = read_key(model.config, experts.width_key) or neurons
    return [
        ExpertSite(
            kind,
            index,
            f"{module}.{number}",
            neurons,
            hidden,
            stacks.is_transposed,
            slices,
            None if experts.bias is None else f"{module}.{experts.bias}",
            config_values={experts.width_key: width},
            scaled_keys=frozenset({experts.width_key}),
            served=min(1.0, chosen / count),
            module=module,
            expert=number,
            output=experts.output,
        )
        for number in range(count)
    ]
