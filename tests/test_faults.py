"""Whatever befalls a `compress`, no folder under the final name is half a model, and the source stays as it was.

`pytest -m faults`; each fault happens in a process of its own (`faults.py`), on a trained model.
"""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faults
import pytest
from conftest import EXAMPLES
from faults import End, Server

from prune_peak.verification import verify

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for faulty_disk.c"),
]
MODEL = EXAMPLES / "llama-mini"
WORDS = ("--ratio", 0.3, "--samples", 4, "--sequence-length", 64, "-q")
RESUMES = "the same command resumes"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@dataclass(frozen=True)
class Bench:
    """A source, the command that cuts it, and what that gives and takes undisturbed."""

    server: Server
    source: Path
    command: tuple[object, ...]
    expected: dict[str, str]
    whole: End

    def run(self, output: Path, *fault: Any) -> End:
        end = self.server.run([*self.command, "--output", output], *fault)
        assert not output.exists() or verify(output).passed
        assert "Traceback" not in end.stderr
        return end

    def change(self, share: float) -> int:
        """The disk's change that comes after a share of all."""
        return 1 + round(share * (self.whole.changes - 1))

    def check_source(self) -> None:
        assert digests(self.source) == digests(MODEL)

    def check_kept(self, output: Path) -> None:
        """What was done is there, and the same command ends with the bytes of an undisturbed run."""
        assert not output.exists()
        assert partial(output).is_dir()
        self.check_resumes(output)

    def check_resumes(self, output: Path) -> None:
        end = self.run(output)
        assert end.code == 0, end.stderr
        assert digests(output) == self.expected
        assert not partial(output).exists()
        self.check_source()


def partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    from pydoc_data.topics import topics

    scratch = tmp_path_factory.mktemp("bench")
    text = scratch / "text.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics))[:60_000])
    shutil.copytree(MODEL, scratch / "source")
    server = Server(scratch)
    command = ("compress", "--model", scratch / "source", "--calibration", text, *WORDS)
    output = scratch / "undisturbed"
    whole = server.run([*command, "--output", output], faults.fail_at, output, 0, 0)
    assert whole.code == 0, whole.stderr
    yield Bench(server, scratch / "source", command, digests(output), whole)
    server.close()


SHARES = [number / 23 for number in range(24)]


@pytest.mark.parametrize("share", SHARES, ids=lambda share: f"{share:.0%}")
def test_disk_full_at(share: float, bench: Bench, tmp_path: Path) -> None:
    """Every write, and every other change, is refused from some on: the first, the last, and those between."""
    output = tmp_path / "cut"
    end = bench.run(output, faults.fail_at, output, bench.change(share), errno.ENOSPC)
    assert end.code == 1
    assert end.stderr.startswith("Error: ")
    assert end.stderr.count("\n") == 1
    assert "No space left on device" in end.stderr
    if partial(output).exists():
        bench.check_kept(output)
    else:
        assert share == 0  # not even the partial folder could be made


@pytest.mark.parametrize("size", [500, 30_000, 2_000_000])
def test_a_real_limit_to_files(size: int, bench: Bench, tmp_path: Path) -> None:
    end = bench.run(tmp_path / "cut", faults.limit_files, size)
    assert end.code == 1
    assert "File too large" in end.stderr
    bench.check_kept(tmp_path / "cut")


def test_a_read_only_folder(bench: Bench, tmp_path: Path) -> None:
    output = tmp_path / "cut"
    end = bench.run(output, faults.fail_at, output, 1, errno.EROFS)
    assert end.code == 1
    assert end.stderr == f"Error: {partial(output)} cannot be written (Read-only file system).\n"
    assert not any(tmp_path.iterdir())
    bench.check_source()


STEPS = [
    "job:open_model",
    "job:find_sites",
    "export.resume:ResumableRun._recall",
    "job:measure",
    "stats.calibration:collect_together",
    "compression:plan_site",
    "export.folder:FolderWriter.write_block",
    "export.resume:ResumableRun.save_block",
    "export.folder:FolderWriter.finish",
    "compression:measure_quality",
    "compression:verify",
    "compression:write_card",
    "export.resume:ResumableRun.finish",
]


@pytest.mark.parametrize("step", STEPS)
def test_interrupted_before(step: str, bench: Bench, tmp_path: Path) -> None:
    end = bench.run(tmp_path / "cut", faults.before, step, signal.raise_signal, signal.SIGINT)
    assert end.code == 130
    assert RESUMES in end.stderr
    assert end.stderr.count("\n") == 1
    assert partial(tmp_path / "cut").exists() == (STEPS.index(step) > 1)
    bench.check_resumes(tmp_path / "cut")


@pytest.mark.parametrize("share", [0.05, 0.15, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9], ids=lambda share: f"{share:.0%}")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_stopped_after(share: float, sent: int, bench: Bench, tmp_path: Path) -> None:
    """After some share of the processor's time, wherever that is; sooner, where the run was faster than the first."""
    seconds = share * bench.whole.seconds
    while (end := bench.run(tmp_path / "cut", faults.signal_after, seconds, sent)).code == 0:
        shutil.rmtree(tmp_path / "cut")
        seconds *= 0.8
    assert end.code == (130 if sent == signal.SIGINT else -sent)
    if sent == signal.SIGINT:
        assert RESUMES in end.stderr
    bench.check_resumes(tmp_path / "cut")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0], ids=lambda share: f"{share:.0%}")
def test_killed_between_two_changes_of_the_disk(share: float, bench: Bench, tmp_path: Path) -> None:
    output = tmp_path / "cut"
    end = bench.run(output, faults.signal_at, output, bench.change(share), signal.SIGKILL)
    assert end.code == -signal.SIGKILL
    bench.check_resumes(output)


@pytest.mark.parametrize("more", [1 << 18, 1 << 19, 1 << 20], ids=lambda more: f"{more >> 10}KiB")
def test_too_little_memory(more: int, bench: Bench, tmp_path: Path) -> None:
    end = bench.run(tmp_path / "cut", faults.limit_memory, more)
    assert end.code == 1
    assert end.stderr.startswith("Error: not enough memory. ")
    assert end.stderr.count("\n") == 1
    bench.check_resumes(tmp_path / "cut")


@pytest.mark.parametrize(
    "step",
    [
        "export.folder:FolderWriter.write_block",
        "export.resume:ResumableRun.save_block",
        "export.resume:ResumableRun.finish",
    ],
)
def test_the_folder_vanishes(step: str, bench: Bench, tmp_path: Path) -> None:
    output = tmp_path / "cut"
    end = bench.run(output, faults.before, step, faults.remove, partial(output))
    assert end.code == 1
    assert f"{partial(output)} was removed" in end.stderr
    assert not any(tmp_path.iterdir())
    bench.check_resumes(output)


@pytest.mark.parametrize(
    "step", ["compression:plan_site", "export.resume:ResumableRun.save_block", "compression:verify"]
)
@pytest.mark.parametrize("change", [faults.replace, faults.truncate, faults.touch], ids=lambda change: change.__name__)
def test_a_shard_is_changed_while_it_is_read(change: Any, step: str, bench: Bench, tmp_path: Path) -> None:
    """Nothing is made of half one file and half another."""
    shutil.copytree(MODEL, tmp_path / "source")
    shard = tmp_path / "source" / "model.safetensors"
    words = [*bench.command, "--output", tmp_path / "cut", "--model", tmp_path / "source"]
    end = bench.server.run(words, faults.before, step, change, shard)
    assert end.code == 1
    assert end.stderr.startswith(f"Error: {shard} was changed while it was read")
    assert end.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_another_run_writes_the_same_folder(bench: Bench, tmp_path: Path) -> None:
    """It is begun while the first is in the midst of it, and refused; the first comes to its end."""
    output = tmp_path / "cut"
    words = [sys.executable, "-m", "prune_peak", *map(str, bench.command), "--output", str(output)]
    end = bench.run(
        output, faults.before, "compression:measure_quality", faults.begin_another, words, tmp_path / "said"
    )
    assert end.code == 0, end.stderr
    assert (tmp_path / "said").read_text() == (
        f"1: Error: another run writes {output}; wait for it, or choose another --output.\n"
    )
    assert digests(output) == bench.expected
    bench.check_source()


def test_a_folder_that_comes_up_meanwhile_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    output = tmp_path / "cut"
    end = bench.server.run(
        [*bench.command, "--output", output], faults.before, "compression:write_card", faults.write, output / "mine.txt"
    )
    assert end.code == 1
    assert RESUMES in end.stderr
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    shutil.rmtree(output)
    bench.check_kept(output)


def test_failed_replacement_keeps_the_old_folder(bench: Bench, tmp_path: Path) -> None:
    """The last change of all, the rename, is refused."""
    output = tmp_path / "cut"
    assert bench.run(output).code == 0
    shutil.copytree(output, tmp_path / "before")
    count = bench.server.run([*bench.command, "--output", output, "--force"], faults.fail_at, output, 0, 0).changes
    end = bench.server.run(
        [*bench.command, "--output", output, "--force", "--seed", 1], faults.fail_once_at, output, count, errno.EIO
    )
    assert end.code == 1, end
    assert digests(output) == digests(tmp_path / "before")
    assert bench.run(output, faults.fail_at, output, 0, 0).code == 1  # without --force: it exists


@pytest.mark.parametrize("words", [["inspect", MODEL], ["inspect", MODEL, "--json"]], ids=["table", "json"])
def test_closed_stdout(words: list[object], bench: Bench) -> None:
    """As `| head` leaves it: no traceback and no talk."""
    end = bench.server.run(words, faults.close_stdout)
    assert end.code == 1
    assert end.stderr == ""


def test_closed_stdout_of_compress(bench: Bench, tmp_path: Path) -> None:
    end = bench.run(tmp_path / "cut", faults.close_stdout)
    assert end.stderr == ""
    assert digests(tmp_path / "cut") == bench.expected


def test_the_real_command_under_ulimit(bench: Bench, tmp_path: Path) -> None:
    """`ulimit -v`, as a shell sets it, low enough that torch itself does not fit."""
    words = " ".join(map(str, bench.command))
    command = f"ulimit -v 400000; {sys.executable} -m prune_peak {words} --output {tmp_path / 'cut'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: not enough memory"), done.stderr
    assert not any(tmp_path.iterdir())
