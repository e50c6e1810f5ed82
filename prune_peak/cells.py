"""The cells of a study, and the file that keeps them as they come, so that a stopped study goes on where it was."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .errors import PrunePeakError
from .evaluation import Grades
from .strangers import check_file, parse_json


@dataclass(frozen=True)
class Cell:
    """One measurement: a share of the neurons of every site of one kind, held at one fill."""

    site: str  # the kind: mlp or attention
    fill: str
    fraction: float
    seed: int


INTACT = Cell("none", "none", 0.0, 0)  # the model as it is; stands for fraction 0 of every fill, site and seed


class CellFile:
    """The graded cells of one question, one line each.

    A line is `{"site", "fill", "fraction", "seed", "losses", "hits"}`, the last two window by window. The first line is
    the question: all that decides what a cell gives, beside its own four coordinates.

    Args:
        path: the file; made if it is not there.
        question: anything that JSON holds.
        force: begin anew where the file holds the answers to another question.

    Raises:
        PrunePeakError: the file is of another question, or not of this kind.
    """

    def __init__(self, path: Path, question: Mapping[str, Any], force: bool = False) -> None:
        self.graded: dict[Cell, Grades] = {}
        head = json.dumps(question, sort_keys=True) + "\n"
        lines = [head]
        if path.exists():
            found = _whole_lines(path)
            if found[:1] == [head]:
                lines = found
                self._read(path)
            elif not force:
                raise PrunePeakError(
                    f"{path} holds the cells of another question ({_difference(found, question)}). "
                    "Choose another --output, or pass --force to begin anew."
                )
        # A run that was killed may have left half a line
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(lines), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "CellFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, cell: Cell, grades: Grades) -> None:
        """Keep a cell; it is on disk when this returns."""
        self.graded[cell] = grades
        values = {"losses": grades.losses.tolist(), "hits": grades.hits.tolist()}
        self._file.write(json.dumps(asdict(cell) | values) + "\n")
        self._file.flush()

    def _read(self, path: Path) -> None:
        for line in _whole_lines(path)[1:]:
            try:
                entry = dict(parse_json(line))
                losses, hits = (torch.tensor(entry.pop(name), dtype=torch.float64) for name in ("losses", "hits"))
                self.graded[Cell(**entry)] = Grades(losses, hits)
            except (ValueError, KeyError, TypeError):
                raise PrunePeakError(
                    f"{path} is not a file of cells: {line[:60]!r}. Pass --force to replace it."
                ) from None


def _whole_lines(path: Path) -> list[str]:
    try:
        check_file(path)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise PrunePeakError(f"{path} is not a file of cells ({error}). Choose another --output.") from None
    return [line for line in lines if line.endswith("\n")]


def _difference(found: list[str], question: Mapping[str, Any]) -> str:
    """The names of what is asked otherwise."""
    try:
        other = parse_json(found[0])
        changed = sorted(name for name in question if other.get(name) != question[name])
    except (IndexError, ValueError, AttributeError):
        changed = []
    return "other " + ", ".join(changed) if changed else "unreadable"
