"""Single attention neurons against whole heads, at the same parameters, on `examples/vit-mini`:

python bench/narrow_heads.py > docs/narrow-heads.md
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from transformers.utils import logging

import prune_peak
from prune_peak.compression import CompressionResult

EXAMPLES = Path(__file__).parent.parent / "examples"
RATIOS = (0.25, 0.5, 0.75)
WAYS: dict[str, dict[str, Any]] = {
    "zero": {"fill": "zero", "refit": False},
    "peak": {"refit": False},
    "mean": {"fill": "mean", "refit": False},
    "refit": {},
}


def cut(ratio: float, unit: str, way: str, folder: Path) -> CompressionResult:
    return prune_peak.compress(
        str(EXAMPLES / "vit-mini"),
        {"attention": ratio},
        folder / "cut",
        unit=unit,
        calibration=str(EXAMPLES / "digits" / "calibration"),
        samples=100,
        evaluate=EXAMPLES / "digits" / "held-out",
        force=True,
        **WAYS[way],
    )


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    lines, dense = [], None
    for ratio in RATIOS:
        for unit in ("head", "neuron"):
            trials, scores = [], "-"
            for way in WAYS:
                with tempfile.TemporaryDirectory() as folder:
                    result = cut(ratio, unit, way, Path(folder))
                dense, after = result.quality_before, result.quality_after
                assert dense is not None
                assert after is not None
                trials.append(f"{after.value:.1%} ({after.loss:.3f})")
                if result.scores_lost:
                    scores = f"{statistics.median(result.scores_lost.values()):.2%}"
            shape = f"{round(4 * (1 - ratio))} x 32" if unit == "head" else f"4 x {round(32 * (1 - ratio))}"
            row = [f"{ratio:.0%} of the {unit}s", shape, f"{result.after.parameters:,}", *trials, scores]
            lines.append(f"| {' | '.join(row)} |")
    assert dense is not None
    print(INTRODUCTION.format(accuracy=dense.value, loss=dense.loss, images=dense.windows))
    print(f"| cut at every block | heads x width | parameters | {' | '.join(WAYS)} | scores lost |")
    print("|---" * (4 + len(WAYS)) + "|")
    print("\n".join(lines))


INTRODUCTION = """# Single neurons of attention, or whole heads

`examples/vit-mini`, its attention cut by whole heads and by single neurons (`--unit neuron`), which makes every head
narrower: value dimensions are chosen by their error, and the product of queries and keys is reduced to the same width
by its best approximation of that rank (`sites/low_rank.py`). Accuracy, and cross-entropy in nats, on {images}
held-out images; uncut {accuracy:.1%} ({loss:.3f}). "Scores lost" is the share of the variance of attention scores that
the narrower queries and keys cannot give, the median of the blocks. Calibrated on 100 images, float32; every folder was
verified and loads with stock transformers. A model of images of 8 x 8 pixels uses few directions of its heads, so
almost nothing is lost here; a large one was not measured. Made by
`python bench/narrow_heads.py > docs/narrow-heads.md`.
"""

if __name__ == "__main__":
    main()
