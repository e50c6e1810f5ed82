"""Give a command twice, and on two threads, and see which bytes are the same:

    python bench/reproduction.py --model examples/llama-mini --calibration FILE

Every run is a process of its own. What differs is told by file, by tensor and by neuron.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

PLAN = "prune_peak_plan.safetensors"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def compare(first: Path, second: Path) -> dict[str, Any]:
    """What of two written folders is not the same."""
    theirs, ours = digests(first), digests(second)
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    moved = {name: (after[name].float() - before[name].float()).abs().max().item() for name in before}
    scale = {name: before[name].float().abs().max().item() for name in before}
    plans = [load_file(folder / PLAN) for folder in (first, second)]
    kept = [{name: set(plan[name].tolist()) for name in plan if name.endswith(".keep")} for plan in plans]
    return {
        "files": len(ours),
        "files that differ": sorted(name for name in ours if ours[name] != theirs.get(name)),
        "tensors": len(moved),
        "tensors that differ": sum(distance > 0 for distance in moved.values()),
        "of the kinds": sorted({re.sub(r"\.\d+\.", ".N.", name) for name, distance in moved.items() if distance > 0}),
        "largest difference, of the tensor's largest": max(moved[n] / scale[n] for n in moved if scale[n]),
        "neurons kept": sum(map(len, kept[0].values())),
        "others kept": sum(len(kept[1][name] - kept[0][name]) for name in kept[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("more", nargs="*", help="options of compress, after --")
    options = parser.parse_args()
    words = ["--model", options.model, "--ratio", 0.3, "--calibration", options.calibration, "-q", "--json"]
    with tempfile.TemporaryDirectory() as scratch:

        def run(name: str, threads: int) -> tuple[Path, float]:
            output = Path(scratch, name)
            command = [sys.executable, "-m", "prune_peak", "compress", *words, "--output", output, *options.more]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
            done = subprocess.run(list(map(str, command)), env=environment, stdout=subprocess.PIPE, check=True)
            return output, json.loads(done.stdout)["quality_after"]["value"]

        one, value = run("one", 1)
        again, _ = run("again", 1)
        two, other = run("two", 2)
        two_again, _ = run("two-again", 2)
        print(json.dumps({
            "model": options.model.name,
            "one thread, twice": compare(one, again),
            "two threads, twice": compare(two, two_again),
            "one thread and two": compare(one, two) | {"quality": [value, other]},
        }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
