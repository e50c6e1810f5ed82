"""What healing gives: `python bench/heal_runs.py ORIGINAL COMPRESSED --data DATA --tokens 51200 --test test.txt`.

Heals a folder that `compress` wrote, and prints, as JSON: the divergence on held-out windows, perplexity on a test
text, talk on prompts that nothing was tuned on (bench/prompts.txt), minutes, and peak memory beside the estimate.
"""

import argparse
import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import prune_peak
from prune_peak.evaluation.talk import evaluate_talk
from prune_peak.healing.job import prepare_heal
from prune_peak.healing.options import HealOptions


def measure(original: str, compressed: str, test: str | None, talk: bool, options: dict[str, Any]) -> dict[str, Any]:
    output = Path(f"{compressed}-{options['tokens']}")
    shutil.rmtree(output, ignore_errors=True)
    job = prepare_heal(Path(compressed), HealOptions(original=original, **options))
    planned, minutes = job.memory, job.minutes
    start = time.perf_counter()
    result = prune_peak.heal(compressed, original=original, output=output, **options)
    assert result is not None
    measured: dict[str, Any] = {
        "data": result.data,
        "tokens": result.tokens,
        "method": result.method,
        "minutes": (time.perf_counter() - start) / 60,
        "minutes_planned": minutes,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "memory_planned": planned,
        "divergence": [result.divergence_before, result.divergence_after],
        "held_out_perplexity": [result.score_original, result.score_before, result.score_after],
    }
    models = [original, compressed, str(output)]
    if test is not None:
        [comparison] = prune_peak.evaluate(models, data=test)
        measured["perplexity"] = [entry.quality.value for entry in comparison.entries]
    if talk:
        talks = evaluate_talk(models, Path(__file__).parent / "prompts.txt")
        measured["talk"] = [
            {key: getattr(each, key) for key in ("loops", "ends", "length", "divergence")} for each in talks
        ]
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("original")
    parser.add_argument("compressed")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokens", type=int, default=51_200)
    parser.add_argument("--method", default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test")
    parser.add_argument("--talk", action="store_true")
    given = vars(parser.parse_args())
    options = {name: given[name] for name in ("data", "tokens", "method", "seed")}
    print(json.dumps(measure(given["original"], given["compressed"], given["test"], given["talk"], options), indent=2))


if __name__ == "__main__":
    main()
