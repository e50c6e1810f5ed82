"""Eight-bit weights on top, on a CPU, with torchao: `python examples/quantized.py FOLDER` (extra `quantized`)."""

import sys

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def main(folder: str, prompt: str = "The function is called") -> tuple[str, float]:
    """What the quantized model writes, and how far its logits are from the plain one's, as a share of the largest."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    batch = tokenizer(prompt, return_tensors="pt")
    plain = model(**batch).logits
    quantize_(model.base_model, Int8WeightOnlyConfig())
    distance = ((model(**batch).logits - plain).abs().max() / plain.abs().max()).item()
    tokens = model.generate(**batch, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(tokens[0]), distance


if __name__ == "__main__":
    text, distance = main(*sys.argv[1:])
    print(f"{text}\n\nlargest difference of the logits: {distance:.1%} of the largest")
