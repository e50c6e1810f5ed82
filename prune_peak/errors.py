"""The errors that a user is meant to read: one line that says what is wrong, what was expected and what to do."""


class PrunePeakError(Exception):
    """A refusal or a failure with a cause outside this program (the command line prints it and exits with 1)."""


class UsageError(PrunePeakError):
    """An argument that no input could make sense of (the command line exits with 2)."""


class VerificationError(PrunePeakError):
    """A written folder does not compute what it should."""


class LostProcessError(Exception):
    """Another process of the same command is gone; what is finished stays, as after an interruption."""
