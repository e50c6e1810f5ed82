"""Names of tensors in the class and on disk; tied weights."""

import logging
import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion

from ..errors import PrunePeakError
from ..io.checkpoint import Checkpoint

log = logging.getLogger(__name__)


# Buffers that older transformers releases saved and newer ones compute
LEGACY_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"attn\.(masked_)?bias$")


def match_names(checkpoint: Checkpoint, meta_model: PreTrainedModel, ignored_tensors: Sequence[str]) -> dict[str, str]:
    """Map names in the class to names on disk by transformers' renaming rules, without the tensors of other heads."""
    class_name, state = type(meta_model).__name__, meta_model.state_dict()
    ignored = [*(meta_model._keys_to_ignore_on_load_unexpected or ()), *LEGACY_BUFFERS]
    names: dict[str, str] = {}
    unknown = []
    for disk, name in names_in_class(checkpoint, meta_model).items():
        if name in state:
            if name in names:
                raise PrunePeakError(
                    f"{checkpoint.folder}: {disk!r} and {names[name]!r} are the same tensor, {name}. "
                    "Expected one of them; save the model again with `save_pretrained`."
                )
            names[name] = disk
        elif any(re.search(pattern, name) for pattern in ignored_tensors):
            log.warning("%s: tensor %s is not part of %s and is ignored.", checkpoint.folder, disk, class_name)
        elif not any(re.search(pattern, name) for pattern in ignored):
            unknown.append(disk)
    if unknown:
        raise PrunePeakError(
            f"{checkpoint.folder} contains {len(unknown)} tensors that are not part of {class_name} and would be lost: "
            f"{_few(unknown)}. Remove them, or correct config.json."
        )
    return names


def names_in_class(checkpoint: Checkpoint, meta_model: PreTrainedModel) -> dict[str, str]:
    """Map names on disk to names in the class, by transformers' renaming rules; unknown names are kept."""
    state = meta_model.state_dict()
    transforms = get_model_conversion_mapping(meta_model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    names: dict[str, str] = {}
    for disk in checkpoint.names:
        name, converter = rename_source_key(disk, renamings, converters, meta_model.base_model_prefix, state)
        names[disk] = name if converter is None else disk
    return names


def names_on_disk(meta_model: PreTrainedModel) -> dict[str, str]:
    """Map names in the class to the names that `save_pretrained` writes (older ones, for older releases)."""
    state = meta_model.state_dict()
    saved = {id(tensor): disk for disk, tensor in revert_weight_conversion(meta_model, dict(state)).items()}
    return {name: saved.get(id(tensor), name) for name, tensor in state.items()}


def check_shapes(
    checkpoint: Checkpoint, meta_model: PreTrainedModel, names: Mapping[str, str], tied: Mapping[str, str]
) -> None:
    """Refuse missing tensors, and shapes or kinds of number that differ between class and checkpoint."""
    class_name, state = type(meta_model).__name__, meta_model.state_dict()
    missing = [name for name in state if tied.get(name, name) not in names]
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


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
