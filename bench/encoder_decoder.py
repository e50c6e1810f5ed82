"""What cutting the MLPs of an encoder and its decoder costs, in numbers that are still spelled without a mistake:

    python bench/encoder_decoder.py > docs/encoder-decoders.md

The model is `examples/bart-mini`, which writes numbers in words (347 is three hundred forty seven). It is calibrated on
numbers that it learned from, and measured on others.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import prune_peak

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.append(str(EXAMPLES))
from train_mini import count_spelled  # noqa: E402 - a script beside this folder

MODEL, NUMBERS = EXAMPLES / "bart-mini", EXAMPLES / "numbers"
RATIOS = (0.25, 0.5, 0.75)
WAYS: dict[str, dict[str, Any]] = {
    "deleted by magnitude": {"score": "weight-norm", "fill": "zero", "refit": False},
    "peak constants": {"refit": False},
    "peak constants and refit": {},
    "refit, calibrated on its own answers": {},
}
OWN_ANSWERS = "refit, calibrated on its own answers"


def count(folder: Path, numbers: list[int]) -> int:
    """How many of the numbers a model spells without a mistake."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    return count_spelled(model, AutoTokenizer.from_pretrained(folder), numbers)


def main() -> None:
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    held_out, learned = ([json.loads(row) for row in (NUMBERS / name).read_text().splitlines()]
                         for name in ("held-out.jsonl", "calibration.jsonl"))  # fmt: skip
    numbers = [int(row["text"]) for row in held_out]
    with tempfile.TemporaryDirectory() as scratch:
        bare = Path(scratch) / "numbers.jsonl"  # without targets
        bare.write_text("\n".join(json.dumps({"text": row["text"]}) for row in learned))
        rows: list[list[str]] = []
        for way, options in WAYS.items():
            cells = []
            for ratio in RATIOS:
                result = prune_peak.compress(
                    str(MODEL),
                    ratio,
                    Path(scratch) / "cut",
                    calibration=str(bare if way == OWN_ANSWERS else NUMBERS / "calibration.jsonl"),
                    evaluate=str(NUMBERS / "held-out.jsonl"),
                    samples=512,
                    sequence_length=16,
                    force=True,
                    **options,
                )
                assert result.verification.passed
                assert result.quality_after is not None
                cells.append(f"{count(Path(scratch) / 'cut', numbers)} ({result.quality_after.value:.3f})")
            rows.append([way, *cells])
        assert result.quality_before is not None
        intact = f"{count(MODEL, numbers)} ({result.quality_before.value:.3f})"
    print("# Encoder-decoders\n\nMade by `python bench/encoder_decoder.py`, on one of two cores, in float32.\n")
    print(
        f"`examples/bart-mini` spells numbers. Of {len(numbers)} that it did not learn from, it spells {intact}\n"
        "without a mistake (in brackets: the perplexity of the right words of the first 24). Encoder and decoder lose\n"
        "of their MLP neurons:\n"
    )
    print("| | " + " | ".join(f"{ratio:.0%}" for ratio in RATIOS) + " |\n|---|" + "---|" * len(RATIOS))
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
