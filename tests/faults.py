"""One command in a process of its own, and what may befall it there.

The processes are forked from one that has imported all (multiprocessing's fork server), before which `faulty_disk.c`
was put. A fault is a function of this file and its arguments; it prepares the process, then the command runs in it.
"""

import ctypes
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LIBRARY = "LD_PRELOAD"


@dataclass(frozen=True)
class End:
    """How a command ended."""

    code: int  # negative: the signal that killed it
    stdout: str
    stderr: str
    changes: int  # of the disk, under the faulty folder
    seconds: float  # of the processor


class Server:
    """Forks processes that have imported all."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        library = scratch / "faulty_disk.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "faulty_disk.c", "-ldl"], check=True)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["faults", "warm", "prune_peak.cli"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(LIBRARY, str(library))
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            patch.setenv("TQDM_DISABLE", "1")
            patch.setenv("TOKENIZERS_PARALLELISM", "false")
            self._run([], ())  # the server takes the environment of its first process

    def close(self) -> None:
        """End the server; multiprocessing keeps one for all, which would keep the library too."""
        forkserver._forkserver._stop()  # type: ignore[attr-defined]

    def run(self, words: Sequence[object], *fault: Any) -> End:
        """One command line, with or without a fault: a function that prepares the process, and its arguments."""
        return self._run([str(word) for word in words], fault)

    def _run(self, words: list[str], fault: tuple[Any, ...]) -> End:
        names = [self.scratch / name for name in ("stdout", "stderr", "about")]
        for name in names:
            name.write_text("")
        process = self._context.Process(target=_command, args=(words, names, fault))
        process.start()
        process.join(300)
        assert process.exitcode is not None, "the command hangs"
        out, err, about = (name.read_text() for name in names)
        changes, seconds = about.split() or (0, 0)
        return End(process.exitcode, out, err, int(changes), float(seconds))


def _command(words: list[str], names: Sequence[Path], fault: tuple[Any, ...]) -> None:
    from prune_peak.cli.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
    for stream, name in ((1, names[0]), (2, names[1])):
        os.dup2(os.open(name, os.O_WRONLY), stream)
    if fault:
        fault[0](*fault[1:])
    try:
        main(words, prog_name="prune-peak")
    finally:
        with names[2].open("w") as about:
            about.write(f"{_disk().faulty_disk_seen()} {time.process_time()}")


def _disk() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ[LIBRARY])


def fail_at(folder: Path, change: int, error: int) -> None:
    """The disk refuses the n-th change under a folder, and all after it; 0 only counts them."""
    _disk().faulty_disk(str(folder).encode(), ctypes.c_long(change), error, 0)


def fail_once_at(folder: Path, change: int, error: int) -> None:
    """The disk refuses the n-th change under a folder, and no other."""
    _disk().faulty_disk(str(folder).encode(), ctypes.c_long(-change), error, 0)


def signal_at(folder: Path, change: int, sent: int) -> None:
    """A signal comes just before the n-th change under a folder."""
    _disk().faulty_disk(str(folder).encode(), ctypes.c_long(change), 0, sent)


def signal_after(seconds: float, sent: int) -> None:
    """A signal comes after so many seconds of the processor's time."""
    signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), sent))
    signal.setitimer(signal.ITIMER_PROF, max(seconds, 1e-3))


def before(step: str, do: Callable[..., None], *arguments: Any) -> None:
    """Something happens as a step begins, named "module:function" or "module:Class.method"."""
    module, _, path = step.partition(":")
    owner: Any = import_module(f"prune_peak.{module}")
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    def stepping(*args: Any, **options: Any) -> Any:
        do(*arguments)
        return function(*args, **options)

    setattr(owner, name, stepping)


def limit_memory(more: int) -> None:
    """The process may map so many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def limit_files(size: int) -> None:
    """No file may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def close_stdout() -> None:
    """Nobody reads what is printed."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)


def remove(folder: Path) -> None:
    """Somebody deletes a folder."""
    shutil.rmtree(folder)


def truncate(path: Path) -> None:
    """Somebody's download begins again."""
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    """Somebody puts another file in its place."""
    other = path.with_name("other")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    os.replace(other, path)


def begin_another(words: Sequence[str], said: Path) -> None:
    """The same command is given in another process, which is waited for."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | {LIBRARY: ""})
    said.write_text(f"{done.returncode}: {done.stderr}")


def write(path: Path) -> None:
    """Somebody makes a folder with a file in it."""
    path.parent.mkdir()
    path.write_text("precious")


def touch(path: Path) -> None:
    """Somebody writes a file anew."""
    os.utime(path)
