"""`export_model()`: a folder as one file of another format. A format is one module with `export(folder, file)`."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import PrunePeakError, UsageError, spell
from ..option_fields import takes
from ..options import FORMATS, ExportOptions


@takes(ExportOptions)
def export_model(folder: str | Path, file: str | Path, **options: Any) -> Path:
    """Write a stock checkpoint as one file of another format.

    Args:
        folder: what `compress` wrote, or any checkpoint that the format can hold.
        file: the file to write.
        {options}

    Raises:
        UsageError: the file is a folder, or the format is unknown.
        PrunePeakError: the file exists, the model or its tokenizer does not fit the format, or an extra is missing.

    Example:
        >>> export_model("SmolLM2-135M-peak-0.3", "small.gguf", format="gguf")    # doctest: +SKIP
    """
    given, path = ExportOptions(**options), Path(file)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; expected a file to write.")
    if os.path.exists(path) and not given.force:
        raise PrunePeakError(f"{path} exists; pass {spell('force', True)} to replace it, or choose another name.")
    partial = path.with_name(path.name + ".partial")
    try:
        import_module(FORMATS[given.format]).export(Path(folder), partial)
        partial.replace(path)
    except OSError as error:
        raise PrunePeakError(f"{path} could not be written ({error}).") from None
    finally:
        partial.unlink(missing_ok=True)
    return path
