"""How quality grows with the windows of calibration, and what they cost:

    python bench/curve.py --model DIR --calibration FILE|self --text FILE

One pass over the most windows (in random order) gives all points: after so many of them, every site is decided with
what was seen so far. The minutes of a point are its share of the pass and its decisions; sampling own text is apart.
"""

import argparse
import time
from itertools import chain
from pathlib import Path

import torch
from quality import ours, perplexity
from tqdm import tqdm

from prune_peak.data.sampling import draw_windows
from prune_peak.data.self_generated import generate_windows
from prune_peak.data.texts import read_windows
from prune_peak.data.windows import into_batches
from prune_peak.models.execution import DTYPES
from prune_peak.models.loading import open_model
from prune_peak.models.streaming import BlockStream
from prune_peak.options import AUTO, Budget
from prune_peak.pruning.budget import find_allocations
from prune_peak.sites.finding import find_sites
from prune_peak.sites.hooks import ablated, observed
from prune_peak.sites.plan import SitePlan
from prune_peak.stats.collection import SiteObserver

BATCH_WINDOWS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--calibration", required=True, help="a text, or self")
    parser.add_argument("--text", required=True, help="the text to measure on")
    parser.add_argument("--samples", type=int, nargs="*", default=[12, 24, 48, 96, 192, 384], help="multiples of 4")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.3, 0.5], help="of the MLP")
    parser.add_argument("--windows", type=int, default=24, help="of the text")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--multiple-of", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    source, dtype, length = open_model(str(options.model)), DTYPES[options.dtype], options.sequence_length
    most, began = max(options.samples), time.perf_counter()
    if options.calibration == "self":
        windows = generate_windows(source, most, length, options.seed).calibration
    else:
        windows = draw_windows(source, options.calibration, most, length, options.seed).calibration
    found = time.perf_counter() - began
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.seed))]
    sites = find_sites(source.meta_model, source.family)
    kept = {}
    for ratio in options.ratios:
        budget = Budget(ratio=ratio, multiple_of=options.multiple_of)
        kept[ratio] = next(iter(find_allocations(source, sites, budget, AUTO)[0].values()))
    plans: dict[tuple[int, float], dict[str, SitePlan]] = {
        (samples, ratio): {} for samples in options.samples for ratio in kept
    }
    seconds = dict.fromkeys(options.samples, 0.0)
    stream = BlockStream(source, into_batches(windows, tokens=BATCH_WINDOWS * length), dtype)
    for step in tqdm(stream.steps(), total=len(sites), desc="calibrate", unit="block"):
        site = sites[step.index]
        observer = SiteObserver(site, [windows.numel()], for_refit=True)
        ran, resumed = 0.0, time.perf_counter()
        with observed(stream.model.get_submodule(site.name), observer.add):
            # when the step gives a batch's number, those before it have run
            for done in chain((number * BATCH_WINDOWS for number in step.run()), [len(windows)]):
                if done in seconds:
                    ran += time.perf_counter() - resumed
                    resumed = time.perf_counter()
                    for ratio, width in kept.items():
                        plans[done, ratio][site.name] = ours(source, observer.site_stats(), width)
                    seconds[done] += ran + (time.perf_counter() - resumed) / len(kept)
                    resumed = time.perf_counter()

    model = source.model_class.from_pretrained(source.folder, dtype=dtype).eval()
    test = read_windows(options.text, source, length)[: options.windows]
    print(f"{options.model.name}, {options.dtype}, {options.windows} x {length} tokens of {Path(options.text).name}; "
          f"calibrated on {Path(options.calibration).name}, windows found in {found / 60:.1f} minutes. "
          f"Dense: {perplexity(model, test):.2f}.\n")  # fmt: skip
    print("| windows | tokens | minutes | " + " | ".join(f"{ratio:.0%}" for ratio in kept) + " |")
    print("|---" * (3 + len(kept)) + "|")
    for samples in options.samples:
        figures = []
        for ratio in kept:
            with ablated(model, sites, plans[samples, ratio]):
                figures.append(f"{perplexity(model, test):.2f}")
        print(f"| {samples} | {samples * length} | {seconds[samples] / 60:.1f} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
