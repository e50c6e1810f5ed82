"""Faults that users of other tools reported (docs/robustness.md), each tried on a stock class."""

import json
import os
import shutil
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import EXAMPLES
from huggingface_hub import metadata_load
from test_compress import compress, run
from tiny import BY_NAME, TINY, Tiny
from tokenizers import Tokenizer, models, processors
from transformers import (
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    AutoTokenizer,
    BertForMultipleChoice,
    BertModel,
    Dinov2Backbone,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    RobertaForMaskedLM,
)

import prune_peak
from prune_peak.cli.main import main
from prune_peak.data.self_generated import cache_path, generate_windows
from prune_peak.data.texts import special_tokens, tokenize_text
from prune_peak.export.digests import digest_files, is_read
from prune_peak.export.folder import copy_side_files
from prune_peak.models.execution import ExecutionConfig
from prune_peak.models.loading import open_model
from prune_peak.probes import Whole, probe_batches, run_streamed

WORDS = ("--samples", 4, "--sequence-length", 32)


def with_tokenizer(folder: Path) -> Path:
    """The tokenizer of llama-mini beside a model that knows its tokens."""
    AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini").save_pretrained(folder)
    return folder


def save(model_class: Any, name: str, folder: Path) -> Path:
    config = BY_NAME[name].configure()
    config.vocab_size = 1024
    if model_class is LlamaForSequenceClassification:
        config.pad_token_id = None
    model_class(config).save_pretrained(folder)
    return with_tokenizer(folder)


@pytest.mark.parametrize(
    ("model_class", "name"), [(LlamaForSequenceClassification, "llama-tied"), (BertForMultipleChoice, "bert")]
)
def test_heads_that_want_another_form(model_class: Any, name: str, tmp_path: Path, text: Path) -> None:
    """A classifier without a pad token, which takes one text at a time; and texts of several choices."""
    source = save(model_class, name, tmp_path / "model")
    result = compress(source, tmp_path / "cut", text, *WORDS)
    assert result.exit_code == 0, result.output
    assert run("verify", tmp_path / "cut", "--original", source, "-q").exit_code == 0
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "cut")]
    assert configs[0].get("pad_token_id") == configs[1].get("pad_token_id")


def test_a_backbone_is_refused(tmp_path: Path) -> None:
    Dinov2Backbone(BY_NAME["dinov2"].configure()).save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "model")])
    assert result.exit_code == 1
    assert "Dinov2Backbone, whose feature maps cannot be compared" in result.stderr


def test_modules_of_sentence_transformers(tmp_path: Path, text: Path) -> None:
    source = save(BertModel, "bert", tmp_path / "model")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (source / "1_Pooling" / "evil.py").write_text("raise SystemExit")
    (source / "notes").mkdir()
    (source / "notes" / "config.json").write_text("{}")
    assert compress(source, tmp_path / "cut", text, *WORDS).exit_code == 0
    cut = tmp_path / "cut"
    assert (cut / "1_Pooling" / "config.json").read_text() == '{"pooling_mode_cls_token": true}'
    assert not (cut / "1_Pooling" / "evil.py").exists()
    assert not (cut / "notes").exists()
    (cut / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": false}')
    assert run("verify", cut, "-q").exit_code == 3


def with_modules(folder: Path, *names: str) -> Path:
    """A model with folders of sentence-transformers, each with a config."""
    source = save(BertModel, "bert", folder)
    for name in names:
        (source / name).mkdir(parents=True)
        (source / name / "config.json").write_text("{}")
    (source / "modules.json").write_text(json.dumps([{"path": name} for name in ("", *names)]))
    return source


def test_modules_are_those_that_are_named(tmp_path: Path) -> None:
    source = with_modules(tmp_path / "model", "Pooling", "10_Dense")
    (source / "10_Dense" / "model.safetensors").write_bytes(b"weights")
    (source / "4bit").mkdir()
    (source / "4bit" / "config.json").write_text("{}")
    (tmp_path / "copy").mkdir()
    copy_side_files(source, tmp_path / "copy")
    copied = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").glob("*/*")}
    assert copied == {"Pooling/config.json", "10_Dense/config.json", "10_Dense/model.safetensors"}
    assert copied <= digest_files(tmp_path / "copy").keys()
    assert is_read("modules.json")


def test_a_module_with_a_pickle_only_is_refused(tmp_path: Path, text: Path) -> None:
    source = with_modules(tmp_path / "model", "2_Dense")
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    result = compress(source, tmp_path / "cut", text, *WORDS)
    assert result.exit_code == 1
    assert "is a pickle, which is not copied; expected model.safetensors beside it" in result.stderr


@pytest.mark.parametrize("name", ["..", "../other", "/etc", "a/b"])
def test_a_module_outside_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    source = save(BertModel, "bert", tmp_path / "model")
    (source / "modules.json").write_text(json.dumps([{"path": name}]))
    assert "expected one beside it" in run("inspect", source).stderr


MULTIPLE_CHOICE = {
    tiny.family: tiny for tiny in TINY if type(tiny.configure()) in MODEL_FOR_MULTIPLE_CHOICE_MAPPING
}.values()


@pytest.mark.parametrize("tiny", MULTIPLE_CHOICE, ids=lambda tiny: tiny.family)
def test_multiple_choice_block_by_block(tiny: Tiny, tmp_path: Path) -> None:
    """A model that does not fit into memory is verified as one that does."""
    config = tiny.configure()
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING[type(config)](config).save_pretrained(tmp_path)
    model = open_model(str(tmp_path))
    batches = probe_batches(model, 4)
    whole = Whole(model, torch.float32).run(batches).logits
    streamed = run_streamed(model, batches, torch.float32, None, ExecutionConfig()).logits
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(whole[stage], streamed[stage]) for stage in whole)
    assert whole["prefill 0"].shape == (2, 2)


def test_a_damaged_cache_is_not_read() -> None:
    model = open_model(str(EXAMPLES / "llama-mini"))
    first = generate_windows(model, 2, 16, 0).calibration.clone()  # the file is mapped
    cached = cache_path(model, 3, 16, 0)
    cached.write_bytes(cached.read_bytes()[:40])
    assert torch.equal(generate_windows(model, 2, 16, 0).calibration, first)


def test_a_window_does_not_open_twice(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini")
    opening = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.backend_tokenizer.post_processor = opening
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"text": "<s>hello there my friend"})] * 80))
    windows = tokenize_text(str(tmp_path / "chats.jsonl"), tokenizer, 16)
    assert windows.shape[1] == 16
    assert bool((windows[:, 0] == 0).all())
    assert not bool((windows[:, 1] == 0).any())


def test_a_link_out_of_a_module_is_refused(tmp_path: Path) -> None:
    source = with_modules(tmp_path / "model", "1_Pooling")
    (source / "1_Pooling" / "evil.json").symlink_to("/etc/passwd")
    assert "is a link out of its folder" in run("inspect", source).stderr


def test_vocabularies_of_other_names_are_copied(tmp_path: Path, text: Path) -> None:
    """PhoBERT has `bpe.codes`; its tokenizer does not load without it."""
    source = save(RobertaForMaskedLM, "roberta", tmp_path / "model")
    for path in source.glob("tokenizer*"):
        path.unlink()
    letters = "abcdefghijklmnopqrstuvwxyz"
    (source / "vocab.txt").write_text("".join(f"{letter}{end} 1\n" for letter in letters for end in ("@@", "")))
    (source / "bpe.codes").write_text("")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PhobertTokenizer"}')
    result = compress(source, tmp_path / "cut", text, *WORDS)
    assert result.exit_code == 0, result.output
    first, second = (
        AutoTokenizer.from_pretrained(folder)("tin nhan")["input_ids"] for folder in (source, tmp_path / "cut")
    )
    assert first == second


def test_files_have_the_mode_of_the_umask(tmp_path: Path, text: Path) -> None:
    before = os.umask(0o022)
    try:
        assert compress(EXAMPLES / "opt-mini", tmp_path / "cut", text, *WORDS).exit_code == 0
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cut").iterdir()}
    assert set(modes.values()) == {0o644}, modes


def test_a_cache_of_another_user_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(str(EXAMPLES / "llama-mini"))
    first = generate_windows(model, 2, 16, 0).calibration.clone()  # the file is mapped
    cached = cache_path(model, 3, 16, 0)
    assert cached.is_file()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    cached.write_bytes(b"not to be read")
    assert torch.equal(generate_windows(model, 2, 16, 0).calibration, first)


@pytest.mark.parametrize(
    ("given", "expected"), [("[sv, no, da]", ["sv", "no", "da"]), ("no", "no"), ("[1, en]", ["en"])]
)
def test_norwegian_is_a_language(given: str, expected: Any, tmp_path: Path, text: Path) -> None:
    source = shutil.copytree(EXAMPLES / "opt-mini", tmp_path / "model")
    (source / "README.md").write_text(f"---\nlicense: mit\nlanguage: {given}\n---\n# x\n")
    assert compress(source, tmp_path / "cut", text, *WORDS).exit_code == 0
    found = metadata_load(tmp_path / "cut" / "README.md")
    assert found is not None
    assert found["language"] == expected


@pytest.mark.parametrize("unknown", [None, "<s>"])
def test_a_vocabulary_without_the_letter_a(unknown: str | None, tmp_path: Path) -> None:
    """Amino acids; an unknown letter is dropped, or is the token that opens a text."""
    vocabulary = {"<s>": 0} | {letter: number + 1 for number, letter in enumerate("CDEFGHIKLMNPQRSTVWY")}
    model = models.BPE(vocabulary, []) if unknown is None else models.BPE(vocabulary, [], unk_token=unknown)
    made = Tokenizer(model)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>", unk_token=unknown)
    assert special_tokens(tokenizer) == ([0], [])
    (tmp_path / "text.txt").write_text("CDEF" * 8)
    assert tokenize_text(str(tmp_path / "text.txt"), tokenizer, 9)[0].tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4]


def test_a_text_that_ends_is_not_ended_again(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini")
    end = tokenizer.eos_token
    lines = [{"text": f"one text{end}"}, {"text": "another"}] * 40
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokens = tokenize_text(str(tmp_path / "chats.jsonl"), tokenizer, 16).flatten().tolist()
    pairs = list(pairwise(tokens))
    assert (tokenizer.eos_token_id, tokenizer.eos_token_id) not in pairs
    assert tokens.count(tokenizer.eos_token_id) > 20


def test_named_templates_go_into_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = shutil.copytree(EXAMPLES / "llama-mini", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(source)
    prune_peak.export_model(source, tmp_path / "model.gguf", format="gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.chat_template.rag"].contents() == "{{ documents }}"


def test_float64_is_refused_by_gguf(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path / "model")
    config = BY_NAME["llama-tied"].configure()
    config.vocab_size = 1024
    LlamaForCausalLM(config).double().save_pretrained(source)
    result = run("export", source, tmp_path / "model.gguf", "--format", "gguf", "-q")
    assert result.exit_code == 1
    assert "expected float32, float16 or bfloat16 for a GGUF file" in result.stderr
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_constant_too_large_for_float16_is_ours(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BY_NAME["opt"].configure()
    config.vocab_size = 1024
    OPTForCausalLM(config).half().save_pretrained(tmp_path / "model")
    source = with_tokenizer(tmp_path / "model")
    monkeypatch.setattr("prune_peak.sites.site.fold", lambda weight, *_: torch.full(weight.shape[:1], 1e6))
    result = compress(source, tmp_path / "cut", text, *WORDS)
    assert result.exit_code == 1
    assert "constants of the pruned neurons, are too large for float16; the original's are not" in result.stderr
    assert "OPTForCausalLM.from_pretrained(DIR, dtype='bfloat16').save_pretrained(OTHER)" in result.stderr
    assert not (tmp_path / "cut").exists()
