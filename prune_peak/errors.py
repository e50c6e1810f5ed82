"""Errors for the user: one line with what is wrong, what was expected and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

LONGEST = 2000  # characters of a message
NO_MEMORY = ("allocate memory", "failed to map segment", "out of memory")  # torch and the loader have no class of it
_in_command: ContextVar[bool] = ContextVar("in_command", default=False)


class PrunePeakError(Exception):
    """Base class of errors shown to the user without a traceback (exit code 1)."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(PrunePeakError):
    """An invalid argument, whatever the model (exit code 2)."""


class VerificationError(PrunePeakError):
    """The output does not compute the expected function, or cannot be verified."""


class LostProcessError(Exception):
    """Another process of the same distributed command died; finished work is kept and can be resumed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library says that there is not enough memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


@contextmanager
def spelled_as_options() -> Iterator[None]:
    """Let `spell` name options of the command line."""
    token = _in_command.set(True)
    try:
        yield
    finally:
        _in_command.reset(token)


def spell(name: str, value: object = None) -> str:
    """An option for a message: the argument where Python called, the option of the command line in a command.

    Args:
        name: of the field of the option.
        value: False for the option that turns it off; None names the option alone.

    Example:
        >>> spell("force", True), spell("samples", 8), spell("sequence_length")
        ('force=True', 'samples=8', 'sequence_length')
        >>> with spelled_as_options():
        ...     spell("refit", False), spell("samples", 8), spell("sites", ("mlp", "attention"))
        ('--no-refit', '--samples 8', '--sites mlp,attention')
    """
    if not _in_command.get():
        return name if value is None else f"{name}={str(value) if isinstance(value, Path) else value!r}"
    flag = name.replace("_", "-")
    if value is None or isinstance(value, bool):
        return f"--no-{flag}" if value is False else f"--{flag}"
    return f"--{flag} {','.join(value) if isinstance(value, tuple) else value}"


def one_line(text: str) -> str:
    r"""One line of printable characters; escapes control sequences in untrusted text.

    Example:
        >>> print(one_line("red \x1b[31m\n"))
        red \x1b[31m\n
    """
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def brief(error: BaseException) -> str:
    """The message of a library's error, at most 200 characters; its type if the message is empty."""
    return " ".join(str(error).split())[:200] or type(error).__name__
