"""What cutting 30 % costs families of the paper (arXiv 2408.17322), MLP and attention apart:

    python bench/families.py > docs/families.md

The models are the small trained ones of `examples/`: a decoder, a decoder with grouped queries and a sliding window, an
encoder, a vision model. Text and images are split as `examples/train_mini.py` does: calibrated on a part of what the
model was trained on, measured on what it was not.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import logging

import prune_peak
from prune_peak.compression import CompressionResult
from prune_peak.evaluation.quality import PERPLEXITY

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.append(str(EXAMPLES))
from train_mini import read_text, split  # noqa: E402 - a script beside this folder

RATIO = 0.3
WAYS: dict[str, dict[str, Any]] = {
    "zero": {"fill": "zero", "refit": False},
    "mean": {"fill": "mean", "refit": False},
    "peak": {"fill": "peak", "refit": False},
    "refit": {"fill": "peak", "refit": True},
}
IN_PLACE = {"keep_shape": True, "unit": "neuron"}  # no stock class holds these narrower


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    model: str
    kind: str
    options: dict[str, Any]


CASES = [
    Case("opt-mini", "mlp", {}),
    Case("opt-mini", "attention", IN_PLACE),
    Case("mistral-mini", "mlp", {}),
    Case("mistral-mini", "attention", {}),
    Case("roberta-mini", "mlp", {}),
    Case("roberta-mini", "attention", IN_PLACE),
    Case("vit-mini", "mlp", {}),
    Case("vit-mini", "attention", {}),
]


def find_data(model: str, folder: Path) -> tuple[Path, Path]:
    """The text to calibrate on, and the one to measure on, written to a folder; or the folders of images."""
    if model == "vit-mini":
        return EXAMPLES / "digits" / "calibration", EXAMPLES / "digits" / "held-out"
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / model)
    paths = []
    for name, tokens in zip(("training", "held-out"), split(read_text(), tokenizer), strict=True):
        paths.append(folder / f"{name} text.txt")
        paths[-1].write_text(tokenizer.decode(tokens))
    return paths[0], paths[1]


def compress_all(case: Case, folder: Path) -> Iterator[tuple[str, CompressionResult]]:
    """The case in every way."""
    calibration, evaluate = find_data(case.model, folder)
    for name, way in WAYS.items():
        result = prune_peak.compress(
            str(EXAMPLES / case.model),
            {case.kind: RATIO},
            folder / "cut",
            calibration=str(calibration),
            evaluate=evaluate,
            force=True,
            **case.options,
            **way,
        )
        yield name, result


def describe(case: Case, results: dict[str, CompressionResult]) -> str:
    """The line of the table."""
    one = next(iter(results.values()))
    dense = one.quality_before
    assert dense is not None
    digits = ".2f" if dense.metric == PERPLEXITY else ".1%"
    unit = case.options.get("unit", "neuron" if case.kind == "mlp" else "head")
    trials = [
        case.model,
        f"{case.kind}: {one.share[case.kind]:.0%} of the {unit}s",
        dense.metric,
        f"{dense.value:{digits}}",
        *(f"{result.quality_after.value:{digits}}" for result in results.values() if result.quality_after),
        f"{one.before.bytes:,} -> {one.after.bytes:,}" + (" (in place)" if one.keep_shape else ""),
    ]
    return f"| {' | '.join(trials)} |"


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    lines = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            results = dict(compress_all(case, Path(folder)))
        lines.append(describe(case, results))
    print(INTRODUCTION)
    print(f"| model | cut | metric | dense | {' | '.join(WAYS)} | bytes of the weights |")
    print("|---" * (5 + len(WAYS)) + "|")
    print("\n".join(lines))


INTRODUCTION = f"""# The families of the paper

The small trained models of `examples/`, {RATIO:.0%} cut (or the nearest that the shapes allow), by every constant and
with the refit. Made by `python bench/families.py > docs/families.md`: 48 windows of 128 tokens of the training text to
calibrate on, the metric on 24 windows of text that the models were not trained on, float32 (vit-mini: 48 and 360 images
of digits; roberta-mini's tokens are bytes, 15 % of them masked). Where the weights stay as large, no stock class holds
the narrower attention and `--keep-shape` was used; every written folder was verified.
"""

if __name__ == "__main__":
    main()
