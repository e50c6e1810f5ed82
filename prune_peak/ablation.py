"""Hold neurons at constants by hooks on the stock model: the specification that every written checkpoint must meet."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from .selection import Choice
from .sites import Site


@contextmanager
def ablated(model: nn.Module, sites: Sequence[Site], plan: Mapping[str, Choice]) -> Iterator[None]:
    """Within the context, every cut neuron of the plan is held at its fill.

    Where the plan holds a refitted reader, the cut neurons are removed and the reader replaced by it.
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
        yield


def _hold(choice: Choice):  # type: ignore[no-untyped-def]
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        held = choice.fill.to(args[0].dtype).expand_as(args[0]).clone()
        held[..., choice.keep] = args[0][..., choice.keep]
        return held, *args[1:]

    return hook


def _replace(choice: Choice):  # type: ignore[no-untyped-def]
    assert choice.weight is not None
    assert choice.bias is not None
    weight, bias = choice.weight, choice.bias

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kept = args[0][..., choice.keep]
        return nn.functional.linear(kept, weight.to(kept.dtype), bias.to(kept.dtype))

    return hook
