"""Open a checkpoint as the stock class that its config names.

Names on disk and in the class can differ (base-class checkpoints, legacy names); only this module resolves them.
Every check that needs no weights is made here.
"""

import copy
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype

from ..errors import PrunePeakError, brief
from ..io.checkpoint import Checkpoint, has_weights
from ..io.locating import FETCHED, locate, strip_slash
from ..io.side_files import MODULE_FILES
from ..io.tensor_files import digest_tensor
from ..io.untrusted import find_modules
from ..progress import phase, track
from .config_checks import (
    MOST_BUFFERS,
    build_meta_model,
    check_counts,
    find_class,
    find_family,
    read_config,
    read_generation,
    refuse_code,
)
from .config_keys import image_size, vision_config
from .discovery import add_experts, discover_family
from .families import Family
from .head_detection import detect_class
from .miniature import DECODER_IDS as DECODER_IDS  # exported
from .miniature import IMAGES as IMAGES  # exported
from .miniature import takes_decoder_ids
from .weight_names import Merged, check_shapes, match_names


@dataclass(frozen=True)
class ModelSpec:
    """A model described by its config; no weight is read."""

    name: str  # as the user gave it
    revision: str | None  # the Hub's commit, None for a folder
    folder: Path
    family: Family
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]

    @property
    def label(self) -> str:
        """The name in published files: the Hub id, or the folder's name without its path."""
        return self.origin[0]

    @property
    def origin(self) -> tuple[str, str | None]:
        """The Hub id and the commit, also of a folder in the Hub's cache; else the folder's name and None."""
        if self.revision is not None:
            return self.name, self.revision
        folder = self.folder.resolve()
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/"), folder.name
        return folder.name, None

    @cached_property
    def meta_model(self) -> PreTrainedModel:
        """The model on `meta`: modules and shapes without weights."""
        return build_meta_model(self.model_class, self.config)

    def dtype_of(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor (without weights: the config's)."""
        return self.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights according to the config."""
        return self.config.dtype or torch.float32

    @property
    def sees_images(self) -> bool:
        """Whether the inputs are images rather than tokens."""
        return bool(self.model_class.main_input_name == IMAGES)

    @property
    def reads_pairs(self) -> bool:
        """Whether it reads pairs of token windows: one of its encoder, one of its decoder."""
        return not self.sees_images and takes_decoder_ids(self.model_class)

    @property
    def vocabulary(self) -> int:
        """The number of token ids; 0 of a model of images."""
        return getattr(self.config.get_text_config(), "vocab_size", None) or 0

    @property
    def positions(self) -> int | None:
        """The maximum number of tokens of a window; None if the config sets no limit (XLNet: -1)."""
        positions: int | None = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if positions == -1:
            return None
        for name, module in self.meta_model.named_modules():
            # RoBERTa's positions start after the padding index
            if positions and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                positions -= int(module.padding_idx) + 1
        return positions


@dataclass(frozen=True)
class Model(ModelSpec):
    """An open model with its weights; `names` maps names in the class to names on disk."""

    checkpoint: Checkpoint
    names: Mapping[str, str]
    tied: Mapping[str, str]  # tied tensor -> the tensor that is stored for it
    merged: Mapping[str, Merged]  # by the name in the class: what transformers makes from several tensors on disk

    @property
    def tensor_names(self) -> list[str]:
        """The names in the class of all tensors, tied ones once."""
        return [*self.names, *self.merged]

    @property
    def disk_names(self) -> list[str]:
        """The names on disk of all tensors of the class."""
        parts = (disk for merged in self.merged.values() for _, disk in merged.parts)
        return list(dict.fromkeys([*self.names.values(), *parts]))

    def _parts(self, name: str) -> list[str]:
        """The names on disk of what a tensor of the class is made from."""
        name = self.tied.get(name, name)
        return [disk for _, disk in self.merged[name].parts] if name in self.merged else [self.names[name]]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights (of most elements, if the dtypes differ)."""
        sizes: dict[torch.dtype, int] = {}
        for name in self.checkpoint.names:
            dtype = self.checkpoint.dtype(name)
            if dtype.is_floating_point:
                sizes[dtype] = sizes.get(dtype, 0) + torch.Size(self.checkpoint.shape(name)).numel()
        return max(sizes, key=lambda dtype: sizes[dtype])

    def read(self, name: str) -> Tensor:
        """Read a tensor by its name in the class."""
        name = self.tied.get(name, name)
        if name in self.merged:
            kept: dict[str, Tensor] = vars(self).setdefault("_made", {})  # the last one: experts read it one by one
            if name not in kept:
                kept.clear()
                kept[name] = self.merged[name].make(self.checkpoint.read, self.meta_model)[name].contiguous()
            return kept[name]
        return self.checkpoint.read(self.names[name])

    def read_ahead(self, names: Iterable[str]) -> None:
        """`Checkpoint.read_ahead` for names in the class."""
        self.checkpoint.read_ahead([disk for name in names for disk in self._parts(name)])

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The stock model with all its weights in memory, in evaluation mode."""
        with phase("load the model"):
            loaded: PreTrainedModel = self.model_class.from_pretrained(self.folder, dtype=dtype).eval()
        return loaded

    def empty_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model with parameters on `meta` and computed buffers, in evaluation mode, without a cache."""
        empty_model = self._build(dtype)
        if dtype is not torch.float32:  # round float32 tables, as `from_pretrained` does
            exact = dict(self._build(torch.float32).named_buffers())
            for name, buffer in empty_model.named_buffers():
                buffer.copy_(exact[name])
        return empty_model

    def _build(self, dtype: torch.dtype) -> PreTrainedModel:
        with local_torch_dtype(dtype), no_init_weights(), _parameters_on_meta():
            model: PreTrainedModel = self.model_class(copy.deepcopy(self.config)).eval()
        model.config.use_cache = False
        return model

    def dtype_of(self, name: str) -> torch.dtype:
        return self.checkpoint.dtype(self._parts(name)[0])

    @property
    def parameters(self) -> int:
        return sum(torch.Size(self.checkpoint.shape(disk)).numel() for disk in self.disk_names)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(
            torch.Size(self.checkpoint.shape(disk)).numel() * self.checkpoint.dtype(disk).itemsize
            for disk in self.disk_names
        )

    @cached_property
    def digest(self) -> str:
        """An identifier of the weights: the Hub's commit, or a SHA-256 over config and tensors."""
        if self.revision is not None:
            return self.revision
        total = hashlib.sha256((self.folder / "config.json").read_bytes())
        plain = set(self.names.values())
        names = sorted([*self.names.items(), *((disk, disk) for disk in self.disk_names if disk not in plain)])
        at_once = os.cpu_count() or 1
        with ThreadPoolExecutor(at_once) as pool:
            for start in track(range(0, len(names), at_once), "read the weights", "tensor"):
                tensors = {name: self.checkpoint.read(disk) for name, disk in names[start : start + at_once]}
                for name, digest in zip(tensors, pool.map(digest_tensor, tensors.values()), strict=True):
                    total.update(name.encode() + digest.encode())
                del tensors
                self.checkpoint.release()
        return total.hexdigest()


def count_patches(source: ModelSpec) -> int:
    """The number of patches per image, without class tokens."""

    def area(size: Any) -> int:
        return size**2 if isinstance(size, int) else math.prod(size)

    config = vision_config(source.config)
    return math.prod(image_size(config)) // area(getattr(config, "patch_size", None) or 16)


def open_model_spec(name: str, revision: str | None = None) -> ModelSpec:
    """Read only the config of a model from a folder or the Hub.

    Raises:
        PrunePeakError: the model cannot be found or is not supported.
    """
    name = strip_slash(name)
    folder, commit = locate(name, revision, ["config.json"])
    return _read_spec(name, commit, folder)


def open_model(name: str, revision: str | None = None) -> Model:
    """Open a folder or a Hub id as a supported model.

    Raises:
        PrunePeakError: the model cannot be found, is not supported, or config and weights do not match.
    """
    name = strip_slash(name)
    folder, commit = locate(name, revision, [*FETCHED, "*.safetensors"])
    if commit is not None and not any(folder.glob("*.safetensors")):
        folder, commit = locate(name, commit, [*FETCHED, "pytorch_model*.bin"])
    modules = find_modules(folder)
    if commit is not None and modules:
        patterns = [f"{escape(module)}/{pattern}" for module in modules for pattern in (*MODULE_FILES, "*.bin")]
        locate(name, commit, patterns, ())
    spec = _read_spec(name, commit, folder)
    config, meta_model = spec.config, spec.meta_model
    checkpoint = Checkpoint(folder)
    found = match_names(checkpoint, meta_model, spec.family.ignored_tensors)
    names = found.plain
    tied = {copied: first for copied, first in meta_model.all_tied_weights_keys.items() if first != copied}
    for copied, first in list(tied.items()):
        if first not in names and copied in names:
            names[first] = names.pop(copied)
        elif copied in names and not torch.equal(checkpoint.read(names[copied]), checkpoint.read(names[first])):
            # like transformers, do not tie tensors that differ, whatever the config says
            config.tie_word_embeddings = False
            del tied[copied]
        elif copied in names:
            del names[copied]
    check_shapes(checkpoint, meta_model, found, tied)
    return Model(
        name, commit, folder, spec.family, config, spec.model_class, checkpoint, names, tied, merged=found.merged
    )


def _read_spec(name: str, commit: str | None, folder: Path) -> ModelSpec:
    raw = read_config(folder)
    family = find_family(raw, folder)
    path = folder / "config.json"
    check_counts(raw, path)
    refuse_code(raw, folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config.dtype, torch.dtype | None):
            raise TypeError(f"dtype {raw.get('dtype', raw.get('torch_dtype'))!r}")
        weights = Checkpoint(folder) if not raw.get("architectures") and has_weights(folder) else None
        model_class = find_class(config, raw.get("architectures") or [detect_class(config, weights)])
        family = discover_family(model_class, config) if family is None else add_experts(family, model_class, config)
        spec = ModelSpec(name, commit, folder, family, config, model_class)
        meta_model = spec.meta_model  # raises for shapes that the class rejects
    except PrunePeakError:
        raise
    except Exception as error:  # config classes and modules raise many types
        raise PrunePeakError(
            f"{path} is not a valid {raw['model_type']} config: {brief(error)}. Correct the config."
        ) from None
    if not spec.sees_images and not spec.vocabulary:
        raise PrunePeakError(
            f"{folder} is a multimodal wrapper ({raw['model_type']}); expected a vocab_size in its config, or images "
            "alone. Save its language model separately and prune that."
        )
    tables = sum(buffer.numel() * buffer.itemsize for buffer in meta_model.buffers())
    if tables > MOST_BUFFERS:
        raise PrunePeakError(
            f"{path} needs tables of {tables:,} bytes; expected at most {MOST_BUFFERS:,}. Correct the config."
        )
    read_generation(folder)
    return spec


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Create parameters on `meta` and compute buffers (rotary tables): replaces `nn.Module.register_parameter`."""
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
