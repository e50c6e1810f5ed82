"""Sentence embeddings from an encoder such as BERT: `python examples/sentence_embeddings.py FOLDER SENTENCE...`.

The mean of the last hidden states over a sentence's tokens, at length one, as sentence-transformers pools them.
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer


@torch.inference_mode()
def main(folder: str, *sentences: str) -> torch.Tensor:
    """Unit vectors, (sentences, hidden)."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    batch = tokenizer(list(sentences), return_tensors="pt", padding=True, truncation=True)
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


if __name__ == "__main__":
    vectors = main(*sys.argv[1:])
    print(vectors @ vectors.T)
