"""Healed against unhealed models of other heads: `python bench/heal_heads.py NAME FOLDER [TRAIN TEST]`.

NAME is minilm (TRAIN and TEST are texts: the cosine to the original's embeddings of sentences of TEST), roberta (the
trained model of examples/, on Python's language reference) or vit (the same, on scikit-learn's digits). FOLDER takes
what is written. Prints, as JSON, the distance on held-out data and the task's own measure, of the original, the
compressed and the healed model.
"""

import json
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from minilm import LONGEST, embed, read_sentences, write_minilm
from PIL import Image

import prune_peak

EXAMPLES = Path(__file__).parent.parent / "examples"
TOKENS, IMAGES, PATCHES = 50_000, 2000, 16
RATIOS: dict[str, Any] = {"minilm": 0.3, "roberta": 0.5, "vit": {"mlp": 0.9, "attention": 0.5}}


def run(name: str, original: Path, folder: Path, data: Path, tokens: int) -> tuple[dict[str, Any], list[Path]]:
    """Compress and heal; the figures, and the three models."""
    cut = folder / f"{name}-cut"
    options = {"sequence_length": LONGEST} if name == "minilm" else {}
    prune_peak.compress(str(original), RATIOS[name], cut, calibration=str(data), force=True, **options)
    start = time.perf_counter()
    result = prune_peak.heal(cut, original=str(original), data=str(data), tokens=tokens, force=True)
    assert result is not None
    figures = {
        "name": name,
        "ratio": RATIOS[name],
        "tokens": tokens,
        "minutes": (time.perf_counter() - start) / 60,
        "distance": result.distance,
        "divergence": [result.divergence_before, result.divergence_after],
        "metric": result.metric,
        "score": [result.score_original, result.score_before, result.score_after],
    }
    return figures, [original, cut, result.output]


def evaluate(models: list[Path], data: Path) -> list[float]:
    [comparison] = prune_peak.evaluate([str(model) for model in models], data=str(data))
    return [entry.quality.value for entry in comparison.entries if entry.quality is not None]


def minilm(folder: Path, train: Path, test: Path) -> dict[str, Any]:
    figures, models = run("minilm", write_minilm(folder / "minilm"), folder, train, TOKENS)
    vectors = [embed(model, read_sentences(test)) for model in models]
    cosines = [float((vectors[0] * each).sum(1).mean()) for each in vectors]
    return figures | {"task": "cosine to the original's sentence embeddings", "test": cosines}


def roberta(folder: Path) -> dict[str, Any]:
    """The last tenth of the text is for the evaluation."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    train, test = folder / "train.txt", folder / "test.txt"
    train.write_text(text[: len(text) * 9 // 10])
    test.write_text(text[len(text) * 9 // 10 :])
    figures, models = run("roberta", EXAMPLES / "roberta-mini", folder, train, TOKENS)
    return figures | {"task": "masked-token accuracy", "test": evaluate(models, test)}


def vit(folder: Path) -> dict[str, Any]:
    """All digits but every fifth, which is for the evaluation."""
    sys.path.insert(0, str(EXAMPLES))
    from train_mini import HELD_OUT_IMAGES, read_digits

    train = folder / "digits"
    train.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(read_digits()[0]):
        if number % HELD_OUT_IMAGES:
            Image.fromarray(image.numpy()).save(train / f"{number:04}.png")
    figures, models = run("vit", EXAMPLES / "vit-mini", folder, train, IMAGES * PATCHES)
    return figures | {"task": "accuracy", "test": evaluate(models, EXAMPLES / "digits" / "held-out")}


def main() -> None:
    match sys.argv[1:]:
        case ["minilm", folder, train, test]:
            figures = minilm(Path(folder), Path(train), Path(test))
        case ["roberta", folder]:
            figures = roberta(Path(folder))
        case ["vit", folder]:
            figures = vit(Path(folder))
        case _:
            sys.exit(__doc__)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
