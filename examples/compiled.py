"""The compiled model beside the plain one: `python examples/compiled.py FOLDER [BACKEND]`.

The backend is inductor if none is named; it needs a C++ compiler.
"""

import sys

import torch
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main(folder: str, backend: str = "inductor") -> float:
    """The largest difference of the logits."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(model.config.vocab_size, (2, 32))
    plain = model(tokens, use_cache=False).logits
    compiled = torch.compile(model, backend=backend)(tokens, use_cache=False).logits
    return (plain - compiled).abs().max().item()


if __name__ == "__main__":
    print(f"largest difference of the logits: {main(*sys.argv[1:]):.1e}")
