"""README and guide: their Python, run as it stands; their commands, parsed; their links, followed."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import EXAMPLES

import prune_peak
from prune_peak.cli.main import main

ROOT = EXAMPLES.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README, GUIDE = ((ROOT / name).read_text() for name in ("README.md", "docs/guide.md"))
MOST_WORDS = 700


def test_python(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every block in its order; a compressed example stands in for the model that the first one loads."""
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    shutil.copy(text, "notes.txt")
    [folder] = set(re.findall(r'from_pretrained\("(.*?)"\)', GUIDE))
    prune_peak.compress("examples/llama-mini", 0.5, folder, samples=4, sequence_length=32, calibration="notes.txt")
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "721792 594784"
    assert printed[2].split() == ["0.29166666666666663", "True"]
    assert printed[3].startswith("Difference(mean=")
    assert (tmp_path / "smaller.gguf").is_file()


def test_public_names_exist() -> None:
    for name in prune_peak.__all__:
        assert getattr(prune_peak, name) is not None


def test_study_example(monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "docs" / "study.md").read_text(), re.DOTALL)
    monkeypatch.chdir(EXAMPLES.parent)
    names: dict[str, Any] = {}
    exec(block, names)
    assert 0 < (names["held"] - names["intact"]).abs().max() < names["intact"].abs().max()


def test_readme_commands_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fenced = "\n".join(part for page in PAGES for part in page.read_text().split("```")[1::2] if page.stem != "cli")
    lines = [line.split("#")[0] for line in fenced.splitlines() if line.strip().startswith("prune-peak ")]
    assert len(lines) > 40
    group = click.Context(main, **main.context_settings)
    for line in lines:
        name, *words = shlex.split(line)[1:]
        command = main.get_command(group, name)
        assert command is not None, line
        if any(parameter.human_readable_name == "DIR" for parameter in command.params):
            Path(words[0]).mkdir(exist_ok=True)
        command.make_context(name, words, parent=group)  # which refuses what it does not know


def test_readme_scripts_exist() -> None:
    for page in PAGES:
        for script in re.findall(r"python ((?:examples|bench)/\w+\.py)", page.read_text()):
            assert (ROOT / script).is_file(), (page.name, script)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_readme_is_short() -> None:
    assert len(re.sub(r"<!--.*?-->", "", README).split()) <= MOST_WORDS
