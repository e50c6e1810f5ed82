"""A short fine-tune after the cut: `python examples/healing.py FOLDER TEXT OUTPUT [STEPS]`.

All weights train for a few steps on a text; what comes out is a checkpoint like any other.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH, BATCH, HELD_OUT = 64, 4, 16  # tokens a window, windows a step, windows that are not trained on


def train(model: nn.Module, tokens: list[int], steps: int, rate: float) -> tuple[float, float]:
    """Train what is trainable; the loss on held-out windows before and after, in nats a token."""
    windows = torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
    held_out, windows = windows[-HELD_OUT:], windows[:-HELD_OUT]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def measure() -> float:
        return model.eval()(input_ids=held_out, labels=held_out).loss.item()

    before = measure()
    model.train()
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (BATCH,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return before, measure()


def main(folder: str, text: str, output: str, steps: str = "100", rate: float = 3e-4) -> tuple[float, float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer(Path(text).read_text(), verbose=False)["input_ids"]
    losses = train(model, tokens, int(steps), rate)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return losses


if __name__ == "__main__":
    before, after = main(*sys.argv[1:])
    print(f"held-out loss {before:.3f} -> {after:.3f}; written to {sys.argv[3]}")
