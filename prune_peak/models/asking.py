"""Build a class on `meta` under changed values of its config, and see which tensors change their shapes."""

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config_checks import build_meta_model
from .config_keys import all_keys, write_key

Shapes = dict[str, tuple[int, ...]]

NUMBERED = re.compile(r"^(.*?)\.(\d+)\.(.*)\.(\w+)$")  # path of the list, block, module, parameter


class NotDiscovered(Exception):  # noqa: N818 - a reason, not a failure
    """Why a key is not one that can be used for pruning."""


class Asked:
    """A class and its config, and the shapes of its tensors under other values."""

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
        self.model_class, self.config = model_class, config
        self.model = build_meta_model(model_class, config)
        self.shapes = shapes_of(self.model)
        self.prefix = "" if self.model.base_model is self.model else f"{self.model.base_model_prefix}."
        tied = self.model.all_tied_weights_keys
        self.tied = {*tied, *tied.values()}

    def shapes_with(self, values: Mapping[str, Any]) -> Shapes | None:
        """The shapes under other values; None where the class rejects them."""
        config = copy.deepcopy(self.config)
        try:
            for key, value in values.items():
                write_key(config, key, value)
            return shapes_of(build_meta_model(self.model_class, config))
        except Exception:  # classes raise their own kinds
            return None

    def moved(self, values: Mapping[str, Any]) -> dict[str, int] | None:
        """The tensors that become smaller and the axis of each; None where the class rejects the values.

        Raises:
            NotDiscovered: more than one axis of a tensor changes, or tensors come and go.
        """
        after = self.shapes_with(values)
        if after is None:
            return None
        if after.keys() != self.shapes.keys():
            raise NotDiscovered("tensors come and go with it")
        moved: dict[str, int] = {}
        for name, shape in self.shapes.items():
            if len(shape) != len(after[name]):
                raise NotDiscovered(f"{name} has another number of axes")
            axes = [axis for axis, (a, b) in enumerate(zip(shape, after[name], strict=True)) if a != b]
            if len(axes) > 1:
                raise NotDiscovered(f"it changes more than one axis of {name}")
            if axes:
                moved[name] = axes[0]
        return moved

    def numbered(self, name: str) -> tuple[str, str, str, str]:
        """The path of the list of blocks, the block, the module in it and the parameter.

        Raises:
            NotDiscovered: the tensor is outside the blocks.
        """
        match = NUMBERED.match(name.removeprefix(self.prefix))
        if match is None or not name.startswith(self.prefix):
            raise NotDiscovered(f"{name} is outside the blocks")
        path, block, module, parameter = match.groups()
        return path, block, module, parameter

    def is_numbered(self, name: str) -> bool:
        """Whether a tensor is in a list of blocks."""
        return name.startswith(self.prefix) and NUMBERED.match(name.removeprefix(self.prefix)) is not None

    def is_matrix(self, name: str) -> bool:
        """Whether a tensor belongs to a module that multiplies by a matrix."""
        module = self.model.get_submodule(name.rpartition(".")[0])
        return isinstance(module, nn.Linear | Conv1D) or is_pointwise(module)

    def is_depthwise(self, name: str) -> bool:
        """Whether a tensor belongs to a convolution that keeps its channels apart."""
        module = self.model.get_submodule(name.rpartition(".")[0])
        return isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == module.in_channels == module.out_channels

    def reads(self, name: str, axis: int) -> bool:
        """Whether an axis of a weight is the one that multiplies the inputs of its module."""
        if not name.endswith("weight") or not self.is_matrix(name):
            return False
        is_transposed = isinstance(self.model.get_submodule(name.rpartition(".")[0]), Conv1D)
        return axis == (0 if is_transposed else 1)

    def has_bias(self, module: str, shapes: Shapes | None = None) -> bool:
        """Whether the modules at this path in the blocks have a bias."""
        return any(name.endswith(f".{module}.bias") for name in (self.shapes if shapes is None else shapes))

    def bias_keys(self, modules: list[str]) -> dict[str, str]:
        """The keys that open the bias of modules that have none, by their paths in the block."""
        lacking = [module for module in modules if not self.has_bias(module)]
        keys: dict[str, str] = {}
        for key, value in all_keys(self.config):
            if len(keys) < len(lacking) and value is False and "bias" in key:
                opened = self.shapes_with({key: True}) or {}
                keys = {module: key for module in lacking if self.has_bias(module, opened)} | keys
        return keys


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution that multiplies the channels of every pixel by one matrix."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return False
    return module.groups == 1 and set(module.kernel_size) == set(module.stride) == {1}


def shapes_of(model: PreTrainedModel) -> Shapes:
    """The shapes of all tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
