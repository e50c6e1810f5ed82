"""A run's folder beside the final name: the checkpoint that grows in it, and what is done of it.

`<name>.partial` holds `checkpoint`, which becomes `<name>` by one rename when it is whole and verified; `run.json`,
what the run was asked for; and a file for every finished block, written whole or not at all after the block's tensors.
A run that was killed goes on from there when the same is asked for again.
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

from .checkpoint import load_tensors, save_tensors
from .errors import PrunePeakError, UsageError, VerificationError
from .export import RECIPE_FILE
from .planning import Decision
from .refit import Refit
from .selection import pack_plan, unpack_plan
from .strangers import check_folder, parse_json, read_json

log = logging.getLogger(__name__)

RUN_FILE, UNFINISHED, LOCK_FILE = "run.json", "run.json.new", "lock"
DONE = "done"  # the key of the metadata that tells of a finished block
DISK_MARGIN = 50_000_000  # bytes that must stay free beside the output


class Progress:
    """The partial folder of one run; within the context no other run touches it.

    A refusal removes what this run began; an interruption keeps it, and so does a disk that takes no more.

    Args:
        folder: the final name.
        question: all that the result depends on, as JSON can hold it.
        size: bytes that the checkpoint will take.
        force: replace what is there, and begin anew.

    Raises:
        PrunePeakError: the output is there already, or cannot be written, or belongs to another run.
    """

    def __init__(self, folder: Path, question: Mapping[str, Any], size: int, force: bool = False) -> None:
        self.folder = folder
        self.partial = folder.parent / f"{folder.name}.partial"
        self.checkpoint = self.partial / "checkpoint"
        self._lock = FileLock(self.partial / LOCK_FILE, timeout=0)
        self._question = json.loads(json.dumps(question))
        self._answers: dict[str, Any] = {}
        self._resumed, self._force = False, force
        if not folder.name:
            raise UsageError(f"--output {folder}: expected the name of a folder to write.")
        for path in (self.folder, self.partial):
            if os.path.islink(path) or (os.path.exists(path) and not path.is_dir()):
                raise PrunePeakError(f"{path} is a file; choose another --output.")
        if os.path.exists(folder) and not force:
            raise PrunePeakError(f"{folder} exists; pass --force to replace it, or choose another --output.")
        if os.path.exists(folder) and any(folder.iterdir()) and not (folder / RECIPE_FILE).exists():
            raise PrunePeakError(
                f"{folder} holds something else than a result of prune-peak, which --force does not replace. Choose "
                "another --output."
            )
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            if force:
                self._clear()
            self._recall()
            self._check_disk(size)
        except Timeout:
            raise PrunePeakError(f"another run is writing {folder}; let it end, or choose another --output.") from None
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
        """Go on from what an earlier run of the same question left, if one did."""
        if {path.name for path in self.partial.iterdir()} <= {LOCK_FILE, UNFINISHED}:
            self._save()
            self.checkpoint.mkdir()
            return
        try:
            run = read_json(self.partial / RUN_FILE)
            asked, self._answers = dict(run["question"]), dict(run["answers"])
        except (OSError, ValueError, KeyError, TypeError):
            asked = {}
        changed = sorted(key for key in self._question if key not in asked or asked[key] != self._question[key])
        if changed:
            raise PrunePeakError(
                f"{self.partial} was left by a run that did not end and was asked for something else "
                f"({', '.join(changed)}). Repeat that command to go on with it, or pass --force to begin anew."
            )
        self.checkpoint.mkdir(exist_ok=True)
        for folder in (self.partial, self.checkpoint):
            check_folder(folder)
        self._resumed = True
        log.warning("Going on with the run that %s is left of.", self.partial)

    def _check_disk(self, size: int) -> None:
        there = sum(path.stat().st_blocks * 512 for path in self.checkpoint.iterdir())
        free = shutil.disk_usage(self.partial).free + there
        if free < size + DISK_MARGIN:
            if not self._resumed:
                shutil.rmtree(self.partial)
            raise PrunePeakError(
                f"{self.folder.parent} has {free / 1e9:.2f} GB free; the result needs {size / 1e9:.2f} GB. "
                "Choose another --output."
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, PrunePeakError) and (not self._resumed or isinstance(error, VerificationError)):
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.release()
        if isinstance(error, OSError):
            kept = f"Whatever was finished is kept in {self.partial}: the same command goes on from there."
            rest = kept if self.partial.is_dir() else f"{self.partial} is gone, and what was done with it."
            raise PrunePeakError(f"{self.folder} could not be written ({error}). {rest}") from None

    def recall(self, name: str) -> Any:
        """What `remember` was told, by this run or the one it goes on from; None where it was not."""
        return self._answers.get(name)

    def remember(self, name: str, answer: Any) -> None:
        """Keep something that took time to find out."""
        self._answers[name] = answer
        self._save()

    def _save(self) -> None:
        unfinished = self.partial / UNFINISHED
        text = json.dumps({"question": self._question, "answers": self._answers}, indent=2)
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(self.partial / RUN_FILE)

    def insist(self, name: str, answer: Any) -> None:
        """Something that must be as it was in the run this one goes on from.

        Raises:
            PrunePeakError: it is not.
        """
        if self._answers.setdefault(name, answer) != answer:
            raise PrunePeakError(
                f"{self.partial} was left by a run over another {name}. Repeat it with that to go on, or pass --force "
                "to begin anew."
            )
        self._save()

    def note(self, block: int, decisions: Mapping[str, Decision], digests: Mapping[str, str]) -> None:
        """A block is finished: what was decided for its sites, by their names, and the digests of its tensors."""
        about = {"digests": dict(digests), "sites": {name: _tell(decision) for name, decision in decisions.items()}}
        plan = {name: decision.choice for name, decision in decisions.items()}
        save_tensors(pack_plan(plan), self._done_file(block), {DONE: json.dumps(about)})

    def recall_block(self, block: int) -> tuple[dict[str, Decision], dict[str, str]] | None:
        """What `note` was told of a block; None where it was not. The refitted readers lie in the checkpoint."""
        if not self._done_file(block).exists():
            return None
        try:
            tensors, metadata = load_tensors(self._done_file(block))
            about, plan = parse_json(metadata[DONE]), unpack_plan(tensors)
            decisions = {}
            for name, told in about["sites"].items():
                refit = None if told["refit"] is None else Refit(**told["refit"])
                decisions[name] = Decision(**told | {"choice": plan[name], "refit": refit})
            return decisions, dict(about["digests"])
        except (PrunePeakError, ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s is damaged; block %d is done again.", self._done_file(block), block)
            return None

    def _done_file(self, block: int) -> Path:
        return self.partial / f"block-{block}.safetensors"

    def finish(self) -> None:
        """Give the checkpoint its final name, once the disk holds all of it."""
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
        shutil.rmtree(self.partial, ignore_errors=True)  # the result is there; what else fails is no failure


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder: a full one may say so only now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tell(decision: Decision) -> dict[str, Any]:
    """All of a decision that is no tensor."""
    refit = None if decision.refit is None else asdict(decision.refit)
    return {**vars(decision), "refit": refit, "choice": None}
