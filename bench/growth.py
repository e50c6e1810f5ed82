"""How the cost grows with tokens, width and blocks: `python bench/growth.py`.

Processor time of the calibration (the forward, statistics and products of neurons) and of the choice (elimination,
ridge and refit) on random Llamas in float32; each figure is the least of a few runs. The exponent is the base-2
logarithm of what doubling multiplies the time by. Expected are the leading terms: a token costs a block the square of
its width, a system of equations costs the third power, whatever the tokens.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from random_llama import write_random_llama
from transformers import LlamaConfig, LlamaForCausalLM

from prune_peak.data.windows import into_batches
from prune_peak.models.loading import open_model
from prune_peak.options import AUTO, Budget, PruningOptions
from prune_peak.pruning.budget import find_allocations
from prune_peak.pruning.site_pruning import plan_site
from prune_peak.sites.finding import find_sites
from prune_peak.stats.collection import collect

LENGTH = 256  # of a window
SIZE = {"tokens": 8192, "width": 512, "blocks": 2}
EXPECTED = {"calibration": {"tokens": 1, "width": 2, "blocks": 1}, "plan": {"tokens": 0, "width": 3, "blocks": 1}}


def measure(tokens: int, width: int, blocks: int) -> dict[str, float]:
    """Seconds of processor time of each part."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        vocab_size=1000,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        write_random_llama(folder, LlamaForCausalLM, config)
        source = open_model(str(folder))
        sites = find_sites(source.meta_model, source.family)
        [kept] = find_allocations(source, sites, Budget(ratio=0.3), AUTO)
        windows = torch.randint(1000, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
        began, choosing = time.process_time(), 0.0
        for observed in collect(source, sites, into_batches(windows), torch.float32, for_refit=True):
            chosen = time.process_time()
            plan_site(source, observed, kept[observed.site.name], PruningOptions())
            choosing += time.process_time() - chosen
        return {"calibration": time.process_time() - began - choosing, "plan": choosing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each size; the fastest counts")
    options = parser.parse_args()

    def fastest(**size: int) -> dict[str, float]:
        runs = [measure(**size) for _ in range(options.runs)]
        return {part: min(run[part] for run in runs) for part in EXPECTED}

    base = fastest(**SIZE)
    rows = []
    for doubled in SIZE:
        seconds = fastest(**SIZE | {doubled: 2 * SIZE[doubled]})
        for part, expected in EXPECTED.items():
            rows.append({
                "doubled": doubled, "part": part, "from, s": round(base[part], 2), "to, s": round(seconds[part], 2),
                "exponent": round(math.log2(seconds[part] / base[part]), 2), "expected": expected[doubled],
            })  # fmt: skip
    threads, version = torch.get_num_threads(), torch.__version__
    print(json.dumps({"size": SIZE, "threads": threads, "torch": version, "growth": rows}, indent=2))


if __name__ == "__main__":
    main()
