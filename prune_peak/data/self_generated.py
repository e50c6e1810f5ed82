"""Text that the model generates itself, for calibration without a data set."""

import hashlib
import json
import math
import os
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from torch import Tensor
from transformers import GenerationConfig

from ..errors import PrunePeakError, UsageError, spell
from ..io.tensor_files import load_tensors, save_tensors
from ..models.bfloat16 import fast_products
from ..models.loading import Model
from ..progress import open_bar
from .texts import check_vocabulary, load_tokenizer
from .windows import Windows, held_out_count

PASSAGE = 128  # tokens generated in one sequence; short sequences are more diverse, and faster
PASSAGES = 64  # generated at once


def generate_windows(model: Model, samples: int, length: int, seed: int) -> Windows:
    """Windows of the model's own text, sampled at temperature 1 and cached on disk.

    A window is a row of passages. Each begins with BOS (EOS without a BOS) and a random token, and has no other
    special token.
    """
    held = held_out_count(samples)
    cached = cache_path(model, samples + held, length, seed)
    tokens = _read_cache(cached)
    if tokens is None:
        tokens = generate_tokens(model, samples + held, length, seed)
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
    options = {"model": model.digest, "windows": count, "length": length, "seed": seed, "rule": 2}
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:24]
    return Path(HF_HOME) / "prune-peak" / f"own-text-{key}.safetensors"


def generate_tokens(model: Model, count: int, length: int, seed: int) -> Tensor:
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
    tokenizer, vocabulary = load_tokenizer(model), model.vocabulary
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise PrunePeakError(
            f"{model.name}: the tokenizer has neither BOS nor EOS; pass a text with {spell('calibration')}."
        )
    check_vocabulary(model, first)
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(min(len(tokenizer), vocabulary)) if token not in special])
    stock = model.load(model.dtype)
    size = min(PASSAGE, length)
    each = math.ceil(length / size)
    # Plain sampling of ordinary tokens replaces the model's generation settings; EOS is suppressed
    stock.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
        max_length=size,
        suppress_tokens=sorted(set(range(vocabulary)) - set(ordinary.tolist())) or None,
    )
    passages = []
    with torch.random.fork_rng(devices=[]), open_bar("generate text", "passage", count * each) as bar:
        torch.manual_seed(seed)
        for part in torch.empty(count * each, 1).split(PASSAGES):
            second = ordinary[torch.randint(len(ordinary), part.shape)]
            prompt = torch.cat([torch.full_like(second, first), second], dim=1)
            with fast_products():
                passages.append(stock.generate(prompt, attention_mask=torch.ones_like(prompt)))
            bar.update(len(part))
    return torch.cat(passages).view(count, each * size)[:, :length].contiguous()
