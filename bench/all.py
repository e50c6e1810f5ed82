"""The costs that docs/performance.md tells: `make bench`, or `python bench/all.py [NAME ...]`.

Each script runs in a process of its own, one after the other, with nothing else on the machine. What they print is
kept in `bench-output/NAME.json`, beside the machine and the versions in `bench-output/machine.json`. The models are
SmolLM2 (`bench/smollm2.py`, which fetches a package), a random Llama of 1.3 billion parameters and an example, the text
the help topics of Python: none of it changes what is measured here. What a cut and more calibration buy is measured
apart, on a text (`prune-peak evaluate --latency`, `bench/curve.py`).
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
from smollm2 import write_smollm2

from prune_peak.memory import physical_memory

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "opt-mini"
OUTPUT = Path("bench-output")
SCRIPTS = {
    "moments": "calibration.py --model {smollm2} --what moments",
    "moments-large": "calibration.py --model {random} --what moments --samples 16 --pairs 2",
    "compress": "calibration.py --model {smollm2} --what compress",
    "export": "export.py --model {random} --calibration {text}",
    "budgets": "budgets.py --model {random} --calibration {text} --samples 4 --budgets 1.5GB 1.7GB 2GB",
    "ranks": "ranks.py --model {smollm2} --calibration {text}",
    "kills": "resume.py --model {example} --calibration {text}",
    "reproduction": "reproduction.py --model {smollm2} --calibration {text} -- --samples 16",
    "growth": "growth.py",
    "large": "large.py --calibration {text}",
}


def main() -> None:
    names = sys.argv[1:] or list(SCRIPTS)
    if not set(names) <= set(SCRIPTS):
        sys.exit(f"expected names of {', '.join(SCRIPTS)}")
    OUTPUT.mkdir(exist_ok=True)
    execution = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory, GB": round(physical_memory() / 1e9, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (OUTPUT / "machine.json").write_text(json.dumps(execution, indent=2) + "\n")
    print(json.dumps(execution, indent=2), flush=True)
    wanted = " ".join(SCRIPTS[name] for name in names)
    with tempfile.TemporaryDirectory() as scratch:
        places = {name: Path(scratch, name) for name in ("smollm2", "random")}
        places |= {"text": Path(scratch, "text.txt"), "example": EXAMPLE}
        places["text"].write_text("\n\n".join(topics.values()))
        if "{smollm2}" in wanted:
            write_smollm2(places["smollm2"])
        if "{random}" in wanted:
            write_random_llama(places["random"])
        for name in names:
            script, *words = SCRIPTS[name].format(**places).split()
            answer = subprocess.run(
                [sys.executable, HERE / script, *words], check=True, stdout=subprocess.PIPE, text=True
            )
            (OUTPUT / f"{name}.json").write_text(answer.stdout)
            print(f"{name}: {answer.stdout}", flush=True)


if __name__ == "__main__":
    main()
