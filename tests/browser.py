"""Headless Chromium, which shows a page and asks nobody else for anything."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars")
ALONE = ("--disable-background-networking", "--disable-component-update", "--disable-sync")


def dump(page: Path, width: int = 1100) -> str:
    """The page as HTML, after it was loaded in a window of this width."""
    assert CHROMIUM is not None
    profile = page.parent / "profile"
    words = [*FLAGS, *ALONE, f"--user-data-dir={profile}", f"--window-size={width},900", "--dump-dom", page.as_uri()]
    environment = os.environ | {"HOME": str(page.parent)}
    done = subprocess.run([CHROMIUM, *words], capture_output=True, text=True, timeout=240, check=True, env=environment)
    return done.stdout


PROBE = """<script>
addEventListener("error", event => document.title = "failed", true);
addEventListener("securitypolicyviolation", () => document.title = "left");
addEventListener("load", () => {
  const pictures = [...document.images].filter(image => image.complete && image.naturalWidth > 300).length;
  const entries = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length;
  const wide = document.documentElement.scrollWidth - innerWidth;
  document.body.dataset.seen = JSON.stringify({pictures, entries, wide, title: document.title, width: innerWidth});
});
</script>"""


def look(page: Path, width: int) -> dict[str, Any]:
    """Pictures and requests of a report, and by how much it is wider than the window.

    The probe is a script, which the report's own policy would refuse.
    """
    probed = page.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    copy = page.with_name("probed.html")
    copy.write_text(probed.replace("<head>", "<head>" + PROBE))
    match = re.search(r'data-seen="([^"]*)"', dump(copy, width))
    assert match
    found: dict[str, Any] = json.loads(match.group(1).replace("&quot;", '"'))
    return found
