"""Choose lists of blocks of a model that has several, such as those of an encoder and a decoder."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from ..errors import PrunePeakError, UsageError, spell
from .loading import ModelSpec

AnySpec = TypeVar("AnySpec", bound=ModelSpec)


def choose_stacks(spec: AnySpec, names: Sequence[str] | None) -> AnySpec:
    """A model of which only the lists of blocks with these names are pruned; all of them without names.

    Raises:
        UsageError: it has no list of such a name.
        PrunePeakError: a chosen one shares a width with another.
    """
    if names is None:
        return spec
    stacks = spec.family.named_stacks
    if unknown := set(names) - set(stacks):
        raise UsageError(f"{spell('stack', ','.join(unknown))}: expected {', '.join(stacks)}, or several with commas.")
    chosen = [stack for name, stack in stacks.items() if name in names]
    others = {name: stack for name, stack in stacks.items() if name not in names}
    for key in {mlp.width_key for stack in chosen for mlp in stack.mlps}:
        if sharing := [name for name, stack in others.items() if key in {mlp.width_key for mlp in stack.mlps}]:
            raise PrunePeakError(
                f"{spec.name} has one {key} for {' and '.join([*names, *sharing])}. Prune all of them."
            )
    left = {stack.blocks: f"{spell('stack')} does not name it" for stack in others.values()}
    whole = {**spec.family.left_whole, **left}
    first = replace(chosen[0], left_whole=whole, others=tuple(chosen[1:]), streamable=spec.family.streamable)
    return replace(spec, family=first)
