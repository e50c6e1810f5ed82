"""What compressing costs over the bare forward: `python bench/calibration.py --model FOLDER --what moments`.

    moments    peaks and moments of every MLP neuron
    products   the same, with the products of neurons that the refit needs
    compress   all of it, at a ratio of 0.3: elimination, refit and the written folder; verification apart

The bare forward is the model's body over the same tokens, with the same type, batches and threads, in the same process.
Both run in turns; the ratio is taken pair by pair, and its median is the figure. Run it alone on the machine: a second
busy process makes two threads several times slower.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from prune_peak.conversion.choice import choose_conversion
from prune_peak.data.windows import into_batches
from prune_peak.export.folder import FolderWriter
from prune_peak.models.bfloat16 import fast_products
from prune_peak.models.loading import open_model
from prune_peak.models.stream import Batch
from prune_peak.options import AUTO, Budget, PruningOptions
from prune_peak.pruning.budget import find_allocations
from prune_peak.pruning.site_pruning import plan_site
from prune_peak.sites.finding import find_sites
from prune_peak.stats.collection import collect


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and seconds of processor time."""
    began, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - busy


def ratio(pairs: Sequence[tuple[tuple[float, float], tuple[float, float]]], which: int) -> float:
    return round(statistics.median(second[which] / first[which] for first, second in pairs), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model's folder")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--what", choices=["moments", "products", "compress"], default="moments")
    parser.add_argument("--score", default="elimination", help="of `compress`")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()

    source = open_model(str(options.model))
    sites = find_sites(source.meta_model, source.family)
    generator = torch.Generator().manual_seed(0)
    shape = (options.samples, options.sequence_length)
    batches = into_batches(torch.randint(source.config.vocab_size, shape, generator=generator))
    body = source.model_class.from_pretrained(source.folder, dtype=source.dtype).base_model.eval()

    @torch.inference_mode()
    def bare(batches: Sequence[Batch] = batches) -> None:
        with fast_products():
            for batch in batches:
                body(**batch, use_cache=False)

    def ours() -> None:
        observed = collect(source, sites, batches, source.dtype, for_refit=options.what != "moments")
        if options.what != "compress":
            for _ in observed:
                pass
            return
        [kept] = find_allocations(source, sites, Budget(ratio=0.3), AUTO)
        conversion = choose_conversion(source, sites, kept, source.dtype)
        with (
            tempfile.TemporaryDirectory() as folder,
            FolderWriter(source, conversion, Path(folder)) as export,
        ):
            for seen in observed:
                choice = plan_site(source, seen, kept[seen.site.name], PruningOptions(score=options.score)).plan
                export.write_block(seen.site.block, {seen.site.name: choice})
            export.finish()

    bare(batches[:1])  # warm-up
    pairs = [(timed(bare), timed(ours)) for _ in tqdm(range(options.pairs))]
    result = {
        "model": options.model.name,
        "tokens": shape[0] * shape[1],
        "dtype": str(source.dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bare forward, s": [round(first, 2) for (first, _), _ in pairs],
        "what": options.what,
        "score": options.score if options.what == "compress" else None,
        "ours, s": [round(second, 2) for _, (second, _) in pairs],
        "ratio": ratio(pairs, 0),
        "ratio of processor time": ratio(pairs, 1),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
