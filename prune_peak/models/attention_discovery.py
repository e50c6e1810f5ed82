"""Ask a stock class for its attention: halve its heads at one width of a head, and see which tensors become smaller."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import brief
from .asking import Asked, NotDiscovered
from .config_keys import all_keys, read_key
from .families import Attention

HEADS = re.compile(r"^(?!.*(key_value|kv|index|linear|mamba|lru|num_key)).*heads?$")
KV_HEADS = re.compile(r"(key_value_heads|kv_heads|num_kv_heads|n_kv_head|num_query_groups|multi_query_group_num)$")
HEAD_DIM = re.compile(r"^(attention_)?head_(dim|size)$|^d_kv$|^kv_channels$|^d_head$")
QUERY, KEY, VALUE = (re.compile(rf"(^|[._]){name}") for name in ("(q|query)", "(k|key)", "(v|value)"))


def discover_attention(asked: Asked, blocks: str) -> tuple[Attention | None, str]:
    """The attention of the blocks at a path and an empty text, or None and what was seen instead."""
    seen: list[str] = []
    for key, value in sorted(all_keys(asked.config), key=lambda item: item[0].count(".")):
        if type(value) is int and value > 1 and HEADS.search(key.rpartition(".")[2]):
            try:
                return _describe(asked, blocks, key), ""
            except NotDiscovered as reason:
                seen.append(f"{key}: {reason}")
            except Exception as error:  # of configs without these keys, or with others in every block
                seen.append(f"{key}: {brief(error)}")
    return None, "; ".join(seen) or "no key of its config is a number of heads"


def _describe(asked: Asked, blocks: str, key: str) -> Attention:
    holder = key.rpartition(".")[0]
    siblings = {
        name.rpartition(".")[2]: name for name, _ in all_keys(asked.config) if name.rpartition(".")[0] == holder
    }
    kv_key = next((name for last, name in siblings.items() if KV_HEADS.search(last)), None)
    head_dim_key = next((name for last, name in siblings.items() if HEAD_DIM.search(last)), "head_dim")
    heads: int = read_key(asked.config, key)
    head_dim = read_key(asked.config, head_dim_key)
    if head_dim is None:
        head_dim = read_key(asked.config, f"{holder}.hidden_size".lstrip(".")) // heads
    kv_heads = read_key(asked.config, kv_key) if kv_key else None
    groups = kv_heads or heads
    fewer = groups // 2 if groups % 2 == 0 else groups - 1
    values: dict[str, Any] = {key: heads // groups * fewer or heads // 2, head_dim_key: head_dim}
    if kv_key is not None and kv_heads is not None and fewer:  # the only group stays
        values[kv_key] = fewer
    inputs, output = _moved(asked, blocks, values)
    keys: dict[str, Any] = {"heads_key": key, "kv_heads_key": kv_key, "head_dim_key": head_dim_key}
    if len(inputs) == 1 and not fewer and _is(QUERY, inputs[0]):  # keys and values of the only group do not change
        inputs += _siblings(asked, blocks, inputs[0])
    if len(inputs) == 1:
        return Attention(inputs[0], inputs[0], inputs[0], output, **keys)
    named = [next((module for module in inputs if _is(pattern, module)), None) for pattern in (QUERY, KEY, VALUE)]
    if None in named or len(set(named)) < 3:
        raise NotDiscovered(f"its input projections are {', '.join(inputs)}, not queries, keys and values")
    query, key_module, value_module = map(str, named)
    others = tuple(module for module in inputs if module not in named)
    return Attention(query, key_module, value_module, output, other_inputs=others, **keys)


def _siblings(asked: Asked, blocks: str, module: str) -> list[str]:
    """The other modules beside a module of the blocks that have a weight."""
    beside: dict[str, None] = {}
    for name in asked.shapes:
        if asked.is_numbered(name):
            path, _, other, _ = asked.numbered(name)
            if path == blocks and other != module and other.rpartition(".")[0] == module.rpartition(".")[0]:
                beside.setdefault(other)
    return [other for other in beside if _is(KEY, other) or _is(VALUE, other)]


def _is(pattern: re.Pattern[str], module: str) -> bool:
    return bool(pattern.search(module.rpartition(".")[2]))


def _moved(asked: Asked, blocks: str, values: Mapping[str, Any]) -> tuple[list[str], str]:
    """The input projections and the output projection of the blocks, by their paths in the block.

    Raises:
        NotDiscovered: something else becomes smaller, or nothing does.
    """
    moved = asked.moved(values)
    if not moved:
        raise NotDiscovered("the class derives the width of a head from it, so fewer heads would be wider ones")
    inputs: dict[str, None] = {}
    outputs: dict[str, None] = {}
    for name, axis in moved.items():
        path, _, module, parameter = asked.numbered(name)
        if path != blocks or parameter not in ("weight", "bias") or name in asked.tied:
            raise NotDiscovered(f"{name} follows it too")
        (outputs if asked.reads(name, axis) else inputs).setdefault(module)
        if not asked.reads(name, axis) and not asked.is_matrix(name):
            raise NotDiscovered(f"{name} spans all heads")
    if len(outputs) != 1 or not inputs:
        raise NotDiscovered(f"{len(outputs)} output projections and {len(inputs)} input projections follow it")
    return list(inputs), next(iter(outputs))


def is_grouped(attention: Attention, blocks: str, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> bool | None:
    """Whether the rows of a fused projection are ordered by KV group; None where neither order is seen.

    The first row of the first group's values makes the first neuron of each of its heads. Where that row lies is tried.
    """
    block = next(
        name.removesuffix(f".{attention.output_projection}")
        for name, _ in model.named_modules()
        if name.startswith(f"{blocks}.") and name.endswith(f".{attention.output_projection}")
    )
    fused = model.get_submodule(f"{block}.{attention.query}").get_parameter("weight")
    output = model.get_submodule(f"{block}.{attention.output_projection}")
    heads: int = read_key(model.config, attention.heads_key)
    head_dim = output.get_parameter("weight").shape[-1] // heads
    groups = (len(fused) // head_dim - heads) // 2
    expected = [head * head_dim for head in range(heads // groups)]
    for grouped, row in ((False, (heads + groups) * head_dim), (True, (heads // groups + 1) * head_dim)):
        if changed_neurons(model, inputs, fused, row, output) == expected:
            return grouped
    return None


@torch.inference_mode()
def changed_neurons(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], weight: Tensor, row: int, output: nn.Module
) -> list[int]:
    """The inputs of an output projection that change with one row of a weight."""
    seen: list[Tensor] = []
    with output.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).clone())):
        model(**inputs)
        before = weight[row].clone()
        weight[row] *= 2
        model(**inputs)
        weight[row] = before
    changed: list[int] = (seen[0] != seen[len(seen) // 2]).any(0).nonzero().flatten().tolist()
    return changed
