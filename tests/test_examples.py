"""Every downstream example, run on a small compressed model; those whose packages are missing are skipped."""

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLES
from safetensors import safe_open
from tiny import BY_NAME, Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import prune_peak

PROMPT = "The function is called"


@pytest.fixture(scope="module")
def training_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:60_000])
    return path


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, training_text: Path) -> str:
    """The trained Llama with heads and MLP neurons cut."""
    folder = tmp_path_factory.mktemp("cut") / "llama-cut"
    ratio = {"mlp": 0.5, "attention": 0.5}
    prune_peak.compress(
        str(EXAMPLES / "llama-mini"), ratio, folder, samples=8, sequence_length=64, calibration=str(training_text)
    )
    return str(folder)


def example(name: str) -> Any:
    return importlib.import_module(name).main


def greedy(folder: str) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=20, do_sample=False)
    return tokenizer.decode(tokens[0])


def test_pipeline(cut: str) -> None:
    assert example("text_pipeline")(cut) == greedy(cut)


def test_batched_generation(cut: str) -> None:
    """Each prompt gets what it gets alone."""
    first, *others = example("batched_generation")(cut)
    assert first == greedy(cut)
    assert all(len(other) > 20 for other in others)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled(cut: str) -> None:
    assert example("compiled")(cut) < 1e-4


def test_healing(cut: str, training_text: Path, tmp_path: Path) -> None:
    """The loss falls, and the result has the shapes of what was cut."""
    before, after = example("healing")(cut, str(training_text), str(tmp_path / "healed"), steps="30", rate=1e-3)
    assert after < before - 0.02
    healed, info = AutoModelForCausalLM.from_pretrained(tmp_path / "healed", output_loading_info=True)
    assert not any(info.values())
    assert healed.num_parameters() == AutoModelForCausalLM.from_pretrained(cut).num_parameters()


@pytest.mark.filterwarnings("ignore")
def test_lora(cut: str, training_text: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    before, after = example("lora")(cut, str(training_text), str(tmp_path / "adapter"), steps="20")
    assert after < before - 0.02
    base = AutoModelForCausalLM.from_pretrained(cut)
    tokens = torch.randint(1024, (1, 16))
    plain = base(tokens).logits
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not torch.allclose(model(tokens).logits, plain)
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, model(tokens).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_quantized(cut: str) -> None:
    pytest.importorskip("torchao")
    text, distance = example("quantized")(cut)
    assert text.startswith(PROMPT)
    assert 0 < distance < 0.05


def test_sentence_embeddings(training_text: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini")
    bert = BY_NAME["bert"]
    Tiny("bert", bert.family, bert.head, {"vocab_size": len(tokenizer)}).save(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    options = {"samples": 4, "sequence_length": 32, "calibration": str(training_text)}
    prune_peak.compress(str(tmp_path / "bert"), 0.5, tmp_path / "cut", **options)
    embed = example("sentence_embeddings")
    vectors = embed(str(tmp_path / "cut"), "A short one.", "A much longer sentence, with padding beside it.")
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(embed(str(tmp_path / "cut"), "A short one.")[0], vectors[0])
    assert not torch.allclose(vectors[0], vectors[1])


def test_image_classification(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    digits = EXAMPLES / "digits"
    prune_peak.compress(str(EXAMPLES / "vit-mini"), 0.3, tmp_path / "cut", calibration=str(digits / "calibration"))
    seven = sorted((digits / "held-out" / "7").iterdir())[0]
    assert example("image_classification")(str(tmp_path / "cut"), str(seven)) == "7"


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_onnx_export(cut: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    assert example("onnx_export")(cut, str(tmp_path / "model.onnx")) < 1e-3


# What the loaders of vLLM read of a config, in its own llama.py and granite.py (of 2025 and 2026); vLLM does not run
# here. A key that it does not know would be left out without a word.
IN_VLLM = {
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias"),
}
MULTIPLIERS = {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}
NOT_COMPUTED_WITH = {
    *("architectures", "model_type", "dtype", "transformers_version", "use_cache", "initializer_range"),
    *("attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp"),
}
PROJECTIONS = {"mlp_bias": r"mlp\.(gate|up|down)_proj", "attention_bias": r"self_attn\.(q|k|v|o)_proj"}


@pytest.mark.parametrize(("heads", "output_class"), [(0.5, "Llama"), (0.25, "Granite")])
def test_vllm_reads_all_of_it(heads: float, output_class: str, tmp_path: Path, training_text: Path) -> None:
    """Every key of the config is one that vLLM's loader reads, and every bias one whose flag it heeds."""
    source = BY_NAME["llama-no-groups"]
    Tiny(source.name, source.family, settings=source.settings | {"vocab_size": 1024}).save(tmp_path / "source")
    AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini").save_pretrained(tmp_path / "source")
    options = {"samples": 4, "sequence_length": 32, "calibration": str(training_text)}
    prune_peak.compress(str(tmp_path / "source"), {"mlp": 0.3, "attention": heads}, tmp_path / "cut", **options)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["architectures"] == [f"{output_class}ForCausalLM"]
    assert config["hidden_act"] == "silu"
    assert set(config) - NOT_COMPUTED_WITH <= IN_VLLM | (MULTIPLIERS if output_class == "Granite" else set())
    blocks = r"model\.layers\.\d+\."
    named = [rf"{blocks}{names}\.weight" for names in PROJECTIONS.values()]
    named += [rf"{blocks}{names}\.bias" for flag, names in PROJECTIONS.items() if config[flag]]
    named += [rf"{blocks}(input|post_attention)_layernorm\.weight", r"(model\.(embed_tokens|norm)|lm_head)\.weight"]
    with safe_open(tmp_path / "cut" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            assert any(re.fullmatch(pattern, name) for pattern in named), name
