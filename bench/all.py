"""Every figure of docs/performance.md: `make bench`, or `python bench/all.py [NAME ...]`.

Each script runs in a process of its own, one after the other, with nothing else on the machine. What they print is
kept in `bench-output/NAME.json`, beside the machine and the versions in `bench-output/machine.json`. The model is the
random Llama of `bench/random_llama.py`, the text the help topics of Python: neither changes what is measured here.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from random_llama import write_random_llama

from prune_peak.machine import physical_memory

HERE = Path(__file__).parent
OUTPUT = Path("bench-output")
SCRIPTS = {
    "moments": "calibration.py --model {model} --what moments --samples 8",
    "compress": "calibration.py --model {model} --what compress --samples 8",
    "export": "export.py --model {model} --calibration {text}",
    "budgets": "budgets.py --model {model} --calibration {text}",
    "growth": "growth.py",
    "large": "large.py --calibration {text}",
}


def main() -> None:
    names = sys.argv[1:] or list(SCRIPTS)
    if not set(names) <= set(SCRIPTS):
        sys.exit(f"expected names of {', '.join(SCRIPTS)}")
    OUTPUT.mkdir(exist_ok=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory, GB": round(physical_memory() / 1e9, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (OUTPUT / "machine.json").write_text(json.dumps(machine, indent=2) + "\n")
    print(json.dumps(machine, indent=2), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        model, text = Path(scratch, "random-llama"), Path(scratch, "topics.txt")
        write_random_llama(model)
        text.write_text("\n\n".join(topics.values()))
        for name in names:
            script, *words = SCRIPTS[name].format(model=model, text=text).split()
            answer = subprocess.run(
                [sys.executable, HERE / script, *words], check=True, stdout=subprocess.PIPE, text=True
            )
            (OUTPUT / f"{name}.json").write_text(answer.stdout)
            print(f"{name}: {answer.stdout}", flush=True)


if __name__ == "__main__":
    main()
