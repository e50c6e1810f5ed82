"""Write a folder as one GGUF file for llama.cpp: arch `llama`, whatever the host, where the mathematics is Llama's.

llama.cpp's own converter reads neither Granite's `head_dim` nor SmolLM3's biases; its `llama` arch holds both.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .errors import PrunePeakError, UsageError
from .source import Source, open_source
from .texts import load_tokenizer, special_tokens

log = logging.getLogger(__name__)

HOSTS = ("granite", "llama", "mistral", "qwen2", "smollm3")

# What a multiplier of Granite must be to do nothing
NEUTRAL: dict[str, Callable[[int], float]] = {
    "embedding_multiplier": lambda head_dim: 1.0,
    "residual_multiplier": lambda head_dim: 1.0,
    "logits_scaling": lambda head_dim: 1.0,
    "attention_multiplier": lambda head_dim: head_dim**-0.5,
}

# llama.cpp's names of how a byte-level tokenizer splits text, by what tokenizer.json says; its first pattern, where it
# has one, with how that splits
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (WORDS % "{1,3}", "ByteLevel"): "llama-bpe",
    (WORDS % "", "ByteLevel"): "qwen2",
}


def export_gguf(folder: str | Path, file: str | Path, *, force: bool = False) -> Path:
    """Write one GGUF file, in the type of the weights (norms and biases in float32).

    With sliding windows, the file's context length is the window: up to there the two compute the same.

    Args:
        folder: what `compress` wrote, or any stock checkpoint of Llama's mathematics.
        file: where to write.
        force: replace an existing file.

    Raises:
        PrunePeakError: other mathematics, a tokenizer that is no byte-level BPE, the extra is missing, or a file that
            is there.

    Example:
        >>> export_gguf("SmolLM2-135M-peak-0.3", "small.gguf")    # doctest: +SKIP
        >>> llama_cpp.Llama("small.gguf")                         # doctest: +SKIP
    """
    path = Path(file)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; expected a file to write.")
    if os.path.exists(path) and not force:
        raise PrunePeakError(f"{path} exists; pass --force to replace it, or choose another name.")
    try:
        import gguf
    except ImportError:
        raise PrunePeakError("export-gguf needs the package gguf: pip install 'prune-peak[gguf]'.") from None
    source = open_source(str(folder))
    _check_mathematics(source)
    factors = _rope_factors(source)
    tokenizer = load_tokenizer(source)
    vocabulary = _read_vocabulary(source, tokenizer)
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _write_hyperparameters(writer, source)
    _write_tokenizer(writer, source, tokenizer, vocabulary)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, source.config.num_hidden_layers)
    tensors = list(_list_tensors(source))
    try:
        for name in tensors:
            tensor, kind = _convert(source, name)
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert theirs is not None
            quantization = gguf.GGMLQuantizationType[kind]
            writer.add_tensor_info(theirs, tensor.shape, numpy.dtype("f4"), tensor.nbytes, quantization)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in tensors:
            writer.write_tensor_data(_convert(source, name)[0])
            source.checkpoint.release()
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.close()
        partial.replace(path)
    except OSError as error:
        raise PrunePeakError(f"{path} could not be written ({error}).") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def _head_dim(source: Source) -> int:
    config = source.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_mathematics(source: Source) -> None:
    config, name = source.config, source.name
    if config.model_type not in HOSTS or not source.blank.can_generate():
        raise PrunePeakError(
            f"{name} is a {source.model_class.__name__}; GGUF files are written of causal LMs of Llama's mathematics: "
            f"{', '.join(HOSTS)}."
        )
    if config.hidden_act != "silu":
        raise PrunePeakError(f"{name} has the activation {config.hidden_act}; the arch llama has silu.")
    for key, neutral in NEUTRAL.items():
        value, expected = getattr(config, key, None), neutral(_head_dim(source))
        if value is not None and abs(value / expected - 1) > 1e-6:
            raise PrunePeakError(f"{name} has {key} = {value}; the arch llama computes as with {expected:g}.")
    if not all(getattr(config, "no_rope_layers", None) or [1]):
        raise PrunePeakError(f"{name} has blocks without rotary positions, which the arch llama has not.")


def _context_length(source: Source) -> int:
    """The learned positions; the window, where some block has one."""
    config = source.config
    length: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or (["sliding_attention"] if window else [])
    if window is None or "sliding_attention" not in kinds or window >= length:
        return length
    log.warning(
        "%s sees %d tokens back and the arch llama has no windows, so the file's context length is %d, not %d.",
        source.name,
        window,
        window,
        length,
    )
    return int(window)


def _rope_factors(source: Source) -> Any:
    """What the rotary frequencies are divided by, (head_dim / 2,) float32; None where plain ones are used."""
    rotary: nn.Module = next(module for module in source.shell(torch.float32).modules() if hasattr(module, "inv_freq"))
    if rotary.attention_scaling != 1 or getattr(rotary, "rope_type", "default") in ("dynamic", "longrope"):
        raise PrunePeakError(f"{source.name} has {rotary.rope_type} positions, which are not written as GGUF here.")
    head_dim, base = _head_dim(source), source.config.rope_parameters["rope_theta"]
    frequencies = rotary.inv_freq
    assert isinstance(frequencies, Tensor)
    if 2 * len(frequencies) != head_dim:
        raise PrunePeakError(f"{source.name} turns a part of every head only, which the arch llama does not.")
    plain = base ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    factors = (plain / frequencies.double()).float()
    return None if bool((factors - 1).abs().max() < 1e-5) else factors.numpy()


def _write_hyperparameters(writer: Any, source: Source) -> None:
    config, head_dim = source.config, _head_dim(source)
    kind = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[source.dtype]  # llama.cpp's LLAMA_FTYPE_*
    writer.add_name(source.label)
    writer.add_file_type(kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context_length(source))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _read_vocabulary(source: Source, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json says, and `pre`: how llama.cpp calls the way it splits text.

    Raises:
        PrunePeakError: not a byte-level BPE that llama.cpp knows by a name of `SPLITS`.
    """
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= source.config.vocab_size:  # before the tokenizer is written as JSON: it makes room for every number
        raise PrunePeakError(
            f"the tokenizer of {source.name} has the token {highest}, but the model knows "
            f"{source.config.vocab_size}. The two do not belong together."
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "slow one"}}
    model = told["model"]
    before = told.get("pre_tokenizer") or {"type": "nothing"}
    steps = before.get("pretokenizers", [before])
    pre = SPLITS.get(tuple(_name_step(step) for step in steps))
    start, end = special_tokens(tokenizer)
    reason = None
    if model["type"] != "BPE" or model.get("byte_fallback"):
        reason = f"it is a {model['type']}{' with byte fallback' * bool(model.get('byte_fallback'))}, no byte-level BPE"
    elif pre is None:
        reason = f"it splits text by {', '.join(_name_step(step) for step in steps)}"
    elif (told.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        reason = f"it normalizes by {told['normalizer']['type']}"
    elif bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        reason = f"it {'ignores' if model.get('ignore_merges') else 'heeds'} merges of whole words, unlike {pre}"
    elif start not in ([], [tokenizer.bos_token_id]) or end not in ([], [tokenizer.eos_token_id]):
        reason = "it puts more than BOS and EOS around a text"
    if reason is not None:
        raise PrunePeakError(
            f"the tokenizer of {source.name} has no place in a GGUF file here: {reason}. "
            f"Byte-level BPE of the kinds {', '.join(SPLITS.values())} is written."
        )
    return told | {"pre": pre, "add_bos": bool(start), "add_eos": bool(end)}


def _name_step(step: Mapping[str, Any]) -> str:
    """One step of splitting, with a mark on what is set otherwise than llama.cpp has it."""
    kind = str(step["type"])
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", kind))
    odd = step.get("add_prefix_space") or (kind == "Digits" and not step["individual_digits"])
    return kind + " (of its own kind)" * bool(odd)


def _write_tokenizer(
    writer: Any, source: Source, tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, Any]
) -> None:
    from gguf import TokenType

    model = vocabulary["model"]
    size = source.config.vocab_size
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [TokenType.UNUSED] * size
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for added in vocabulary["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary["add_bos"])
    writer.add_add_eos_token(vocabulary["add_eos"])
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)


def _list_tensors(source: Source) -> Iterator[str]:
    """The tensors to write: all but biases of nothing but zeros, which the arch llama does without."""
    for name in source.names:
        if not name.endswith(".bias") or bool(source.read(name).any()):
            yield name
        source.checkpoint.release()


def _convert(source: Source, name: str) -> tuple[Any, str]:
    """A tensor as an array, and the name of its type in GGUF."""
    tensor = source.read(name)
    for kind, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f"{kind}." in name:
            tensor = _pair(tensor, getattr(source.config, heads))
    if tensor.dim() == 1 or tensor.dtype is torch.float32:
        return tensor.float().contiguous().numpy(), "F32"
    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy(), "BF16"
    return tensor.contiguous().numpy(), "F16"


def _pair(tensor: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in llama.cpp's order: it turns neighbours, transformers the halves of a head."""
    halves = tensor.view(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
