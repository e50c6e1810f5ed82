"""Conversion of the config and weights of a family to an equivalent class.

There are two layouts: Llama's (a gated MLP after attention) and Phi's (a plain MLP parallel to attention). A family
whose keys or tensors differ from its output class has a row in `CLASS_MAPPINGS`. Heads, groups and widths are those
after pruning.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Config keys and values, always with num_attention_heads, num_key_value_heads and head_dim
ConfigDict = dict[str, Any]
Tensors = dict[str, Tensor]  # of one block, or of everything outside the blocks; names relative to it


class UnsupportedClass(Exception):  # noqa: N818 - a reason, not a failure
    """The reason why a class cannot hold this model."""


@dataclass(frozen=True)
class ClassMapping:
    """How a family differs from its output classes."""

    config: Callable[[ConfigDict], ConfigDict]
    block: Callable[[ConfigDict, Tensors], Tensors] = lambda _, tensors: tensors
    outside: Callable[[Tensors], Tensors] = lambda tensors: tensors
    inexact_step: str | None = None  # the conversion step that is inexact below float32, if any


def llama(config: ConfigDict) -> ConfigDict:
    """Sliding windows are given by `layer_types` and `sliding_window` alone, if there are any."""
    window = config.get("sliding_window")
    everywhere = ["full_attention" if window is None else "sliding_attention"] * config["num_hidden_layers"]
    types = config.get("layer_types") or everywhere
    config = _without(config, "sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
    return config | {"sliding_window": window, "layer_types": types} if "sliding_attention" in types else config


def qwen2(config: ConfigDict) -> ConfigDict:
    """Biases on q, k and v, none on o."""
    return llama(config) | {"attention_bias": True}


def phi3(config: ConfigDict) -> ConfigDict:
    """Rotary positions over whole heads only: Llama's classes do not rotate a part of each head."""
    rope = dict(config["rope_parameters"])
    if rope.pop("partial_rotary_factor") != 1:
        raise UnsupportedClass("Llama's attention does not rotate a part of each head")
    # `rope_parameters` holds it too, if it is used
    return llama(_without(config, "original_max_position_embeddings")) | {"rope_parameters": rope}


def phi3_block(config: ConfigDict, tensors: Tensors) -> Tensors:
    """Split the fused q, k, v and the fused gate and up."""
    tensors = dict(tensors)
    gate, up = tensors.pop("mlp.gate_up_proj.weight").chunk(2)
    head_dim = config["head_dim"]
    queries, pairs = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    query, key, value = tensors.pop("self_attn.qkv_proj.weight").split([queries, pairs, pairs])
    return tensors | {
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "self_attn.q_proj.weight": query,
        "self_attn.k_proj.weight": key,
        "self_attn.v_proj.weight": value,
    }


def gemma(config: ConfigDict) -> ConfigDict:
    """Embeddings are multiplied by the square root of the hidden size."""
    return config | {"embedding_multiplier": config["hidden_size"] ** 0.5}


def gemma_norms(tensors: Tensors) -> Tensors:
    """Norms multiply by 1 + weight."""
    return {name: 1 + tensor if "norm" in name else tensor for name, tensor in tensors.items()}


def gptj(config: ConfigDict) -> ConfigDict:
    """Other keys; rotary positions with a fixed base."""
    if not config["rotary_dim"]:
        raise UnsupportedClass("Phi does not rotate across heads")
    config = _renamed(
        config,
        n_embd="hidden_size",
        n_inner="intermediate_size",
        n_layer="num_hidden_layers",
        n_positions="max_position_embeddings",
        activation_function="hidden_act",
        layer_norm_epsilon="layer_norm_eps",
    )
    # the next float up, because Phi rounds the product with head_dim down
    share = math.nextafter(config["rotary_dim"] / config["head_dim"], 1)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    return _without(config, "n_head", "rotary_dim") | {"rope_parameters": rope}


def gptj_block(config: ConfigDict, tensors: Tensors) -> Tensors:
    """GPT-J rotates neighbouring dimensions; Phi, halves."""
    tensors = _moved(
        tensors,
        {
            "ln_1": "input_layernorm",
            "attn.out_proj": "self_attn.dense",
            "attn": "self_attn",
            "mlp.fc_in": "mlp.fc1",
            "mlp.fc_out": "mlp.fc2",
        },
    )
    turned = int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"])
    order = [*range(0, turned, 2), *range(1, turned, 2), *range(turned, config["head_dim"])]
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
        heads = tensors[name].unflatten(0, (-1, config["head_dim"]))
        tensors[name] = heads[:, order].flatten(0, 1)
    return tensors


def gpt_neox(config: ConfigDict) -> ConfigDict:
    """Parallel attention and MLP with a norm each."""
    if not config["use_parallel_residual"]:
        raise UnsupportedClass("Phi's MLP is parallel to attention, not after it")
    return _without(config, "use_parallel_residual", "attention_bias")


def gpt_neox_block(config: ConfigDict, tensors: Tensors) -> Tensors:
    """Phi has one norm: fold weight and bias of both norms into the next projections."""
    tensors = _unfuse(tensors, "attention.query_key_value", config)
    tensors = _fold_norm(tensors, "input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
    tensors = _fold_norm(tensors, "post_attention_layernorm", ["mlp.dense_h_to_4h"])
    return _moved(
        tensors | _plain_norm(config, tensors["mlp.dense_h_to_4h.weight"]),
        {"attention.dense": "self_attn.dense", "mlp.dense_h_to_4h": "mlp.fc1", "mlp.dense_4h_to_h": "mlp.fc2"},
    )


def falcon(config: ConfigDict) -> ConfigDict:
    """Parallel attention and MLP with one norm or two."""
    if config["alibi"]:
        raise UnsupportedClass("Phi does not support alibi positions")
    if not config["parallel_attn"]:
        raise UnsupportedClass("Phi's MLP is parallel to attention, not after it")
    config = _renamed(
        config, ffn_hidden_size="intermediate_size", activation="hidden_act", layer_norm_epsilon="layer_norm_eps"
    )
    kinds = ("new_decoder_architecture", "multi_query", "num_kv_heads", "num_ln_in_parallel_attn")
    rope = config["rope_parameters"] | {"partial_rotary_factor": 1.0}
    return _without(config, *kinds, "parallel_attn", "bias") | {"rope_parameters": rope}


def falcon_block(config: ConfigDict, tensors: Tensors) -> Tensors:
    """Split the fused queries, keys and values, which are ordered by KV group."""
    tensors = _unfuse(tensors, "self_attention.query_key_value", config)
    if "ln_attn.weight" in tensors:
        tensors = _fold_norm(tensors, "ln_attn", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
        tensors = _fold_norm(tensors, "ln_mlp", ["mlp.dense_h_to_4h"])
        tensors |= _plain_norm(config, tensors["mlp.dense_h_to_4h.weight"])
    return _moved(
        tensors,
        {"self_attention.dense": "self_attn.dense", "mlp.dense_h_to_4h": "mlp.fc1", "mlp.dense_4h_to_h": "mlp.fc2"},
    )


def _without(config: ConfigDict, *keys: str) -> ConfigDict:
    return {key: value for key, value in config.items() if key not in keys}


def _renamed(config: ConfigDict, **keys: str) -> ConfigDict:
    return {keys.get(key, key): value for key, value in config.items()}


def _moved(tensors: Tensors, modules: Mapping[str, str]) -> Tensors:
    """Tensors under the new paths of their modules; the first matching path counts."""
    moved = {}
    for name, tensor in tensors.items():
        old = next((old for old in modules if name.startswith(f"{old}.")), None)
        moved[name if old is None else modules[old] + name.removeprefix(old)] = tensor
    return moved


def _unfuse(tensors: Tensors, module: str, config: ConfigDict) -> Tensors:
    """Split a fused module that is ordered by KV group into queries, keys and values."""
    pairs, head_dim = config["num_key_value_heads"], config["head_dim"]
    each = config["num_attention_heads"] // pairs
    parts = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{module}."):
            leaf = name.removeprefix(f"{module}.")
            groups = tensor.unflatten(0, (pairs, each + 2, head_dim))
            for letter, part in zip("qkv", groups.split([each, 1, 1], dim=1), strict=True):
                parts[f"self_attn.{letter}_proj.{leaf}"] = part.flatten(0, 2)
        else:
            parts[name] = tensor
    return parts


def _fold_norm(tensors: Tensors, norm: str, projections: Sequence[str]) -> Tensors:
    """W (g n + b) + c  =  (W g) n + (W b + c): fold a norm's weight g and bias b into the next projections."""
    tensors = dict(tensors)
    scale, shift = tensors.pop(f"{norm}.weight"), tensors.pop(f"{norm}.bias")
    for projection in projections:
        weight = tensors[f"{projection}.weight"]
        moved = weight @ shift.to(weight.dtype)
        bias = tensors.get(f"{projection}.bias")
        tensors[f"{projection}.bias"] = moved if bias is None else bias + moved
        tensors[f"{projection}.weight"] = weight * scale.to(weight.dtype)
    return tensors


def _plain_norm(config: ConfigDict, like: Tensor) -> Tensors:
    """Phi's norm of a block as the identity."""
    norm = like.new_ones(config["hidden_size"])
    return {"input_layernorm.weight": norm, "input_layernorm.bias": torch.zeros_like(norm)}


# By model_type; the other families have the keys and tensors of their output classes
CLASS_MAPPINGS = {
    "falcon": ClassMapping(
        falcon, falcon_block, partial(_moved, modules={"word_embeddings": "embed_tokens", "ln_f": "final_layernorm"})
    ),
    "gemma": ClassMapping(gemma, lambda _, tensors: gemma_norms(tensors), gemma_norms, "one plus a norm's weight"),
    "gpt_neox": ClassMapping(
        gpt_neox,
        gpt_neox_block,
        partial(_moved, modules={"embed_in": "embed_tokens", "final_layer_norm": "final_layernorm"}),
    ),
    "gptj": ClassMapping(gptj, gptj_block, partial(_moved, modules={"wte": "embed_tokens", "ln_f": "final_layernorm"})),
    "mistral": ClassMapping(llama),
    "phi3": ClassMapping(phi3, phi3_block),
    "qwen2": ClassMapping(qwen2),
    "qwen3": ClassMapping(llama),
}
