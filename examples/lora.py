"""LoRA on top, with PEFT: `python examples/lora.py FOLDER TEXT OUTPUT [STEPS]` (needs peft).

The adapter trains on the cut model's own shapes; OUTPUT holds the adapter alone.
"""

import sys
from pathlib import Path

import torch
from healing import train
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, text: str, output: str, steps: str = "100") -> tuple[float, float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokens = tokenizer(Path(text).read_text(), verbose=False)["input_ids"]
    losses = train(model, tokens, int(steps), rate=2e-3)
    model.save_pretrained(output)
    return losses


if __name__ == "__main__":
    before, after = main(*sys.argv[1:])
    print(f"held-out loss {before:.3f} -> {after:.3f}; adapter written to {sys.argv[3]}")
