"""Folders and small files of strangers: nothing here leads out of a folder, waits for a pipe, or fills the memory."""

import json
import os
from pathlib import Path
from typing import Any

from .errors import PrunePeakError

LONGEST = 128 * 2**20  # bytes of a JSON file; far more than a config, an index or a tokenizer takes
TEMPLATES = "additional_chat_templates"  # the one folder below a model's that transformers reads


def check_folder(folder: Path) -> None:
    """See that all of a folder lies in it, and can be read to its end; the Hub's cache links to blobs beside snapshots.

    Raises:
        PrunePeakError: a link out of the folder, a pipe or a device.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    for path in (*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")):
        try:
            inside = path.resolve().is_relative_to(root)
        except (OSError, RuntimeError):  # links in a circle
            inside = False
        if not inside:
            raise PrunePeakError(f"{path} is a link out of its folder, which is not followed. Copy the file instead.")
        if not path.is_file() and not path.is_dir():
            raise PrunePeakError(f"{path} is neither a file nor a folder, so it is not opened. Take it away.")


def check_file(path: Path) -> None:
    """See that whoever opens a file does not wait for a pipe, or read a device without end.

    Raises:
        OSError: there is something, and it is no file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("not a file")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: there is no such file, or it is none that has an end.
        ValueError: it holds something else, or too much.
    """
    check_file(path)
    if path.stat().st_size > LONGEST:
        raise ValueError(f"more than {LONGEST:,} bytes")
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """`json.loads`, for which brackets in brackets without end are a ValueError too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets in brackets without end") from None
