"""The unfinished output folder, and how a killed run is resumed.

`<name>.partial` has `checkpoint`, which is renamed to `<name>` when it is complete and verified; `run.json`, the
fingerprint of the run; and a file for every finished block, written atomically after the block's tensors. The same
command resumes a killed run.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from ..errors import PrunePeakError, UsageError, VerificationError, spell
from ..io.tensor_files import load_tensors, save_tensors
from ..io.untrusted import check_folder, parse_json, read_json
from ..progress import phase
from ..sites.plan import RefitResult, SiteResult, pack_plan, unpack_plan
from .recipe import RECIPE_FILE

log = logging.getLogger(__name__)


RUN_FILE, UNFINISHED, LOCK_FILE = "run.json", "run.json.new", "lock"
DONE = "done"  # metadata key of a finished block
DISK_MARGIN = 50_000_000  # bytes that must stay free besides the output


class ResumableRun:
    """The partial folder of one run; within the context no other run uses it.

    A refusal removes it, unless the run was resumed. An interruption or a full disk keeps it.

    Args:
        folder: the final name.
        fingerprint: everything that the result depends on, as JSON.
        size: bytes of the checkpoint.
        force: replace an existing output, and start over.

    Raises:
        PrunePeakError: the output exists, cannot be written, or belongs to another run.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], size: int, force: bool = False) -> None:
        self.folder = folder
        self.partial = folder.parent / f"{folder.name}.partial"
        self.checkpoint = self.partial / "checkpoint"
        self._lock = FileLock(self.partial / LOCK_FILE, timeout=0)
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._found: dict[str, Any] = {}
        self._resumed, self._force = False, force
        if not folder.name:
            raise UsageError(f"{spell('output', folder)}: expected the name of a folder to write.")
        for path in (self.folder, self.partial):
            if os.path.islink(path) or (os.path.exists(path) and not path.is_dir()):
                raise PrunePeakError(f"{path} is a file; choose another {spell('output')}.")
        is_empty = os.path.isdir(folder) and not any(folder.iterdir())
        if os.path.exists(folder) and not is_empty and not force:
            raise PrunePeakError(
                f"{folder} exists; pass {spell('force', True)} to replace it, or choose another {spell('output')}."
            )
        if os.path.exists(folder) and not is_empty and not (folder / RECIPE_FILE).exists():
            raise PrunePeakError(
                f"{folder} is not an output folder of prune-peak, so {spell('force', True)} does not replace it. "
                f"Choose another {spell('output')}."
            )
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            if force:
                self._clear()
            self._recall()
            self._check_disk(size)
        except Timeout:
            raise PrunePeakError(
                f"another run writes {folder}; wait for it, or choose another {spell('output')}."
            ) from None
        except OSError as error:
            self._lock.release()
            raise PrunePeakError(f"{self.partial} cannot be written ({error.strerror}).") from None
        except BaseException:
            self._lock.release()
            raise

    def _clear(self) -> None:
        for path in self.partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()

    def _recall(self) -> None:
        """Resume an unfinished run with the same fingerprint, if there is one."""
        if {path.name for path in self.partial.iterdir()} <= {LOCK_FILE, UNFINISHED}:
            self._save()
            self.checkpoint.mkdir()
            return
        try:
            run = read_json(self.partial / RUN_FILE)
            asked, self._found = dict(run["fingerprint"]), dict(run["found"])
        except (OSError, ValueError, KeyError, TypeError):
            asked = {}
        changed = sorted(key for key in self._fingerprint if key not in asked or asked[key] != self._fingerprint[key])
        if changed:
            raise PrunePeakError(
                f"{self.partial} belongs to an unfinished run with different options ({', '.join(changed)}). Rerun "
                f"that command to resume it, or pass {spell('force', True)} to start over."
            )
        self.checkpoint.mkdir(exist_ok=True)
        for folder in (self.partial, self.checkpoint):
            check_folder(folder)
        self._resumed = True
        log.warning("Resuming the unfinished run in %s.", self.partial)

    def _check_disk(self, size: int) -> None:
        there = sum(path.stat().st_blocks * 512 for path in self.checkpoint.iterdir())
        free = shutil.disk_usage(self.partial).free + there
        if free < size + DISK_MARGIN:
            if not self._resumed:
                shutil.rmtree(self.partial)
            raise PrunePeakError(
                f"{self.folder.parent} has {free / 1e9:.2f} GB free; the output needs {size / 1e9:.2f} GB. "
                f"Choose another {spell('output')}."
            )

    def __enter__(self) -> "ResumableRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, PrunePeakError) and (not self._resumed or isinstance(error, VerificationError)):
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.release()
        if isinstance(error, OSError):
            kept = f"Finished work is kept in {self.partial}; the same command resumes."
            rest = kept if self.partial.is_dir() else f"{self.partial} was removed, and the finished work with it."
            raise PrunePeakError(f"{self.folder} could not be written ({error}). {rest}") from None

    def lookup(self, name: str) -> Any:
        """A value stored by this run or the one it resumes; None if there is none."""
        return self._found.get(name)

    def store(self, name: str, answer: Any) -> None:
        """Keep a value that took time to compute."""
        self._found[name] = answer
        self._save()

    def _save(self) -> None:
        unfinished = self.partial / UNFINISHED
        text = json.dumps({"fingerprint": self._fingerprint, "found": self._found}, indent=2)
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(self.partial / RUN_FILE)

    def require_unchanged(self, name: str, answer: Any) -> None:
        """Check a value against the run that this one resumes.

        Raises:
            PrunePeakError: it differs.
        """
        if self._found.setdefault(name, answer) != answer:
            raise PrunePeakError(
                f"{self.partial} belongs to an unfinished run with another {name}. Rerun it with that one to resume, "
                f"or pass {spell('force', True)} to start over."
            )
        self._save()

    def save_block(self, block: int, results: Mapping[str, SiteResult], digests: Mapping[str, str]) -> None:
        """Keep a finished block: the results of its sites, by name, and the digests of its tensors."""
        content = {"digests": dict(digests), "sites": {name: _describe(result) for name, result in results.items()}}
        plan = {name: result.plan for name, result in results.items()}
        save_tensors(pack_plan(plan), self._done_file(block), {DONE: json.dumps(content)})

    def load_block(self, block: int) -> tuple[dict[str, SiteResult], dict[str, str]] | None:
        """A block kept by `save_block`; None if there is none. The refitted weights are in the checkpoint."""
        if not self._done_file(block).exists():
            return None
        try:
            tensors, metadata = load_tensors(self._done_file(block))
            content, plan = parse_json(metadata[DONE]), unpack_plan(tensors)
            results = {}
            for name, entry in content["sites"].items():
                refit = None if entry["refit"] is None else RefitResult(**entry["refit"])
                results[name] = SiteResult(**entry | {"plan": plan[name], "refit": refit})
            return results, dict(content["digests"])
        except (PrunePeakError, ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s is damaged; block %d is pruned again.", self._done_file(block), block)
            return None

    def _done_file(self, block: int) -> Path:
        return self.partial / f"block-{block}.safetensors"

    def finish(self) -> None:
        """Rename the checkpoint to its final name, after all files are on disk."""
        with phase("flush to the disk"):
            for path in (*self.checkpoint.rglob("*"), self.checkpoint):
                _sync(path)
        replaced = self.partial / "replaced"
        if self._force and self.folder.exists():
            os.replace(self.folder, replaced)
        try:
            os.replace(self.checkpoint, self.folder)
        except OSError:
            if replaced.exists():
                os.replace(replaced, self.folder)
            raise
        shutil.rmtree(self.partial, ignore_errors=True)  # the output is complete; a failure here does not matter


def _sync(path: Path) -> None:
    """Flush a file or folder to disk; a full disk may report its error only now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _describe(result: SiteResult) -> dict[str, Any]:
    """The parts of a result that are not tensors."""
    refit = None if result.refit is None else asdict(result.refit)
    return {**vars(result), "refit": refit, "plan": None}
