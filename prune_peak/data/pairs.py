"""Pairs of token windows for encoder-decoders: what the encoder reads, and what the decoder writes of it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunePeakError, brief
from ..models.bfloat16 import fast_products
from ..models.loading import DECODER_IDS, Model
from ..options import FIRST_PART, DataOptions
from ..progress import open_bar
from .text_files import Answered
from .texts import check_vocabulary, load_tokenizer, read_texts, tokenize_windows
from .windows import PADDING, into_batches

ANSWER = 64  # tokens, at most, that a model writes where the data has no targets
ANSWERED_AT_ONCE = 16  # windows


def read_pairs(name: str, model: Model, length: int, reading: DataOptions = FIRST_PART) -> Tensor:
    """Pairs of windows, (pairs, 2, length), padded with `PADDING`: one for each of several texts, cut off at `length`.

    A single text gives consecutive windows. The decoder's window has the target of the text as the decoder reads it;
    without a target it is empty, for `answer` to fill.

    Raises:
        PrunePeakError: the text cannot be read, or is shorter than one window.
    """
    tokenizer = load_tokenizer(model)
    texts = read_texts(name, tokenizer, reading)
    if len(texts) == 1:
        windows = tokenize_windows(name, texts, tokenizer, length)
        pairs = torch.stack([windows, torch.full_like(windows, PADDING)], dim=1)
    else:
        pairs = torch.full((len(texts), 2, length), PADDING)
        for row, text in zip(pairs, texts, strict=True):
            for window, tokens in zip(row, _tokenize_pair(name, text, model, tokenizer, length), strict=True):
                window[: len(tokens)] = torch.tensor(tokens)
        pairs = pairs[(pairs[:, 0] != PADDING).any(1)]  # a text may be empty
    if not len(pairs):
        raise PrunePeakError(f"{name} has no text. Pass rows with a text and a target.")
    check_vocabulary(model, int(pairs.max()))
    return pairs


def _tokenize_pair(
    name: str, text: str, model: Model, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[list[int], list[int]]:
    """The tokens of a text, and those of its target, if it has one, as the decoder reads them: after a start token."""
    try:
        read = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        if not isinstance(text, Answered):
            return read, []
        written = tokenizer(text_target=text.target, truncation=True, max_length=length - 1)["input_ids"]
        shift = getattr(model.meta_model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            return read, [model.config.decoder_start_token_id, *written]
        return read, shift(labels=torch.tensor([[*written, PADDING]]))[0].tolist()  # the last one is shifted out
    except Exception as error:  # tokenizers and classes raise their own kinds
        raise PrunePeakError(f"{name} has a pair that {model.name} cannot read ({brief(error)}).") from None


def answer(model: Model, *parts: Tensor) -> list[Tensor]:
    """Pairs whose decoder has nothing to read get what the model itself writes, greedily, of at most 64 tokens.

    Args:
        parts: (pairs, 2, length) each.

    Raises:
        PrunePeakError: the class cannot write.
    """
    empty = [(pairs[:, 1] == PADDING).all(1) for pairs in parts]
    count = sum(int(each.sum()) for each in empty)
    if not count:
        return list(parts)
    stock = model.load(model.dtype)
    answered = [pairs.clone() for pairs in parts]
    with open_bar("write targets", "window", count) as bar, torch.inference_mode(), fast_products():
        for pairs, lacking in zip(answered, empty, strict=True):
            for rows in lacking.nonzero()[:, 0].split(ANSWERED_AT_ONCE):
                pairs[rows, 1] = _write(model, stock, pairs[rows])
                bar.update(len(rows))
    return answered


def _write(model: Model, stock: PreTrainedModel, pairs: Tensor) -> Tensor:
    """The decoder's windows, (pairs, length): what a model writes of those of the encoder, up to EOS."""
    [batch] = into_batches(pairs, pairs.numel())
    del batch[DECODER_IDS]
    most = min(ANSWER, pairs.shape[2] - 1)
    try:
        options = {"do_sample": False, "num_beams": 1, "min_length": 0, "max_length": None, "max_new_tokens": most}
        written: Tensor = stock.generate(**batch, **options)
    except Exception as error:  # classes raise their own kinds
        raise PrunePeakError(
            f"{model.name} does not write targets ({brief(error)}). Pass rows with a text and a target."
        ) from None
    ends: Sequence[int] | int | None = stock.generation_config.eos_token_id
    is_after = torch.isin(written, torch.tensor([] if ends is None else ends)).roll(1, dims=1)
    is_after[:, :2] = False  # the start token may be EOS itself
    windows = torch.full_like(pairs[:, 1], PADDING)
    windows[:, : written.shape[1]] = written.masked_fill(is_after.long().cumsum(1) > 0, PADDING)
    return windows
