"""Numbers that go wrong: a model of which nothing is left, activations that overflow, blocks that are dead."""

import json
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES
from test_compress import compress, run
from transformers import AutoModelForCausalLM, AutoTokenizer

ABSURD = ("--ratio", "mlp=0.98,attention=0.5", "--sites", "mlp,attention", "--score", "random", "--fill", "zero")


def save_changed(folder: Path, change: dict[str, float], dtype: torch.dtype = torch.float32) -> Path:
    """llama-mini with all weights whose name holds a word multiplied."""
    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "llama-mini")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for word, factor in change.items():
                if word in name:
                    parameter *= factor
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini").save_pretrained(folder)
    return folder


def test_collapse_warning(tmp_path: Path, text: Path) -> None:
    result = compress(EXAMPLES / "llama-mini", tmp_path / "cut", text, "--samples", 4, *ABSURD)
    assert result.exit_code == 0, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("WARNING: this model is unusable: its perplexity on held-out windows of text.txt")
    recipe = json.loads((tmp_path / "cut" / "prune_peak.json").read_text())
    assert [f"WARNING: {warning}" for warning in recipe["warnings"]] == [last]
    title, note = (tmp_path / "cut" / "README.md").read_text().split("\n# ")[1].split("\n\n")[:2]
    assert title.endswith("pruned")
    assert note == f"> [!WARNING]\n> T{last.removeprefix('WARNING: t')}"


def test_no_collapse_warning(tmp_path: Path, text: Path) -> None:
    result = compress(EXAMPLES / "llama-mini", tmp_path / "cut", text, "--samples", 4)
    assert result.exit_code == 0, result.output
    assert "WARNING" not in result.stderr
    assert json.loads((tmp_path / "cut" / "prune_peak.json").read_text())["warnings"] == []
    assert "WARNING" not in (tmp_path / "cut" / "README.md").read_text()


def test_collapse_warning_of_a_classifier(tmp_path: Path) -> None:
    words = (
        "--model",
        EXAMPLES / "vit-mini",
        "--output",
        tmp_path / "cut",
        "--calibration",
        EXAMPLES / "digits" / "calibration",
    )
    more = ("--samples", 16, "--evaluate", EXAMPLES / "digits" / "held-out", "--no-refit", "-q", "--json")
    result = run("compress", *words, *more, *ABSURD, "--ratio", "mlp=0.98,attention=0.75")
    assert result.exit_code == 0, result.output
    assert "image accuracy" in result.stderr.splitlines()[-1]
    assert "less than half of the original's" in result.stderr.splitlines()[-1]
    assert json.loads(result.stdout)["warnings"]


def test_activations_that_overflow_float16(tmp_path: Path, text: Path) -> None:
    """Files in float16 are computed with in float32; who asks for float16 is told."""
    source = save_changed(tmp_path / "source", {"up_proj": 2e4, "down_proj": 1 / 2e4}, torch.float16)
    asked = compress(source, tmp_path / "cut", text, "--samples", 4, "--dtype", "float16")
    assert asked.exit_code == 1
    assert "not finite in float16" in asked.stderr.replace("torch.", "")
    assert not any(tmp_path.glob("cut*"))
    result = compress(source, tmp_path / "cut", text, "--samples", 4, "--refit", "--json")
    assert result.exit_code == 0, result.output
    quality = json.loads(result.stdout)
    assert quality["quality_after"]["value"] < 2 * quality["quality_before"]["value"]


def test_outputs_that_overflow_float16(tmp_path: Path, text: Path) -> None:
    """The blocks are well, and the head is not."""
    source = save_changed(tmp_path / "source", {"model.norm": 1e4}, torch.float16)
    result = compress(source, tmp_path / "cut", text, "--samples", 4, "--dtype", "float16")
    assert result.exit_code == 1
    assert "are not finite in float16" in result.stderr
    assert not any(tmp_path.glob("cut*"))


DEAD = ["layers.1.", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj", "layers.1.self_attn"]
CASES = [(dead, sites) for dead in DEAD for sites in ("mlp", "attention", "mlp,attention")]


# every other one is left to `-m real`
@pytest.mark.parametrize(
    ("dead", "sites"),
    [pytest.param(*case, marks=[pytest.mark.real] * (number % 2)) for number, case in enumerate(CASES)],
)
def test_dead_blocks_are_cut_like_others(dead: str, sites: str, tmp_path: Path, text: Path) -> None:
    """Their neurons are constant, so their statistics have no width and their refit no equations."""
    source = save_changed(tmp_path / "source", {dead: 0.0})
    words = ("--samples", 8, "--sites", sites, "--ratio", 0.5, "--fill", "auto", "--refit", "--json")
    result = compress(source, tmp_path / "cut", text, *words)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["verification"]["checks"]
    assert answer["quality_after"]["value"] < 5 * answer["quality_before"]["value"]


def test_a_model_that_answers_zeros_alone(tmp_path: Path, text: Path) -> None:
    source = save_changed(tmp_path / "source", {"embed_tokens": 0.0})
    result = compress(source, tmp_path / "cut", text, "--samples", 4, "--json")
    assert result.exit_code == 0, result.output
    assert all(check["passed"] for check in json.loads(result.stdout)["verification"]["checks"])
