import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import EXAMPLES
from test_law import KEPT, cut_tiny
from tiny import TINY, Tiny

from prune_peak.cli import main
from prune_peak.families import FAMILIES
from prune_peak.inspection import inspect
from prune_peak.source import open_source


@pytest.mark.parametrize("tiny", TINY, ids=lambda tiny: tiny.name)
def test_inspect_foretells_what_is_written(tiny: Tiny, tmp_path: Path) -> None:
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
    assert inspection.parameters_after == open_source(str(tmp_path / "cut")).parameters
    assert bool(inspection.why) == (inspection.written_as in ("GraniteForCausalLM", "SmolLM3ForCausalLM")
                                    and not tiny.name.startswith(("granite", "smollm3")))  # fmt: skip


def test_every_family_is_inspected_above() -> None:
    assert {tiny.build().config.model_type for tiny in TINY} == set(FAMILIES)


def test_the_command_says_what_a_person_wants_to_know() -> None:
    result = CliRunner().invoke(main, ["inspect", str(EXAMPLES / "llama-mini"), "--ratio", "0.5"])
    assert result.exit_code == 0, result.output
    for words in (
        "384 neurons in each of 3 blocks",
        "LlamaForCausalLM",
        "bias of mlp.down_proj",
        "vLLM",
        "192 of 384 mlp",
        "128 of 128 attention",
    ):
        assert words in result.stdout


def test_a_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["compress", "--model", str(EXAMPLES / "llama-mini"), "--ratio", "0.3", "--dry-run", "--json", "-q"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert 0 < answer["minutes"] < 10
    assert answer["memory"] > 10_000_000
    assert answer["disk"] == answer["bytes_after"]
    assert not list(tmp_path.iterdir())
