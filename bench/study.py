"""What a default study costs over its bare forward passes, in the same run: `python bench/study.py --model FOLDER`.

Bare is the model's body over the windows of evaluation, in the study's own batches: once every few cells, so that both
see the same machine. Seconds are the processor's, of all threads, so another busy process counts for nothing.
"""

import argparse
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch

from prune_peak.evaluation.quality import WindowScores
from prune_peak.studies.ablation import ablate
from prune_peak.studies.runner import TrialRunner
from prune_peak.studies.trials import Trial

EVERY = 10  # cells between two bare passes


@torch.inference_mode()
def time_bare(bench: TrialRunner, with_head: bool) -> float:
    model = bench.model if with_head else bench.model.base_model
    began = time.process_time()
    for batch, _ in bench.batches:
        model(**batch)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--dtype", default="float32", help="of the model's own products, so that bare is bare")
    options = parser.parse_args()
    bodies: list[float] = []
    wholes: list[float] = []
    measured = 0
    measure = TrialRunner.measure

    def measure_and_time(bench: TrialRunner, trial: Trial) -> WindowScores:
        nonlocal measured
        if measured == 0:
            bench.evaluate()  # warm up, so that neither side pays for it
        if measured % EVERY == 0:
            bodies.append(time_bare(bench, with_head=False))
            wholes.append(time_bare(bench, with_head=True))
        measured += 1
        return measure(bench, trial)

    TrialRunner.measure = measure_and_time  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "topics.txt"
        text.write_text("\n\n".join(topics[name] for name in sorted(topics)))
        began = time.process_time()
        study = ablate(
            options.model,
            Path(folder) / "study",
            calibration=str(text),
            samples=options.samples,
            sequence_length=options.sequence_length,
            dtype=options.dtype,
            seeds=1,
        )
        seconds = time.process_time() - began - sum(bodies) - sum(wholes)
    rows = len(study.measurements)
    print(f"{rows} rows from {measured} cells and a calibration: {seconds:.1f} s of the processor")
    for name, times in (("body", bodies), ("body and head", wholes)):
        bare = sum(times) / len(times)
        print(f"bare pass, {name}: {bare:.3f} s ({min(times):.3f} to {max(times):.3f})")
        print(f"  the study: {seconds / (measured + 1) / bare:.2f} a pass it made, {seconds / rows / bare:.2f} a row")


if __name__ == "__main__":
    main()
