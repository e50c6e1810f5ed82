"""What writing costs over copying: `python bench/export.py [--model FOLDER]`.

From kept statistics to a written checkpoint, without refit and without verification (opening the model, its digest, the
choices and the export), beside a copy of the source's bytes. Both end with their bytes on the disk (fsync), and read
what has left the page cache. Without a model it is a random Llama of 1.3 billion parameters.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from pathlib import Path

import torch
from large import forget, highest_memory, timed
from random_llama import write_random_llama

from prune_peak.conversion.choice import choose_conversion
from prune_peak.export.folder import FolderWriter
from prune_peak.models.loading import open_model
from prune_peak.options import AUTO, Budget, PruningOptions
from prune_peak.pruning.budget import find_allocations
from prune_peak.pruning.site_pruning import plan_site
from prune_peak.sites.finding import find_sites
from prune_peak.stats.calibration import calibrate
from prune_peak.stats.stats_file import load_statistics

CHUNK = 16 * 2**20  # bytes


def copy(source: Path, conversion: Path) -> None:
    """The weights of one folder in another."""
    for path in source.glob("*.safetensors"):
        with path.open("rb", buffering=0) as read, (conversion / path.name).open("wb", buffering=0) as written:
            while chunk := read.read(CHUNK):
                written.write(chunk)
            os.fsync(written.fileno())


def export(model: Path, stats: Path, target_folder: Path) -> None:
    """What `compress --stats --no-refit` does up to the written checkpoint."""
    source = open_model(str(model))
    sites = find_sites(source.meta_model, source.family)
    statistics = load_statistics(stats, source, sites)
    [kept] = find_allocations(source, sites, Budget(ratio=0.3), AUTO)
    conversion = choose_conversion(source, sites, kept, source.dtype)
    rules = PruningOptions(score="deviation", refit=False)
    with FolderWriter(source, conversion, target_folder) as out:
        for site in sites:
            choice = plan_site(source, statistics.read_site(site), kept[site.name], rules).plan
            out.write_block(site.block, {site.name: choice})
        out.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model's folder")
    parser.add_argument("--calibration", required=True, help="a text; what is measured on it does not matter here")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        stats, model = Path(scratch, "stats"), options.model or Path(scratch, "model")
        if options.model is None:
            write_random_llama(model)
        few = {"calibration": options.calibration, "samples": 1, "sequence_length": 128}
        process = multiprocessing.get_context("spawn").Process(
            target=calibrate, args=(str(model), stats), kwargs=few
        )  # of its own, so that the memory is that of the export
        process.start()
        process.join()
        pairs = []
        for _ in range(options.pairs):
            seconds = []
            for work in (lambda into: copy(model, into), lambda into: export(model, stats, into)):
                forget(model)
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    seconds.append(timed(lambda: work(Path(folder))))  # noqa: B023 - called at once
            pairs.append(seconds)
    print(json.dumps({
        "model": options.model.name if options.model else "random Llama, 1.3 billion parameters",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "copy, s": [round(first, 2) for first, _ in pairs],
        "export, s": [round(second, 2) for _, second in pairs],
        "ratio": round(statistics.median(second / first for first, second in pairs), 2),
        "highest resident memory, GB": round(highest_memory() / 1e9, 2),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
