"""The tokenizer of an output of another class: `AutoTokenizer` chooses by the model type, and must behave as before."""

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..conversion.layout import Conversion
from ..errors import PrunePeakError, spell
from ..models.loading import Model
from ..options import OWN
from .digests import is_tokenizer
from .folder import copy_side_files, write_config

# A class that every release knows, and that reads tokenizer.json as it is
PLAIN_CLASS = "PreTrainedTokenizerFast"
STRINGS = (
    "",
    "The quick brown fox",
    " leading and  double  spaces ",
    "In 2024 the 1234th of 56,789.01",
    "line\nbreaks\n\n\tand tabs\r\n",
    "don't I'll we've CamelCase snake_case",
    "naïve café ÀÉÎ ﬁ",
    "日本語 中文 한국어 العربية",
    "😀 🏳️‍🌈 \u200b\ufeff",
    "def f(x): return x ** 2  # code",
)


def check_tokenizer(source: Model, conversion: Conversion) -> None:
    """Write only config and tokenizer to a temporary folder, and compare.

    Raises:
        PrunePeakError: no file makes `AutoTokenizer` behave on the output as on the source.
    """
    if conversion.output_class == OWN:
        return
    with tempfile.TemporaryDirectory() as name:
        write_config(conversion.config, Path(name) / "config.json")
        copy_side_files(source.folder, Path(name))
        keep_tokenizer(source, conversion, Path(name))


def keep_tokenizer(source: Model, conversion: Conversion, folder: Path) -> None:
    """Write the source's tokenizer under a class that does not change it, if the copied files read otherwise.

    Raises:
        PrunePeakError: `AutoTokenizer` behaves otherwise still.
    """
    if conversion.output_class == OWN:
        return
    tokenizer = _load(source.folder)
    if tokenizer is None:
        if any(is_tokenizer(path.name) for path in source.folder.iterdir()):
            raise PrunePeakError(
                f"the tokenizer of {source.name} cannot be loaded here, so it is not known what it does once "
                f"{conversion.model_class.__name__} is written. Install what it needs (tokenizer.model: pip install "
                f"sentencepiece protobuf), or pass {spell('output_class', 'own')}."
            )
        return
    expected = _behaviour(tokenizer, tokenizer)
    if _reads(folder, tokenizer, expected):
        return
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) | {"tokenizer_class": PLAIN_CLASS}
    path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    if not _reads(folder, tokenizer, expected):
        raise PrunePeakError(
            f"the tokenizer of {source.name} behaves otherwise once {conversion.model_class.__name__} is written. "
            f"Choose another {spell('output_class')}, or {spell('output_class', 'own')}."
        )


def behaves_alike(source: Path, folder: Path) -> bool | None:
    """Whether `AutoTokenizer` behaves on both folders alike; None where the source has no tokenizer."""
    tokenizer = _load(source)
    return None if tokenizer is None else _reads(folder, tokenizer, _behaviour(tokenizer, tokenizer))


def _reads(folder: Path, source: PreTrainedTokenizerBase, expected: dict[str, Any]) -> bool:
    tokenizer = _load(folder)
    return tokenizer is not None and _behaviour(tokenizer, source) == expected


def _load(folder: Path) -> Any:
    """The tokenizer of a folder; None without one."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # every tokenizer class raises its own kinds
        return None


def _behaviour(tokenizer: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Ids, texts and settings to compare, over the special tokens of the source.

    Templates are compared as text: with equal special tokens they render alike, and none of them is run.
    """
    specials = list(source.all_special_tokens)
    texts = [*STRINGS, *(f"a{token} b {token}c" for token in specials)]
    ids = [_encode(tokenizer, text) for text in texts]
    names = ("padding_side", "truncation_side", "model_max_length", "special_tokens_map", "chat_template")
    return {
        "ids": ids,
        "plain": [_encode(tokenizer, text, add_special_tokens=False) for text in texts],
        "texts": [tokenizer.decode(each) for each in ids],
        "words": [tokenizer.decode(each, skip_special_tokens=True) for each in ids],
        **{name: getattr(tokenizer, name) for name in names},
    }


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    """The ids of a text; none where the tokenizer raises (words that it does not have, without a token for them)."""
    try:
        ids: list[int] = tokenizer(text, **options)["input_ids"]
    except Exception:  # every tokenizer class raises its own kinds
        return []
    return ids
