"""Headless Chromium, which shows a page and asks nobody else for anything."""

import os
import shutil
import subprocess
from pathlib import Path

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
