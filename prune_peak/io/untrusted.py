"""Safe access to untrusted files: no links out of the folder, no pipes or devices, bounded size."""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import PrunePeakError, brief

LONGEST = 128 * 2**20  # bytes of a JSON file; configs, indices and tokenizers are far smaller
TEMPLATES = "additional_chat_templates"  # the only subfolder that transformers reads
MODULES = "modules.json"  # of sentence-transformers: names folders, such as 1_Pooling


def check_folder(folder: Path) -> None:
    """Refuse links out of a folder, pipes and devices; in the Hub's cache, links to the blobs are allowed.

    Raises:
        PrunePeakError: the folder contains one of them.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    others = [TEMPLATES, *find_modules(folder)]
    for path in (*folder.iterdir(), *(path for other in others for path in (folder / other).rglob("*"))):
        try:
            inside = path.resolve().is_relative_to(root)
        except (OSError, RuntimeError):  # circular links
            inside = False
        if not inside:
            raise PrunePeakError(
                f"{path} is a link out of its folder, which is not followed. Replace it with a copy of the file."
            )
        if not path.is_file() and not path.is_dir():
            raise PrunePeakError(f"{path} is neither a file nor a folder and was not opened. Remove it.")


def find_modules(folder: Path) -> list[str]:
    """The subfolders that `modules.json` names; none without that file.

    Raises:
        PrunePeakError: the file is damaged, or names anything but folders beside it.
    """
    names = [str(module["path"]) for module in _read_modules(folder)]
    for name in names:
        if name and (name == ".." or "\\" in name or Path(name).name != name):
            raise PrunePeakError(
                f"{folder / MODULES} names the folder {name!r}; expected one beside it. Correct the file."
            )
    return [name for name in names if name]  # the model itself has an empty path


def module_classes(folder: Path) -> list[str]:
    """The classes that `modules.json` names, such as `sentence_transformers.models.Pooling`.

    Raises:
        PrunePeakError: the file is damaged.
    """
    return [str(module["type"]) for module in _read_modules(folder) if "type" in module]


def _read_modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / MODULES
    try:
        return [{"path": module["path"], **module} for module in read_json(path)] if os.path.lexists(path) else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PrunePeakError(
            f"{path} is not a list of modules of sentence-transformers ({brief(error)}). Correct it, or remove it."
        ) from None


def check_file(path: Path) -> None:
    """Refuse pipes, devices and folders, which would block or never end.

    Raises:
        OSError: the path exists and is not a file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("not a file")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        OSError: the file does not exist or is not a regular file.
        ValueError: the content is not JSON or is too large.
    """
    check_file(path)
    if path.stat().st_size > LONGEST:
        raise ValueError(f"more than {LONGEST:,} bytes")
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """`json.loads` that raises ValueError for content that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
