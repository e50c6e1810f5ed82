"""Hold neurons by hooks on the stock model: the specification that every written checkpoint must meet.

At constants, or at what they were for another token (resampling), which no checkpoint could hold.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .folding import cut_mask
from .selection import Choice
from .sites import Site


@contextmanager
def ablated(model: nn.Module, sites: Sequence[Site], plan: Mapping[str, Choice]) -> Iterator[None]:
    """Within the context, every cut neuron of the plan is held at its fill.

    Where the plan holds a refitted reader, the cut neurons are removed and the reader replaced by it. Where it makes
    heads narrower, their queries are projected, so that they score the keys as the narrower ones do.
    """
    with ExitStack() as hooks:
        for site in sites:
            reader = model.get_submodule(site.name)
            choice = plan[site.name]
            if choice.weight is None:
                handle = reader.register_forward_pre_hook(_hold(choice))
            else:
                handle = reader.register_forward_hook(_replace(choice))
            hooks.callback(handle.remove)
            if choice.narrowing is not None:
                query = model.get_submodule(site.narrowed[0])
                hooks.callback(query.register_forward_hook(_project(choice.narrowing.projection())).remove)
        yield


@contextmanager
def resampled(
    model: nn.Module, sites: Sequence[Site], keeps: Mapping[str, Tensor], draw: Callable[[int], Tensor]
) -> Iterator[None]:
    """Within the context, every cut neuron takes the value that it has for another token of the batch.

    Args:
        keeps: by the site's name, the indices of the neurons that are not cut.
        draw: for a number of tokens, the token that each takes its values from; called once a site and batch.
    """
    with ExitStack() as hooks:
        for site in sites:
            hook = _resample(cut_mask(site.neurons, keeps[site.name]), draw)
            handle = model.get_submodule(site.name).register_forward_pre_hook(hook)
            hooks.callback(handle.remove)
        yield


def draw_others(generator: torch.Generator) -> Callable[[int], Tensor]:
    """For `resampled`: a random one of the other tokens for each, every token once (a random cycle through them all).

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


def _resample(is_cut: Tensor, draw: Callable[[int], Tensor]):  # type: ignore[no-untyped-def]
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = args[0]
        flat = values.flatten(0, -2)
        others = flat.index_select(0, draw(len(flat))).view_as(values)
        return torch.where(is_cut, others, values), *args[1:]

    return hook


def _hold(choice: Choice):  # type: ignore[no-untyped-def]
    is_cut = cut_mask(len(choice.fill), choice.keep)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.where(is_cut, choice.fill.to(args[0].dtype), args[0]), *args[1:]

    return hook


def _project(projection: Tensor):  # type: ignore[no-untyped-def]
    heads, head_dim, _ = projection.shape

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        queries = output.unflatten(-1, (heads, head_dim)).unsqueeze(-1)
        projected: Tensor = projection.to(output.dtype) @ queries
        return projected.squeeze(-1).flatten(-2)

    return hook


def _replace(choice: Choice):  # type: ignore[no-untyped-def]
    assert choice.weight is not None
    assert choice.bias is not None
    weight, bias = choice.weight, choice.bias

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kept = args[0][..., choice.keep]
        return nn.functional.linear(kept, weight.to(kept.dtype), bias.to(kept.dtype))

    return hook
