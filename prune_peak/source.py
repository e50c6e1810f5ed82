"""A checkpoint opened as the stock class that its config names: folder, config, class, and which name is where.

Names on disk and in the class can differ (a base-class checkpoint, legacy names); they are resolved here and nowhere
else. Everything that can be refused without reading weights is refused here.
"""

import copy
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.initialization import no_init_weights

from .checkpoint import Checkpoint, digest_tensor
from .errors import PrunePeakError, brief
from .families import FAMILIES, Family
from .strangers import TEMPLATES, check_folder, read_json

log = logging.getLogger(__name__)

# What travels with a checkpoint. Code, pickles and the source's own README do not.
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", f"{TEMPLATES}/*.jinja", "LICENSE*", "NOTICE*")
CARD = "README.md"  # read for its licence
# What is not fetched of the Hub: folders, but for that of templates; and the same weights once more
NOT_FETCHED = ("*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors", "*/*.bin", "consolidated*", "*.fp16*", "*.fp32*")

IMAGES = "pixel_values"  # the name of an input, (images, channels, height, width)

# Far above any model: a config that claims more would only exhaust the memory
MOST_BLOCKS, MOST_LABELS = 1000, 1_000_000
MOST = {
    "num_hidden_layers": MOST_BLOCKS,
    "n_layer": MOST_BLOCKS,
    "n_layers": MOST_BLOCKS,
    "num_labels": MOST_LABELS,
    "_num_labels": MOST_LABELS,
}
MOST_BUFFERS = 2**31  # bytes of tables (of positions, of masks) that the class computes from its config

# Buffers that older releases of transformers saved and newer ones compute
LEGACY_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"attn\.(masked_)?bias$")


@dataclass(frozen=True)
class Blueprint:
    """A model as its config alone tells it: no weight is read."""

    name: str  # as the user gave it
    revision: str | None  # the Hub's commit, None for a folder
    folder: Path
    family: Family
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]

    @property
    def label(self) -> str:
        """What to call it where others read: the Hub id, or the folder's own name, not where it lies."""
        return self.name if self.revision is not None else self.folder.resolve().name

    @cached_property
    def blank(self) -> PreTrainedModel:
        """The class without any numbers, for asking it about shapes and modules."""
        return build_blank(self.model_class, self.config)

    def dtype_of(self, name: str) -> torch.dtype:
        """The type that a tensor is stored in, as far as is known."""
        return self.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, as far as is known."""
        return self.config.dtype or torch.float32

    @property
    def sees_images(self) -> bool:
        """Whether the inputs are images; tokens otherwise."""
        return bool(self.model_class.main_input_name == IMAGES)

    @property
    def positions(self) -> int | None:
        """The tokens that a window can have at most, as far as the config says."""
        positions: int | None = getattr(self.config, "max_position_embeddings", None)
        for name, module in self.blank.named_modules():
            # RoBERTa counts its positions from behind the padding's
            if positions and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                positions -= int(module.padding_idx) + 1
        return positions


@dataclass(frozen=True)
class Source(Blueprint):
    """An opened model. `names` maps the names of the class's tensors to those on disk."""

    checkpoint: Checkpoint
    names: Mapping[str, str]
    tied: Mapping[str, str]  # tensors of the class that are others' twins

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of the weights (that of the most numbers, where they differ)."""
        sizes: dict[torch.dtype, int] = {}
        for name in self.checkpoint.names:
            dtype = self.checkpoint.dtype(name)
            if dtype.is_floating_point:
                sizes[dtype] = sizes.get(dtype, 0) + torch.Size(self.checkpoint.shape(name)).numel()
        return max(sizes, key=lambda dtype: sizes[dtype])

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the class."""
        return self.checkpoint.read(self.names[self.tied.get(name, name)])

    def read_ahead(self, names: Iterable[str]) -> None:
        """`Checkpoint.read_ahead`, by names in the class."""
        self.checkpoint.read_ahead([self.names[self.tied.get(name, name)] for name in names])

    def shell(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model with parameters on `meta` and real buffers, in evaluation mode, without a cache."""
        shell = self._build(dtype)
        if dtype is not torch.float32:  # tables are made in float32, and then rounded, as `from_pretrained` does
            exact = dict(self._build(torch.float32).named_buffers())
            for name, buffer in shell.named_buffers():
                buffer.copy_(exact[name])
        return shell

    def _build(self, dtype: torch.dtype) -> PreTrainedModel:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with no_init_weights(), _parameters_on_meta():
                model: PreTrainedModel = self.model_class(copy.deepcopy(self.config)).eval()
            model.config.use_cache = False
            return model
        finally:
            torch.set_default_dtype(default)

    def dtype_of(self, name: str) -> torch.dtype:
        return self.checkpoint.dtype(self.names[self.tied.get(name, name)])

    @property
    def parameters(self) -> int:
        return sum(torch.Size(self.checkpoint.shape(disk)).numel() for disk in self.names.values())

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(
            torch.Size(self.checkpoint.shape(disk)).numel() * self.checkpoint.dtype(disk).itemsize
            for disk in self.names.values()
        )

    @cached_property
    def digest(self) -> str:
        """What identifies the weights: the Hub's commit, or a SHA-256 over config and tensors."""
        if self.revision is not None:
            return self.revision
        total = hashlib.sha256((self.folder / "config.json").read_bytes())
        names = sorted(self.names.items())
        at_once = os.cpu_count() or 1
        with ThreadPoolExecutor(at_once) as pool:
            for start in range(0, len(names), at_once):
                tensors = {name: self.checkpoint.read(disk) for name, disk in names[start : start + at_once]}
                for name, digest in zip(tensors, pool.map(digest_tensor, tensors.values()), strict=True):
                    total.update(name.encode() + digest.encode())
                del tensors
                self.checkpoint.release()
        return total.hexdigest()


def count_patches(source: Blueprint) -> int:
    """What a model of images makes of one, but for a token or two."""

    def area(size: Any) -> int:
        return size**2 if isinstance(size, int) else math.prod(size)

    return area(source.config.image_size) // area(source.config.patch_size)


def open_blueprint(name: str, revision: str | None = None) -> Blueprint:
    """Read a model's config, and nothing else, from a folder or the Hub.

    Raises:
        PrunePeakError: with what is wrong and what to do.
    """
    folder, commit = _locate(name, revision, ["config.json"])
    return _read_blueprint(name, commit, folder)


def open_source(name: str, revision: str | None = None) -> Source:
    """Open a folder or a Hub id as a model of the table.

    Raises:
        PrunePeakError: with what is wrong and what to do, before any weight is read.
    """
    folder, commit = _locate(name, revision, [*SIDE_FILES, CARD, "*.safetensors"])
    if commit is not None and not any(folder.glob("*.safetensors")):
        folder, commit = _locate(name, commit, [*SIDE_FILES, CARD, "pytorch_model*.bin"])
    blueprint = _read_blueprint(name, commit, folder)
    config, blank = blueprint.config, blueprint.blank
    checkpoint = Checkpoint(folder)
    names = _match_names(checkpoint, blank, blueprint.family.leftovers)
    tied = {twin: first for twin, first in blank.all_tied_weights_keys.items() if first != twin}
    for twin, first in list(tied.items()):
        if first not in names and twin in names:
            names[first] = names.pop(twin)
        elif twin in names and not torch.equal(checkpoint.read(names[twin]), checkpoint.read(names[first])):
            # transformers does not tie two tensors that differ, whatever the config says; nor do we
            config.tie_word_embeddings = False
            del tied[twin]
        elif twin in names:
            del names[twin]
    _check_shapes(checkpoint, blank, names, tied)
    return Source(
        name, commit, folder, blueprint.family, config, blueprint.model_class, checkpoint, names=names, tied=tied
    )


def _locate(name: str, revision: str | None, patterns: list[str]) -> tuple[Path, str | None]:
    folder = Path(name)
    try:
        if folder.is_dir():
            check_folder(folder)
            return folder, None
        if folder.exists():
            raise PrunePeakError(f"{name} is a file; expected a model's folder or a Hub id.")
    except OSError as error:
        raise PrunePeakError(f"{name} cannot be opened ({error.strerror}).") from None
    try:
        found = Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=[*NOT_FETCHED])
        )
    except HFValidationError:
        raise PrunePeakError(f"{name} is neither a folder nor a Hub id.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise PrunePeakError(f"{name} is not a folder, and the Hub does not give it: {brief(error)}") from None
    return found, found.name


def _read_blueprint(name: str, commit: str | None, folder: Path) -> Blueprint:
    raw = _read_config(folder)
    family = _find_family(raw, folder)
    path = folder / "config.json"
    for key, most in MOST.items():
        if key in raw and not (isinstance(raw[key], int) and 1 <= raw[key] <= most):
            raise PrunePeakError(f"{path} claims a {key} of {raw[key]!r}; expected 1 to {most}.")
    _refuse_code(raw, folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config.dtype, torch.dtype | None):
            raise TypeError(f"dtype {raw.get('dtype', raw.get('torch_dtype'))!r}")
        model_class = find_class(config, raw.get("architectures"))
        blueprint = Blueprint(name, commit, folder, family, config, model_class)
        blank = blueprint.blank  # shapes that the class itself refuses are refused here
    except PrunePeakError:
        raise
    except Exception as error:  # transformers raises whatever its strict config classes and its modules raise
        raise PrunePeakError(f"{path} is not a valid {family.model_type} config: {brief(error)}") from None
    tables = sum(buffer.numel() * buffer.itemsize for buffer in blank.buffers())
    if tables > MOST_BUFFERS:
        raise PrunePeakError(f"{path} asks for tables of {tables:,} bytes; expected at most {MOST_BUFFERS:,}.")
    _check_generation(folder)
    return blueprint


def _refuse_code(raw: Mapping[str, Any], folder: Path) -> None:
    """What makes transformers read, and perhaps run, something else than the weights of this folder."""
    for key, value in raw.items():
        if "_implementation" in key and "/" in json.dumps(value):
            raise PrunePeakError(
                f"{folder / 'config.json'} asks for {value!r} ({key}), which is code from the Hub. It is never run; "
                "remove the key."
            )
    if raw.get("transformers_weights") is not None:
        raise PrunePeakError(
            f"{folder / 'config.json'} names weights of its own ({raw['transformers_weights']!r}); expected them under "
            "their usual names. Remove the key transformers_weights."
        )
    if (folder / "adapter_config.json").exists():
        raise PrunePeakError(
            f"{folder} holds an adapter (adapter_config.json), which would be put on top of the result. Merge it into "
            "the model first."
        )


def _check_generation(folder: Path) -> None:
    """Whatever loads the weights reads this file too."""
    path = folder / "generation_config.json"
    if path.exists():
        try:
            read_json(path)
            GenerationConfig.from_pretrained(folder)
        except Exception as error:  # transformers raises what its checks of every setting raise
            raise PrunePeakError(f"{path} is not a valid generation config: {brief(error)}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise PrunePeakError(f"{folder} holds no config.json, so it is not a model's folder.") from None
    except (OSError, ValueError) as error:
        raise PrunePeakError(f"{path} is not readable JSON ({brief(error)}).") from None
    if not isinstance(raw, dict):
        raise PrunePeakError(f"{path} holds a {type(raw).__name__}; expected an object with a model_type.")
    return raw


def _find_family(raw: dict[str, Any], folder: Path) -> Family:
    """The row of the table, or a refusal that says what the model is."""
    model_type = raw.get("model_type")
    if raw.get("quantization_config"):
        what = "a quantized checkpoint. Cut the unquantized model, then quantize the result."
    elif raw.get("is_encoder_decoder") or raw.get("add_cross_attention"):
        what = "an encoder-decoder, which prune-peak does not calibrate."
    elif isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    elif any("expert" in key for key in raw):
        what = f"a mixture of experts ({model_type}), whose experts have no place for a constant."
    elif isinstance(raw.get("text_config"), dict) or isinstance(raw.get("vision_config"), dict):
        what = f"a multimodal wrapper ({model_type}). Save its language model on its own and cut that."
    elif "auto_map" in raw:
        what = f"a model with code of its own ({model_type!r}), which is never run."
    else:
        what = f"of the model type {model_type!r}, which is not supported. Supported: {', '.join(sorted(FAMILIES))}."
    raise PrunePeakError(f"{folder} is {what}")


def find_class(config: PreTrainedConfig, architectures: Any) -> type[PreTrainedModel]:
    """The stock class that a config names first; where it names none, a causal LM, or the body if there is none."""
    found: Any = getattr(transformers, str(architectures[0]), None) if architectures else None
    if not architectures:
        causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        found = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING if causal else transformers.MODEL_MAPPING)[type(config)]
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model or found.config_class is not type(config):
        raise PrunePeakError(
            f"config.json names the class {architectures!r}, which is no stock {config.model_type} class of "
            f"transformers {transformers.__version__}. Custom code is never run."
        )
    model_class: type[PreTrainedModel] = found
    return model_class


def build_blank(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The class on `meta`: shapes and modules, no numbers."""
    with torch.device("meta"), no_init_weights():
        return model_class(config)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters go to `meta` as modules register them; buffers (rotary tables) stay real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _match_names(checkpoint: Checkpoint, blank: PreTrainedModel, leftovers: Sequence[str]) -> dict[str, str]:
    """Class name -> disk name, by transformers' own renaming rules; leftovers of another head are left out."""
    state = blank.state_dict()
    transforms = get_model_conversion_mapping(blank)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    ignored = [*(blank._keys_to_ignore_on_load_unexpected or ()), *LEGACY_BUFFERS]
    names: dict[str, str] = {}
    unknown = []
    for disk in checkpoint.names:
        name, converter = rename_source_key(disk, renamings, converters, blank.base_model_prefix, state)
        if converter is None and name in state:
            if name in names:
                raise PrunePeakError(f"{checkpoint.folder}: {disk!r} and {names[name]!r} are the same tensor, {name}.")
            names[name] = disk
        elif any(re.search(pattern, name) for pattern in leftovers):
            log.warning(
                "%s: %s belongs to no part of %s and is left out.", checkpoint.folder, disk, type(blank).__name__
            )
        elif not any(re.search(pattern, name) for pattern in ignored):
            unknown.append(disk)
    if unknown:
        raise PrunePeakError(
            f"{checkpoint.folder} holds {len(unknown)} tensors that {type(blank).__name__} has no place for, and that "
            f"would be lost: {_few(unknown)}."
        )
    return names


def names_on_disk(blank: PreTrainedModel) -> dict[str, str]:
    """Class name -> the name that stock `save_pretrained` writes: the older one, which older releases know too."""
    state = blank.state_dict()
    theirs = {id(tensor): disk for disk, tensor in revert_weight_conversion(blank, dict(state)).items()}
    return {name: theirs[id(tensor)] for name, tensor in state.items()}


def _check_shapes(
    checkpoint: Checkpoint, blank: PreTrainedModel, names: Mapping[str, str], tied: Mapping[str, str]
) -> None:
    state = blank.state_dict()
    missing = [name for name in state if tied.get(name, name) not in names]
    if missing:
        raise PrunePeakError(
            f"{checkpoint.folder} lacks {len(missing)} tensors that {type(blank).__name__} needs: {_few(missing)}."
        )
    for name, disk in names.items():
        if tuple(state[name].shape) != checkpoint.shape(disk):
            raise PrunePeakError(
                f"{checkpoint.folder}: tensor {disk!r} is {checkpoint.shape(disk)}, but config.json says "
                f"{tuple(state[name].shape)}. The two do not belong together."
            )
        if state[name].is_floating_point() != checkpoint.dtype(disk).is_floating_point:
            raise PrunePeakError(
                f"{checkpoint.folder}: tensor {disk!r} is stored as {checkpoint.dtype(disk)}, but "
                f"{type(blank).__name__} has {state[name].dtype} there."
            )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
