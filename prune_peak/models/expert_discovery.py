"""Ask a stock class for its experts: which stacked weights follow the width of an expert, and which their number."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from .asking import Asked, NotDiscovered
from .config_keys import all_keys
from .families import Experts
from .miniature import CHOSEN, GROUPS

OUTPUT = "down_proj"  # in all classes that transformers' interface for experts runs


def has_stacked_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of experts as transformers' interface for experts expects them."""
    return hasattr(module, OUTPUT) and hasattr(module, "is_transposed") and hasattr(module, "has_bias")


def find_experts(asked: Asked, key: str, moved: Mapping[str, int]) -> tuple[str, Experts, dict[str, int]] | None:
    """The experts whose neurons a config key counts: the path of the blocks, and the other tensors that follow it.

    Raises:
        NotDiscovered: stacked weights that transformers' interface for experts does not run.
    """
    stacked = {name for name in moved if has_stacked_experts(asked.model.get_submodule(name.rpartition(".")[0]))}
    if not stacked:
        return None
    places = {asked.numbered(name)[0::2] for name in stacked}
    if len(places) > 1:
        raise NotDiscovered("experts in several places follow it")
    [(path, module)] = places
    axes = {asked.numbered(name)[3]: moved[name] for name in sorted(stacked)}
    if OUTPUT not in axes:
        raise NotDiscovered(f"the output projections of {module} do not follow it")
    first = next(name for name in stacked if name.endswith(f".{OUTPUT}"))
    owner = asked.model.get_submodule(first.rpartition(".")[0])
    experts = Experts(
        module,
        {name: axis for name, axis in axes.items() if name != OUTPUT},
        OUTPUT,
        key,
        f"{OUTPUT}_bias" if owner.has_bias else None,
    )
    others = {name: axis for name, axis in moved.items() if name not in stacked}
    return path, _with_count(asked, experts, first), others


def _with_count(asked: Asked, experts: Experts, output: str) -> Experts:
    """The same, with what follows the number of experts, where it can be lowered."""
    count = asked.shapes[output][0]
    values = {key: value for key, value in all_keys(asked.config) if type(value) is int}
    for key, value in values.items():
        if value != count or "expert" not in key or CHOSEN.search(key):
            continue
        try:
            moved = asked.moved({key: count // 2}) or {}
            places = [asked.numbered(name) for name in moved]
        except NotDiscovered:
            continue
        if moved.get(output) != 0 or any(asked.shapes[name][axis] != count for name, axis in moved.items()):
            continue
        router = {
            f"{module}.{leaf}": axis
            for (_, _, module, leaf), axis in zip(places, moved.values(), strict=True)
            if module != experts.module
        }
        return replace(
            experts,
            router=router,
            count_key=key,
            chosen_key=next((each for each in values if CHOSEN.search(each) and not GROUPS.search(each)), None),
            groups_key=next((each for each in values if GROUPS.search(each) and "top" not in each), None),
        )
    return experts
