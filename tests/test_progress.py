"""A run that was stopped goes on where it was, and ends with the same bytes; what it left serves no other run."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import EXAMPLES
from filelock import FileLock
from safetensors.torch import load_file, save_file
from test_compress import compress, digests, run

from prune_peak.errors import PrunePeakError
from prune_peak.export.resume import ResumableRun
from prune_peak.pruning import site_pruning

MODEL = EXAMPLES / "llama-mini"
BENCH = Path(__file__).parent.parent / "bench"


def interrupt_after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once so many blocks are finished."""
    save_block = ResumableRun.save_block
    count = 0

    def noting(self: ResumableRun, *args: object) -> None:
        nonlocal count
        save_block(self, *args)  # type: ignore[arg-type]
        count += 1
        if count == blocks:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResumableRun, "save_block", noting)


@pytest.fixture
def stopped(tmp_path: Path, text: Path) -> Path:
    """What a run leaves that was interrupted after two of its four blocks."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(2, patch)
        result = compress(MODEL, tmp_path / "cut", text, "--samples", 4, "--refit")
    assert result.exit_code == 130
    assert "the same command resumes" in result.stderr
    assert not (tmp_path / "cut").exists()
    return tmp_path / "cut.partial"


def test_the_same_command_resumes(stopped: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decided = []
    refit_best = site_pruning.refit_best
    monkeypatch.setattr(site_pruning, "refit_best", lambda *args: decided.append(1) or refit_best(*args))
    assert compress(MODEL, tmp_path / "cut", text, "--samples", 4, "--refit").exit_code == 0
    resumed = len(decided)
    assert compress(MODEL, tmp_path / "whole", text, "--samples", 4, "--refit").exit_code == 0
    assert len(decided) == resumed + (resumed + 2)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert not stopped.exists()


def test_what_was_damaged_is_done_again(stopped: Path, tmp_path: Path, text: Path) -> None:
    path = stopped / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, path)
    assert compress(MODEL, tmp_path / "cut", text, "--samples", 4, "--refit").exit_code == 0
    assert compress(MODEL, tmp_path / "whole", text, "--samples", 4, "--refit").exit_code == 0
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_another_command_does_not_go_on(stopped: Path, tmp_path: Path, text: Path) -> None:
    result = compress(MODEL, tmp_path / "cut", text, "--samples", 4, "--refit", "--fill", "mean", "--seed", 1)
    assert result.exit_code == 1
    assert "different options (fill, seed)" in result.stderr
    assert stopped.exists()


def test_another_text_does_not_go_on(stopped: Path, tmp_path: Path, text: Path) -> None:
    text.write_text(text.read_text()[1000:])
    result = compress(MODEL, tmp_path / "cut", text, "--samples", 4, "--refit")
    assert result.exit_code == 1
    assert "another calibration" in result.stderr
    assert stopped.exists()
    assert compress(MODEL, tmp_path / "cut", text, "--samples", 4, "--refit", "--force").exit_code == 0


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, text: Path) -> None:
    partial = tmp_path / "cut.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("precious")
    result = compress(MODEL, tmp_path / "cut", text, "--samples", 4)
    assert result.exit_code == 1
    assert "unfinished run" in result.stderr
    assert (partial / "mine.txt").read_text() == "precious"


def test_two_runs_do_not_write_one_folder(tmp_path: Path, text: Path) -> None:
    (tmp_path / "cut.partial").mkdir()
    with FileLock(tmp_path / "cut.partial" / "lock"):
        result = compress(MODEL, tmp_path / "cut", text, "--samples", 4)
    assert result.exit_code == 1
    assert "another run writes" in result.stderr
    assert compress(MODEL, tmp_path / "cut", text, "--samples", 4).exit_code == 0


@pytest.mark.faults
def test_killed_at_random_moments(text: Path) -> None:
    """SIGKILL, as `bench/resume.py` does it at more moments."""
    command = [sys.executable, BENCH / "resume.py", "--model", EXAMPLES / "opt-mini", "--calibration", text]
    done = subprocess.run([*command, "--kills", "2", "--samples", "4"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["same bytes"] == 2
    assert summary["source untouched"]


def test_interrupt_inside_a_finalizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python ignores what a finalizer raises, and prints it with its traceback."""

    def finalized(*args: object, **options: object) -> None:
        Interrupting()
        time.sleep(5)

    class Interrupting:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("prune_peak.inspection.inspect", finalized)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    result = run("inspect", EXAMPLES / "opt-mini")
    signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert result.stderr.startswith("Interrupted. ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("made_of_it", [KeyboardInterrupt, UnboundLocalError, PrunePeakError])
def test_interrupt_inside_a_library(made_of_it: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise made_of_it from None

    monkeypatch.setattr("prune_peak.inspection.inspect", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what runs behind it
    result = run("inspect", EXAMPLES / "opt-mini")
    signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert result.stderr.startswith("Interrupted. ")
