"""Models by Hub id, and pushes to it: over real HTTP, with huggingface_hub's own client and cache."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import EXAMPLES
from huggingface_hub import constants
from loopback_hub import COMMIT, CUT, TOKEN, LoopbackHub
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prune_peak
from prune_peak.cli.main import main


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    legacy = tmp_path_factory.mktemp("legacy")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "opt-mini" / name, legacy / name)
    torch.save(load_file(EXAMPLES / "opt-mini" / "model.safetensors"), legacy / "pytorch_model.bin")
    (legacy / "README.md").write_text("the source's card")
    (legacy / "evil.py").write_text("raise SystemExit")
    repositories = {"mini/opt": EXAMPLES / "opt-mini", "mini/legacy": legacy, "mini/secret": EXAMPLES / "opt-mini"}
    storage = tmp_path_factory.mktemp("storage")
    with LoopbackHub(repositories, private=frozenset({"mini/secret"}), storage=storage) as hub:
        yield hub


SMALL = ("--ratio", "0.3", "--samples", "4", "--sequence-length", "32")


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `compress` wrote."""
    folder = tmp_path_factory.mktemp("cut") / "opt-cut"
    text = Path(__file__).read_text()
    (folder.parent / "text.txt").write_text(text)
    prune_peak.compress(
        str(EXAMPLES / "opt-mini"),
        0.3,
        folder,
        samples=4,
        sequence_length=32,
        refit=False,
        calibration=str(folder.parent / "text.txt"),
    )
    return folder


@pytest.fixture
def calm(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """The hub as this very process knows it, with what was asked before forgotten, and without trouble afterwards."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    hub.requests.clear()
    yield hub
    hub.trouble = lambda request: None


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words), "-q"])


def test_compress_by_id_then_offline_from_the_cache(
    calm: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("compress", "--model", "mini/opt", "--revision", "v1", *SMALL, "--json")
    assert first.exit_code == 0, first.stderr
    assert json.loads(first.stdout)["output"] == "opt-peak-0.3"
    recipe = json.loads((tmp_path / "opt-peak-0.3" / "prune_peak.json").read_text())
    assert recipe["source"] == {"model": "mini/opt", "revision": COMMIT, "digest": COMMIT}
    calm.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = run("compress", "--model", "mini/opt", "--revision", COMMIT, *SMALL, "--output", "again")
    assert again.exit_code == 0, again.stderr
    assert not calm.requests
    for name in ("model.safetensors", "prune_peak_plan.safetensors", "prune_peak.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "opt-peak-0.3" / name).read_bytes()


def test_a_repository_with_only_a_bin(calm: LoopbackHub, tmp_path: Path) -> None:
    done = run("compress", "--model", "mini/legacy", *SMALL)
    assert done.exit_code == 0, done.stderr
    written = {path.name for path in (tmp_path / "legacy-peak-0.3").iterdir()}
    assert "model.safetensors" in written
    assert not written & {"pytorch_model.bin", "evil.py"}
    assert "the source's card" not in (tmp_path / "legacy-peak-0.3" / "README.md").read_text()
    assert not any("evil.py" in request for request in calm.requests)


def test_modules_are_fetched_as_named(calm: LoopbackHub, tmp_path: Path) -> None:
    """And no other folder: 4bit has the weights of another model."""
    folder = shutil.copytree(EXAMPLES / "opt-mini", tmp_path / "modules")
    for name in ("Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "4bit/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "modules.json").write_text(json.dumps([{"path": name} for name in ("", "Pooling", "2_Dense")]))
    calm.repositories["mini/modules"] = folder
    done = run("compress", "--model", "mini/modules", *SMALL)
    assert done.exit_code == 0, done.stderr
    written = {path.parent.name for path in (tmp_path / "modules-peak-0.3").glob("*/*")}
    assert written == {"Pooling", "2_Dense"}
    assert (tmp_path / "modules-peak-0.3" / "2_Dense" / "model.safetensors").is_file()
    assert not any("4bit" in request for request in calm.requests)


def test_inspect_fetches_the_config_alone(calm: LoopbackHub) -> None:
    done = run("inspect", "mini/opt")
    assert done.exit_code == 0, done.stderr
    fetched = {request.split("/")[-1] for request in calm.requests if "/resolve/" in request}
    assert fetched == {"config.json"}


@pytest.mark.usefixtures("calm")
def test_a_private_repository_needs_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    without = run("inspect", "mini/secret")
    assert without.exit_code == 1
    assert without.stderr.startswith("Error: mini/secret is not a folder, and the download from the Hub failed")
    assert len(without.stderr.strip().splitlines()) == 1
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run("inspect", "mini/secret").exit_code == 0


UNKNOWN = [(["mini/none"], False), (["mini/opt", "--revision", "v9"], False), (["mini/opt"], True)]


@pytest.mark.usefixtures("calm")
@pytest.mark.parametrize(("words", "offline"), UNKNOWN, ids=["no such id", "no such revision", "offline, not cached"])
def test_what_the_hub_does_not_have_is_one_line(
    words: list[str], offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    done = run("inspect", *words)
    assert done.exit_code == 1
    told = (
        "neither a folder nor in the Hub's cache" if offline else "not a folder, and the download from the Hub failed"
    )
    assert done.stderr.startswith(f"Error: {words[0]} is {told}")
    assert len(done.stderr.strip().splitlines()) == 1


CLIENT = "ignore:Use 'content=:DeprecationWarning"  # huggingface_hub's own way to send a file


@pytest.mark.filterwarnings(CLIENT)
def test_a_push_makes_the_repository_and_it_loads(calm: LoopbackHub, cut: Path, tmp_path: Path) -> None:
    """First a large file is refused, then the line is cut at the commit; the same command goes on each time."""
    command = ("push", cut, "mini/pushed", "--private", "--commit-message", "Smaller")
    seen: list[str] = []

    def refuse_second_file(request: str) -> int | None:
        seen.append(request)
        return 400 if request.startswith("PUT") and sum(one.startswith("PUT") for one in seen) == 2 else None

    large = {path.name for path in cut.iterdir() if b"\0" in path.read_bytes()[:512]}
    calm.trouble = refuse_second_file
    refused = run(*command)
    calm.trouble = lambda request: CUT if "/commit/" in request else None
    interrupted = run(*command)
    for failed in (refused, interrupted):
        assert failed.exit_code == 1
        last = failed.stderr.splitlines()[-1]
        assert last.startswith("Error: the push to mini/pushed failed: "), failed.stderr
        assert last.endswith(f"`prune-peak push {cut} mini/pushed` resumes, and sends nothing twice.")
    assert not list(calm.repositories["mini/pushed"].iterdir())
    calm.trouble = lambda request: None
    done = run(*command)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{calm.endpoint}/mini/pushed"
    sent = [request for request in calm.requests if request.startswith("PUT")]
    assert len(sent) == len(large) + 1  # each once, and the refused one again
    assert "mini/pushed" in calm.private
    assert {path.name for path in cut.iterdir()} == {path.name for path in calm.repositories["mini/pushed"].iterdir()}
    for path in cut.iterdir():
        assert path.read_bytes() == (calm.repositories["mini/pushed"] / path.name).read_bytes(), path.name
    model, info = AutoModelForCausalLM.from_pretrained(
        "mini/pushed", output_loading_info=True, cache_dir=tmp_path / "cache"
    )
    recipe = json.loads((cut / "prune_peak.json").read_text())
    assert model.num_parameters() == recipe["after"]["parameters"]
    assert not any(info.values())


@pytest.mark.filterwarnings(CLIENT)
def test_compress_and_push_in_one_go(calm: LoopbackHub) -> None:
    words = (
        "compress",
        "--model",
        "mini/opt",
        *SMALL,
        "--push-to-hub",
        "opt-small",
        "--json",
    )  # of who is logged in
    done = run(*words)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["url"] == f"{calm.endpoint}/mini/opt-small"
    card = (calm.repositories["mini/opt-small"] / "README.md").read_text()
    assert "base_model: mini/opt\n" in card
    assert "mini/opt-small" not in calm.private
    words = ("push", "opt-peak-0.3", "mini/opt-small")
    calm.requests.clear()
    again = run(*words, "--revision", "small")
    assert again.exit_code == 0, again.stderr
    assert again.stdout.splitlines()[-1] == f"{calm.endpoint}/mini/opt-small/tree/small"
    assert not any(request.startswith("PUT") or "/commit/" in request for request in calm.requests)
    public = run(*words, "--private")
    assert public.exit_code == 1
    assert "mini/opt-small exists and is public" in public.stderr


REFUSED_PUSHES = [
    ("wrong token", "mini/no", {}, "hf_wrong", 1, "the Hub does not accept the token. Run `hf auth login`"),
    ("no token", "mini/no", {}, "", 1, "not logged in. Run `hf auth login`, or set HF_TOKEN."),
    ("of another", "other/no", {}, TOKEN, 1, "the token has no write access there"),
    ("no name", "a/b/c", {}, TOKEN, 2, "a/b/c is not a valid name of a repository; expected USER/NAME."),
    ("no hub", "mini/no", {"ENDPOINT": "http://127.0.0.1:9"}, TOKEN, 1, "cannot push to mini/no"),
    ("offline", "mini/no", {"HF_HUB_OFFLINE": True}, TOKEN, 1, "HF_HUB_OFFLINE is set."),
]


@pytest.mark.parametrize(
    ("repo_id", "settings", "token", "code", "words"),
    [case[1:] for case in REFUSED_PUSHES],
    ids=[case[0] for case in REFUSED_PUSHES],
)
def test_a_push_that_cannot_be_is_one_line(
    calm: LoopbackHub,
    cut: Path,
    monkeypatch: pytest.MonkeyPatch,
    repo_id: str,
    settings: dict[str, object],
    token: str,
    code: int,
    words: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    done = run("push", cut, repo_id)
    assert done.exit_code == code, done.output
    assert words in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("Error:")]) == 1
    assert repo_id not in calm.repositories


def test_a_folder_that_does_not_verify_is_not_pushed(calm: LoopbackHub, cut: Path, tmp_path: Path) -> None:
    spoilt = shutil.copytree(cut, tmp_path / "spoilt")
    data = bytearray((spoilt / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (spoilt / "model.safetensors").write_bytes(data)
    done = run("push", "spoilt", "mini/spoilt")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("Error: spoilt does not verify, so it was not pushed: ")
    assert "mini/spoilt" not in calm.repositories


@pytest.mark.filterwarnings(CLIENT)
def test_files_of_another_model_are_removed(calm: LoopbackHub, cut: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the same commit as the push, and said; what transformers does not look for stays."""
    stale = ["adapter_config.json", "chat_template.jinja", "model-00001-of-00002.safetensors"]
    stale += ["model.safetensors.index.json", "pytorch_model.bin"]
    assert calm.storage is not None
    repository = calm.storage / "stale"
    repository.mkdir()
    calm.repositories["mini/stale"] = repository
    for name in [*stale, ".gitattributes", "results.json", "notes.txt", "config.json"]:
        (repository / name).write_text("{}")
    done = CliRunner().invoke(main, ["push", str(cut), "mini/stale"])
    assert done.exit_code == 0, done.stderr
    assert f"files of another model, which this push removes: {', '.join(stale)}." in caplog.text
    left = {".gitattributes", "results.json", "notes.txt"}
    assert {path.name for path in repository.iterdir()} == left | {path.name for path in cut.iterdir()}
    assert len([request for request in calm.requests if "/commit/" in request]) == 1
    assert (repository / "config.json").read_bytes() == (cut / "config.json").read_bytes()
