"""To ONNX, and run by onnxruntime: `python examples/onnx_export.py FOLDER FILE`.

Needs onnx, onnxscript and onnxruntime.
"""

import sys

import onnxruntime
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


class Logits(nn.Module):
    """Tokens to logits, without a cache."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


@torch.inference_mode()
def main(folder: str, file: str) -> float:
    """The largest difference of the logits, on a prompt of another length than the one it was exported with."""
    model = Logits(folder)
    vocabulary = model.model.config.vocab_size
    shapes = {"tokens": {0: "batch", 1: "length"}}
    example = torch.randint(vocabulary, (2, 16))
    torch.onnx.export(
        model, (example,), file, input_names=["tokens"], output_names=["logits"], dynamo=True, dynamic_shapes=shapes
    )
    tokens = torch.randint(vocabulary, (1, 24))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    [logits] = session.run(["logits"], {"tokens": tokens.numpy()})
    return (torch.from_numpy(logits) - model(tokens)).abs().max().item()


if __name__ == "__main__":
    print(f"largest difference of the logits: {main(*sys.argv[1:]):.1e}")
