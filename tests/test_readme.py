"""The README's Python, run as it stands, and its commands, parsed; and how CONTRIBUTING finds a family."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import EXAMPLES

import prune_peak
from prune_peak import families
from prune_peak.cli import main
from prune_peak.families import FAMILIES

README = (EXAMPLES.parent / "README.md").read_text()
CONTRIBUTING = (EXAMPLES.parent / "CONTRIBUTING.md").read_text()


def test_python(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every block in its order; a compressed example stands in for the model that the first one loads."""
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    shutil.copy(text, "notes.txt")
    [folder] = set(re.findall(r'from_pretrained\("(.*?)"\)', README))
    prune_peak.compress("examples/llama-mini", 0.5, folder, samples=4, sequence_length=32, calibration="notes.txt")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "721792 594784"
    assert printed[2].split() == ["0.29166666666666663", "True"]
    assert printed[3].startswith("Difference(mean=")
    assert (tmp_path / "smaller.gguf").is_file()


def test_what_the_package_offers_is_there() -> None:
    for name in prune_peak.__all__:
        assert getattr(prune_peak, name).__name__ == name


def test_the_study_holds_neurons_of_ones_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "docs" / "study.md").read_text(), re.DOTALL)
    monkeypatch.chdir(EXAMPLES.parent)
    names: dict[str, Any] = {}
    exec(block, names)
    assert 0 < (names["held"] - names["intact"]).abs().max() < names["intact"].abs().max()


def test_commands_are_ones_that_there_are() -> None:
    fenced = "\n".join(README.split("```")[1::2])
    lines = [line.split("#")[0] for line in fenced.splitlines() if line.startswith("prune-peak ")]
    assert len(lines) > 10
    for line in lines:
        name, *words = shlex.split(line)[1:]
        command = main.get_command(click.Context(main), name)
        assert command is not None, line
        command.make_context(name, words)  # which refuses what it does not know


def test_scripts_are_ones_that_there_are() -> None:
    for script in re.findall(r"python ((?:examples|bench)/\w+\.py)", README):
        assert (EXAMPLES.parent / script).is_file(), script


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_found(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the two lines that CONTRIBUTING gives: one place in the table, and the row in full."""
    [pattern] = re.findall(r"`grep -n '(.*?)' prune_peak/\*\.py`", CONTRIBUTING)
    table = Path(families.__file__).read_text().splitlines()
    rows = [line.strip() for line in table if pattern.replace("gemma", name) in line]
    assert sum(row.startswith((f'Family("{name}",', f'"{name}",')) for row in rows) == 1, rows
    [code] = re.findall(r'python -c "(.*)"', CONTRIBUTING)
    exec(code.replace("gemma", name), {})
    shown = capsys.readouterr().out
    assert shown.startswith(f"Family(model_type='{name}',")
    assert f"reader='{FAMILIES[name].mlp.reader}'" in shown
