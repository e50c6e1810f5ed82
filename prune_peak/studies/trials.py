"""Trial, and the JSON-lines file that keeps finished trials, so that a stopped study resumes."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from ..errors import PrunePeakError, spell
from ..evaluation.quality import WindowScores
from ..io.untrusted import check_file, parse_json


@dataclass(frozen=True)
class Trial:
    """One measurement: a share of the neurons of every site of one kind, held at one fill."""

    site: str  # the kind: mlp or attention
    fill: str
    fraction: float
    seed: int


BASELINE = Trial("none", "none", 0.0, 0)  # the unchanged model: fraction 0 of every fill, site and seed


class TrialLog:
    """The finished trials of one study, one line each: `{"site", "fill", "fraction", "seed", "losses", "hits"}`.

    `losses` and `hits` are lists over windows. The first line is the fingerprint of the study: everything that decides
    a result besides the trial itself.

    Args:
        path: the file; created if it does not exist.
        fingerprint: anything that JSON holds.
        force: start over where the file belongs to another study.

    Raises:
        PrunePeakError: the file belongs to another study, or is not a trial log.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], force: bool = False) -> None:
        self.results: dict[Trial, WindowScores] = {}
        head = json.dumps(fingerprint, sort_keys=True) + "\n"
        lines = [head]
        if path.exists():
            found = _whole_lines(path)
            if found[:1] == [head]:
                lines = found
                self._read(path, found[1:])
            elif not force:
                raise PrunePeakError(
                    f"{path} belongs to another study ({_difference(found, fingerprint)}). Choose another "
                    f"{spell('output')}, or "
                    f"pass {spell('force', True)} to start over."
                )
        # A killed run may have left half a line
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(lines), encoding="utf-8")
        os.replace(partial, path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def __enter__(self) -> "TrialLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, trial: Trial, scores: WindowScores) -> None:
        """Keep a trial; it is on disk when this returns."""
        self.results[trial] = scores
        values = {"losses": scores.losses.tolist(), "hits": scores.hits.tolist()}
        self._file.write(json.dumps(asdict(trial) | values) + "\n")
        self._file.flush()

    def _read(self, path: Path, lines: list[str]) -> None:
        for line in lines:
            try:
                entry = dict(parse_json(line))
                losses, hits = (torch.tensor(entry.pop(name), dtype=torch.float64) for name in ("losses", "hits"))
                self.results[Trial(**entry)] = WindowScores(losses, hits)
            except (ValueError, KeyError, TypeError):
                raise PrunePeakError(
                    f"{path} is not a trial log: {line[:60]!r}. Pass {spell('force', True)} to replace it."
                ) from None


def _whole_lines(path: Path) -> list[str]:
    try:
        check_file(path)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise PrunePeakError(f"{path} is not a trial log ({error}). Choose another {spell('output')}.") from None
    return [line for line in lines if line.endswith("\n")]


def _difference(found: list[str], fingerprint: Mapping[str, Any]) -> str:
    """The names of the values that differ."""
    try:
        other = parse_json(found[0])
        changed = sorted(name for name in fingerprint if other.get(name) != fingerprint[name])
    except (IndexError, ValueError, AttributeError):
        changed = []
    return "other " + ", ".join(changed) if changed else "unreadable"
