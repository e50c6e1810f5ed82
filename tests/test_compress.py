"""`compress` and `verify`, as commands and as functions, on the trained models of `examples/`."""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import EXAMPLES
from safetensors.torch import load_file, save_file
from tiny import BY_NAME, Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import prune_peak
from prune_peak import memory
from prune_peak.cli.main import SUMMARIES, main
from prune_peak.export.recipe import PLAN_FILE
from prune_peak.models.execution import ExecutionConfig
from prune_peak.models.loading import open_model
from prune_peak.verification import verify

MINI = ["opt-mini", "llama-mini", "mistral-mini", "roberta-mini"]
ROBERTA = EXAMPLES / "roberta-mini"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def compress(model: Path, output: Path, text: Path, *more: object) -> Result:
    words = ("--model", model, "--ratio", 0.3, "--output", output, "--calibration", text, "-q")
    return run("compress", *words, *([] if "--refit" in more else ["--no-refit"]), *more)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# the other fill of each is left to `-m real`
@pytest.mark.parametrize(
    ("name", "fill"),
    [
        pytest.param(name, fill, marks=[pytest.mark.real] * ((number + at) % 2))
        for number, name in enumerate(MINI)
        for at, fill in enumerate(("peak", "mean"))
    ],
)
def test_trained_models_obey_the_law(name: str, fill: str, tmp_path: Path, text: Path) -> None:
    result = prune_peak.compress(
        str(EXAMPLES / name), 0.3, tmp_path / "cut", fill=fill, calibration=str(text), samples=16, refit=False
    )
    checks = {check["check"] for check in result.verification.checks}
    writing = {"same function in float32, cached decoding", "same greedy tokens"}
    assert {"same function in float32, prefill 0", "loads with the stock class"} <= checks
    assert checks & writing == (set() if name == "roberta-mini" else writing)
    assert result.verification.passed
    assert result.after.parameters < result.before.parameters
    assert result.quality_after.loss < result.quality_before.loss + math.log(3)


def test_the_folder_is_whole(tmp_path: Path, text: Path) -> None:
    source, output = EXAMPLES / "llama-mini", tmp_path / "cut"
    result = compress(source, output, text, "--samples", 8, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["after"]["neurons"]["mlp"] == 3 * 272  # 384 * 0.7, the nearest multiple of eight
    assert {path.name for path in output.iterdir()} - {"prune_peak.png"} == {
        *(path.name for path in source.iterdir()),
        "README.md",
        "prune_peak.json",
        "prune_peak_plan.safetensors",
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.intermediate_size == 272
    assert sum(p.numel() for p in model.parameters()) == answer["after"]["parameters"]
    plan = load_file(output / "prune_peak_plan.safetensors")
    for block in range(3):
        site = f"model.layers.{block}.mlp.down_proj"
        assert model.get_submodule(site).in_features == len(plan[f"{site}.keep"])
        assert plan[f"{site}.fill"].shape == (384,)
        assert plan[f"{site}.keep"].tolist() == sorted(set(plan[f"{site}.keep"].tolist()))
    recipe = json.loads((output / "prune_peak.json").read_text())
    assert recipe["options"]["fill"] == "peak"
    assert all(check["passed"] for check in recipe["verification"])
    assert "NaN" not in (output / "prune_peak.json").read_text()
    config = json.loads((output / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


@pytest.mark.draws
def test_same_command_same_bytes(tmp_path: Path, text: Path) -> None:
    for name in ("one", "two"):
        assert compress(EXAMPLES / "opt-mini", tmp_path / name, text, "--samples", 8).exit_code == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.real
def test_two_threads_keep_the_same_neurons(tmp_path: Path, text: Path) -> None:
    """And the same weights to rounding; docs/reproducibility.md tells what was seen."""
    words = (text, "--samples", 8, "--refit")
    assert compress(EXAMPLES / "llama-mini", tmp_path / "one", *words).exit_code == 0
    torch.set_num_threads(2)
    try:
        assert compress(EXAMPLES / "llama-mini", tmp_path / "two", *words).exit_code == 0
    finally:
        torch.set_num_threads(1)
    one, two = (load_file(tmp_path / name / PLAN_FILE) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one if name.endswith(".keep"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5 * weight.abs().max().item(), msg=name)


def test_own_text_is_the_default(tmp_path: Path) -> None:
    words = ("--ratio", 0.3, "--samples", 4, "--sequence-length", 32, "-q", "--json")
    for name in ("one", "two"):  # sampled, then from the cache
        result = run("compress", "--model", EXAMPLES / "llama-mini", "--output", tmp_path / name, *words)
        assert result.exit_code == 0, result.output
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert json.loads(result.stdout)["quality_before"]["text"] == "held-out windows of the model's own text"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype, tmp_path: Path, text: Path) -> None:
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(EXAMPLES / "llama-mini", dtype=dtype).save_pretrained(source)
    AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini").save_pretrained(source)
    result = compress(source, tmp_path / "cut", text, "--samples", 8, "--fill", "mean")
    assert result.exit_code == 0, result.output
    assert {tensor.dtype for tensor in load_file(tmp_path / "cut" / "model.safetensors").values()} == {dtype}


@pytest.fixture
def good(tmp_path: Path, text: Path) -> Path:
    output = tmp_path / "good"
    assert compress(EXAMPLES / "llama-mini", output, text, "--samples", 8, "--fill", "mean").exit_code == 0
    return output


@pytest.mark.parametrize("original", [False, True])
def test_verify_passes_a_good_folder(good: Path, original: bool) -> None:
    result = run("verify", good, "-q", *(["--original", EXAMPLES / "llama-mini"] if original else []))
    assert result.exit_code == 0, result.output
    assert ("cached decoding" in result.stdout) == original


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.bias"])
def test_verify_finds_one_changed_value(good: Path, name: str) -> None:
    tensors = load_file(good / "model.safetensors")
    tensors[name].view(-1)[-1] += 1e-6
    save_file(tensors, good / "model.safetensors", metadata={"format": "pt"})
    result = run("verify", good, "-q")
    assert result.exit_code == 3
    assert f"changed since written: {name}" in result.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "differ from the plan: model.layers.0.self_attn.q_proj.weight"),
        ("model.layers.2.mlp.down_proj.bias", "FAILED  same function in float32"),
        ("model.layers.0.mlp.gate_proj.bias", "differ from the plan"),
    ],
)
def test_verify_compares_with_the_original(good: Path, name: str, words: str) -> None:
    """A forged recipe does not help: the tensors and the outputs themselves are compared."""
    # copies, for older releases of safetensors map the file that is written over here
    tensors = {key: value.clone() for key, value in load_file(good / "model.safetensors").items()}
    tensors[name] += 0.01
    save_file(tensors, good / "model.safetensors", metadata={"format": "pt"})
    recipe = json.loads((good / "prune_peak.json").read_text())
    recipe["tensors"] = {key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in tensors.items()}
    (good / "prune_peak.json").write_text(json.dumps(recipe))
    alone = run("verify", good, "-q")
    assert alone.exit_code == 0
    assert alone.stdout.endswith("\npassed\n")
    result = run("verify", good, "-q", "--original", EXAMPLES / "llama-mini")
    assert result.exit_code == 3
    assert words in result.stdout
    assert re.search(r"\nfailed: [1-9] of \d+ checks\n$", result.stdout)


def test_verify_names_another_model(good: Path, tmp_path: Path) -> None:
    """Same shapes, other weights: not an original that a wrong compression came from."""
    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "llama-mini")
    model.model.embed_tokens.weight.data.mul_(2)
    shutil.copytree(EXAMPLES / "llama-mini", tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    result = run("verify", good, "-q", "--original", tmp_path / "other")
    assert result.exit_code == 1
    assert "other is not the original of this folder: its config or weights differ." in result.output


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CHANGES: dict[str, Callable[[Path], object]] = {
    "tokenizer.json": lambda folder: shutil.copy(EXAMPLES / "roberta-mini" / "tokenizer.json", folder),
    "tokenizer_config.json": lambda folder: change(folder / "tokenizer_config.json", chat_template="{{ 1 }}"),
    "chat_template.jinja": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    "config.json": lambda folder: change(folder / "config.json", rms_norm_eps=1e-3),
    "generation_config.json": lambda folder: (folder / "generation_config.json").unlink(),
    "additional_chat_templates/rag.jinja": lambda folder: (
        (folder / "additional_chat_templates").mkdir(),
        (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}"),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_verify_finds_a_changed_tokenizer_template_or_config(good: Path, name: str) -> None:
    (good / "results.json").write_text("{}")
    (good / "README.md").write_text("mine")
    assert run("verify", good, "-q").exit_code == 0
    CHANGES[name](good)
    result = run("verify", good, "-q")
    assert result.exit_code == 3
    assert f"changed since written: {name}" in result.stdout


def test_verify_compares_the_tokenizers(good: Path) -> None:
    """A forged recipe does not help: ids, texts and settings themselves are compared."""
    shutil.copy(EXAMPLES / "roberta-mini" / "tokenizer.json", good)
    recipe = json.loads((good / "prune_peak.json").read_text())
    recipe["files"]["tokenizer.json"] = hashlib.sha256((good / "tokenizer.json").read_bytes()).hexdigest()
    (good / "prune_peak.json").write_text(json.dumps(recipe))
    assert run("verify", good, "-q").exit_code == 0
    result = run("verify", good, "-q", "--original", EXAMPLES / "llama-mini")
    assert result.exit_code == 3
    assert "FAILED  tokenizer is the original's" in result.stdout


def test_failed_verification_removes_the_result(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prune_peak.sites.site.fold", lambda weight, bias, fill, keep: torch.ones(weight.shape[0]))
    monkeypatch.setattr("prune_peak.verification._check_tensors", lambda *_: None)
    result = compress(EXAMPLES / "llama-mini", tmp_path / "cut", text, "--samples", 4)
    assert result.exit_code == 1
    assert "does not compute what it should" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_trained_window_is_kept(tmp_path: Path, text: Path) -> None:
    """One of the three heads of every group leaves; what the window hides stays hidden, and it matters."""
    options = {"calibration": str(text), "samples": 16}
    result = prune_peak.compress(str(EXAMPLES / "mistral-mini"), {"attention": 0.3}, tmp_path / "cut", **options)
    assert result.model_class == "SmolLM3ForCausalLM"
    assert result.share["attention"] == pytest.approx(1 / 3)
    assert result.quality_after.value < 1.5 * result.quality_before.value
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "cut")(text.read_text()[:2000], return_tensors="pt").input_ids
    far, near = tokens[:, :128].clone(), tokens[:, :128].clone()
    far[:, :4] = 7
    near[:, -8:-4] = 7
    dense, far, near = (model(inputs).logits[:, -1] for inputs in (tokens[:, :128], far, near))
    assert torch.equal(dense, far)  # three blocks see 3 * 31 tokens back
    assert not torch.allclose(dense, near, atol=0.1)


def test_attention_of_opt_is_folded_in_place(tmp_path: Path, text: Path) -> None:
    words = ("--samples", 8, "--refit", "--sites", "attention", "--keep-shape")
    result = compress(EXAMPLES / "opt-mini", tmp_path / "cut", text, *words, "--unit", "neuron")
    assert result.exit_code == 0, result.output
    assert "Nothing is saved" in result.stdout
    recipe = json.loads((tmp_path / "cut" / "prune_peak.json").read_text())
    assert {check["check"] for check in recipe["verification"]} >= {"same function in float32, cached decoding"}
    assert recipe["before"]["bytes"] == recipe["after"]["bytes"]
    assert (recipe["before"]["neurons"]["attention"], recipe["after"]["neurons"]["attention"]) == (3 * 128, 3 * 90)
    assert run("verify", tmp_path / "cut", "--original", EXAMPLES / "opt-mini").exit_code == 0
    refused = compress(EXAMPLES / "opt-mini", tmp_path / "other", text, "--sites", "attention")
    assert refused.exit_code == 1
    assert "fold it in place at the same size (--keep-shape)" in refused.stderr


BAD = {
    "single neurons of attention": (["--sites", "attention", "--unit", "neuron"], 2, "makes heads narrower"),
    "a target in place": (["--keep-shape", "--target-params", "0.8"], 2, "pass one of"),
    "unknown folder": (["--model", "nowhere/at-all"], 1, "nowhere/at-all"),
    "ratio 0": (["--ratio", "0"], 2, "between 0 and 1"),
    "ratio 1": (["--ratio", "1"], 2, "between 0 and 1"),
    "ratio 1.5": (["--ratio", "1.5"], 2, "between 0 and 1"),
    "ratio 30": (["--ratio", "30"], 2, "Did you mean 0.3?"),
    "ratio of words": (["--ratio", "much"], 2, "expected a number, or mlp=NUMBER"),
    "ratio of another site": (["--ratio", "embedding=0.3"], 2, "expected mlp, experts, expert-mlp, blocks, attention"),
    "attention that cannot be narrower": (["--ratio", "attention=0.3"], 1, "no stock class supports fewer heads"),
    "ratio nan": (["--ratio", "nan"], 2, "between 0 and 1"),
    "no sample": (["--samples", "0"], 2, "expected at least 1"),
    "text not there": (["--calibration", "no.txt"], 1, "no.txt does not exist"),
    "window of one token": (["--sequence-length", "1"], 2, "expected at least 2"),
    "multiple of 0": (["--multiple-of", "0"], 2, "expected at least 1"),
    "multiple too large": (["--multiple-of", "4096"], 1, "keep none"),
    "unknown fill": (["--fill", "mode"], 2, "peak"),
    "output is a file": (["--output", "{text}"], 1, "is a file"),
    "output cannot be made": (["--output", "/proc/nowhere/out"], 1, "cannot be written"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, tmp_path: Path, text: Path) -> None:
    more, code, words = BAD[name]
    given = [word.format(text=text) for word in more]
    result = compress(EXAMPLES / "opt-mini", tmp_path / "cut", text, "--samples", 4, *given)
    assert result.exit_code == code, result.output
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("Error: ")
    assert words in error
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_short_and_empty_texts(tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    text.write_text("")
    result = compress(EXAMPLES / "opt-mini", tmp_path / "cut", text)
    assert result.exit_code == 1
    assert "fewer than one window" in result.stderr
    text.write_text("def f(x): return x\n" * 100)
    result = run(
        *("compress", "--model", EXAMPLES / "opt-mini", "--ratio", 0.3, "--output", tmp_path / "cut"),
        *("--calibration", text, "--samples", 40),
    )
    assert result.exit_code == 0, result.output
    assert "fewer than --samples 40; all are used" in caplog.text


def test_nan_weights_are_refused_and_nothing_stays(tmp_path: Path, text: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(EXAMPLES / "llama-mini", source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = compress(source, tmp_path / "cut", text, "--samples", 4)
    assert result.exit_code == 1
    assert "not finite" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text.txt"}


def test_an_empty_output_folder_is_used(tmp_path: Path, text: Path) -> None:
    (tmp_path / "cut").mkdir()
    result = run(
        "compress",
        f"{EXAMPLES / 'opt-mini'}/",
        "--ratio",
        0.3,
        "--output",
        f"{tmp_path / 'cut'}/",
        "--calibration",
        text,
        "--samples",
        2,
        "--sequence-length",
        32,
        "--no-refit",
        "-q",
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "cut" / "prune_peak.json").read_text())["source"]["model"] == "opt-mini"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "text.txt"]


def test_an_output_that_exists_is_not_touched(tmp_path: Path, text: Path) -> None:
    output = tmp_path / "cut"
    output.mkdir()
    (output / "precious").touch()
    assert "--force" in compress(EXAMPLES / "opt-mini", output, text, "--samples", 4).stderr
    refused = compress(EXAMPLES / "opt-mini", output, text, "--samples", 4, "--force")
    assert "is not an output folder of prune-peak" in refused.stderr
    assert (output / "precious").exists()
    (output / "precious").rename(output / "prune_peak.json")  # what an earlier result has
    assert compress(EXAMPLES / "opt-mini", output, text, "--samples", 4, "--force").exit_code == 0
    assert json.loads((output / "prune_peak.json").read_text())["output_class"] == "OPTForCausalLM"


def test_the_model_is_not_its_own_output(tmp_path: Path, text: Path) -> None:
    source = tmp_path / "models" / "source"
    shutil.copytree(EXAMPLES / "opt-mini", source)
    before = digests(source)
    for output in (source, source.parent):
        refused = compress(source, output, text, "--samples", 4, "--force")
        assert refused.exit_code == 2
        assert "contains the model itself" in refused.stderr
    assert digests(source) == before


@pytest.mark.parametrize("output", [".", "/"])
def test_an_output_without_a_name_is_refused(
    output: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = compress(EXAMPLES / "opt-mini", Path(output), text, "--samples", 4, "--force")
    assert refused.exit_code == 2
    assert f"--output {output}" in refused.stderr
    made = run("calibrate", "--model", EXAMPLES / "opt-mini", "--output", output, "--force")
    assert "is a folder; expected a file" in made.stderr


def test_a_mistral_with_a_window_is_written_as_smollm3(tmp_path: Path, text: Path) -> None:
    source = tmp_path / "source"
    BY_NAME["mistral-window"].save(source)
    config = json.loads((source / "config.json").read_text())
    assert config["vocab_size"] == 97
    AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini").save_pretrained(source)
    result = run("compress", "--model", source, "--ratio", 0.3, "--output", tmp_path / "cut", "--sequence-length", 32,
                 "--samples", 4, "--json", "-q")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model_class"] == "SmolLM3ForCausalLM"


def test_help_does_not_import_torch() -> None:
    code = "import sys, prune_peak.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_module_is_the_program() -> None:
    words = [sys.executable, "-m", "prune_peak", "--version"]
    assert "prune-peak" in subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_help_with_an_example() -> None:
    for name in SUMMARIES:
        assert f"prune-peak {name}" in run(name, "--help").output


def test_a_ratio_may_name_its_site(tmp_path: Path, text: Path) -> None:
    result = compress(EXAMPLES / "llama-mini", tmp_path / "cut", text, "--samples", 4, "--ratio", "mlp=0.5", "--json")
    assert json.loads(result.stdout)["share"] == {"mlp": 0.5}


def test_a_disk_that_is_too_small_is_seen_before_work(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    result = compress(EXAMPLES / "opt-mini", tmp_path / "cut", text, "--samples", 4)
    assert result.exit_code == 1
    assert "0.00 GB free" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_the_chat_template_travels(tmp_path: Path, text: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(EXAMPLES / "llama-mini", source)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "loud.jinja").write_text("{{ messages[0].content | upper }}")
    assert compress(source, tmp_path / "cut", text, "--samples", 4).exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    loud = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False, chat_template="loud")
    assert loud == "HELLO"


@pytest.mark.parametrize(("name", "head"), [("llama-tied", "Model"), ("llama-tied", "ForSequenceClassification")])
def test_models_without_a_language_head(name: str, head: str, tmp_path: Path, text: Path) -> None:
    tiny = BY_NAME[name]
    source = Tiny(name, tiny.family, head, {"vocab_size": 1024}).save(tmp_path / "source")
    AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini").save_pretrained(source)
    result = compress(source, tmp_path / "cut", text, "--samples", 4, "--fill", "mean")
    assert result.exit_code == 0, result.output
    assert "same function in float32, prefill 1" in (tmp_path / "cut" / "prune_peak.json").read_text()
    assert "perplexity" not in result.stdout
    evaluated = compress(source, tmp_path / "other", text, "--samples", 4, "--evaluate", text)
    assert "predicts no text" in evaluated.stderr
    own = run("compress", "--model", source, "--ratio", 0.3, "--output", tmp_path / "other")
    assert "generates no text; pass a text with --calibration" in own.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"source", "cut", "text.txt"}


@pytest.mark.parametrize(
    ("name", "output_class", "written_as", "zero"),
    [
        ("cohere", "auto", "CohereForCausalLM", ""),
        ("falcon-40b", "auto", "PhiForCausalLM", ""),
        ("gemma", "auto", "GemmaForCausalLM", "MLP neurons"),  # in float32 Granite (`test_conversion.py`)
        ("gemma2", "auto", "Gemma2ForCausalLM", "MLP neurons"),
        ("gpt-neox-parallel", "auto", "PhiForCausalLM", ""),
        ("gptj", "auto", "PhiForCausalLM", ""),
        ("phi3", "own", "Phi3ForCausalLM", "attention neurons and MLP neurons"),
    ],
)
def test_output_classes_verify_in_bfloat16(
    name: str, output_class: str, written_as: str, zero: str, tmp_path: Path, text: Path
) -> None:
    tiny = BY_NAME[name]
    small = Tiny(name, tiny.family, tiny.head, tiny.settings | {"vocab_size": 1024})
    source = small.save(tmp_path / "source", torch.bfloat16)
    AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini").save_pretrained(source)
    words = (
        "--samples",
        4,
        "--sequence-length",
        64,
        "--sites",
        "mlp,attention",
        "--ratio",
        0.5,
        "--output-class",
        output_class,
    )
    result = compress(source, tmp_path / "cut", text, *words)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["architectures"] == [written_as]
    assert (f"Held at zero: the pruned {zero}" if zero else "Verified.") in result.stdout
    assert ("Held at zero" in result.stdout) == bool(zero)
    checks = json.loads((tmp_path / "cut" / "prune_peak.json").read_text())["verification"]
    assert any("cached decoding" in check["check"] for check in checks)


def test_unsupported_output_class_is_refused_before_work(tmp_path: Path, text: Path) -> None:
    result = compress(EXAMPLES / "mistral-mini", tmp_path / "cut", text, "--output-class", "granite")
    assert result.exit_code == 1
    assert "These do: own (with a fill of zero in mlp), smollm3." in result.stderr
    assert compress(EXAMPLES / "mistral-mini", tmp_path / "cut", text, "--output-class", "mamba").exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, text: Path) -> None:
    source = BY_NAME["opt"].save(tmp_path / "source")
    AutoTokenizer.from_pretrained(EXAMPLES / "llama-mini").save_pretrained(source)
    result = compress(source, tmp_path / "cut", text, "--samples", 4)
    assert result.exit_code == 1
    assert "Use the tokenizer that belongs to the model" in result.stderr


def test_an_encoder_is_cut_on_a_text(tmp_path: Path, text: Path) -> None:
    own = run("compress", "--model", ROBERTA, "--ratio", 0.3, "--output", tmp_path / "cut", "-q")
    assert own.exit_code == 1
    assert "generates no text; pass a text with --calibration" in own.stderr
    result = compress(ROBERTA, tmp_path / "cut", text, "--samples", 16, "--refit", "--json")
    assert result.exit_code == 0, result.output
    before, after = (json.loads(result.stdout)[f"quality_{when}"] for when in ("before", "after"))
    assert before["metric"] == after["metric"] == "masked-token accuracy"
    assert before["text"] == "held-out windows of text.txt"
    assert before["value"] > 0.35  # it has learned: the most frequent byte is 18 % of the text
    assert after["value"] > before["value"] - 0.1
    assert run("verify", tmp_path / "cut", "--original", ROBERTA).exit_code == 0


def test_a_masked_lm_without_a_mask_token(tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = shutil.copytree(ROBERTA, tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(source)
    result = compress(source, tmp_path / "cut", text, "--samples", 4, "--evaluate", text)
    assert result.exit_code == 1
    assert "has no mask token" in result.stderr
    with caplog.at_level("WARNING", "prune_peak"):
        prune_peak.compress(str(source), 0.3, tmp_path / "cut", calibration=str(text), samples=16, refit=False)
    assert "quality before and after is not measured" in caplog.text


@pytest.mark.parametrize("refit", ["--refit", "--no-refit"])
def test_a_large_model_is_verified_block_by_block(
    refit: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a plan that is not the one that was written is seen."""
    monkeypatch.setattr(memory, "WHOLE_SIZE", 0)
    result = compress(EXAMPLES / "llama-mini", tmp_path / "cut", text, "--samples", 4, "--fill", "mean", refit)
    assert result.exit_code == 0, result.output
    plan = load_file(tmp_path / "cut" / PLAN_FILE)
    keep = plan["model.layers.1.mlp.down_proj.keep"]
    keep[0] = next(neuron for neuron in range(384) if neuron not in keep)
    plan["model.layers.1.mlp.down_proj.keep"] = keep.sort().values
    save_file(plan, tmp_path / "cut" / PLAN_FILE)
    checked = verify(tmp_path / "cut", open_model(str(EXAMPLES / "llama-mini")), ExecutionConfig(whole_size=0))
    failed = [check["check"] for check in checked.checks if not check["passed"]]
    assert "same function in float32, prefill 0" in failed
