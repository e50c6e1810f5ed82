"""Kill a compress at random moments, and see whether the same command ends with the same bytes:

    python bench/resume.py --model examples/opt-mini --calibration FILE --kills 20

One undisturbed run is the measure. Then, for every kill: begin, SIGKILL after a random share of that run's time, look
at what lies under the final name, and give the same command again.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prune_peak import compress
from prune_peak.export.resume import RUN_FILE
from prune_peak.verification import verify

FORK = multiprocessing.get_context("fork")  # imports once


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sites", nargs="*", default=["mlp"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)  # threads do not survive a fork
    chance = random.Random(options.seed)
    work: dict[str, Any] = {
        "model": str(options.model),
        "calibration": options.calibration,
        "samples": options.samples,
        "sites": options.sites,
        "ratio": 0.3 if options.sites == ["mlp"] else 0.5,
    }
    source = digests(options.model)
    with tempfile.TemporaryDirectory() as scratch:

        def run(name: str, most: float | None = None) -> tuple[bool, float]:
            """Whether it came to its end within so many seconds, or was killed; and how long it ran."""
            began = time.perf_counter()
            child = FORK.Process(target=compress, kwargs=work | {"output": Path(scratch, name)})
            child.start()
            child.join(most)
            child.kill()
            child.join()
            return child.exitcode == 0, time.perf_counter() - began

        ended, whole = run("undisturbed")
        if not ended:
            sys.exit("the undisturbed run failed")
        expected = digests(Path(scratch, "undisturbed"))
        results = []
        for number in tqdm(range(options.kills), desc="kill", unit="run"):
            folder, partial = Path(scratch, f"run{number}"), Path(scratch, f"run{number}.partial")
            after = chance.uniform(0, whole)
            done, _ = run(folder.name, after)
            blocks_done = len(list(partial.glob("block-*.safetensors")))
            began = (partial / RUN_FILE).exists()
            verifies = not folder.exists() or verify(folder).passed
            resumed, took = (True, 0.0) if folder.exists() else run(folder.name)
            equal = resumed and digests(folder) == expected and not partial.exists()
            results.append({
                "killed after, s": None if done else round(after, 2), "begun": began, "blocks done": blocks_done,
                "resumed in, s": round(took, 2), "only whole folders": verifies, "same bytes": equal,
            })  # fmt: skip
        untouched = digests(options.model) == source
    summary = {
        "model": options.model.name,
        "undisturbed, s": round(whole, 2),
        "killed": sum(result["killed after, s"] is not None for result in results),
        "same bytes": sum(bool(result["same bytes"]) for result in results),
        "of": len(results),
        "source untouched": untouched,
    }
    print(json.dumps(summary | {"runs": results}, indent=2))
    if not untouched or not all(result["only whole folders"] and result["same bytes"] for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
