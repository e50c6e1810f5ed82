"""The files beside the weights, by role: what is copied with a checkpoint, and what stays behind."""

from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from .untrusted import MODULES, TEMPLATES, find_modules

CARD = "README.md"  # read for the licence; the output has its own
TOKENIZER_FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*vocab*.json", "*vocab*.txt", "merges.txt"),
    *("dict.txt", "emoji.json", "word_*.json", "normalizer.json", "byte_maps.json", "tekken.json"),
    *("*.model", "*.spm", "*.codes", "*.tokenizer", "*.tiktoken"),
)
SIDE_FILES = (
    *TOKENIZER_FILES,
    *("*.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja", "generation_config.json", "*processor_config.json"),
    *(MODULES, "config_sentence_transformers.json", "sentence_*_config.json"),
)
MODULE_FILES = (*TOKENIZER_FILES, "*.json", "*.safetensors")  # of the folders that modules.json names
TERMS = ("licen?e", "notice", "copying", "copyright", "use?policy", "terms?of?use")
TERMS_IN_ANY_CASE = tuple(
    f"*{''.join(f'[{char}{char.upper()}]' if char.isalpha() else char for char in word)}*" for word in TERMS
)
TEXTS = ("", ".md", ".txt", ".rst", ".html", ".pdf")  # suffixes of terms
# Not copied either, but written anew
REPLACED = ("config.json", CARD, "model*.safetensors*", "pytorch_model*.bin*", "prune_peak*", ".*")


def find_side_files(folder: Path) -> list[str]:
    """The files of a checkpoint that are copied, as paths in the folder: by their role, and nothing else.

    Tokenizer, processor, generation settings, chat templates, terms of use, and modules of sentence-transformers.
    """
    modules = [f"{escape(module)}/**/{pattern}" for module in find_modules(folder) for pattern in MODULE_FILES]
    found = {path for pattern in (*SIDE_FILES, *modules) for path in folder.glob(pattern)}
    found |= {path for path in folder.iterdir() if is_terms(path.name)}
    return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())


def is_terms(name: str) -> bool:
    """Whether a file is a licence, a notice or a policy of use, in any case.

    Example:
        >>> [name for name in ("LICENSE", "Notice.txt", "USE_POLICY.md", "license.py", "notes.txt") if is_terms(name)]
        ['LICENSE', 'Notice.txt', 'USE_POLICY.md']
    """
    suffix = Path(name).suffix.lower()
    is_text = suffix in TEXTS or suffix[1:].isdigit()  # LICENSE-2.0
    return is_text and any(fnmatchcase(name.lower(), f"*{word}*") for word in TERMS)


def find_left_behind(folder: Path) -> list[str]:
    """What else lies in the folder of a checkpoint: files that are not copied, and folders with a slash."""
    copied = {name.partition("/")[0] for name in find_side_files(folder)} | set(find_modules(folder))
    others = [path for path in sorted(folder.iterdir()) if path.name not in copied]
    return [
        f"{path.name}/" if path.is_dir() else path.name
        for path in others
        if not any(fnmatchcase(path.name, pattern) for pattern in REPLACED)
    ]
