"""The errors that a user is meant to read: one line that says what is wrong, what was expected and what to do."""

LONGEST = 2000  # characters of a line


class PrunePeakError(Exception):
    """A refusal or a failure with a cause outside this program (the command line prints it and exits with 1)."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(PrunePeakError):
    """An argument that no input could make sense of (the command line exits with 2)."""


class VerificationError(PrunePeakError):
    """What was written does not compute what it should, or cannot be known to."""


class LostProcessError(Exception):
    """Another process of the same command is gone; what is finished stays, as after an interruption."""


def one_line(text: str) -> str:
    r"""One line of printable characters: a stranger's words, so that a terminal shows them and does not obey them.

    Example:
        >>> print(one_line("red \x1b[31m\n"))
        red \x1b[31m\n
    """
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def brief(error: BaseException) -> str:
    """What a library says, shortly; its kind where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__
