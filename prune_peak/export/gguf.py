"""GGUF files for llama.cpp: models that compute what its architecture `llama` computes, whatever their class.

llama.cpp's own converter reads neither Granite's `head_dim` nor SmolLM3's biases; its architecture supports both.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.texts import load_tokenizer, special_tokens
from ..errors import PrunePeakError, spell
from ..models.loading import Model, open_model

log = logging.getLogger(__name__)


MODEL_TYPES = ("granite", "llama", "mistral", "qwen2", "smollm3")

# The value at which a multiplier of Granite has no effect
NEUTRAL: dict[str, Callable[[int], float]] = {
    "embedding_multiplier": lambda head_dim: 1.0,
    "residual_multiplier": lambda head_dim: 1.0,
    "logits_scaling": lambda head_dim: 1.0,
    "attention_multiplier": lambda head_dim: head_dim**-0.5,
}

FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # llama.cpp's LLAMA_FTYPE_*

# llama.cpp's names of pre-tokenizers, by the steps in tokenizer.json
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (WORDS % "{1,3}", "ByteLevel"): "llama-bpe",
    (WORDS % "", "ByteLevel"): "qwen2",
}


def export(folder: Path, file: Path) -> None:
    """Write one GGUF file, in the dtype of the weights (norms and biases in float32).

    With sliding windows, the file's context length is the window: up to that length both compute the same.

    Raises:
        PrunePeakError: an architecture or a tokenizer that does not fit, or the extra `gguf` is missing.
    """
    try:
        import gguf
    except ImportError:
        raise PrunePeakError(
            f"{spell('format', 'gguf')} needs the package gguf: pip install 'prune-peak[gguf]'."
        ) from None
    source = open_model(str(folder))
    _check_architecture(source)
    factors = _rope_factors(source)
    tokenizer = load_tokenizer(source)
    vocabulary = _read_vocabulary(source, tokenizer)
    writer = gguf.GGUFWriter(file, "llama")
    _write_hyperparameters(writer, source)
    _write_tokenizer(writer, source, tokenizer, vocabulary)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, source.config.num_hidden_layers)
    tensors = list(_list_tensors(source))
    for name in tensors:
        tensor, kind = _convert(source, name)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None
        quantization = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(gguf_name, tensor.shape, numpy.dtype("f4"), tensor.nbytes, quantization)
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


def _head_dim(source: Model) -> int:
    config = source.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_architecture(source: Model) -> None:
    config, name = source.config, source.name
    if config.model_type not in MODEL_TYPES or not source.meta_model.can_generate():
        raise PrunePeakError(
            f"{name} is a {source.model_class.__name__}; expected a causal LM of one of the model types "
            f"{', '.join(MODEL_TYPES)} for a GGUF file."
        )
    kinds = {source.dtype_of(tensor) for tensor in source.names} - set(FILE_TYPES)
    if kinds:
        raise PrunePeakError(
            f"{name} has weights in {kinds.pop()}; expected float32, float16 or bfloat16 for a GGUF file."
        )
    if config.hidden_act != "silu":
        raise PrunePeakError(f"{name} has the activation {config.hidden_act}; the GGUF architecture llama has silu.")
    for key, neutral in NEUTRAL.items():
        value, expected = getattr(config, key, None), neutral(_head_dim(source))
        if value is not None and abs(value / expected - 1) > 1e-6:
            raise PrunePeakError(f"{name} has {key} = {value}; the GGUF architecture llama supports only {expected:g}.")
    if not all(getattr(config, "no_rope_layers", None) or [1]):
        raise PrunePeakError(
            f"{name} has blocks without rotary positions, which the GGUF architecture llama does not support."
        )


def _context_length(source: Model) -> int:
    """The learned positions, or the sliding window where a block has one."""
    config = source.config
    length: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or (["sliding_attention"] if window else [])
    if window is None or "sliding_attention" not in kinds or window >= length:
        return length
    log.warning(
        "%s has a sliding window of %d tokens, which the GGUF architecture llama does not support: the context length "
        "of the file is %d, not %d.",
        source.name,
        window,
        window,
        length,
    )
    return int(window)


def _rope_factors(source: Model) -> Any:
    """The divisors of the rotary frequencies, (head_dim / 2,) float32; None for plain ones."""
    rotary: nn.Module = next(
        module for module in source.empty_model(torch.float32).modules() if hasattr(module, "inv_freq")
    )
    if rotary.attention_scaling != 1 or getattr(rotary, "rope_type", "default") in ("dynamic", "longrope"):
        raise PrunePeakError(f"{source.name} has {rotary.rope_type} positions, which export to GGUF does not support.")
    head_dim, base = _head_dim(source), source.config.rope_parameters["rope_theta"]
    frequencies = rotary.inv_freq
    assert isinstance(frequencies, Tensor)
    if 2 * len(frequencies) != head_dim:
        raise PrunePeakError(
            f"{source.name} rotates a part of every head only, which the GGUF architecture llama does not support."
        )
    plain = base ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    factors = (plain / frequencies.double()).float()
    return None if bool((factors - 1).abs().max() < 1e-5) else factors.numpy()


def _write_hyperparameters(writer: Any, source: Model) -> None:
    config, head_dim = source.config, _head_dim(source)
    kind = FILE_TYPES[source.dtype]
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


def _read_vocabulary(source: Model, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of tokenizer.json, with `pre`: llama.cpp's name of the pre-tokenizer.

    Raises:
        PrunePeakError: not a byte-level BPE with a pre-tokenizer of `SPLITS`.
    """
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= source.config.vocab_size:  # writing the tokenizer as JSON allocates up to the highest number
        raise PrunePeakError(
            f"the tokenizer of {source.name} has the token {highest}, but the vocabulary has "
            f"{source.config.vocab_size} entries. Use the tokenizer that belongs to the model."
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = (
        json.loads(backend.to_str()) if backend is not None else {"model": {"type": "tokenizer without tokenizer.json"}}
    )
    model = content["model"]
    before = content.get("pre_tokenizer") or {"type": "nothing"}
    steps = before.get("pretokenizers", [before])
    pre = SPLITS.get(tuple(_name_step(step) for step in steps))
    start, end = special_tokens(tokenizer)
    reason = None
    if model["type"] != "BPE" or model.get("byte_fallback"):
        reason = (
            f"it is a {model['type']}{' with byte fallback' * bool(model.get('byte_fallback'))}, not a byte-level BPE"
        )
    elif pre is None:
        reason = f"it splits text by {', '.join(_name_step(step) for step in steps)}"
    elif (content.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        reason = f"it normalizes by {content['normalizer']['type']}"
    elif bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        reason = f"its ignore_merges is {bool(model.get('ignore_merges'))}, unlike that of {pre}"
    elif start not in ([], [tokenizer.bos_token_id]) or end not in ([], [tokenizer.eos_token_id]):
        reason = "it adds other tokens than BOS and EOS to a text"
    if reason is not None:
        raise PrunePeakError(
            f"the tokenizer of {source.name} cannot be exported to GGUF: {reason}. Expected a byte-level BPE of the "
            f"kinds {', '.join(SPLITS.values())}."
        )
    return content | {"pre": pre, "add_bos": bool(start), "add_eos": bool(end)}


def _name_step(step: Mapping[str, Any]) -> str:
    """The name of a pre-tokenizer step, marked if its settings differ from llama.cpp's."""
    kind = str(step["type"])
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", kind))
    odd = step.get("add_prefix_space") or (kind == "Digits" and not step["individual_digits"])
    return kind + " (other settings)" * bool(odd)


def _write_tokenizer(
    writer: Any, source: Model, tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, Any]
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
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _list_tensors(source: Model) -> Iterator[str]:
    """The tensors to write: all but biases that are zero, which the architecture llama does not need."""
    for name in source.names:
        if not name.endswith(".bias") or bool(source.read(name).any()):
            yield name
        source.checkpoint.release()


def _convert(source: Model, name: str) -> tuple[Any, str]:
    """A tensor as an array, and its GGUF type."""
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
    """Rows of queries or keys in llama.cpp's order: it rotates neighbours, transformers the halves of a head."""
    halves = tensor.view(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
