"""What whole blocks cost: `python bench/blocks.py OUTPUT.json [MODEL CALIBRATION TEST]`.

One of the three blocks of `examples/vit-mini` and `roberta-mini` is removed in three ways, and measured on held-out
images and masked tokens. With a MODEL, 1, 2, 3 and 6 of its blocks are removed; it is measured once for all of them,
with 96 windows of CALIBRATION, and every choice is that of `prune-peak compress --sites blocks`.
"""

import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import experts
from tqdm import tqdm

import prune_peak
from prune_peak.conversion.choice import choose_conversion
from prune_peak.data.windows import into_batches
from prune_peak.evaluation.quality import measure_quality
from prune_peak.export.folder import FolderWriter
from prune_peak.job import Job, prepare
from prune_peak.models.loading import open_model
from prune_peak.options import CompressOptions
from prune_peak.pruning.block_choice import BlockSearch, cheapest_runs
from prune_peak.pruning.site_pruning import plan_site
from prune_peak.sites.blocks import BlocksSite, join_runs, removed_blocks
from prune_peak.stats.collection import collect

EXAMPLES = Path(__file__).parent.parent / "examples"
COUNTS = (1, 2, 3, 6)
WAYS: dict[str, dict[str, Any]] = {
    "removed": {"refit": False, "fill": "zero"},
    "mean": {"refit": False, "fill": "mean"},
    "map": {},
}


def measure_small(scratch: Path) -> Iterator[dict[str, Any]]:
    """One of three blocks of the examples, removed in every way."""
    training, held_out = experts.write_texts(EXAMPLES / "roberta-mini", scratch)
    digits = EXAMPLES / "digits"
    data = {
        "vit-mini": {
            "calibration": (str(digits / "calibration"),),
            "evaluate": (str(digits / "held-out"),),
            "samples": 100,
        },
        "roberta-mini": {"calibration": (training,), "evaluate": (held_out,), "samples": 96},
    }
    for name, options in data.items():
        for way, how in WAYS.items():
            result = prune_peak.compress(
                str(EXAMPLES / name), 0.34, scratch / "cut", sites=("blocks",), force=True, **options, **how
            )
            before, after = result.quality_before, result.quality_after
            assert before is not None
            assert after is not None
            yield {
                "model": name,
                "way": way,
                "before": [before.accuracy, before.loss],
                "after": [after.accuracy, after.loss],
                "windows": after.windows,
            }


def measure_model(model: str, calibration: str, test: str, scratch: Path) -> Iterator[dict[str, Any]]:
    """The perplexity without 0, 1, 2, 3 and 6 blocks."""
    options = CompressOptions(
        ratio=0.5, sites=("blocks",), calibration=(calibration,), samples=96, evaluate=(test,), output=scratch / "out"
    )
    job = prepare(model, options)
    assert job.eval_set is not None
    measured = job.calibrate()
    able = [site for site in job.sites if isinstance(site, BlocksSite) and site.removed]
    costs = BlockSearch(job.source, able, max(COUNTS), measured, options, job.execution).measure()
    chosen = {count: _find_runs(able, cheapest_runs(costs, count)) for count in COUNTS}
    every = {(site.block, site.removed): site for sites in chosen.values() for site in sites}
    batches = into_batches(measured.windows.calibration, job.execution.batch_tokens)
    plans = {
        (stats.site.block, stats.site.removed): plan_site(job.source, stats, stats.site.always_kept, options).plan
        for stats in collect(job.source, [*every.values()], batches, measured.dtype, True, job.execution)
        if isinstance(stats.site, BlocksSite)
    }
    before = measure_quality(job.source, job.eval_set, measured.dtype, job.execution, "the original")
    yield {"removed": [], "parameters": job.source.parameters, "perplexity": before.value}
    for count, sites in chosen.items():
        folder = _write(job, sites, plans, scratch / str(count))
        written = open_model(str(folder))
        after = measure_quality(written, job.eval_set, measured.dtype, job.execution, f"{count} blocks less")
        yield {"removed": removed_blocks(sites), "parameters": written.parameters, "perplexity": after.value}


def _find_runs(able: list[BlocksSite], runs: list[tuple[int, int]]) -> list[BlocksSite]:
    removed = {after + 1 + each for after, length in runs for each in range(length)}
    return [
        site for site in join_runs([one for one in able if one.removed[0] in removed]) if isinstance(site, BlocksSite)
    ]


def _write(job: Job, sites: list[BlocksSite], plans: dict[tuple[int, tuple[int, ...]], Any], folder: Path) -> Path:
    kept = {site.name: site.always_kept for site in sites}
    conversion = choose_conversion(job.source, sites, kept, job.source.dtype)
    folder.mkdir()
    with FolderWriter(job.source, conversion, folder) as writer:
        for site in sites:
            writer.write_block(site.block, {site.name: plans[site.block, site.removed]})
        writer.finish()
    return folder


def main() -> None:
    logging.disable(logging.WARNING)
    output, *words = sys.argv[1:]
    found: dict[str, Any] = {"prune_peak": prune_peak.__version__}
    with tempfile.TemporaryDirectory() as scratch:
        found["small"] = list(tqdm(measure_small(Path(scratch))))
        if words:
            model, calibration, test = words
            found["model"] = list(tqdm(measure_model(model, calibration, test, Path(scratch))))
    Path(output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
