"""Whether a compress keeps to its budget: `python bench/budgets.py --calibration FILE [--model FOLDER]`.

The same compress with several budgets, each in a process of its own: what was planned, and the highest resident memory
(VmHWM; mapped files count). Without a model it is a random Llama of 1.3 billion parameters.
"""

import argparse
import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch
from large import run_compress
from random_llama import write_random_llama

from prune_peak.calibration import weigh
from prune_peak.cli import Bytes
from prune_peak.errors import PrunePeakError
from prune_peak.machine import plan_machine
from prune_peak.sites import find_sites
from prune_peak.source import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model's folder")
    parser.add_argument("--calibration", required=True, help="a text")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--budgets", nargs="+", default=["1GB", "1.5GB", "2GB", "4GB"])
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or Path(scratch, "model")
        if options.model is None:
            write_random_llama(model)
        source = open_source(str(model))
        sites = find_sites(source.blank, source.family)
        fresh = multiprocessing.get_context("spawn")
        for budget in options.budgets:
            size = Bytes().convert(budget, None, None)
            asked = (options.calibration, options.samples, options.sequence_length, None, 0, True)
            try:
                plan = plan_machine(source, weigh(source, sites, *asked), size)
            except PrunePeakError as refusal:
                results.append({"budget": budget, "refused": str(refusal)})
                continue
            words = dict(zip(("calibration", "samples", "sequence_length", "dtype", "seed"), asked[:-1], strict=True))
            words |= {"model": str(model), "ratio": 0.3, "output": str(Path(scratch, budget))}
            words |= {"max_memory": size, "threads": torch.get_num_threads()}
            answers = fresh.Queue()
            process = fresh.Process(target=run_compress, args=(words, answers))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)
            seconds, memory = answers.get()
            results.append({
                "budget": budget, "batch tokens": plan.batch_tokens, "hidden states on disk": plan.spills,
                "planned, GB": round(plan.needed / 1e9, 2), "highest resident memory, GB": round(memory / 1e9, 2),
                "kept": memory <= size, "seconds": round(seconds, 1),
            })  # fmt: skip
    print(json.dumps({"model": options.model.name if options.model else "random Llama", "runs": results}, indent=2))


if __name__ == "__main__":
    main()
