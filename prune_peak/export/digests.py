"""SHA-256 of what was written, in the recipe: `verify` finds a changed weight, tokenizer, template or config."""

import hashlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from ..io.checkpoint import Checkpoint
from ..io.tensor_files import digest_tensor
from ..io.untrusted import MODULES, TEMPLATES, find_modules
from ..progress import track
from .recipe import RECIPE_FILE

# What transformers reads besides the weights; the licence and other texts may change
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "dict.txt", "bpe.codes")
READ_FILES = (
    "*.json",
    "*.jinja",
    f"{TEMPLATES}/*.jinja",
    "*.model",
    "*.spm",
    "*.tokenizer",
    *TOKENIZER_FILES,
)

JSON_FILES = ("config", "tokenizer", "tokens", "vocab", "chat_template")  # parts of the names of these
WEIGHT_FILES = (
    "*.index.json",
    *("model*.safetensors", "pytorch_model*.bin", "tf_model*.h5", "flax_model*.msgpack"),
    *("consolidated*", "adapter_model*"),
)


def digest_files(folder: Path) -> dict[str, str]:
    """The digest of every file that decides what the weights compute, by its path in the folder."""
    patterns = [*READ_FILES, *(f"{escape(module)}/**/*" for module in find_modules(folder))]
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
        if path.name != RECIPE_FILE and ".index." not in path.name
    }


def changed_files(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """The files that were changed, removed or, where a tokenizer or a template would be read from them, added."""
    found = digest_files(folder)
    added = [name for name in found.keys() - expected.keys() if is_read(name)]
    return sorted(added + [name for name, digest in expected.items() if found.get(name) != digest])


def changed_tensors(folder: Path, expected: Mapping[str, str]) -> Iterator[str]:
    """The tensors that were changed, removed or added."""
    checkpoint = Checkpoint(folder)
    found = set(checkpoint.names)
    yield from sorted(expected.keys() ^ found)
    for name in track(sorted(expected.keys() & found), "compare bytes", "tensor"):
        if digest_tensor(checkpoint.read(name)) != expected[name]:
            yield name
        checkpoint.release()


def is_tokenizer(name: str) -> bool:
    """Whether a file name is that of a tokenizer."""
    return name.endswith((".model", ".spm", ".tokenizer")) or name in TOKENIZER_FILES


def is_read(name: str) -> bool:
    """Whether transformers looks for weights, a config, a tokenizer or a template of this name, by its path.

    Example:
        >>> is_read("model-00001-of-00002.safetensors"), is_read("chat_template.jinja"), is_read("results.json")
        (True, True, False)
    """
    if "/" in name:
        return fnmatchcase(name, f"{TEMPLATES}/*.jinja")
    if any(fnmatchcase(name, pattern) for pattern in WEIGHT_FILES):
        return True
    known = name == MODULES or not name.endswith(".json") or any(word in name for word in JSON_FILES)
    return known and name != RECIPE_FILE and any(fnmatchcase(name, pattern) for pattern in READ_FILES)
