"""Tables on disk: the same rows as CSV and as JSON."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `<path>.csv` and `<path>.json`; the keys of the first row are the columns, None an empty field.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "table"
        >>> write_table(path, [{"site": "mlp", "stderr": None}])
        >>> path.with_suffix(".csv").read_text().split()
        ['site,stderr', 'mlp,']
    """
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")
