"""Progress bars: a name and a stage for each phase, a clock that goes on, and a start where a run resumes."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import EXAMPLES
from test_compress import run
from test_progress import interrupt_after

from prune_peak import progress
from prune_peak.progress import Bar, describe_stage, next_stage, open_bar, phase, stages, track

OPT, LLAMA = EXAMPLES / "opt-mini", EXAMPLES / "llama-mini"
SHORT = ("--samples", 2, "--sequence-length", 32)


def bars_of(stderr: str) -> list[tuple[str, int, int]]:
    """Name, stage and number of stages of every bar with a length, in their order."""
    found = re.findall(r"\r([^\r\n:]+), stage (\d+) of (\d+): +\d+%\|", stderr)
    return list(dict.fromkeys((name, int(number), int(count)) for name, number, count in found))


def check_stages(bars: list[tuple[str, int, int]], count: int) -> None:
    assert {each for _, _, each in bars} == {count}
    numbers = [number for _, number, _ in bars]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(1, count + 1))
    assert len({name for name, _, _ in bars}) == len(bars), "every phase has a name of its own"


def test_every_phase_has_a_name_and_a_stage(tmp_path: Path, text: Path) -> None:
    words = ("--calibration", text, "--no-refit", *SHORT)
    compressed = run("compress", OPT, "--ratio", 0.3, "--output", tmp_path / "cut", *words)
    assert compressed.exit_code == 0, compressed.stderr
    check_stages(bars_of(compressed.stderr), 4)
    verified = run("verify", tmp_path / "cut", "--original", OPT)
    bars = bars_of(verified.stderr)
    assert [name for name, _, _ in bars][:2] == ["compare bytes", "compare tensors"]
    assert {count for _, _, count in bars} == {4}


def test_stages_of_the_other_commands(tmp_path: Path, text: Path) -> None:
    evaluated = run("evaluate", OPT, OPT, "--data", text, "--windows", 2)
    assert {(number, count) for _, number, count in bars_of(evaluated.stderr)} == {(1, 1)}
    calibrated = run("calibrate", OPT, "--output", tmp_path / "stats", *SHORT)
    check_stages(bars_of(calibrated.stderr), 2)


def test_a_resumed_bar_starts_where_it_resumes(tmp_path: Path, text: Path) -> None:
    words = (
        "compress",
        LLAMA,
        "--ratio",
        0.3,
        "--calibration",
        text,
        "--output",
        tmp_path / "cut",
        "--no-refit",
        *SHORT,
    )
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(2, patch)
        first = run(*words)
    assert first.exit_code == 130
    assert re.findall(r"calibrate, stage 2 of 4: +\d+%\|[^|]*\| (\d/\d)", first.stderr)[0] == "0/3"
    resumed = run(*words)
    assert resumed.exit_code == 0, resumed.stderr
    counts = re.findall(r"calibrate, stage 2 of 4: +\d+%\|[^|]*\| (\d/\d)", resumed.stderr)
    assert (counts[0], counts[-1]) == ("2/3", "3/3")


def test_the_clock_goes_on_in_a_long_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "BEAT", 0.02)
    with open_bar("slow", "step", 2, done=1) as bar:
        time.sleep(0.3)
        seen = capsys.readouterr().err
        bar.update()
    assert seen.count("\rslow:") > 3
    assert "1/2" in seen
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == "", "it stops with the bar"


def test_a_phase_is_shown_where_it_is_long(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with phase("short"):
        pass
    assert "short" not in capsys.readouterr().err
    monkeypatch.setattr(progress, "BEAT", 0.02)
    with phase("long"):
        time.sleep(0.2)
    assert "\rlong: 00:00" in capsys.readouterr().err


def test_inner_stages_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    @stages(3)
    def inner() -> str:
        next_stage()
        return describe_stage("inner")

    assert inner() == "inner, stage 2 of 3"
    with stages(2):
        next_stage()
        assert inner() == "inner, stage 2 of 2"
        assert list(track([1, 2], "outer", "step")) == [1, 2]
    assert describe_stage("none") == "none"
    assert "outer, stage 2 of 2: 100%" in capsys.readouterr().err


def test_an_error_begins_a_line(tmp_path: Path, text: Path) -> None:
    """Also where a bar was open, and its clock stands still then."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(1, patch)
        words = ("compress", LLAMA, "--ratio", 0.3, "--calibration", text, "--no-refit", "--output", tmp_path / "cut")
        stopped = run(*words, *SHORT)
    assert stopped.exit_code == 130
    assert re.search(r"^Interrupted\. ", stopped.stderr, re.MULTILINE)
    assert not progress._open


def test_a_study_resumes_its_bar(tmp_path: Path, text: Path) -> None:
    words: list[Any] = ["ablate", OPT, "--output", tmp_path / "study", "--calibration", text, *SHORT, "--sites", "mlp"]
    words += ["--fill", "mean", "--seeds", 1]
    assert run(*words, "--fraction", 0.3, "--fraction", 0.5).exit_code == 0
    log = tmp_path / "study" / "trials.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]))
    resumed = run(*words, "--fraction", 0.3, "--fraction", 0.5)
    assert resumed.exit_code == 0, resumed.stderr
    counts = re.findall(r"ablate, stage 3 of 3: +\d+%\|[^|]*\| (\d/\d)", resumed.stderr)
    assert (counts[0], counts[-1]) == ("2/3", "3/3")


def test_a_bar_that_was_interrupted_while_it_was_made_closes() -> None:
    Bar.__new__(Bar).close()
