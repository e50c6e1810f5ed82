"""Where another class is written, `AutoTokenizer` gives the ids of the source, or the model is refused."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import BY_NAME, TINY
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prune_peak.conversion.choice import choose_conversion
from prune_peak.conversion.layout import Conversion
from prune_peak.data.texts import load_tokenizer
from prune_peak.errors import PrunePeakError
from prune_peak.export.folder import copy_side_files, write_config
from prune_peak.export.tokenizer import STRINGS, _behaviour, behaves_alike, check_tokenizer, keep_tokenizer
from prune_peak.models.families import FAMILIES
from prune_peak.models.loading import Model, open_model
from prune_peak.sites.finding import find_sites

TEXT = [(Path(__file__).parent.parent / "README.md").read_text(), *STRINGS] * 2
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>"]
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


def byte_level(digits: str) -> Tokenizer:
    """Of GPT-2, or of those that split digits."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(digits), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """BPE of SentencePiece: a blank before the text, but not after a special token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": lambda: byte_level(r"\p{N}+"),
    "digits by three": lambda: byte_level(r"\p{N}{1,3}"),
    "metaspace": metaspace,
    "unigram": unigram,
    "word piece": word_piece,
}
SOURCES = sorted(name for name, family in FAMILIES.items() if family.output_classes)
FIRST = {tiny.configure().model_type: tiny for tiny in reversed(TINY)}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    made = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[request.param](),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=99,
    )
    made.chat_template = TEMPLATE
    return made


def convert(source: Model) -> Conversion:
    sites = find_sites(source.meta_model, source.family)
    return choose_conversion(source, sites, {site.name: site.neurons // 2 for site in sites}, torch.float32)


def write(folder: Path, written: Path) -> Path:
    """Config and tokenizer of the class that is written for a model."""
    source = open_model(str(folder))
    conversion = convert(source)
    check_tokenizer(source, conversion)
    written.mkdir()
    write_config(conversion.config, written / "config.json")
    copy_side_files(folder, written)
    keep_tokenizer(source, conversion, written)
    return written


@pytest.mark.parametrize("model_type", SOURCES)
def test_tokenizer_of_another_class(model_type: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = FIRST[model_type].save(tmp_path / "source")
    tokenizer.save_pretrained(folder)
    written = write(folder, tmp_path / "written")
    first, second = (AutoTokenizer.from_pretrained(path) for path in (folder, written))
    assert _behaviour(second, first) == _behaviour(first, first)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokenizer.model`, as SentencePiece itself writes it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("\n".join(TEXT))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        pad_id=3,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.mark.parametrize("model_type", SOURCES)
def test_tokenizer_model_alone(model_type: str, sentencepiece_model: Path, tmp_path: Path) -> None:
    """Without `tokenizer.json`; Gemma's class reads this file otherwise than any other, and is refused."""
    folder = FIRST[model_type].save(tmp_path / "source")
    shutil.copy(sentencepiece_model, folder)
    if model_type == "gemma":
        with pytest.raises(PrunePeakError, match="behaves otherwise"):
            write(folder, tmp_path / "written")
        return
    assert behaves_alike(folder, write(folder, tmp_path / "written"))


def test_tokenizer_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    """Without the source's behaviour there is nothing to compare with."""
    folder = BY_NAME["mistral"].save(tmp_path / "source")
    (folder / "tokenizer.model").write_bytes(b"damaged")
    source = open_model(str(folder))
    with pytest.raises(PrunePeakError, match=r"cannot be loaded .* output_class='own'"):
        check_tokenizer(source, convert(source))


def test_tokenizer_without_its_package(
    sentencepiece_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks for tiktoken then, which would not help."""
    folder = BY_NAME["mistral"].save(tmp_path / "source")
    shutil.copy(sentencepiece_model, folder)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(PrunePeakError, match=r"tokenizer\.model needs sentencepiece: pip install sentencepiece\.$"):
        load_tokenizer(open_model(str(folder)))


def test_tokenizer_that_changes_is_refused(tmp_path: Path) -> None:
    """Qwen2's class splits digits one by one, whatever the files say."""
    folder = BY_NAME["mistral"].save(tmp_path / "source")
    made = PreTrainedTokenizerFast(tokenizer_object=byte_level(r"\p{N}{1,3}"), bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)
    source = open_model(str(folder))
    conversion = convert(source)
    config = BY_NAME["qwen2"].configure()
    with pytest.raises(PrunePeakError, match="behaves otherwise"):
        check_tokenizer(source, replace(conversion, config=config))


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    source = open_model(str(BY_NAME["mistral"].save(tmp_path)))
    check_tokenizer(source, convert(source))
    assert not list(tmp_path.glob("tokenizer*"))


def test_tokenizer_that_raises_on_unknown_words(tmp_path: Path) -> None:
    """It is compared by the texts that it reads."""
    folders = []
    for words in ("The quick brown fox", "The quick brown fox", "The brown quick fox"):
        vocabulary = {word: number for number, word in enumerate(words.split())}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        folders.append(BY_NAME["bert"].save(tmp_path / str(len(folders))))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folders[-1])
    with pytest.raises(Exception, match="WordLevel"):
        AutoTokenizer.from_pretrained(folders[0])("b")
    assert behaves_alike(folders[0], folders[1])
    assert not behaves_alike(folders[0], folders[2])
