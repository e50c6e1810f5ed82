"""The router of a block's experts: it chooses among all, or among some of them."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Routed(Exception):  # noqa: N818 - ends a forward pass that has served its purpose
    """The choices of a router: experts and weights, (tokens, chosen)."""


class Stub(nn.Module):
    """In the place of the experts of a copied router."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        _, chosen, weights = (*args, *kwargs.values())
        raise Routed(chosen, weights)


@dataclass(frozen=True)
class Router:
    """A router, in the module that contains it and the experts."""

    root: nn.Module
    experts: str  # path of the experts in it
    tensors: Mapping[str, int]  # names of the tensors in it with one index for every expert, and its axis
    count: int  # of the experts

    @property
    def runs_alone(self) -> bool:
        """Whether the root is only the mixture of experts, not a whole block."""
        return "." not in self.experts

    @contextmanager
    def among(self, keep: Tensor) -> Iterator[None]:
        """Within the context, the router has rows for some experts only, and its choices are mapped to all of them."""

        def map_choices(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hidden, chosen, weights = (*args, *kwargs.values())
            return (hidden, keep[chosen], weights), {}

        with ExitStack() as undo:
            for name, axis in self.tensors.items():
                path, _, leaf = name.rpartition(".")
                owner = self.root.get_submodule(path)
                held: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
                whole = held[leaf]
                undo.callback(held.__setitem__, leaf, whole)
                rows = whole.detach().index_select(axis, keep)
                held[leaf] = nn.Parameter(rows, requires_grad=False) if isinstance(whole, nn.Parameter) else rows
            for module in self._around():
                for attribute, value in list(vars(module).items()):
                    if type(value) is int and value == self.count and "expert" in attribute:
                        undo.callback(setattr, module, attribute, value)
                        setattr(module, attribute, len(keep))
            experts = self.root.get_submodule(self.experts)
            undo.callback(experts.register_forward_pre_hook(map_choices, with_kwargs=True).remove)
            yield

    def _around(self) -> set[nn.Module]:
        """The root, and what contains the experts or the router in it."""
        paths = [self.experts, *self.tensors]
        parts = [path.split(".")[:length] for path in paths for length in range(path.count(".") + 1)]
        return {self.root.get_submodule(".".join(part)) for part in parts}

    def copy(self) -> "Router":
        """The router without the experts and without what computes no choice."""
        owners = {name.rpartition(".")[0] for name in self.tensors}
        needed = {".".join(path.split(".")[:length]) for path in owners for length in range(path.count(".") + 2)}
        memo: dict[int, Any] = {}
        for path, module in self.root.named_modules():
            inside_owner = any(path == owner or path.startswith(f"{owner}.") for owner in owners)
            if path and path not in needed and not inside_owner:
                memo.setdefault(id(module), Stub() if path == self.experts else nn.Identity())
        hooks = self.root._forward_pre_hooks
        memo[id(hooks)] = type(hooks)()
        return Router(copy.deepcopy(self.root, memo), self.experts, self.tensors, self.count)

    @torch.inference_mode()
    def weigh(self, inputs: Tensor, keep: Tensor) -> Tensor:
        """The weights of all experts for some tokens, (tokens, experts), where only some experts can be chosen.

        Args:
            inputs: of the root, (tokens, hidden).
        """
        with self.among(keep):
            try:
                self.root(inputs[None])
            except Routed as routed:
                chosen, weights = routed.args
        weighed = torch.zeros(len(inputs), self.count, device=inputs.device)
        return weighed.scatter_(1, chosen.view(len(inputs), -1), weights.view(len(inputs), -1).float())


@dataclass(frozen=True)
class RoutingSample:
    """What all experts make of some tokens."""

    router: Router
    inputs: Tensor  # (tokens, hidden), of the router's root
    grams: Tensor  # (tokens, experts, experts): products of the outputs of every two experts
