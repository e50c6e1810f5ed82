"""A report as one HTML file: it opens offline, asks for nothing outside itself, and fits a phone."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

# The policy makes a browser refuse whatever would leave the file
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; padding: 1rem;
  max-width: 60rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.scroll {{ overflow-x: auto; max-height: 60rem; }}
img {{ width: 100%; min-width: 38rem; height: auto; }}
table {{ border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.2rem 0.5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }}
th {{ position: sticky; top: 0; background: #f3f3f3; }}
.text {{ text-align: left; }}
</style>
</head>
<body>
<h1>{title}</h1>
"""


@dataclass(frozen=True)
class Section:
    """A heading, a few words, and a picture or a table."""

    title: str
    words: str
    picture: Path | None = None  # a PNG, which goes into the file
    rows: Sequence[Mapping[str, Any]] = ()


def write_report(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write sections as one self-contained page."""
    parts = [HEAD.format(title=escape(title))]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>\n<p>{escape(section.words)}</p>\n")
        if section.picture is not None:
            data = base64.b64encode(section.picture.read_bytes()).decode()
            image = f'<img alt="{escape(section.words)}" src="data:image/png;base64,{data}">'
            parts.append(f'<div class="scroll" tabindex="0">{image}</div>\n')
        if section.rows:
            parts.append(_table(section.rows))
    parts.append("</body>\n</html>\n")
    path.write_text("".join(parts), encoding="utf-8")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th{_side(value)}>{escape(name)}</th>" for name, value in rows[0].items())
    lines = ["".join(f"<td{_side(value)}>{_cell(value)}</td>" for value in row.values()) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll" tabindex="0"><table>\n<tr>{head}</tr>\n{body}\n</table></div>\n'


def _side(value: Any) -> str:
    return ' class="text"' if isinstance(value, str) else ""


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else escape(str(value))
