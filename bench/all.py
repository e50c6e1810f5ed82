"""The costs that docs/performance.md tells: `make bench`, or `python bench/all.py [NAME ...]`.

Each script runs in a process of its own, one after the other, with nothing else on the machine. What a script prints is
kept in `docs/data/bench.json` with commit, date, command and machine, and written into the table of the page
(`tests/recorded.py`) as soon as it is done. `check` only shows that all of this works. The models are
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
from datetime import date
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from random_llama import write_random_llama
from smollm2 import write_smollm2

from prune_peak.memory import physical_memory

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "opt-mini"
RECORD = HERE.parent / "docs" / "data" / "bench.json"
PAGE = "docs/performance.md"
SCRIPTS = {
    "check": "calibration.py --model {example} --what compress --samples 8 --sequence-length 128 --pairs 1",
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


def describe_machine() -> str:
    memory = round(physical_memory() / 1e9)
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory} GB, {platform.machine()}"


def find_commit() -> str:
    """The commit, and whether the working tree differs from it."""
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(words, cwd=HERE, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def record(path: Path, name: str, run: dict[str, Any]) -> None:
    """Keep a run in the place of the one before."""
    runs = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(runs | {name: run}, indent=2) + "\n")


def write_page() -> None:
    sys.path.insert(0, str(HERE.parent / "tests"))
    recorded = import_module("recorded")
    recorded.load.cache_clear()
    page = HERE.parent / PAGE
    page.write_text(recorded.write_tables(page.read_text(), PAGE))


def main() -> None:
    names = sys.argv[1:] or list(SCRIPTS)
    if not set(names) <= set(SCRIPTS):
        sys.exit(f"expected names of {', '.join(SCRIPTS)}")
    about = {
        "commit": find_commit(),
        "date": date.today().isoformat(),
        "machine": describe_machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(about, indent=2), flush=True)
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
            command = "python bench/" + SCRIPTS[name].replace("{", "").replace("}", "")
            record(RECORD, name, about | {"command": command, "result": json.loads(answer.stdout)})
            write_page()
            print(f"{name}: {answer.stdout}", flush=True)


if __name__ == "__main__":
    main()
