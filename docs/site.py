"""Hooks of mkdocs.yml: pages of the files above docs, and links that work on GitHub and on the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links and pictures as they lie on the site; a picture for each palette, which a reader can switch."""
    themed = r"<picture>.*?<img alt=(\".*?\") src=\"(.*?)-light\.svg\">\s*</picture>"
    both = r'<img alt=\1 src="\2-light.svg#only-light"><img alt=\1 src="\2-dark.svg#only-dark">'
    markdown = re.sub(themed, both, markdown, flags=re.DOTALL)
    markdown = re.sub(r"(\]\(|src=\")(?:docs|\.\.)/", r"\1", markdown)
    for source, page in PAGES.items():
        markdown = markdown.replace(f"]({source}", f"]({page}")
    return markdown
