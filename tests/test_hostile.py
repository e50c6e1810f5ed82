"""The corpus of `hostile.py`: every input is refused in one line, and nothing else happens."""

import hashlib
import os
import pickle
import resource
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hostile
import pytest
from click.testing import CliRunner
from hostile import CANARY, KINDS, OPTIONS
from valid import make_all

from prune_peak.cli.main import main

MEMORY = 2**30  # bytes that a refusal may take on top of what the process has
SECONDS = 30

CASES = {
    **{f"{kind}: {name}": (kind, name) for kind, row in KINDS.items() for name in row.cases},
    **{f"options: {name}": ("options", name) for name in OPTIONS},
}


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_all(tmp_path_factory.mktemp("valid"))


def prepare(case: str, valid: Path, folder: Path) -> tuple[list[str], str, int]:
    """Lay a damaged copy into a folder; the command, the words of the error, and the exit code."""
    kind, name = CASES[case]
    if kind == "options":
        needs, (command, words, code) = ("model", "vit", "text.txt", "text.jsonl", "images"), OPTIONS[name]
    else:
        row = KINDS[kind]
        needs, command, code = row.needs, row.command, row.code
        damage, words = row.cases[name]
    for need in needs:
        path = valid / need
        shutil.copytree(path, folder / need) if path.is_dir() else shutil.copy(path, folder / need)
    if kind != "options":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd tensors
            damage(folder)
    return [word.replace("{}", str(folder)) for word in command], words, code


def digests(folder: Path) -> dict[str, str]:
    """All that lies in a folder: kinds, links as they are, and bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        told = os.readlink(path) if path.is_symlink() else ""
        if stat.S_ISREG(status.st_mode):
            told = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = f"{stat.S_IFMT(status.st_mode)} {told}"
    return found


@contextmanager
def bounded() -> Iterator[None]:
    """Little memory and little time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def check_told(stderr: str, words: str, code: int) -> None:
    """One line of printable characters that names the problem (click puts the usage before it)."""
    lines = [line for line in stderr.split("\n") if "\r" not in line]  # without progress bars: -q is too late for them
    assert lines.pop() == ""
    assert lines[-1].startswith("Error: "), stderr
    assert words in lines[-1], stderr
    assert "Traceback" not in stderr
    assert all(line.isprintable() for line in lines), stderr
    assert len(lines) == 1 or code == 2, stderr


# A third of the cases by default, all with `make real`
SOME = [pytest.param(case, marks=[pytest.mark.real] * (number % 3 > 0)) for number, case in enumerate(CASES)]


@pytest.mark.parametrize("case", SOME)
def test_refused_in_one_line(case: str, valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    monkeypatch.setenv(CANARY, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command, words, code = prepare(case, valid, folder)
    before = digests(tmp_path)
    with bounded():
        result = CliRunner().invoke(main, command)
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    check_told(result.stderr, words, code)
    assert digests(tmp_path) == before


AS_COMMANDS = [
    "config: custom class",
    "config: vocabulary 10^9",
    "header: of 2^60 bytes",
    "header: pipe",
    "bin: a payload",
    "bin: a zip bomb",
    "images: a bomb of 50000 x 50000",
    "stats: pipe",
    "plan: prune_peak.json nested too deeply",
    "options: ratio with escapes",
    "options: bytes infinite",
    "options: command unknown",
]
ADDRESS_SPACE = 3 * 2**30  # bytes; importing torch and transformers takes one


@pytest.mark.real
@pytest.mark.parametrize("case", AS_COMMANDS)
def test_refused_as_a_command(case: str, valid: Path, tmp_path: Path) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    command, words, code = prepare(case, valid, folder)
    before = digests(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "prune_peak", *command],
        cwd=folder,
        env=os.environ | {CANARY: str(tmp_path), "PYTHONPATH": str(Path(hostile.__file__).parent.parent)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    check_told(done.stderr, words, code)
    assert digests(tmp_path) == before


def test_a_payload_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The canary sings: what `Payload` is there to do happens where something unpickles it."""
    monkeypatch.setenv(CANARY, str(tmp_path))
    pickle.loads(pickle.dumps(hostile.Payload())).close()
    assert (tmp_path / CANARY).exists()


def test_there_are_many() -> None:
    assert len(CASES) >= 150
