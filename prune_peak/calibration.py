"""What the statistics are taken over: windows of a text, or of the model's own text; and the taking, block by block."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from .blocks import Batch, BlockStream
from .errors import PrunePeakError, UsageError
from .sites import Site
from .source import Source
from .stats import Stats, Summary

SAMPLES, SEQUENCE_LENGTH = 48, 512
SELF = "self"
BATCH_TOKENS = 4096  # tokens that run through a block at once
OWN_TEXT_BATCH = 32  # windows that are sampled at once
LONGEST_TEXT = 64 * 2**20  # characters read of a file; far more than any calibration takes


@dataclass(frozen=True)
class Windows:
    """Token windows to calibrate on, and others of the same text that are kept apart to evaluate on."""

    source: str  # the name of the text
    calibration: Tensor  # (windows, length) int64
    held_out: Tensor  # (windows, length)

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
    return min(wanted, getattr(source.config, "max_position_embeddings", None) or wanted)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the weights."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # every tokenizer class raises its own kinds
        reason = str(error).strip().splitlines()[0]
        raise PrunePeakError(f"{source.folder} holds no tokenizer that transformers can load ({reason}).") from None
    return tokenizer


def tokenize_text(path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """A text file as consecutive windows, (windows, length); each begins with BOS if the tokenizer adds one.

    Raises:
        PrunePeakError: the file is missing, not text, or shorter than one window.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST_TEXT)
    except (OSError, UnicodeDecodeError) as error:
        raise PrunePeakError(f"{path} is not a readable UTF-8 text ({error}).") from None
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = leading_tokens(tokenizer)
    body = length - len(start)
    count = len(tokens) // body
    if count == 0:
        raise PrunePeakError(
            f"{path} holds {len(tokens)} tokens, fewer than one window of {length}. "
            "Pass a longer text or a smaller --sequence-length."
        )
    windows = torch.tensor(tokens[: count * body]).view(count, body)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, len(start)), windows], dim=1)


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that this tokenizer puts before a text (BOS, or nothing)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return list(full[: full.index(bare[0])])


def choose_windows(path: Path, source: Source, samples: int, length: int, seed: int) -> Windows:
    """Windows of a text file, chosen at random by the seed, with some held out."""
    windows = tokenize_text(path, load_tokenizer(source), length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    held = min(held_out_count(samples), len(windows) // 4)
    samples = min(samples, len(windows) - held)
    return Windows(
        source=path.name,
        calibration=windows[order[:samples].sort().values],
        held_out=windows[order[samples : samples + held].sort().values],
    )


def own_windows(source: Source, samples: int, length: int, seed: int) -> Windows:
    """The model's own text: sampled at temperature 1 from BOS and a random second token, cached on disk.

    Where a tokenizer has no BOS, EOS begins the text. Every window has its own second token, which is neither special
    nor vocabulary padding; generation does not stop at EOS, so a window may hold several texts.
    """
    held = held_out_count(samples)
    options = {"model": source.digest, "windows": samples + held, "length": length, "seed": seed, "rule": 1}
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:24]
    cached = Path(HF_HOME) / "prune-peak" / f"own-text-{key}.safetensors"
    if cached.is_file():
        tokens = load_file(cached)["tokens"]
    else:
        tokens = _sample_own_text(source, samples + held, length, seed)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            partial = cached.with_suffix(".partial")
            save_file({"tokens": tokens}, partial)
            partial.replace(cached)
        except OSError:
            pass  # a cache that cannot be written only costs the next run its time
    return Windows(source="the model's own text", calibration=tokens[:samples], held_out=tokens[samples:])


def _sample_own_text(source: Source, count: int, length: int, seed: int) -> Tensor:
    tokenizer = load_tokenizer(source)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise PrunePeakError(f"{source.name}: the tokenizer has neither BOS nor EOS; pass a text with --calibration.")
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor(
        [token for token in range(min(len(tokenizer), source.config.vocab_size)) if token not in special]
    )
    model = source.model_class.from_pretrained(source.folder, dtype=source.dtype).eval()
    if not model.can_generate():
        raise PrunePeakError(
            f"{source.name} is a {source.model_class.__name__}, which generates no text; pass one with --calibration."
        )
    # In place of the model's own settings: plain sampling, and no EOS to stop at
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, max_length=length
    )
    windows = []
    with torch.random.fork_rng(devices=[]), tqdm(total=count, desc="own text", unit="window") as bar:
        torch.manual_seed(seed)
        for part in torch.empty(count, 1).split(OWN_TEXT_BATCH):
            second = ordinary[torch.randint(len(ordinary), part.shape)]
            prompt = torch.cat([torch.full_like(second, first), second], dim=1)
            windows.append(model.generate(prompt, attention_mask=torch.ones_like(prompt)))
            bar.update(len(part))
    return torch.cat(windows)


def into_batches(windows: Tensor, tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Windows of equal length as the inputs of a forward, some `tokens` at a time."""
    size = max(1, tokens // windows.shape[1])
    return [{"input_ids": part} for part in windows.split(size)]


@contextmanager
def observing(reader: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show `see` the neurons that a reading module is given, (..., neurons)."""
    handle = reader.register_forward_pre_hook(lambda _, args: see(args[0]))
    try:
        yield
    finally:
        handle.remove()


def calibrate(
    source: Source, sites: Sequence[Site], batches: Sequence[Batch], dtype: torch.dtype
) -> Iterator[tuple[Site, Summary]]:
    """Statistics of every site over the batches, one block at a time; padding is not counted.

    Yields a site's `Summary` while its block's weights are in memory, and forgets it.
    """
    masks = [batch.get("attention_mask") for batch in batches]
    tokens = sum(
        batch["input_ids"].numel() if mask is None else int(mask.sum())
        for batch, mask in zip(batches, masks, strict=True)
    )
    stream = BlockStream(source, batches, dtype)
    for step in tqdm(stream.steps(), total=len(sites), desc="calibrate", unit="block"):
        site = sites[step.index]
        stats = Stats(site.neurons, tokens)
        mask: Tensor | None = None

        def see(neurons: Tensor) -> None:
            flat = neurons.reshape(-1, site.neurons)  # noqa: B023
            stats.add(flat if mask is None else flat[mask.bool().view(-1)])  # noqa: B023

        with observing(stream.model.get_submodule(site.name), see):
            for number in step.run():
                mask = masks[number]
        summary = stats.summarize()
        if not bool(torch.isfinite(summary.variance).all()):
            raise PrunePeakError(
                f"block {site.block} of {source.name} gives activations that are not finite in {dtype}. "
                "Try --dtype float32, or check the checkpoint."
            )
        yield site, summary
