"""Tables as CSV and JSON, and reports as one HTML page that opens offline and makes no request.

The template is report.html. Its content security policy makes a browser refuse every request.
"""

import base64
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from .version import __version__


@dataclass(frozen=True)
class Section:
    """A heading, a few words, and a picture or a table."""

    title: str
    words: str
    picture: Path | None = None  # a PNG, which is embedded
    rows: Sequence[Mapping[str, Any]] = ()
    prose: bool = False  # whether the table holds texts, whose lines are broken

    @property
    def data(self) -> str:
        """The picture in base64."""
        return "" if self.picture is None else base64.b64encode(self.picture.read_bytes()).decode()


def write_report(path: Path, title: str, conclusion: str, sections: Sequence[Section], command: str) -> None:
    """Write one self-contained page.

    Args:
        path: the file to write.
        title: the heading.
        conclusion: one sentence, on top.
        sections: what follows.
        command: the command that made it, at the bottom.
    """
    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = _cell
    template = environment.from_string(resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    page = template.render(title=title, conclusion=conclusion, sections=sections, command=command, version=__version__)
    path.write_text(page, encoding="utf-8")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `<path>.csv` and `<path>.json`; the keys of the first row are the columns, None is an empty field.

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
