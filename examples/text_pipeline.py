"""Write with the stock pipeline: `python examples/text_pipeline.py FOLDER [PROMPT]`."""

import sys

from transformers import pipeline


def main(folder: str, prompt: str = "The function is called") -> str:
    generate = pipeline("text-generation", model=folder)
    [answer] = generate(prompt, max_new_tokens=20, do_sample=False)
    return answer["generated_text"]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
