"""Tables as CSV and JSON, and reports as one HTML page that opens offline and makes no request."""

import base64
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

# The content security policy makes a browser refuse every request
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; padding: 1rem;
  max-width: 60rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; max-height: 60rem; }
img { width: 100%; min-width: 38rem; height: auto; }
table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th { position: sticky; top: 0; background: #f3f3f3; }
.text { text-align: left; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<h2>{{ section.title }}</h2>
<p>{{ section.words }}</p>
{% if section.picture %}
<div class="scroll" tabindex="0"><img alt="{{ section.words }}" src="data:image/png;base64,{{ section.data }}"></div>
{% endif %}
{% if section.rows %}
<div class="scroll" tabindex="0"><table>
<tr>
{% for name, value in section.rows[0].items() %}<th{% if value is string %} class="text"{% endif %}>{{ name }}</th>
{% endfor %}</tr>
{% for row in section.rows %}
<tr>
{% for value in row.values() %}<td{% if value is string %} class="text"{% endif %}>{{ value | cell }}</td>
{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A heading, a few words, and a picture or a table."""

    title: str
    words: str
    picture: Path | None = None  # a PNG, which is embedded
    rows: Sequence[Mapping[str, Any]] = ()

    @property
    def data(self) -> str:
        """The picture in base64."""
        return "" if self.picture is None else base64.b64encode(self.picture.read_bytes()).decode()


def write_report(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write sections as one self-contained page."""
    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = _cell
    path.write_text(environment.from_string(PAGE).render(title=title, sections=sections), encoding="utf-8")


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
