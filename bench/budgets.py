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

from prune_peak.cli.parameters import Bytes
from prune_peak.errors import PrunePeakError
from prune_peak.memory import estimate_workload, plan_execution
from prune_peak.models.loading import open_model
from prune_peak.options import CalibrationOptions
from prune_peak.sites.finding import find_sites


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
        source = open_model(str(model))
        sites = find_sites(source.meta_model, source.family)
        fresh = multiprocessing.get_context("spawn")
        for budget in options.budgets:
            size = Bytes().convert(budget, None, None)
            names = ("calibration", "samples", "sequence_length")
            words = {name: getattr(options, name) for name in names}
            try:
                plan = plan_execution(source, estimate_workload(source, sites, CalibrationOptions(**words), True), size)
            except PrunePeakError as refusal:
                results.append({"budget": budget, "refused": str(refusal)})
                continue
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
                "budget": budget, "batch tokens": plan.batch_tokens,
                "hidden states on disk": plan.hidden_states_on_disk,
                "planned, GB": round(plan.needed / 1e9, 2), "highest resident memory, GB": round(memory / 1e9, 2),
                "kept": memory <= size, "seconds": round(seconds, 1),
            })  # fmt: skip
    print(json.dumps({"model": options.model.name if options.model else "random Llama", "runs": results}, indent=2))


if __name__ == "__main__":
    main()
