import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import EXAMPLES
from recorded import load
from test_law import KEPT, cut_tiny
from tiny import BY_NAME, TINY, Tiny, widths_of

from prune_peak.cli.main import main
from prune_peak.conversion.choice import choose_conversion
from prune_peak.conversion.classes import ENGINES
from prune_peak.inspection import inspect
from prune_peak.models.families import FAMILIES
from prune_peak.models.loading import open_model, open_model_spec
from prune_peak.sites.finding import find_sites, labels

# Parts of transformers, or libraries over it: they read what it reads
OF_TRANSFORMERS = {"transformers serve", "PEFT", "torchao", "sentence-transformers"}


@pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.name)
def test_inspect_predicts_the_output(tiny: Tiny, tmp_path: Path) -> None:
    """From a folder that holds nothing but the config."""
    tiny.save(tmp_path / "source")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((tmp_path / "source" / "config.json").read_bytes())
    began = time.perf_counter()
    width = 128 if tiny.name == "gpt2-default-width" else 64
    kept = 32 if tiny.family == "Dinov2" else KEPT  # a multiple of its hidden size
    inspection = inspect(str(alone), 1 - kept / width)
    assert time.perf_counter() - began < 2
    source = cut_tiny(tmp_path / "source", tmp_path / "cut", "mean")
    written = json.loads((tmp_path / "cut" / "config.json").read_text())
    mlp = inspection.sites[0]
    assert (mlp.kind, mlp.neurons, mlp.kept) == ("mlp", width, kept)
    assert [inspection.written_as] == written["architectures"]
    assert inspection.parameters == source.parameters
    cut = open_model(str(tmp_path / "cut"))
    assert inspection.parameters_after == cut.parameters
    # what is written holds the constants of the MLP where `inspect` says, and its own class is written where it does
    mlp_bias = mlp.folded_into.removeprefix("to the bias of ").split(",")[0] + ".bias"
    biases = [cut.read(name) for name in cut.names if name.endswith(f".{mlp_bias}")]
    assert bool(biases) != mlp.folded_into.startswith("nowhere")
    assert all(bool(bias.any()) for bias in biases)
    assert bool(inspection.reason) == (inspection.written_as != inspection.model_class or not biases)


LACKING = {
    "all there": ((), None, {}),
    "weights": (("model.safetensors",), None, {"weights": "contains no weights"}),
    "truncated": ((), 1000, {"weights": "it may be truncated"}),
    "tokenizer": (("tokenizer.json", "tokenizer_config.json"), None, {"tokenizer": "there is no file of one. Copy it"}),
}


@pytest.mark.parametrize("case", LACKING)
def test_what_a_folder_lacks(case: str, tmp_path: Path) -> None:
    removed, length, expected = LACKING[case]
    shutil.copytree(EXAMPLES / "opt-mini", tmp_path / "model")
    for name in removed:
        (tmp_path / "model" / name).unlink()
    if length is not None:
        path = tmp_path / "model" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-length])
    inspection = inspect(str(tmp_path / "model"))
    assert inspection.lacking.keys() == expected.keys()
    assert all(words in inspection.lacking[part] for part, words in expected.items())
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "model")]).stdout
    assert all(words in shown for words in expected.values())
    assert ("tokenizer" in shown) == ("tokenizer" in expected)


PRUNED = {  # options of `inspect`: what it says
    "--ratio 0.5": "50.0% of the MLP neurons = 30.4% of the model",
    "--ratio 0.3": "29.2% of the MLP neurons (asked 30%: multiples of 8) = 17.6% of the model",
    "--ratio attention=0.3": "50.0% of the attention neurons (asked 30%: whole heads, as many of every KV group) =",
    "--ratio 0.4 --sites attention --unit group": "(asked 40%: whole KV groups) = 10.1% of the model",
    "--target-params 0.8": "33.3% of the MLP neurons = 20.2% of the model",
    "--ratio 0.3 --keep-shape": "29.2% of the MLP neurons (asked 30%: multiples of 8)\n",
}


@pytest.mark.parametrize("words", PRUNED)
def test_what_is_asked_and_what_is_pruned(words: str) -> None:
    result = CliRunner().invoke(main, ["inspect", str(EXAMPLES / "llama-mini"), *words.split()])
    assert result.exit_code == 0, result.stderr
    [line] = re.findall(r"^pruned +(.*\n)", result.stdout, re.MULTILINE)
    assert PRUNED[words] in line


def test_images_need_no_tokenizer() -> None:
    assert not inspect(str(EXAMPLES / "vit-mini")).lacking


@pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.name)
def test_inspect_attention(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny.build()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    inspection = inspect(str(tmp_path))
    family = FAMILIES[inspection.model_type]
    if family.attention is None:
        assert [site.kind for site in inspection.sites] == ["mlp"]
        assert "no stock class supports" in inspection.unprunable["attention"]
        return
    _, attention = inspection.sites
    assert attention.in_place == (not family.attention.heads_prunable or tiny.stiff)
    assert bool(inspection.unprunable) == attention.in_place
    blueprint = open_model_spec(str(tmp_path))
    sites = find_sites(blueprint.meta_model, family, ["attention"], keep_shape=attention.in_place)
    target = choose_conversion(
        blueprint, sites, widths_of(sites, {"attention": sites[0].neurons - attention.step}), torch.float32
    )
    assert attention.written_as == target.model_class.__name__
    if attention.folded_into.startswith("nowhere"):
        assert target.zero_filled == ("attention",)
    else:
        bias = attention.folded_into.removeprefix("to the bias of ").split(",")[0] + ".bias"
        assert any(name.endswith(bias) for name in target.meta_model.state_dict())


def test_every_family_is_inspected() -> None:
    assert {tiny.configure().model_type for tiny in TINY} == set(FAMILIES)


def test_inspect_table() -> None:
    result = CliRunner().invoke(main, ["inspect", str(EXAMPLES / "llama-mini"), "--ratio", "0.5"])
    assert result.exit_code == 0, result.output
    for words in (
        "384 neurons in each of 3 blocks",
        "LlamaForCausalLM",
        "bias of mlp.down_proj",
        "vLLM",
        "192 of 384 MLP neurons",
        "128 of 128 attention",
    ):
        assert words in result.stdout


@pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.name)
def test_inspect_table_of_every_family(tiny: Tiny, tmp_path: Path) -> None:
    """Of every kind of model, or says that there is none."""
    config = tiny.build().config
    config.architectures = [f"{tiny.family}{tiny.head}"]
    config.save_pretrained(tmp_path)
    result = CliRunner().invoke(main, ["inspect", str(tmp_path), "--ratio", "0.5"])
    assert result.exit_code == 0, result.output
    said = {line[:12].strip(): line for line in result.stdout.splitlines()}
    for kind in {*labels(FAMILIES[config.model_type])} - {"blocks"}:  # only shown if asked for
        cut = re.search(r"(\d+) neurons .* constants go (to the bias of \S+|nowhere: .*)", said[kind])
        assert cut or "no stock class supports" in said[kind], said[kind]
    assert re.search(r"mlp +\d+ neurons", said["mlp"])
    output_class = re.search(r"written as +(\w+)", said["written as"])
    assert output_class
    written = getattr(transformers, output_class[1]).config_class.model_type
    engines = ENGINES.get(written, ("no serving engine was tried",))
    assert all(engine in said["read by"] for engine in engines), said["read by"]


def test_engines_have_run() -> None:
    """Those of the record that wrote what transformers writes, in float32; in every folder of the class."""
    labels = {"MLX": "MLX-LM {mlx-lm}", "llama.cpp": "llama.cpp (cyllama {cyllama})"}
    seen: dict[str, dict[str, bool]] = {}
    for engine in load("engines")["engines"]:
        own = next(iter(engine["versions"]))
        label = labels.get(engine["name"], f"{engine['name']} {{{own}}}").format_map(engine["versions"])
        for name, row in engine.get("folders", {}).items():
            if name in ("mlp", "granite") and engine["name"] not in OF_TRANSFORMERS:
                runs = seen.setdefault(row["class"].removesuffix("ForCausalLM").lower(), {})
                runs[label] = row.get("same") == 32 and row["difference"] < 1e-2
    assert {kind: tuple(name for name, ran in runs.items() if ran) for kind, runs in seen.items()} == ENGINES


def test_single_unit_is_not_pruned(tmp_path: Path) -> None:
    """All heads share one group of keys and values, which cannot leave."""
    inspection = inspect(str(BY_NAME["llama-one-group"].save(tmp_path)), unit="group")
    assert [site.kind for site in inspection.sites if not site.in_place] == ["mlp"]
    assert "so none would be left" in inspection.unprunable["attention"]


def test_dry_run_checks_statistics(tmp_path: Path, text: Path) -> None:
    model, stats = EXAMPLES / "llama-mini", tmp_path / "plain.stats"
    made = ["calibrate", "--model", str(model), "--output", str(stats), "--calibration", str(text), "--samples", "4"]
    assert CliRunner().invoke(main, [*made, "-q"]).exit_code == 0
    words = ["compress", "--model", str(model), "--ratio", "0.3", "--no-refit", "--stats", str(stats), "--dry-run"]
    assert CliRunner().invoke(main, words).exit_code == 0
    refused = CliRunner().invoke(main, [*words, "--fill", "auto"])
    assert "holds no covariances, required for --fill auto" in refused.stderr


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["compress", "--model", str(EXAMPLES / "llama-mini"), "--ratio", "0.3", "--dry-run", "--json", "-q"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert 0 < answer["minutes"] < 10
    assert answer["memory"] > 10_000_000
    assert answer["disk"] == answer["bytes_after"]
    assert not list(tmp_path.iterdir())
