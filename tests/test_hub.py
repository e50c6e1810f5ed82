"""Models by Hub id, over real HTTP, with huggingface_hub's own client and cache."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES
from loopback_hub import COMMIT, TOKEN, LoopbackHub
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    legacy = tmp_path_factory.mktemp("legacy")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "opt-mini" / name, legacy / name)
    torch.save(load_file(EXAMPLES / "opt-mini" / "model.safetensors"), legacy / "pytorch_model.bin")
    (legacy / "README.md").write_text("the source's card")
    (legacy / "evil.py").write_text("raise SystemExit")
    repositories = {"mini/opt": EXAMPLES / "opt-mini", "mini/legacy": legacy, "mini/secret": EXAMPLES / "opt-mini"}
    with LoopbackHub(repositories, private=frozenset({"mini/secret"})) as hub:
        yield hub


class Machine:
    """A clean user of the hub: its own cache, its own environment, the command as a process."""

    def __init__(self, hub: LoopbackHub, folder: Path) -> None:
        self.folder = folder
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self.environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf")}

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "prune_peak", *words]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment | environment, cwd=self.folder, check=False
        )


@pytest.fixture
def machine(hub: LoopbackHub, tmp_path: Path) -> Machine:
    return Machine(hub, tmp_path)


SMALL = ("--ratio", "0.3", "--samples", "4", "--sequence-length", "32", "-q")


def test_compress_by_id_then_offline_from_the_cache(machine: Machine, hub: LoopbackHub) -> None:
    first = machine.run("compress", "--model", "mini/opt", "--revision", "v1", *SMALL, "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["output"] == "opt-peak-0.3"
    recipe = json.loads((machine.folder / "opt-peak-0.3" / "prune_peak.json").read_text())
    assert recipe["source"] == {"model": "mini/opt", "revision": COMMIT, "digest": COMMIT}
    hub.requests.clear()
    words = ("--revision", COMMIT, *SMALL, "--output", "again")
    again = machine.run("compress", "--model", "mini/opt", *words, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert not hub.requests
    for name in ("model.safetensors", "prune_peak_plan.safetensors", "prune_peak.json", "config.json"):
        assert (machine.folder / "again" / name).read_bytes() == (machine.folder / "opt-peak-0.3" / name).read_bytes()


def test_a_repository_with_only_a_bin(machine: Machine, hub: LoopbackHub) -> None:
    hub.requests.clear()
    done = machine.run("compress", "--model", "mini/legacy", *SMALL)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (machine.folder / "legacy-peak-0.3").iterdir()}
    assert "model.safetensors" in written
    assert not written & {"pytorch_model.bin", "README.md", "evil.py"}
    assert not any("evil.py" in request or "README" in request for request in hub.requests)


def test_inspect_fetches_the_config_alone(machine: Machine, hub: LoopbackHub) -> None:
    hub.requests.clear()
    done = machine.run("inspect", "mini/opt")
    assert done.returncode == 0, done.stderr
    fetched = {request.split("/")[-1] for request in hub.requests if "/resolve/" in request}
    assert fetched == {"config.json"}


def test_a_private_repository_needs_the_token(machine: Machine) -> None:
    without = machine.run("inspect", "mini/secret")
    assert without.returncode == 1
    assert without.stderr.startswith("Error: mini/secret is not a folder, and the Hub does not give it")
    assert len(without.stderr.strip().splitlines()) == 1
    assert machine.run("inspect", "mini/secret", HF_TOKEN=TOKEN).returncode == 0


UNKNOWN = [(["mini/none"], "0"), (["mini/opt", "--revision", "v9"], "0"), (["mini/opt"], "1")]


@pytest.mark.parametrize(("words", "offline"), UNKNOWN, ids=["no such id", "no such revision", "offline, not cached"])
def test_what_the_hub_does_not_have_is_one_line(machine: Machine, words: list[str], offline: str) -> None:
    done = machine.run("inspect", *words, HF_HUB_OFFLINE=offline)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {words[0]} is not a folder, and the Hub does not give it")
    assert len(done.stderr.strip().splitlines()) == 1
