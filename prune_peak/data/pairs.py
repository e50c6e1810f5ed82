"""Pairs of token windows for encoder-decoders: what the encoder reads, and what the decoder writes of it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import PrunePeakError, brief
from ..models.bfloat16 import fast_products
from ..models.loading import Model
from ..options import FIRST_PART, DataOptions
from ..progress import open_bar
from .text_files import Answered
from .texts import check_vocabulary, load_tokenizer, read_texts, tokenize_windows
from .windows import PADDING

ANSWER = 64  # tokens, at most, that a model writes where the data has no targets
ANSWERED_AT_ONCE = 16  # windows


def read_pairs(name: str, model: Model, length: int, reading: DataOptions = FIRST_PART) -> Tensor:
    """Pairs of windows of a text, (pairs, 2, length), padded with `PADDING`.

    Texts that all have a target give a pair each: the text, and its target as the decoder reads it. Others are
    concatenated and cut as for every model; the decoder's windows are empty, for `answer` to fill.

    Raises:
        PrunePeakError: the text cannot be read, or is shorter than one window.
    """
    tokenizer = load_tokenizer(model)
    texts = read_texts(name, tokenizer, reading)
    answered = [text for text in texts if isinstance(text, Answered)]
    if not answered or len(answered) < len(texts):
        windows = tokenize_windows(name, texts, tokenizer, length)
        pairs = torch.stack([windows, torch.full_like(windows, PADDING)], dim=1)
    else:
        pairs = torch.full((len(texts), 2, length), PADDING)
        for row, text in zip(pairs, answered, strict=True):
            for window, tokens in zip(row, _tokenize_pair(name, text, model, tokenizer, length), strict=True):
                window[: len(tokens)] = tokens
    check_vocabulary(model, int(pairs.max()))
    return pairs


def _tokenize_pair(
    name: str, text: Answered, model: Model, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[Tensor, Tensor]:
    """The tokens of a text, and those of its target as the decoder reads them, after its start token."""
    try:
        read = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        written = tokenizer(text_target=text.target, truncation=True, max_length=length - 1)["input_ids"]
        decoded = _start(model, written)
    except Exception as error:  # tokenizers and classes raise their own kinds
        raise PrunePeakError(f"{name} has a pair that {model.name} cannot read ({brief(error)}).") from None
    return torch.tensor(read), decoded


def _start(model: Model, written: list[int]) -> Tensor:
    """The tokens of a target after the start token, as the class itself shifts them, or as its config says."""
    shift = getattr(model.meta_model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        return torch.tensor([model.config.decoder_start_token_id, *written])
    shifted: Tensor = shift(labels=torch.tensor([[*written, PADDING]]))[0]  # the last one is shifted out
    return shifted


def answer(model: Model, *parts: Tensor) -> list[Tensor]:
    """Pairs whose decoder has nothing to read get what the model itself writes, greedily, of at most 64 tokens.

    Args:
        parts: (pairs, 2, length) each.

    Raises:
        PrunePeakError: the class cannot write.
    """
    empty = [int((pairs[:, 1] == PADDING).all()) for pairs in parts]
    if not any(empty):
        return list(parts)
    stock = model.load(model.dtype)
    answered = []
    with open_bar("write targets", "window", sum(map(len, parts))) as bar, torch.inference_mode(), fast_products():
        for pairs in parts:
            done = [pairs[:0]]
            for some in pairs.split(ANSWERED_AT_ONCE):
                done.append(_answer_some(model, stock, some))
                bar.update(len(some))
            answered.append(torch.cat(done))
    return answered


def _answer_some(model: Model, stock: object, pairs: Tensor) -> Tensor:
    longest = min(ANSWER, pairs.shape[2] - 1)
    try:
        written: Tensor = stock.generate(  # type: ignore[attr-defined]
            pairs[:, 0], do_sample=False, num_beams=1, min_length=0, max_length=None, max_new_tokens=longest
        )
    except Exception as error:  # classes raise their own kinds
        raise PrunePeakError(
            f"{model.name} does not write targets ({brief(error)}). Pass rows with a text and a target."
        ) from None
    ends: Sequence[int] | int | None = stock.generation_config.eos_token_id  # type: ignore[attr-defined]
    is_end = torch.isin(written, torch.tensor([] if ends is None else ends)).roll(1, dims=1)
    is_end[:, :2] = False  # the first token may be EOS itself; the next one is read in any case
    windows = torch.full_like(pairs[:, 1], PADDING)
    windows[:, : written.shape[1]] = written.masked_fill(is_end.long().cumsum(1) > 0, PADDING)
    return torch.stack([pairs[:, 0], windows], dim=1)
