"""Windows of tokens to calibrate and evaluate on: from text files, data sets, or the model's own writing."""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from .arithmetic import fast_products
from .checkpoint import load_tensors, save_tensors
from .errors import PrunePeakError, UsageError, brief
from .source import Source
from .strangers import check_file, parse_json

SAMPLES, SEQUENCE_LENGTH = 48, 512
SELF = "self"
PASSAGE = 128  # tokens of own text that are sampled in one go; short ones are more diverse, and faster
PASSAGES = 64  # sampled at once
LONGEST_TEXT = 4 * 2**20  # characters read of a text, from its start: some two thousand windows of 512 tokens


@dataclass(frozen=True)
class Windows:
    """Token windows to calibrate on, and others of the same text that are kept apart to evaluate on; or images."""

    source: str  # the name of the text, folder or data set
    calibration: Tensor  # (windows, length) int64; or (images, channels, height, width) float32
    held_out: Tensor  # (windows, length); no image

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.calibration.numpy().tobytes()).hexdigest()


def held_out_count(samples: int) -> int:
    """Windows kept apart for the perplexity before and after: a twelfth, one to eight."""
    return max(1, min(8, samples // 12))


def window_length(source: Source, wanted: int) -> int:
    """The sequence length asked for, capped at the positions that the model has learned."""
    if wanted < 2:
        raise UsageError(f"--sequence-length {wanted}: a window needs at least 2 tokens.")
    return min(wanted, source.positions or wanted)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the weights."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # every tokenizer class raises its own kinds
        raise PrunePeakError(
            f"{source.folder} holds no tokenizer that transformers can load ({brief(error)})."
        ) from None
    return tokenizer


def name_text(name: str | Path) -> str:
    """What to call a text or a folder of images where others read: its own name, not where it lies; a data set's id."""
    return Path(name).name if os.path.exists(name) else str(name)


def read_texts(name: str) -> list[str]:
    """The texts of a `.txt` file (one), a `.jsonl` file (the key `text` of every line), or a Hub data set.

    Raises:
        PrunePeakError: the file is missing, not text, or not of that form.
    """
    path = Path(name)
    if not path.suffix and (os.path.isdir(name) or not os.path.exists(name)):
        return _read_data_set(name)
    try:
        check_file(path)
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST_TEXT)
    except (OSError, UnicodeDecodeError) as error:
        raise PrunePeakError(f"{name} is not a readable UTF-8 text ({brief(error)}).") from None
    if path.suffix != ".jsonl":
        return [text]
    texts = []
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines[: None if len(text) < LONGEST_TEXT else -1], start=1):
        try:
            texts.append(parse_json(line)["text"])
            texts[-1].encode()  # half a surrogate pair can be written as JSON, and is no text
        except (ValueError, KeyError, TypeError, AttributeError):
            raise PrunePeakError(
                f'{name}, line {number}: expected an object with a "text", like {{"text": "..."}}.'
            ) from None
    return texts


def _read_data_set(name: str) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise PrunePeakError(
            f"{name} is neither a file nor, without the package datasets, a data set: pip install "
            "'prune-peak[datasets]'."
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        texts, size = [], 0
        for row in rows:
            texts.append(row["text"])
            size += len(row["text"])
            if size > LONGEST_TEXT:
                break
    except Exception as error:  # datasets, pyarrow and the Hub raise their own kinds
        raise PrunePeakError(
            f"{name} is neither a file nor a data set with a split `train` and a column `text` ({brief(error)})."
        ) from None
    return texts


def tokenize_text(name: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """A text as consecutive windows, (windows, length); each with the special tokens that the tokenizer adds.

    Several texts follow each other, each ended by EOS.

    Raises:
        PrunePeakError: there is no such text, or it is shorter than one window.
    """
    texts = read_texts(name)
    separator = [tokenizer.eos_token_id] if len(texts) > 1 and tokenizer.eos_token_id is not None else []
    tokens: list[int] = []
    try:
        for text in texts:
            tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
        start, end = special_tokens(tokenizer)
    except Exception as error:  # every tokenizer class raises its own kinds
        raise PrunePeakError(f"the tokenizer fails at {name} ({brief(error)}).") from None
    body = max(1, length - len(start) - len(end))
    count = len(tokens) // body
    if count == 0:
        raise PrunePeakError(
            f"{name} holds {len(tokens)} tokens, fewer than one window of {length}. "
            "Pass a longer text or a smaller --sequence-length."
        )
    windows = torch.tensor(tokens[: count * body]).view(count, body)
    around = [torch.tensor(part, dtype=torch.int64).expand(count, len(part)) for part in (start, end)]
    return torch.cat([around[0], windows, around[1]], dim=1)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What this tokenizer puts before a text and after it: BOS or CLS, SEP, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    first = full.index(bare[0])
    return list(full[:first]), list(full[first + len(bare) :])


def read_windows(name: str, source: Source, length: int) -> Tensor:
    """`tokenize_text` with the model's own tokenizer, checked against its vocabulary."""
    windows = tokenize_text(name, load_tokenizer(source), length)
    if int(windows.max()) >= source.config.vocab_size:
        raise _strangers(source, int(windows.max()))
    return windows


def _strangers(source: Source, token: int) -> PrunePeakError:
    return PrunePeakError(
        f"the tokenizer of {source.name} gives the token {token}, but the model knows {source.config.vocab_size}. "
        "The two do not belong together."
    )


def choose_windows(name: str, source: Source, samples: int, length: int, seed: int) -> Windows:
    """Windows of a text, chosen at random by the seed, with some held out."""
    windows = read_windows(name, source, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    held = min(held_out_count(samples), len(windows) // 4)
    samples = min(samples, len(windows) - held)
    return Windows(
        source=name_text(name),
        calibration=windows[order[:samples].sort().values],
        held_out=windows[order[samples : samples + held].sort().values],
    )


def own_windows(source: Source, samples: int, length: int, seed: int) -> Windows:
    """The model's own text: sampled at temperature 1, cached on disk.

    A window is a row of passages. Each begins with BOS (where a tokenizer has none: EOS) and a random token, and holds
    no other special token.
    """
    held = held_out_count(samples)
    cached = own_text_cache(source, samples + held, length, seed)
    if cached.is_file():
        tokens = load_tensors(cached)[0]["tokens"]
    else:
        tokens = sample_own_text(source, samples + held, length, seed)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({"tokens": tokens}, cached)
        except OSError:
            pass  # a cache that cannot be written only costs the next run its time
    return Windows(source="the model's own text", calibration=tokens[:samples], held_out=tokens[samples:])


def own_text_cache(source: Source, count: int, length: int, seed: int) -> Path:
    """Where a model's own text is kept once it is sampled: beside the Hub's cache."""
    options = {"model": source.digest, "windows": count, "length": length, "seed": seed, "rule": 2}
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:24]
    return Path(HF_HOME) / "prune-peak" / f"own-text-{key}.safetensors"


def sample_own_text(source: Source, count: int, length: int, seed: int) -> Tensor:
    """Sample windows of a model's own text, (count, length)."""
    if not source.blank.can_generate():
        raise PrunePeakError(
            f"{source.name} is a {source.model_class.__name__}, which generates no text; pass one with --calibration."
        )
    if length < 3:
        raise UsageError(f"--sequence-length {length}: a window of the model's own text needs at least 3 tokens.")
    tokenizer = load_tokenizer(source)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise PrunePeakError(f"{source.name}: the tokenizer has neither BOS nor EOS; pass a text with --calibration.")
    if first >= source.config.vocab_size:
        raise _strangers(source, first)
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor(
        [token for token in range(min(len(tokenizer), source.config.vocab_size)) if token not in special]
    )
    model = source.model_class.from_pretrained(source.folder, dtype=source.dtype).eval()
    size = min(PASSAGE, length)
    each = math.ceil(length / size)
    # In place of the model's own settings: plain sampling of ordinary tokens, and so no EOS to stop at
    others = sorted(set(range(source.config.vocab_size)) - set(ordinary.tolist()))
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
        max_length=size,
        suppress_tokens=others or None,
    )
    passages = []
    with torch.random.fork_rng(devices=[]), tqdm(total=count * each, desc="own text", unit="passage") as bar:
        torch.manual_seed(seed)
        for part in torch.empty(count * each, 1).split(PASSAGES):
            second = ordinary[torch.randint(len(ordinary), part.shape)]
            prompt = torch.cat([torch.full_like(second, first), second], dim=1)
            with fast_products():
                passages.append(model.generate(prompt, attention_mask=torch.ones_like(prompt)))
            bar.update(len(part))
    return torch.cat(passages).view(count, each * size)[:, :length].contiguous()
