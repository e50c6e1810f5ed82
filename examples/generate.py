"""Load a checkpoint with transformers alone and let it write: `python examples/generate.py FOLDER [PROMPT]`."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging

logging.disable_progress_bar()


def main(folder: str, prompt: str = "The function is called") -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    set_seed(0)
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=60, do_sample=True, top_k=20)
    print(f"\n{type(model).__name__} loaded from {folder} writes:\n\n{tokenizer.decode(tokens[0])}")


if __name__ == "__main__":
    main(*sys.argv[1:])
