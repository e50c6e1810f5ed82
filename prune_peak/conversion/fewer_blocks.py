"""The config of a model with fewer blocks."""

import copy
import re
from collections.abc import Collection, Sequence
from dataclasses import replace

from ..errors import PrunePeakError
from ..models.config_checks import COUNTS
from ..models.config_keys import all_keys, write_key
from ..models.families import find_blocks
from ..models.loading import ModelSpec

NUMBERS = re.compile(r"mlp_only_layers$|_(idxs|indices|indexes)$")  # lists of the numbers of some blocks


def drop_blocks(spec: ModelSpec, removed: Collection[int]) -> ModelSpec:
    """A model described by the config without some blocks: the lists with an entry for each lose the same ones.

    Raises:
        PrunePeakError: no key of the config sets the number of blocks alone.
    """
    blocks = len(find_blocks(spec.meta_model, spec.family))
    numbers = number_blocks(blocks, removed)
    keys = [
        key for key, value in all_keys(spec.config) if type(value) is int and value == blocks and COUNTS.search(key)
    ]
    for key in keys:
        config = copy.deepcopy(spec.config)
        write_key(config, key, blocks - len(removed))
        prefix = key.rpartition(".")[0]
        for other, value in all_keys(spec.config):
            if other.rpartition(".")[0] == prefix and isinstance(value, list | tuple):
                write_key(config, other, type(value)(_drop(other, value, numbers)))
        try:
            type(config)(**config.to_dict())  # configs are only checked when they are created
            smaller = replace(spec, config=config)
            if len(find_blocks(smaller.meta_model, spec.family)) == blocks - len(removed):
                return smaller
        except Exception:  # classes raise many types; another key may fit
            continue
    raise PrunePeakError(
        f"no key of this {spec.family.model_type} config sets the number of its blocks alone, so none leaves."
    )


def number_blocks(blocks: int, removed: Collection[int]) -> list[int | None]:
    """The new number of every block; None for those that leave.

    Example:
        >>> number_blocks(4, [1])
        [0, None, 1, 2]
    """
    left = [block for block in range(blocks) if block not in removed]
    return [left.index(block) if block in left else None for block in range(blocks)]


def _drop(key: str, value: Sequence[object], numbers: Sequence[int | None]) -> Sequence[object]:
    """A list of the config without the entries of the blocks that leave."""
    if NUMBERS.search(key) and all(type(each) is int and 0 <= each < len(numbers) for each in value):
        return [numbers[each] for each in value if numbers[each] is not None]  # type: ignore[call-overload]
    if len(value) != len(numbers):
        return value
    return [each for each, number in zip(value, numbers, strict=True) if number is not None]
