"""How a family that is written as another class says the same in that class's words.

There are two languages: Llama's (a gated MLP after attention) and Phi's (a plain one beside it). A family that differs
from its host's has a row in `DIALECTS`: what becomes of its config, of the tensors of a block, and of those outside the
blocks. Heads, groups and widths are those that are left.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Words = dict[str, Any]  # a config's keys; num_attention_heads, num_key_value_heads and head_dim are always among them
Tensors = dict[str, Tensor]  # of one block, named from there; or of all that is outside, named from the body


class HostError(Exception):
    """Why a class cannot hold this model."""


@dataclass(frozen=True)
class Dialect:
    """A family's way to say what its hosts say otherwise."""

    words: Callable[[Words], Words]
    block: Callable[[Words, Tensors], Tensors] = lambda _, tensors: tensors
    outside: Callable[[Tensors], Tensors] = lambda tensors: tensors
    rounds: str | None = None  # what loses digits when it is said so in a type narrower than float32


def llama(words: Words) -> Words:
    """Windows are said by `layer_types` and `sliding_window` alone, and only where there are any."""
    window = words.get("sliding_window")
    everywhere = ["full_attention" if window is None else "sliding_attention"] * words["num_hidden_layers"]
    types = words.get("layer_types") or everywhere
    words = _without(words, "sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
    return words | {"sliding_window": window, "layer_types": types} if "sliding_attention" in types else words


def qwen2(words: Words) -> Words:
    """Biases on q, k and v always, and never one on o."""
    return llama(words) | {"attention_bias": True}


def phi3(words: Words) -> Words:
    """Rotation of whole heads only: no host of Llama's kind turns a part of each."""
    rope = dict(words["rope_parameters"])
    if rope.pop("partial_rotary_factor") != 1:
        raise HostError("its rotation of a part of each head has no place in Llama's kind of attention")
    # `rope_parameters` says it too, where it counts
    return llama(_without(words, "original_max_position_embeddings")) | {"rope_parameters": rope}


def phi3_block(words: Words, tensors: Tensors) -> Tensors:
    """One module for q, k and v, and one for gate and up."""
    tensors = dict(tensors)
    gate, up = tensors.pop("mlp.gate_up_proj.weight").chunk(2)
    head_dim = words["head_dim"]
    queries, pairs = words["num_attention_heads"] * head_dim, words["num_key_value_heads"] * head_dim
    query, key, value = tensors.pop("self_attn.qkv_proj.weight").split([queries, pairs, pairs])
    return tensors | {
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "self_attn.q_proj.weight": query,
        "self_attn.k_proj.weight": key,
        "self_attn.v_proj.weight": value,
    }


def gemma(words: Words) -> Words:
    """Embeddings are multiplied by the root of the hidden size."""
    return words | {"embedding_multiplier": words["hidden_size"] ** 0.5}


def gemma_norms(tensors: Tensors) -> Tensors:
    """Norms multiply by one plus their weight."""
    return {name: 1 + tensor if "norm" in name else tensor for name, tensor in tensors.items()}


def gptj(words: Words) -> Words:
    """Other names; rotary positions without a choice of base."""
    if not words["rotary_dim"]:
        raise HostError("its rotation over all heads at once has no place in Phi")
    words = _renamed(
        words,
        n_embd="hidden_size",
        n_inner="intermediate_size",
        n_layer="num_hidden_layers",
        n_positions="max_position_embeddings",
        activation_function="hidden_act",
        layer_norm_epsilon="layer_norm_eps",
    )
    # the next number up, for Phi rounds the product with head_dim down
    share = math.nextafter(words["rotary_dim"] / words["head_dim"], 1)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    return _without(words, "n_head", "rotary_dim") | {"rope_parameters": rope}


def gptj_block(words: Words, tensors: Tensors) -> Tensors:
    """Rotation turns neighbours; Phi's turns halves."""
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
    turned = int(words["head_dim"] * words["rope_parameters"]["partial_rotary_factor"])
    order = [*range(0, turned, 2), *range(1, turned, 2), *range(turned, words["head_dim"])]
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
        heads = tensors[name].unflatten(0, (-1, words["head_dim"]))
        tensors[name] = heads[:, order].flatten(0, 1)
    return tensors


def gpt_neox(words: Words) -> Words:
    """Attention and MLP side by side, with a norm each."""
    if not words["use_parallel_residual"]:
        raise HostError("its MLP after attention has no place in Phi")
    return _without(words, "use_parallel_residual", "attention_bias")


def gpt_neox_block(words: Words, tensors: Tensors) -> Tensors:
    """Phi has one norm: weight and bias of both go into what reads them."""
    tensors = _unfuse(tensors, "attention.query_key_value", words)
    tensors = _fold_norm(tensors, "input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
    tensors = _fold_norm(tensors, "post_attention_layernorm", ["mlp.dense_h_to_4h"])
    return _moved(
        tensors | _plain_norm(words, tensors["mlp.dense_h_to_4h.weight"]),
        {"attention.dense": "self_attn.dense", "mlp.dense_h_to_4h": "mlp.fc1", "mlp.dense_4h_to_h": "mlp.fc2"},
    )


def falcon(words: Words) -> Words:
    """Attention and MLP side by side, with one norm or two."""
    if words["alibi"]:
        raise HostError("its positions by alibi have no place in Phi")
    if not words["parallel_attn"]:
        raise HostError("its MLP after attention has no place in Phi")
    words = _renamed(
        words, ffn_hidden_size="intermediate_size", activation="hidden_act", layer_norm_epsilon="layer_norm_eps"
    )
    kinds = ("new_decoder_architecture", "multi_query", "num_kv_heads", "num_ln_in_parallel_attn")
    rope = words["rope_parameters"] | {"partial_rotary_factor": 1.0}
    return _without(words, *kinds, "parallel_attn", "bias") | {"rope_parameters": rope}


def falcon_block(words: Words, tensors: Tensors) -> Tensors:
    """Queries, keys and values come from one module, KV group by KV group."""
    tensors = _unfuse(tensors, "self_attention.query_key_value", words)
    if "ln_attn.weight" in tensors:
        tensors = _fold_norm(tensors, "ln_attn", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
        tensors = _fold_norm(tensors, "ln_mlp", ["mlp.dense_h_to_4h"])
        tensors |= _plain_norm(words, tensors["mlp.dense_h_to_4h.weight"])
    return _moved(
        tensors,
        {"self_attention.dense": "self_attn.dense", "mlp.dense_h_to_4h": "mlp.fc1", "mlp.dense_4h_to_h": "mlp.fc2"},
    )


def _without(words: Words, *keys: str) -> Words:
    return {key: value for key, value in words.items() if key not in keys}


def _renamed(words: Words, **keys: str) -> Words:
    return {keys.get(key, key): value for key, value in words.items()}


def _moved(tensors: Tensors, modules: Mapping[str, str]) -> Tensors:
    """Tensors under the new paths of their modules; the first path that fits counts."""
    moved = {}
    for name, tensor in tensors.items():
        old = next((old for old in modules if name.startswith(f"{old}.")), None)
        moved[name if old is None else modules[old] + name.removeprefix(old)] = tensor
    return moved


def _unfuse(tensors: Tensors, module: str, words: Words) -> Tensors:
    """Queries, keys and values of a module that makes them KV group by KV group, as three."""
    pairs, head_dim = words["num_key_value_heads"], words["head_dim"]
    each = words["num_attention_heads"] // pairs
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


def _fold_norm(tensors: Tensors, norm: str, readers: Sequence[str]) -> Tensors:
    """W (g n + b) + c  =  (W g) n + (W b + c): a norm's weight g and bias b leave for the modules that read it."""
    tensors = dict(tensors)
    scale, shift = tensors.pop(f"{norm}.weight"), tensors.pop(f"{norm}.bias")
    for reader in readers:
        weight = tensors[f"{reader}.weight"]
        moved = weight @ shift.to(weight.dtype)
        bias = tensors.get(f"{reader}.bias")
        tensors[f"{reader}.bias"] = moved if bias is None else bias + moved
        tensors[f"{reader}.weight"] = weight * scale.to(weight.dtype)
    return tensors


def _plain_norm(words: Words, like: Tensor) -> Tensors:
    """Phi's one norm of a block, which does nothing more."""
    norm = like.new_ones(words["hidden_size"])
    return {"input_layernorm.weight": norm, "input_layernorm.bias": torch.zeros_like(norm)}


# model_type: how it is said; the other families speak as their hosts do
DIALECTS = {
    "falcon": Dialect(
        falcon, falcon_block, partial(_moved, modules={"word_embeddings": "embed_tokens", "ln_f": "final_layernorm"})
    ),
    "gemma": Dialect(gemma, lambda _, tensors: gemma_norms(tensors), gemma_norms, "one plus a norm's weight"),
    "gpt_neox": Dialect(
        gpt_neox,
        gpt_neox_block,
        partial(_moved, modules={"embed_in": "embed_tokens", "final_layer_norm": "final_layernorm"}),
    ),
    "gptj": Dialect(gptj, gptj_block, partial(_moved, modules={"wte": "embed_tokens", "ln_f": "final_layernorm"})),
    "mistral": Dialect(llama),
    "phi3": Dialect(phi3, phi3_block),
    "qwen2": Dialect(qwen2),
    "qwen3": Dialect(llama),
}
