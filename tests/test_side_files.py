"""What is copied beside the weights, by role; everything else stays behind and is named once."""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_compress import compress, run
from test_heads import save
from transformers import AutoModel, AutoTokenizer

from prune_peak.export.folder import copy_side_files
from prune_peak.io.side_files import TOKENIZER_FILES, find_left_behind
from prune_peak.io.untrusted import find_modules

WORDS = ("--samples", 4, "--sequence-length", 16)
COPIED = [
    *("LICENSE", "license.txt", "Notice", "COPYING", "USE_POLICY.md", "LICENSE-2.0", "ACCEPTABLE_USE_POLICY.pdf"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("spm.model", "sentencepiece.bpe.model", "chat_template.jinja", "additional_chat_templates/tools.jinja"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
]
LEFT = [
    *("customers.txt", "data_config.json", "license.py", "optimizer.pt", "quantize_config.json", "requirements.txt"),
    *("runs/events.json", "secrets.json", "train_script.py", "trainer_state.json", "training_args.bin"),
]
# The layout of all-MiniLM-L6-v2
MODULES = ["Transformer", "1_Pooling", "2_Normalize"]
POOLING = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
SETTINGS: dict[str, Any] = {
    "modules.json": [
        {
            "idx": number,
            "name": str(number),
            "path": name if number else "",
            "type": f"sentence_transformers.models.{name.split('_')[-1]}",
        }
        for number, name in enumerate(MODULES)
    ],
    "1_Pooling/config.json": POOLING,
    "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
    "config_sentence_transformers.json": {"__version__": {"sentence_transformers": "2.0.0"}},
}


def lay(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def save_minilm(folder: Path) -> Path:
    """A tiny BERT in the layout of all-MiniLM-L6-v2."""
    save("BertModel", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    for name, settings in SETTINGS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(settings))
    (folder / "2_Normalize").mkdir()
    lay(folder, "train_script.py", "data_config.json", "onnx/model.onnx")
    return folder


def test_files_are_copied_by_their_role(tmp_path: Path) -> None:
    lay(tmp_path / "model", *COPIED, *LEFT, "config.json", "README.md", ".gitattributes", "prune_peak.json")
    lay(tmp_path / "model", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    copy_side_files(tmp_path / "model", tmp_path / "copy")
    assert files(tmp_path / "copy") == set(COPIED)
    assert find_left_behind(tmp_path / "model") == ["runs/" if "/" in name else name for name in LEFT]


def test_no_file_of_a_tokenizer_is_left_behind() -> None:
    """The names that the tokenizer classes of transformers read."""
    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        names |= set(re.findall(r'_file": "([^"]+)"', path.read_text()))
    assert len(names) > 15
    assert {name for name in names if not any(fnmatchcase(name, pattern) for pattern in TOKENIZER_FILES)} == set()


def test_what_stays_behind_is_named_once(tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Path(save("BertForMaskedLM", tmp_path / "model"))
    lay(source, *LEFT, "LICENSE")
    words = ("--ratio", 0.3, "--calibration", text, "--output", tmp_path / "cut", "--no-refit", *WORDS)
    result = run("compress", source, *words)
    assert result.exit_code == 0, result.output
    named = "customers.txt, data_config.json, license.py, optimizer.pt, quantize_config.json, requirements.txt, runs/"
    assert (
        caplog.text.count(f"Not copied, because no loader of the model reads it: {named}, secrets.json and 3 more.")
        == 1
    )
    written = {"config.json", "model.safetensors", "prune_peak.json", "prune_peak_plan.safetensors", "README.md"}
    assert files(tmp_path / "cut") == written | {"LICENSE", "tokenizer.json", "tokenizer_config.json"}
    assert run("verify", tmp_path / "cut", "--original", source, "-q").exit_code == 0


def test_sentence_transformers_keep_their_modules(tmp_path: Path, text: Path) -> None:
    source, cut = save_minilm(tmp_path / "model"), tmp_path / "cut"
    assert compress(source, cut, text, *WORDS).exit_code == 0
    for name, settings in SETTINGS.items():
        assert json.loads((cut / name).read_text()) == settings
    assert (cut / "2_Normalize").is_dir()  # which has no file, and which the loader looks for
    assert not {"train_script.py", "data_config.json", "onnx/model.onnx"} & files(cut)
    assert find_left_behind(source) == ["data_config.json", "onnx/", "train_script.py"]


@pytest.mark.real
def test_sentence_transformers_loads_the_result(tmp_path: Path, text: Path) -> None:
    """Its sentences are the normalized mean of the compressed model's hidden states."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    assert compress(save_minilm(tmp_path / "model"), tmp_path / "cut", text, *WORDS).exit_code == 0
    before, after = (sentence_transformers.SentenceTransformer(str(tmp_path / name)) for name in ("model", "cut"))
    assert [type(module) for module in after] == [type(module) for module in before]
    assert after[1].get_config_dict() == before[1].get_config_dict()
    assert after.max_seq_length == 64
    sentences = ["a function", "the longer sentence of the two"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cut")
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(tmp_path / "cut")(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    torch.testing.assert_close(torch.tensor(after.encode(sentences)), expected)


def test_no_config_names_code_that_is_not_there(tmp_path: Path, text: Path) -> None:
    source = Path(save("BertForMaskedLM", tmp_path / "model"))
    for name, kind in (("config.json", "Config"), ("tokenizer_config.json", "Tokenizer")):
        settings = json.loads((source / name).read_text())
        code = {f"Auto{kind}": "someone/code--mine.Mine"}
        (source / name).write_text(json.dumps(settings | {"auto_map": code, "kept": "naïve"}))
    lay(source, "mine.py")
    (source / "processor_config.json").write_text("not JSON: nothing reads it")
    assert compress(source, tmp_path / "cut", text, *WORDS).exit_code == 0
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((tmp_path / "cut" / name).read_text("utf-8"))
        assert "auto_map" not in settings
        assert settings["kept"] == "naïve"
    assert run("verify", tmp_path / "cut", "--original", source, "-q").exit_code == 0


def test_modules_of_other_code_are_refused(tmp_path: Path, text: Path) -> None:
    source = save_minilm(tmp_path / "model")
    modules = [module | {"type": "custom_st.Transformer"} for module in SETTINGS["modules.json"]]
    (source / "modules.json").write_text(json.dumps(modules))
    result = compress(source, tmp_path / "cut", text, *WORDS)
    assert result.exit_code == 1
    assert "names the class 'custom_st.Transformer', whose code is not copied" in result.stderr
    assert not (tmp_path / "cut").exists()


def test_modules_are_folders_beside_the_weights(tmp_path: Path) -> None:
    lay(tmp_path, "1_Pooling/config.json")
    (tmp_path / "modules.json").write_text(json.dumps(SETTINGS["modules.json"]))
    assert find_modules(tmp_path) == ["1_Pooling", "2_Normalize"]
