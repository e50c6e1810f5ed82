"""Speed-up of several processes over one, each with one thread:

    python bench/ranks.py --model FOLDER --calibration FILE --processes 2

Times whole commands, imports and verification included: `python -m prune_peak` alone and through torchrun, in turns.
The result is the median of the ratios of all pairs. Both must keep the same neurons. Run nothing else meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--what", choices=["compress", "calibrate"], default="compress")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
    words = ["-m", "prune_peak", options.what, "--model", str(options.model), "--calibration", options.calibration]
    words += ["--samples", str(options.samples), "--quiet", "--force"]
    words += ["--ratio", "0.3"] if options.what == "compress" else ["--covariances"]

    with tempfile.TemporaryDirectory() as scratch:

        def timed(name: str, launcher: list[str]) -> float:
            began = time.perf_counter()
            command = [sys.executable, *launcher, *words, "--output", str(Path(scratch, name))]
            subprocess.run(command, env=os.environ | ONE_THREAD, stdout=subprocess.DEVNULL, check=True)
            return time.perf_counter() - began

        pairs = [(timed("alone", []), timed("shared", torchrun)) for _ in tqdm(range(options.pairs))]
        result = {
            "model": options.model.name,
            "what": options.what,
            "windows": options.samples,
            "processes": options.processes,
            "torch": torch.__version__,
            "alone, s": [round(first, 1) for first, _ in pairs],
            "shared, s": [round(second, 1) for _, second in pairs],
            "times as fast": round(statistics.median(first / second for first, second in pairs), 2),
        }
        if options.what == "compress":
            plans = [load_file(Path(scratch, name, "prune_peak_plan.safetensors")) for name in ("alone", "shared")]
            kept = [name for name in plans[0] if name.endswith(".keep")]
            result["sites"] = len(kept)
            result["same neurons"] = sum(torch.equal(plans[0][name], plans[1][name]) for name in kept)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
