"""Text that the model generates itself, for calibration without a data set.

Passages are sampled many at a time, in float32 where the processor has no bfloat16 products. A token is drawn by the
inverse of the cumulative probabilities: one random number for each token of a passage, the same in batches of any size.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..errors import PrunePeakError, UsageError, spell
from ..io.tensor_files import load_tensors, save_tensors
from ..models.bfloat16 import factor_type
from ..models.execution import DTYPES, PASSAGE, ExecutionConfig, default_dtype
from ..models.loading import Model
from ..progress import open_bar
from .chat import is_loop
from .texts import check_vocabulary, load_tokenizer
from .windows import Windows, held_out_count

ADDED_AT_ONCE = 256  # probabilities
SMALLEST = 1e-300


def generate_windows(
    model: Model,
    samples: int,
    length: int,
    seed: int,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - frozen
) -> Windows:
    """Windows of the model's own text, sampled at temperature 1 and cached on disk.

    A window is a row of passages. Each begins with BOS (EOS without a BOS) and a random token, and has no other
    special token.
    """
    held = held_out_count(samples)
    cached = cache_path(model, samples + held, length, seed)
    tokens = _read_cache(cached)
    if tokens is None:
        tokens = generate_tokens(model, samples + held, length, seed, execution)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({"tokens": tokens}, cached)
        except OSError:
            pass  # without the cache, the next run only takes longer
    return Windows(source="the model's own text", calibration=tokens[:samples], held_out=tokens[samples:])


def _read_cache(path: Path) -> Tensor | None:
    """Text that was generated before; None without any, and where it is damaged or belongs to another user."""
    if not os.access(path, os.R_OK):
        return None
    try:
        return load_tensors(path)[0].get("tokens")
    except PrunePeakError:
        return None


def cache_path(model: Model, count: int, length: int, seed: int) -> Path:
    """The file, in the Hub's cache folder, that keeps generated text."""
    options = {"model": model.digest, "windows": count, "length": length, "seed": seed, "rule": 3}
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:24]
    return Path(HF_HOME) / "prune-peak" / f"own-text-{key}.safetensors"


def generate_tokens(
    model: Model,
    count: int,
    length: int,
    seed: int,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - frozen
) -> Tensor:
    """Generate windows of text, (count, length).

    Raises:
        UsageError: windows of fewer than 3 tokens.
        PrunePeakError: the model generates no text, or its tokenizer has neither BOS nor EOS.
    """
    if not model.meta_model.can_generate() or model.reads_pairs:
        lacks = "writes only what a text asks for" if model.reads_pairs else "generates no text"
        raise PrunePeakError(
            f"{model.name} is a {model.model_class.__name__}, which {lacks}; pass a text with {spell('calibration')}."
        )
    if length < 3:
        raise UsageError(f"{spell('sequence_length', length)}: expected at least 3 for text that the model generates.")
    tokenizer = load_tokenizer(model)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise PrunePeakError(
            f"{model.name}: the tokenizer has neither BOS nor EOS; pass a text with {spell('calibration')}."
        )
    check_vocabulary(model, first)
    is_ordinary = torch.zeros(model.vocabulary, dtype=torch.bool)
    is_ordinary[: len(tokenizer)] = True
    is_ordinary[[token for token in tokenizer.all_special_ids if token < model.vocabulary]] = False
    dtype = DTYPES[default_dtype(model)]
    stock = model.load(factor_type(dtype) if execution.device.type == "cpu" else dtype).to(execution.device)
    size = min(PASSAGE, length)
    each = math.ceil(length / size)
    generator = torch.Generator().manual_seed(seed)
    passages = _generate(stock, first, is_ordinary, torch.rand(count * each, size - 1, generator=generator), execution)
    loops = [number for number, passage in enumerate(passages.tolist()) if is_loop(passage)]
    if loops:  # once, for a small model may write nothing else
        numbers = torch.rand(len(loops), size - 1, generator=generator)
        passages[loops] = _generate(stock, first, is_ordinary, numbers, execution)
    return passages.view(count, each * size)[:, :length].contiguous()


def _generate(
    stock: PreTrainedModel, first: int, is_ordinary: Tensor, numbers: Tensor, execution: ExecutionConfig
) -> Tensor:
    """A passage for each row of random numbers between 0 and 1: `first`, and one token for each number."""
    ordinary = is_ordinary.nonzero()[:, 0]
    longest = 1 + numbers.shape[1]
    # plain sampling of ordinary tokens replaces the model's generation settings
    stock.generation_config = GenerationConfig(pad_token_id=0, max_length=longest)
    passages = []
    with open_bar("generate text", "passage", len(numbers)) as bar:
        for part in numbers.split(execution.passages):
            second = ordinary[(part[:, :1] * len(ordinary)).long()]
            prompt = torch.cat([torch.full_like(second, first), second], dim=1).to(stock.device)
            written = stock.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                logits_processor=LogitsProcessorList([Draw(part.to(stock.device), is_ordinary.to(stock.device))]),
                **_room_for(stock, longest),
            )
            passages.append(written.cpu())
            bar.update(len(part))
    return torch.cat(passages)


class Draw(LogitsProcessor):  # type: ignore[misc]
    """Samples a token at temperature 1, and makes it the one that a greedy choice takes.

    It overwrites the scores, which `generate` made for it. `torch.multinomial` would draw a random number for every
    token of the vocabulary.

    Args:
        numbers: between 0 and 1, (passages, tokens); the first of a row is for the last token of the prompt.
        is_ordinary: the tokens that may be drawn, (vocabulary,).

    Example:
        >>> draw = Draw(torch.tensor([[0.0, 0.2], [0.0, 0.8]]), torch.tensor([True, False, True]))
        >>> draw(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3)).argmax(1).tolist()
        [0, 2]
    """

    def __init__(self, numbers: Tensor, is_ordinary: Tensor) -> None:
        self._numbers = numbers
        self._others = (~is_ordinary).nonzero()[:, 0]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self._others] = -math.inf
        scores.sub_(scores.amax(1, keepdim=True)).exp_()
        whole = scores.shape[1] // ADDED_AT_ONCE * ADDED_AT_ONCE
        parts = scores[:, :whole].unflatten(1, (-1, ADDED_AT_ONCE)).sum(2)
        sums = torch.cat([parts, scores[:, whole:].sum(1, keepdim=True)], 1).double().cumsum(1)
        below = self._numbers[:, input_ids.shape[1] - 1, None] * sums[:, -1:]
        part = _first_above(sums, below)
        below -= torch.where(part > 0, sums.gather(1, (part - 1).clamp_min(0)), 0)
        places = part * ADDED_AT_ONCE + torch.arange(ADDED_AT_ONCE, device=part.device)
        inside = scores.gather(1, places.clamp_max(scores.shape[1] - 1)).double() * (places < scores.shape[1])
        drawn = part * ADDED_AT_ONCE + _first_above(inside.cumsum(1), below)
        return scores.scatter_(1, drawn, 2.0)  # more than any probability


def _first_above(sums: Tensor, value: Tensor) -> Tensor:
    """The first place whose cumulative sum is at least `value`, (rows, 1); of places with a part in the sum."""
    return torch.searchsorted(sums, torch.minimum(value.clamp_min(SMALLEST), sums[:, -1:]))


def _room_for(stock: PreTrainedModel, longest: int) -> dict[str, DynamicCache]:
    """A cache whose plain layers have room for all tokens from the start; none for a model with a cache of its own."""
    if "mamba" in type(stock).__name__.lower() or not stock._supports_default_dynamic_cache():
        return {}
    cache = DynamicCache(config=stock.config.get_text_config(decoder=True))
    cache.layers = [RoomyLayer(longest) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return {"past_key_values": cache}


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache that is written in place, where the usual one is copied with every token."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self._longest, self._filled = longest, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = [
                states.new_empty(*states.shape[:-2], self._longest, states.shape[-1])
                for states in (key_states, value_states)
            ]
        start, self._filled = self._filled, self._filled + key_states.shape[-2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., start : self._filled, :] = states
        self.keys, self.values = (room[..., : self._filled, :] for room in self._room)
        return self.keys, self.values
