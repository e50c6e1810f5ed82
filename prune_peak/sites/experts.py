"""Experts: whole experts of a block leave, and its router chooses among the others."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import PrunePeakError, spell
from ..models.config_keys import read_key
from ..models.families import Family
from .expert_forward import every_output, listened
from .expert_mlp import require_experts
from .folding import cut
from .plan import SitePlan
from .routing import Router, RoutingSample
from .site import ConfigValue, Site, SiteKind, Slice, Tensors, has_module

SAMPLED, SAMPLED_AT_MOST = 1024, 2048  # tokens of a batch, and of all, on which all experts are run
TOKENS_AT_ONCE = 64
FEWEST_OF_A_GROUP = 2  # routers that choose among groups rank these by their two best experts


@dataclass(frozen=True)
class ExpertsSite(Site):
    """The experts of one block; each is a unit, and `neurons` is their number."""

    router: tuple[str, ...] = ()  # those of its slices that are the router's
    chosen: int = 1  # experts that a token is given

    def find_router(self, model: nn.Module) -> Router:
        """The router, in the innermost module that contains it and the experts."""
        paths = [self.name, *self.router]
        root = common_path(paths)
        tensors = {name.removeprefix(f"{root}."): self.slices[name].axis for name in self.router}
        return Router(model.get_submodule(root), self.name.removeprefix(f"{root}."), tensors, self.neurons)


class Experts(SiteKind):
    """The experts of a block."""

    label: ClassVar[str] = "experts"
    holds_constants: ClassVar[bool] = False

    def exists_in(self, family: Family) -> bool:
        return family.experts is not None

    def check(self, model: PreTrainedModel, family: Family) -> None:
        if not require_experts(family).router:
            raise PrunePeakError(
                f"no config key of this {family.model_type} sets the number of its experts alone. Make its experts "
                f"narrower ({spell('sites', 'expert-mlp')})."
            )

    def find(self, model: PreTrainedModel, family: Family, block: str, index: int, unit: str) -> list[Site]:
        experts = require_experts(family)
        name = f"{block}.{experts.module}"
        if not has_module(model, name):
            return []
        stacks: Any = model.get_submodule(name)
        count, *matrix = getattr(stacks, experts.output).shape
        state = model.state_dict()
        router = {tensor: axis for each, axis in experts.router.items() if (tensor := f"{block}.{each}") in state}
        stacked = {f"{name}.{leaf}": 0 for leaf, _ in stacks.named_parameters(recurse=False)}
        groups = int((experts.groups_key and read_key(model.config, experts.groups_key)) or 1)
        chosen = int((experts.chosen_key and read_key(model.config, experts.chosen_key)) or 1)
        return [
            ExpertsSite(
                self,
                index,
                name,
                count,
                matrix[-1] if stacks.is_transposed else matrix[0],
                stacks.is_transposed,
                {tensor: Slice(axis) for tensor, axis in (router | stacked).items()},
                None,
                groups=groups if count % groups == 0 else 1,
                config_values={experts.count_key: count},
                scaled_keys=frozenset({experts.count_key}),
                router=tuple(router),
                chosen=chosen,
            )
        ]

    def step(self, site: Site, multiple_of: int | None) -> int:
        return site.groups

    def config(self, site: Site, kept: int) -> dict[str, ConfigValue]:
        assert isinstance(site, ExpertsSite)
        least = max(site.chosen, FEWEST_OF_A_GROUP * site.groups if site.groups > 1 else 1)
        if kept < least:
            raise PrunePeakError(
                f"{kept} of {site.neurons} experts would stay, but a token is given {site.chosen} of them"
                + (f", out of {site.groups} groups of at least {FEWEST_OF_A_GROUP}" if site.groups > 1 else "")
                + f". Choose a ratio that keeps at least {least}."
            )
        return super().config(site, kept)

    def prune(self, tensors: Mapping[str, Tensor], site: Site, plan: SitePlan) -> Tensors:
        return {
            name: cut(tensor, plan.keep, site.slices[name].axis) if name in site.slices else tensor
            for name, tensor in tensors.items()
        }

    def hold(self, model: nn.Module, site: Site, plan: SitePlan) -> AbstractContextManager[Any]:
        """Within the context, the router of the original chooses among the kept experts only."""
        assert isinstance(site, ExpertsSite)
        return site.find_router(model).among(plan.keep)

    def observe(self, model: nn.Module, site: Site, callback: Callable[..., None]) -> AbstractContextManager[Any]:
        """Within the context, `callback` is called with the weighted norm of every expert's output, (tokens, experts).

        It is zero where a token is not given the expert. For some tokens of every batch it is told what all experts
        would have made of them.
        """
        assert isinstance(site, ExpertsSite)
        return _observed(model, site, callback)


@contextmanager
def _observed(model: nn.Module, site: ExpertsSite, callback: Callable[..., None]) -> Iterator[None]:
    experts, router = model.get_submodule(site.name), site.find_router(model)
    inputs: list[Tensor] = []
    sampled = 0

    def keep_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[:] = [args[0].reshape(-1, args[0].shape[-1])]

    def listen(hidden: Tensor, norms: Tensor) -> None:
        nonlocal sampled
        sample = None
        if sampled < SAMPLED_AT_MOST and router.runs_alone and inputs and len(inputs[0]) == len(hidden):
            some = torch.linspace(0, len(hidden) - 1, min(SAMPLED, len(hidden)), device=hidden.device).long()
            sampled += len(some)
            grams = [_products(every_output(experts, part)) for part in hidden[some].split(TOKENS_AT_ONCE)]
            sample = RoutingSample(router.copy(), inputs[0][some], torch.cat(grams))
        callback(norms, sample=sample)

    handle = router.root.register_forward_pre_hook(keep_input)
    try:
        with listened(experts, listen):
            yield
    finally:
        handle.remove()


def _products(outputs: Tensor) -> Tensor:
    """The products of the outputs of every two experts, (tokens, experts, experts), from (experts, tokens, hidden)."""
    by_token = outputs.float().transpose(0, 1)
    return by_token @ by_token.mT


def common_path(paths: list[str]) -> str:
    """The longest path of modules that all paths begin with.

    Example:
        >>> common_path(["layers.0.mlp.experts", "layers.0.mlp.gate.weight"])
        'layers.0.mlp'
    """
    parts = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    return ".".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, parts))
