"""The reference: neurons held by hooks on the stock model. Every written checkpoint must compute the same.

Neurons are held at constants, or at their values for another token (resampling).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .folding import cut_mask
from .plan import SitePlan

Hook = Callable[..., Any]


class Holdable(Protocol):
    """What hooks need of a `Site`."""

    @property
    def name(self) -> str:
        """Path of the output projection."""

    @property
    def neurons(self) -> int:
        """How many it reads."""

    def hold(self, model: nn.Module, plan: SitePlan) -> AbstractContextManager[Any]:
        """Within the context, the model computes what the pruned checkpoint must compute."""


@contextmanager
def ablated(model: nn.Module, sites: Sequence[Holdable], plan: Mapping[str, SitePlan]) -> Iterator[None]:
    """Within the context, every pruned neuron of the plan is held at its fill, as the kind of each site defines it."""
    with ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(site.hold(model, plan[site.name]))
        yield


@contextmanager
def observed(projection: nn.Module, callback: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the context, `callback` is called with each input of an output projection, (..., neurons)."""
    handle = projection.register_forward_pre_hook(lambda module, args: callback(neurons_last(module, args[0])))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def held(projection: nn.Module, plan: SitePlan) -> Iterator[None]:
    """Within the context, an output projection reads the fills of the pruned neurons.

    With a refit, the pruned neurons are removed and the projection is replaced by the refitted one.
    """
    if plan.weight is None:
        handle = projection.register_forward_pre_hook(_hold(plan))
    else:
        handle = projection.register_forward_hook(_replace(plan))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def projected(query: nn.Module, projection: Tensor) -> Iterator[None]:
    """Within the context, the output of a query projection is multiplied by (heads, head_dim, head_dim) factors."""
    heads, head_dim, _ = projection.shape

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        queries = output.unflatten(-1, (heads, head_dim)).unsqueeze(-1)
        product: Tensor = projection.to(output.dtype) @ queries
        return product.squeeze(-1).flatten(-2)

    handle = query.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def resampled(
    model: nn.Module, sites: Sequence[Holdable], keeps: Mapping[str, Tensor], draw: Callable[[int], Tensor]
) -> Iterator[None]:
    """Within the context, every pruned neuron takes its value for another token of the batch.

    Args:
        keeps: by site, the indices of the neurons that are not pruned.
        draw: maps a number of tokens to the token that each takes its values from; called once per site and batch.
    """
    with ExitStack() as hooks:
        for site in sites:
            hook = _resample(cut_mask(site.neurons, keeps[site.name]), draw)
            hooks.callback(model.get_submodule(site.name).register_forward_pre_hook(hook).remove)
        yield


def draw_others(generator: torch.Generator) -> Callable[[int], Tensor]:
    """For `resampled`: a random other token for each token, every token once (a random cycle).

    Example:
        >>> draw = draw_others(torch.Generator().manual_seed(0))
        >>> others = draw(5)
        >>> sorted(others.tolist()), bool((others == torch.arange(5)).any())
        ([0, 1, 2, 3, 4], False)
    """

    def draw(tokens: int) -> Tensor:
        cycle = torch.randperm(tokens, generator=generator)
        return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))

    return draw


def neurons_last(projection: nn.Module, values: Tensor) -> Tensor:
    """What an output projection reads, (..., neurons): a convolution has its channels before height and width."""
    return values.movedim(1, -1) if isinstance(projection, nn.Conv1d | nn.Conv2d) else values


def _neurons_back(projection: nn.Module, values: Tensor) -> Tensor:
    return values.movedim(-1, 1) if isinstance(projection, nn.Conv1d | nn.Conv2d) else values


def _resample(is_cut: Tensor, draw: Callable[[int], Tensor]) -> Hook:
    def hook(projection: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = neurons_last(projection, args[0])
        flat = values.flatten(0, -2)
        others = flat.index_select(0, draw(len(flat))).view_as(values)
        return _neurons_back(projection, torch.where(is_cut, others, values)), *args[1:]

    return hook


def _hold(plan: SitePlan) -> Hook:
    is_cut = cut_mask(len(plan.fill), plan.keep)

    def hook(projection: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = neurons_last(projection, args[0])
        return _neurons_back(projection, torch.where(is_cut, plan.fill.to(values.dtype), values)), *args[1:]

    return hook


def _replace(plan: SitePlan) -> Hook:
    weight, bias = plan.weight, plan.bias
    assert weight is not None
    assert bias is not None

    def hook(projection: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kept = neurons_last(projection, args[0])[..., plan.keep]
        return _neurons_back(projection, nn.functional.linear(kept, weight.to(kept.dtype), bias.to(kept.dtype)))

    return hook
