"""Experts of a small trained mixture, removed and made narrower: `python bench/experts.py OUTPUT.json [FOLDER ...]`.

Every FOLDER has a `moe-mini` of another seed (`python examples/train_mini.py moe-mini --seed 1 --output FOLDER`);
without one, that of `examples/` is used. It is calibrated on 48 windows of its training text and measured on text that
it was not trained on: the increase of the loss, in nats a token, for every way to choose. Random choices are the mean
of three.
"""

import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

import prune_peak

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import train_mini  # noqa: E402

NAME = "moe-mini"
RATIOS = (0.25, 0.5)
# kind of site, name, options
WAYS: list[tuple[str, str, dict[str, Any]]] = [
    ("experts", "elimination", {}),
    ("experts", "reap", {"score": "reap"}),
    ("experts", "frequency", {"score": "frequency"}),
    ("experts", "random", {"score": "random"}),
    ("expert-mlp", "elimination and refit", {}),
    ("expert-mlp", "activation norm", {"score": "activation-norm", "refit": False}),
    ("expert-mlp", "magnitude", {"score": "weight-norm", "refit": False}),
    ("expert-mlp", "random", {"score": "random", "refit": False}),
]


def write_texts(model: Path, folder: Path) -> tuple[str, str]:
    """The training text and the held-out text of the model, as files."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    paths = []
    for name, tokens in zip(("training", "held-out"), train_mini.split(train_mini.read_text(), tokenizer), strict=True):
        paths.append(folder / f"{name}.txt")
        paths[-1].write_text(tokenizer.decode(tokens), encoding="utf-8")
    return str(paths[0]), str(paths[1])


def measure(model: Path) -> Iterator[dict[str, Any]]:
    """The increase of the loss, for every way and ratio."""
    with tempfile.TemporaryDirectory() as scratch:
        training, held_out = write_texts(model, Path(scratch))
        for ratio in RATIOS:
            for kind, name, options in WAYS:
                losses = []
                for seed in range(3 if name == "random" else 1):
                    result = prune_peak.compress(
                        str(model),
                        ratio,
                        Path(scratch) / "pruned",
                        sites=(kind,),
                        calibration=(training,),
                        evaluate=(held_out,),
                        seed=seed,
                        samples=48,
                        force=True,
                        **options,
                    )
                    assert result.quality_before is not None
                    assert result.quality_after is not None
                    losses.append(result.quality_after.loss - result.quality_before.loss)
                yield {"kind": kind, "ratio": ratio, "way": name, "increase": statistics.fmean(losses)}


def main() -> None:
    logging.disable(logging.WARNING)
    output, *folders = sys.argv[1:]
    runs = []
    for folder in tqdm(folders or [str(HERE.parent / "examples")], unit="model"):
        runs.append(list(measure(Path(folder) / NAME)))
    versions = {"prune_peak": prune_peak.__version__, "torch": torch.__version__}
    Path(output).write_text(json.dumps(versions | {"runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
