"""Checks of a config before any weight is read; the stock class that the config names."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

from ..errors import PrunePeakError, brief
from ..io.untrusted import read_json
from .families import FAMILIES, Family

# Far above any real model; larger values would only exhaust the memory
MOST_BLOCKS, MOST_LABELS = 1000, 1_000_000
MOST = {"num_labels": MOST_LABELS, "_num_labels": MOST_LABELS}
REQUIRED = ("num_hidden_layers", "n_layer", "n_layers")
COUNTS = re.compile(r"(^|_)(layers?|blocks|depth)$")  # keys that are numbers of blocks
MOST_BUFFERS = 2**31  # bytes of the tables (positions, masks) that a class computes from its config


def check_counts(raw: Mapping[str, Any], path: Path) -> None:
    """Refuse counts of blocks and labels that no model has.

    Raises:
        PrunePeakError: the message names the key.
    """
    for key, value in raw.items():
        is_count = key in REQUIRED or (type(value) is int and COUNTS.search(key) is not None)
        most = MOST_BLOCKS if is_count else MOST.get(key)
        least = 0 if is_count and key not in REQUIRED else 1
        if key.endswith("feature_layer"):  # counts from the last
            least = -MOST_BLOCKS
        if most is not None and not (isinstance(value, int) and least <= value <= most):
            raise PrunePeakError(f"{path} sets {key} to {value!r}; expected {least} to {most}. Correct the config.")


def refuse_code(raw: Mapping[str, Any], folder: Path) -> None:
    """Refuse settings that make transformers read or run anything but the weights of this folder."""
    for key, value in raw.items():
        if "_implementation" in key and "/" in json.dumps(value):
            raise PrunePeakError(
                f"{folder / 'config.json'} sets {key} to {value!r}, which is code from the Hub and is never run. "
                "Expected a built-in implementation; remove the key."
            )
    if raw.get("transformers_weights") is not None:
        raise PrunePeakError(
            f"{folder / 'config.json'} sets transformers_weights to {raw['transformers_weights']!r}; expected weight "
            "files with the standard names. Rename the files and remove the key."
        )
    if (folder / "adapter_config.json").exists():
        raise PrunePeakError(
            f"{folder} contains an adapter (adapter_config.json); expected plain weights. Merge the adapter into "
            "the model first."
        )


def read_generation(folder: Path) -> GenerationConfig:
    """The generation settings of a model: of their own file or, in older checkpoints, of config.json.

    Raises:
        PrunePeakError: invalid settings, which every loader of the weights would read.
    """
    path = folder / "generation_config.json"
    is_older = not path.exists()
    if is_older:
        path = folder / "config.json"
    try:
        read_json(path)
        return GenerationConfig.from_pretrained(folder, config_file_name=path.name, _from_model_config=is_older)
    except Exception as error:  # the checks of each setting raise different types
        raise PrunePeakError(
            f"{path} is not a valid generation config: {brief(error)}. Correct the settings, or remove them."
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """Parse config.json."""
    path = folder / "config.json"
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise PrunePeakError(
            f"{folder} contains no config.json; expected the folder of a model. Save it with `save_pretrained`."
        ) from None
    except (OSError, ValueError) as error:
        raise PrunePeakError(f"{path} is not readable JSON ({brief(error)}). Download it again.") from None
    if not isinstance(raw, dict):
        raise PrunePeakError(
            f"{path} contains a {type(raw).__name__}; expected an object with a model_type. Download it again."
        )
    return raw


def find_family(raw: dict[str, Any], folder: Path) -> Family | None:
    """The family of a config; None for a type of transformers that the table does not list, to be asked.

    Raises:
        PrunePeakError: the model is not supported; the message names its kind.
    """
    model_type = raw.get("model_type")
    if raw.get("quantization_config"):
        method = _quantization(raw["quantization_config"])
        what = (
            f"a quantized checkpoint ({method}). Expected float32, bfloat16 or float16: prune the model that it was "
            "made from (`base_model` of its card), then quantize the result."
        )
    elif (str(model_type) in FAMILIES and raw.get("is_encoder_decoder")) or (
        raw.get("add_cross_attention") and not raw.get("is_encoder_decoder")
    ):
        what = "one half of an encoder-decoder model, which is not supported alone. Pass the whole model."
    elif isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    elif isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return None
    elif "auto_map" in raw:
        what = f"a model with custom code ({model_type!r}), which is never run. Use a stock class of transformers."
    else:
        version = transformers.__version__
        what = f"of the model type {model_type!r}, which is not one of transformers {version}. Correct the key."
    raise PrunePeakError(f"{folder} is {what}")


def _quantization(settings: Any) -> str:
    """The format that a quantization config names."""
    return str(settings.get("quant_method") if isinstance(settings, Mapping) else settings)[:40]


def _classifies_images(raw: Mapping[str, Any]) -> bool:
    """Whether a config of two towers names the classifier that has only the one for images."""
    return str(raw.get("architectures")).endswith("ForImageClassification']")


def find_class(config: PreTrainedConfig, architectures: Any) -> type[PreTrainedModel]:
    """The stock class that a config names first."""
    found: Any = getattr(transformers, str(architectures[0]), None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model or not (found.config_class is type(config) or _is_listed(found.__name__, config.model_type)):
        raise PrunePeakError(
            f"config.json names the class {architectures!r}; expected a stock {config.model_type} class of "
            f"transformers {transformers.__version__}. Custom code is never run; correct the key architectures."
        )
    if found.__name__.endswith("Backbone"):
        raise PrunePeakError(
            f"config.json names the class {found.__name__}, whose feature maps cannot be compared; expected a model "
            'with a head, or the bare one. Set the key architectures to that, such as ["Dinov2Model"].'
        )
    model_class: type[PreTrainedModel] = found
    return model_class


def _is_listed(name: str, model_type: str) -> bool:
    """Whether an auto class of transformers names this class for a model type (InternLM3 is a LlamaForCausalLM)."""
    mappings = (names for key, names in vars(modeling_auto).items() if key.endswith("MAPPING_NAMES"))
    listed = (names.get(model_type, ()) for names in mappings)
    return any(name in ((found,) if isinstance(found, str) else found) for found in listed)


def build_meta_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the `meta` device: modules and shapes without weights."""
    with torch.device("meta"), no_init_weights():
        return model_class(config)
