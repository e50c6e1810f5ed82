"""The head class of a config without `architectures`, from the names and shapes of the tensors."""

from itertools import chain

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunePeakError
from ..io.checkpoint import Checkpoint
from .config_checks import build_meta_model
from .weight_names import find_names


def detect_class(config: PreTrainedConfig, checkpoint: Checkpoint | None) -> str:
    """The name of the stock class with the most tensors that a checkpoint has all of.

    Args:
        config: of a supported model type.
        checkpoint: None where only the config is known; then the causal LM, or the base model of an encoder.

    Raises:
        PrunePeakError: several classes have the same tensors.
    """
    kind = type(config)
    is_encoder = kind in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    lm = transformers.MODEL_FOR_MASKED_LM_MAPPING if is_encoder else transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    base: str = transformers.MODEL_MAPPING[kind].__name__
    if checkpoint is None:
        return base if is_encoder or kind not in lm else lm[kind].__name__
    heads = [
        lm,
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
        transformers.MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
        transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    ]
    sizes = {base: 0}
    found = [mapping[kind] for mapping in heads if kind in mapping]  # one class, or a tuple
    for model_class in chain.from_iterable(each if isinstance(each, tuple) else (each,) for each in found):
        meta_model = build_meta_model(model_class, config)
        if _has_all_tensors(checkpoint, meta_model):
            sizes[model_class.__name__] = len(meta_model.state_dict()) - len(meta_model.all_tied_weights_keys)
    largest = [name for name, size in sizes.items() if size == max(sizes.values())]
    if len(largest) > 1:
        raise PrunePeakError(
            f"{checkpoint.folder / 'config.json'} names no class, and the weights fit {' and '.join(largest)}. Add the "
            f'right one: "architectures": ["{largest[0]}"].'
        )
    return largest[0]


def _has_all_tensors(checkpoint: Checkpoint, meta_model: PreTrainedModel) -> bool:
    state, tied = meta_model.state_dict(), meta_model.all_tied_weights_keys
    names = find_names(checkpoint, meta_model)
    shapes = {name: checkpoint.shape(disk) for name, disk in names.plain.items()}
    shapes |= {name: tuple(state[name].shape) for name in names.merged if name in state}
    for copied, first in tied.items():  # one of them is enough
        shapes.setdefault(first, shapes.get(copied, ()))
        shapes.setdefault(copied, shapes[first])
    return all(shapes.get(name) == tuple(tensor.shape) for name, tensor in state.items())
