"""Text files and Hub data sets, and their windows of tokens."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import PrunePeakError, brief, spell
from ..models.loading import Model, ModelSpec
from ..options import FIRST_PART, DataOptions
from .data_sets import check_data, is_data_set, read_rows
from .text_files import Record, check_record, limit_records, read_records

VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.spm", "*.tokenizer", "dict.txt", "bpe.codes")
CHARACTERS = 8  # of a token: with more, a text is tokenized twice
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # packages: what they are imported as


def load_tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer in the model's folder.

    Raises:
        PrunePeakError: there is none, or it cannot be loaded; the message says what it lacks.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False)
        if not has_tokenizer(model.folder) and not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary is empty")  # some classes need no file to be made
    except Exception as error:  # every tokenizer class raises its own kinds
        lacking = (_explain_tokenizer(model.folder) or brief(error)).rstrip(".")
        raise PrunePeakError(f"{model.folder} has no tokenizer that transformers can load: {lacking}.") from None
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file with a vocabulary."""
    return any(True for pattern in VOCABULARIES for _ in folder.glob(pattern))


def _explain_tokenizer(folder: Path) -> str:
    """What a tokenizer lacks that cannot be loaded: its files, or packages; empty where neither is known."""
    if not has_tokenizer(folder):
        return "there is no file of one. Copy it from the original, such as tokenizer.json and tokenizer_config.json"
    missing = [package for package, module in SENTENCEPIECE.items() if not _is_installed(module)]
    if not missing or (folder / "tokenizer.json").exists() or not any(folder.glob("*.model")):
        return ""
    return f"tokenizer.model needs {' and '.join(missing)}: pip install {' '.join(missing)}"


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # its parent is missing, or it was made unavailable
        return False


def read_texts(
    name: str, tokenizer: PreTrainedTokenizerBase | None = None, reading: DataOptions = FIRST_PART
) -> list[str]:
    """The texts of a file (`text_files`) or of a Hub data set; chats are rendered by the tokenizer's template.

    Raises:
        PrunePeakError: the file is missing, of another form, or holds chats without a template to render them.
    """
    check_data([name], takes_images=False)
    records = _read_data_set(name, reading) if is_data_set(name) else read_records(Path(name), reading.text_column)
    return [_render(record, name, tokenizer) for record in records]


def _render(record: Record, name: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if isinstance(record, str):
        return record
    if tokenizer is None or not tokenizer.chat_template:
        raise PrunePeakError(
            f"{name} holds chats, and the model has no chat template to render them. Pass a text instead."
        )
    try:
        return str(tokenizer.apply_chat_template(record, tokenize=False))
    except Exception as error:  # a template raises what it wants
        raise PrunePeakError(f"the chat template fails on a chat of {name} ({brief(error)}).") from None


def _read_data_set(name: str, reading: DataOptions) -> list[Record]:
    column = reading.text_column
    rows = enumerate(read_rows(name, reading, "datasets"), start=1)
    return limit_records(check_record(row, f"{name}, row {number}", column) for number, row in rows)


def tokenize_text(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    reading: DataOptions = FIRST_PART,
    most: int | None = None,
) -> Tensor:
    """A text as consecutive windows, (windows, length), each with the special tokens that the tokenizer adds.

    Several texts are concatenated, each followed by EOS. With `most`, only the first so many windows are wanted, and a
    long text is tokenized no further than they take.

    Raises:
        PrunePeakError: the text does not exist, or is shorter than one window.
    """
    return tokenize_windows(name, read_texts(name, tokenizer, reading), tokenizer, length, most)


def tokenize_windows(
    name: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, most: int | None = None
) -> Tensor:
    """Texts of one data set as consecutive windows, as `tokenize_text` gives them."""
    enough = None if most is None else (most + 1) * length  # tokens
    separator = [tokenizer.eos_token_id] if len(texts) > 1 and tokenizer.eos_token_id is not None else []
    tokens: list[int] = []
    try:
        for text in texts:
            if enough is not None and len(tokens) > enough:
                break
            found = _tokenize_first(tokenizer, text, enough)
            tokens += found if found[-1:] == separator else found + separator  # a rendered chat has its EOS
        start, end = special_tokens(tokenizer)
    except Exception as error:  # every tokenizer class raises its own kinds
        raise PrunePeakError(f"the tokenizer fails on {name} ({brief(error)}).") from None
    body = max(1, length - len(start) - len(end))
    windows, place = [], 0
    while place + body <= len(tokens):
        opening = [] if tokens[place : place + len(start)] == start else start  # a rendered chat has its BOS
        until = place + body + len(start) - len(opening)
        if until <= len(tokens):
            windows.append([*opening, *tokens[place:until], *end])
        place = until
    if not windows:
        raise PrunePeakError(
            f"{name} has {len(tokens)} tokens, fewer than one window of {length}. Pass a longer text or a smaller "
            f"{spell('sequence_length')}."
        )
    return torch.tensor(windows[:most])


def _tokenize_first(tokenizer: PreTrainedTokenizerBase, text: str, enough: int | None) -> list[int]:
    """The tokens of a text, or of a part from its start that has enough of them."""
    size = len(text) if enough is None else CHARACTERS * enough
    tokens: list[int] = tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"]
    if enough is None or size >= len(text) or len(tokens) > enough:
        return tokens
    return _tokenize_first(tokenizer, text, None)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer adds before and after a text: BOS or CLS, SEP, or none."""
    special = set(tokenizer.all_special_ids)
    for probe in ("a", "A", *tokenizer.get_vocab()):  # a vocabulary of amino acids has no "a"
        bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
        if bare and special.isdisjoint(bare):
            break
    if not bare:  # an empty vocabulary
        return [], []
    full = tokenizer(probe)["input_ids"]
    first = full.index(bare[0])
    return list(full[:first]), list(full[first + len(bare) :])


def read_windows(
    name: str, model: Model, length: int, reading: DataOptions = FIRST_PART, most: int | None = None
) -> Tensor:
    """`tokenize_text` with the model's own tokenizer, checked against its vocabulary."""
    windows = tokenize_text(name, load_tokenizer(model), length, reading, most)
    check_vocabulary(model, int(windows.max()))
    return windows


def check_vocabulary(model: Model, token: int) -> None:
    """Refuse a token that the model has no embedding for.

    Raises:
        PrunePeakError: the token is outside the vocabulary.
    """
    if token >= model.vocabulary:
        raise PrunePeakError(
            f"the tokenizer of {model.name} produces the token {token}, but the vocabulary has "
            f"{model.vocabulary} entries. Use the tokenizer that belongs to the model."
        )
