"""Ask a stock class what can be pruned: lower one key of its config, and see which tensors become smaller.

A key that shortens only rows of some matrices and columns of others is a width. Its rows are the input projections, its
columns the output projections. Every class is built on `meta`, so no weight is read. What is found here is proved on a
small random model of the same class before it is used (`prune_peak.proof`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunePeakError
from .asking import Asked, NotDiscovered
from .attention_discovery import changed_neurons, discover_attention, is_grouped
from .config_keys import all_keys, read_key
from .expert_discovery import find_experts
from .families import MLP, Experts, Family, blocks_path, find_blocks
from .miniature import DECODER_IDS, build_miniature
from .recording import is_streamable

TELLING = re.compile(r"intermediate|ffn|inner|mlp|(^|_)ff(_|$)|d_?ff|feed|hidden_dim|expansion", re.IGNORECASE)
# Keys that only sound like widths
OTHERS = re.compile(r"squeeze|chunk|round|multiplier|initializer|dropout|eps|hidden_act|activation")

_families: dict[tuple[type[PreTrainedModel], str], Family] = {}  # asked before, by class and config


def discover_family(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Family:
    """What can be pruned in a stock class that the table of families does not list.

    Raises:
        PrunePeakError: nothing was found; the message says what was seen.
    """
    key = model_class, config.to_json_string(use_diff=False)
    if key not in _families:
        _families[key] = _discover(Asked(model_class, config))
    return _families[key]


def add_experts(family: Family, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Family:
    """A family of the table, with the experts that some of its models have."""
    if not any("expert" in key for key, _ in all_keys(config)):
        return family
    return replace(family, experts=discover_stacks(Asked(model_class, config))[0].experts)


def _discover(asked: Asked) -> Family:
    found = discover_stacks(asked)
    model, inputs = build_miniature(asked.model_class, asked.config)
    stacks = _reached(found, model, inputs) if len(found) > 1 else found
    first, *others = (_complete(asked, stack, model, inputs) for stack in stacks)
    if others:
        return replace(first, streamable=False, others=tuple(replace(other, streamable=False) for other in others))
    return replace(first, streamable=is_streamable(model, find_blocks(model, first), inputs))


def _complete(asked: Asked, stack: Family, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Family:
    """A list of blocks with its attention, and with the keys that open biases."""
    attention, unseen = discover_attention(asked, stack.blocks)
    outputs = [mlp.output_projection for mlp in stack.mlps]
    keys = asked.bias_keys(outputs + ([] if attention is None else [attention.output_projection]))
    mlps = [
        replace(
            mlp,
            bias_key=keys.get(mlp.output_projection),
            interleaved=_is_fused(asked, mlp) and _is_interleaved(asked, stack.blocks, mlp, model, inputs),
        )
        for mlp in stack.mlps
    ]
    family = _with_mlps(stack, mlps)
    if attention is not None:
        attention = replace(attention, bias_key=keys.get(attention.output_projection))
        if attention.key == attention.query:
            grouped = is_grouped(attention, blocks_path(model, family), model, inputs)
            unseen = "" if grouped is not None else f"the order of the rows of {attention.query} is unknown"
            attention = None if grouped is None else replace(attention, grouped_qkv=grouped)
    return replace(family, attention=attention, attention_unseen=unseen)


@torch.inference_mode()
def _reached(stacks: Sequence[Family], model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Family]:
    """The lists of blocks that the inputs reach, in the order that they run; the first names the others.

    Raises:
        PrunePeakError: those that are reached share their widths with others.
    """
    tokens: dict[str, int] = {}  # that a list of blocks reads
    with ExitStack() as hooks:
        for stack in stacks:
            parts = [mlp.output_projection for mlp in stack.mlps] + ([stack.experts.module] if stack.experts else [])
            for name, module in model.named_modules():
                if name.startswith(f"{blocks_path(model, stack)}.") and name.endswith(tuple(f".{p}" for p in parts)):

                    def see(_: nn.Module, args: tuple[Tensor, ...], path: str = stack.blocks) -> None:
                        tokens.setdefault(path, args[0].numel() // args[0].shape[-1])

                    hooks.callback(module.register_forward_pre_hook(see).remove)
        model(**inputs)
    others = [stack for stack in stacks if stack.blocks not in tokens]
    whole = {mlp.width_key: f"it belongs to {stack.blocks}" for stack in others for mlp in stack.mlps}
    read = inputs[DECODER_IDS].numel() if DECODER_IDS in inputs else None
    found = []
    for path, count in tokens.items():
        stack = next(each for each in stacks if each.blocks == path)
        mlps = [mlp for mlp in stack.mlps if mlp.width_key not in whole]
        whole |= {mlp.width_key: "several lists of blocks share it" for mlp in stack.mlps if mlp.width_key in whole}
        if mlps or stack.experts:
            found.append(replace(_with_mlps(stack, mlps), reads_decoder_ids=count == read))
    if not found:
        raise _nothing(type(model), whole)
    return [replace(found[0], left_whole={**stacks[0].left_whole, **whole}), *found[1:]]


def _with_mlps(stack: Family, mlps: Sequence[MLP]) -> Family:
    return replace(stack, mlp=mlps[0] if mlps else None, other_mlps=tuple(mlps[1:]))


def _nothing(model_class: type[PreTrainedModel], seen: Mapping[str, str]) -> PrunePeakError:
    """The reason why nothing can be pruned."""
    return PrunePeakError(
        f"{model_class.__name__} has no MLP that can be pruned. "
        f"{'; '.join(map(': '.join, seen.items())) or 'No key of its config is a width'}."
    )


def discover_stacks(asked: Asked) -> list[Family]:
    """The lists of blocks, each with the MLPs and experts that its blocks can have, and a pooler like them.

    The first one has the keys that are no widths, too.

    Raises:
        PrunePeakError: there is none; the message says what was seen.
    """
    left_whole: dict[str, str] = {}
    found: dict[tuple[str, str], MLP] = {}  # by the path of the blocks and the output projection; the first key counts
    experts: dict[str, Experts] = {}  # by the path of the blocks
    poolers: dict[str, str] = {}
    for key in _width_keys(asked.config):
        try:
            moved = _moved(asked, key)
            stacked = find_experts(asked, key, moved)
            if stacked is not None:
                path, one, others = stacked
                shared = _describe(asked, key, others) if others else []
                experts.setdefault(path, replace(one, shared=tuple(mlp for _, mlp in shared)))
                continue
            outside = {name for name in moved if not asked.is_numbered(name)}
            described = _describe(asked, key, {name: axis for name, axis in moved.items() if name not in outside})
            if outside:
                path, mlp = described[0]
                poolers[path] = _find_pooler(asked, outside, mlp)
            for path, mlp in described:
                found.setdefault((path, mlp.output_projection), mlp)
        except NotDiscovered as reason:
            if reason.args:
                left_whole[key] = str(reason)
    if not found and not experts:
        raise _nothing(asked.model_class, left_whole)
    stacks = []
    for blocks in dict.fromkeys([*experts, *(path for path, _ in found)]):
        bare = Family(
            asked.config.model_type,
            blocks,
            experts=experts.get(blocks),
            pooler=poolers.get(blocks),
            discovered=True,
        )
        stacks.append(_with_mlps(bare, [mlp for (path, _), mlp in found.items() if path == blocks]))
    return [replace(stacks[0], left_whole=left_whole), *stacks[1:]]


def _width_keys(config: PreTrainedConfig) -> Iterator[str]:
    """The keys that may be widths, by their names: those of the config itself, then of its text, then the others."""
    for key, value in sorted(all_keys(config), key=lambda item: (item[0].count("."), "text" not in item[0])):
        name = key.rpartition(".")[2]
        numbers = value if isinstance(value, list | tuple) and value else [value]
        is_width = value is None or all(type(number) in (int, float) for number in numbers)
        if TELLING.search(name) and not OTHERS.search(name) and is_width:
            yield key


def _moved(asked: Asked, key: str) -> dict[str, int]:
    """The tensors that follow a key, and their axes.

    Raises:
        NotDiscovered: none do, or not in one axis each.
    """
    for other in _lower(read_key(asked.config, key)):
        moved = asked.moved({key: other})
        if moved:
            return moved
    raise NotDiscovered


def _lower(value: Any) -> Sequence[Any]:
    """Smaller values to try in the place of a width or a ratio, or of one for each stage."""
    if value is None:
        return 8, 16, 64
    if isinstance(value, list | tuple):
        return (type(value)(each / 2 if isinstance(each, float) else max(each // 2, 1) for each in value),)
    if isinstance(value, float):
        return (value / 2,)
    return [other for other in (value - 8, value // 2, value - 1) if other > 0]


def _describe(asked: Asked, key: str, moved: Mapping[str, int]) -> list[tuple[str, MLP]]:
    """The MLPs of a width, each with the path of its list of blocks.

    Raises:
        NotDiscovered: tensors that are not those of MLPs in a list of blocks.
    """
    inputs: dict[tuple[str, str], list[str]] = {}  # modules by list and block
    outputs: dict[tuple[str, str], list[str]] = {}
    for name, axis in moved.items():
        path, block, module, _ = asked.numbered(name)
        if name in asked.tied:
            raise NotDiscovered(f"{name} is shared by several blocks")
        if len(asked.shapes[name]) > 2 and not asked.is_depthwise(name) and not asked.is_matrix(name):
            raise NotDiscovered(f"{name} has {len(asked.shapes[name])} axes (experts, or a convolution)")
        modules = (outputs if asked.reads(name, axis) else inputs).setdefault((path, block), [])
        if module not in modules:
            modules.append(module)
    if not inputs or not outputs:
        raise NotDiscovered("it changes only rows, or only columns, of the matrices of nn.Linear or Conv1D")
    found: list[tuple[str, MLP]] = []
    for (path, block), projections in outputs.items():
        for output in projections:
            made = [each for each in inputs.get((path, block), []) if _nearest(each, projections) == output]
            if not made:
                raise NotDiscovered(f"{path}.{block}.{output} has no input projections of its own")
            found.append((path, MLP(tuple(made), output, key)))
    return list(dict.fromkeys(found))


def _find_pooler(asked: Asked, outside: Set[str], mlp: MLP) -> str:
    """The path of a module outside the blocks that has an MLP like theirs.

    Raises:
        NotDiscovered: the tensors are those of other modules.
    """
    projections = (*mlp.input_projections, mlp.output_projection)
    first = min(outside)
    module = first.partition(f".{projections[0]}.")[0]
    inside = {name.removeprefix(f"{module}.").rpartition(".")[0] for name in outside}
    if inside != set(projections) or not first.startswith(asked.prefix):
        raise NotDiscovered(f"{first} is outside the blocks")
    return module.removeprefix(asked.prefix)


def _nearest(module: str, others: Sequence[str]) -> str:
    """The path that begins with most of the parts that another begins with; of several, the shortest."""

    def shared(other: str) -> int:
        pairs = enumerate(zip(module.split("."), other.split("."), strict=False))
        return next((number for number, (one, two) in pairs if one != two), other.count("."))

    return max(others, key=lambda other: (shared(other), -other.count(".")))


def _is_fused(asked: Asked, mlp: MLP) -> bool:
    """Whether one module computes gate and up."""

    def size(module: str, axis: int) -> int:
        return next(shape[axis] for name, shape in asked.shapes.items() if name.endswith(f".{module}.weight"))

    return len(mlp.input_projections) == 1 and size(mlp.input_projections[0], 0) == 2 * size(mlp.output_projection, 1)


@torch.inference_mode()
def _is_interleaved(asked: Asked, blocks: str, mlp: MLP, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the rows of a fused gate and up alternate: the second row of a small model makes its first neuron."""
    pattern = re.compile(rf"^{re.escape(asked.prefix + blocks)}\.\d+\.{re.escape(mlp.output_projection)}$")
    name = next(name for name, _ in model.named_modules() if pattern.match(name))
    output = model.get_submodule(name)
    fused = model.get_submodule(name.removesuffix(mlp.output_projection) + mlp.input_projections[0])
    changed = changed_neurons(model, inputs, fused.get_parameter("weight"), 1, output)
    return changed == [0]
