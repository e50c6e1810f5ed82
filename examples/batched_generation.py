"""Several prompts of different lengths at once, with the KV cache: `python examples/batched_generation.py FOLDER`."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("The function is called", "A class", "If the object has no attribute of that name, then")


def main(folder: str, prompts: tuple[str, ...] = PROMPTS) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder)
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    tokens = model.generate(**batch, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


if __name__ == "__main__":
    print("\n".join(main(*sys.argv[1:])))
