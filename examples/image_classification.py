"""Name what is on a picture, with the stock pipeline: `python examples/image_classification.py FOLDER IMAGE`."""

import sys

from transformers import pipeline


def main(folder: str, image: str) -> str:
    """The most likely label."""
    return pipeline("image-classification", model=folder)(image, top_k=1)[0]["label"]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
