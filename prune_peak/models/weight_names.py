"""Names of tensors in the class and on disk; tied weights."""

import copy
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ..errors import PrunePeakError
from ..io.checkpoint import Checkpoint
from .families import computed_names

log = logging.getLogger(__name__)


# Buffers that older transformers releases saved and newer ones compute
LEGACY_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"attn\.(masked_)?bias$")

# Prefixes that wrappers leave in the names of tensors, who adds them, and what to save instead
WRAPPERS = {
    "_orig_mod.": ("torch.compile", "model._orig_mod"),
    "_fsdp_wrapped_module.": ("FSDP", "the full state dict of the model"),
    "base_model.model.": ("peft", "model.merge_and_unload()"),
    "module.": ("DataParallel", "model.module"),
}


@dataclass(frozen=True)
class Merged:
    """Tensors of a class that transformers makes from other tensors on disk: experts stacked, projections split."""

    converter: WeightConverter
    target: str  # the first tensor that is made
    parts: tuple[tuple[str, str], ...]  # pattern of the converter, name on disk

    def make(self, read: Callable[[str], Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """The tensors, by their names in the class."""
        converter = copy.deepcopy(self.converter)
        for pattern, disk in self.parts:
            converter.add_tensor(self.target, disk, pattern, read(disk))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Names:
    """Where the tensors of a class are on disk."""

    plain: dict[str, str]  # name in the class: name on disk
    merged: dict[str, Merged]  # name in the class
    unknown: dict[str, str]  # name on disk: name in the class, which has no such tensor


def match_names(checkpoint: Checkpoint, meta_model: PreTrainedModel, ignored_tensors: Sequence[str]) -> Names:
    """The names of a checkpoint's tensors by transformers' rules, without the tensors of other heads."""
    class_name = type(meta_model).__name__
    ignored = [*(meta_model._keys_to_ignore_on_load_unexpected or ()), *LEGACY_BUFFERS]
    names = find_names(checkpoint, meta_model)
    unknown = []
    for disk, name in names.unknown.items():
        if any(re.search(pattern, name) for pattern in ignored_tensors):
            log.warning("%s: tensor %s is not part of %s and is ignored.", checkpoint.folder, disk, class_name)
        elif not any(re.search(pattern, name) for pattern in ignored):
            unknown.append(disk)
    if unknown:
        _refuse_wrapped(checkpoint, unknown)
        raise PrunePeakError(
            f"{checkpoint.folder} contains {len(unknown)} tensors that are not part of {class_name} and would be lost: "
            f"{_few(unknown)}. Remove them, or correct config.json."
        )
    return names


def _refuse_wrapped(checkpoint: Checkpoint, unknown: Sequence[str]) -> None:
    """Name the wrapper whose prefix the names have.

    Raises:
        PrunePeakError: they have one.
    """
    for prefix, (wrapper, inner) in WRAPPERS.items():
        wrapped = [name for name in unknown if f".{prefix}" in f".{name}"]
        if wrapped:
            raise PrunePeakError(
                f"{checkpoint.folder}: the names of {len(wrapped)} tensors have the prefix {prefix} of {wrapper}: "
                f"{_few(wrapped)}. Save {inner} with `save_pretrained` instead."
            )


def find_names(checkpoint: Checkpoint, meta_model: PreTrainedModel) -> Names:
    """The names of a checkpoint's tensors by transformers' rules.

    Raises:
        PrunePeakError: two tensors on disk are one tensor of the class.
    """
    state = meta_model.state_dict()
    transforms = get_model_conversion_mapping(meta_model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    plain: dict[str, str] = {}
    unknown: dict[str, str] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    for disk in sorted(checkpoint.names, key=dot_natural_key):  # experts in the order of their numbers
        name, pattern = rename_source_key(disk, renamings, converters, meta_model.base_model_prefix, state)
        if pattern is not None and name in state and disk not in state:
            parts.setdefault(name, []).append((pattern, disk))
            continue
        if pattern is not None and disk in state:  # it has been converted already
            name = disk
        if name not in state:
            unknown[disk] = name
            continue
        if name in plain:
            raise PrunePeakError(
                f"{checkpoint.folder}: {disk!r} and {plain[name]!r} are the same tensor, {name}. "
                "Expected one of them; save the model again with `save_pretrained`."
            )
        plain[name] = disk
    merged: dict[str, Merged] = {}
    for target, found in parts.items():
        one = Merged(by_pattern[found[0][0]], target, tuple(found))
        made = one.make(lambda disk: torch.empty(checkpoint.shape(disk), device="meta"), meta_model)
        merged |= dict.fromkeys(made, one)
    return Names(plain, merged, unknown)


def names_on_disk(meta_model: PreTrainedModel) -> dict[str, str]:
    """Map names in the class to the names that `save_pretrained` writes (older ones, for older releases).

    Tensors that it writes as several, or as parts of others, are left out (`split_merged`).
    """
    state = meta_model.state_dict()
    saved = {id(tensor): disk for disk, tensor in revert_weight_conversion(meta_model, dict(state)).items()}
    return {name: saved[id(tensor)] for name, tensor in state.items() if id(tensor) in saved}


def split_merged(meta_model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the class as `save_pretrained` writes them, by their names on disk."""
    split: dict[str, Tensor] = revert_weight_conversion(meta_model, dict(tensors)) if tensors else {}
    return split


def check_shapes(checkpoint: Checkpoint, meta_model: PreTrainedModel, found: Names, tied: Mapping[str, str]) -> None:
    """Refuse missing tensors, and shapes or kinds of number that differ between class and checkpoint."""
    class_name, state, names = type(meta_model).__name__, meta_model.state_dict(), found.plain
    known = {*names, *found.merged, *computed_names(meta_model)}
    missing = [name for name in state if tied.get(name, name) not in known]
    if missing:
        raise PrunePeakError(
            f"{checkpoint.folder} lacks {len(missing)} tensors that {class_name} needs: {_few(missing)}. "
            "Download the checkpoint again, or correct config.json."
        )
    for name, disk in names.items():
        if tuple(state[name].shape) != checkpoint.shape(disk):
            raise PrunePeakError(
                f"{checkpoint.folder}: tensor {disk!r} has the shape {checkpoint.shape(disk)}; config.json expects "
                f"{tuple(state[name].shape)}. Use the config and the weights of one model."
            )
        if state[name].is_floating_point() != checkpoint.dtype(disk).is_floating_point:
            raise PrunePeakError(
                f"{checkpoint.folder}: tensor {disk!r} is stored as {checkpoint.dtype(disk)}; "
                f"{class_name} expects {state[name].dtype}. Download the checkpoint again."
            )
    for one in {each.target: each for each in found.merged.values()}.values():
        made = one.make(lambda disk: torch.empty(checkpoint.shape(disk), device="meta"), meta_model)
        for name, tensor in made.items():
            if name in state and state[name].shape != tensor.shape:
                raise PrunePeakError(
                    f"{checkpoint.folder}: tensors such as {one.parts[0][1]!r} make {name} of the shape "
                    f"{tuple(tensor.shape)}; config.json expects {tuple(state[name].shape)}. Use the config and the "
                    "weights of one model."
                )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
