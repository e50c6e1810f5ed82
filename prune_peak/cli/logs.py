"""Logging of the command line."""

import logging
import os
from importlib import import_module

from ..errors import one_line


class OneLine(logging.Formatter):
    """Escapes control characters, because messages may quote untrusted files."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def configure_logging(quiet: bool) -> None:
    """Silence the libraries, and our own warnings and progress bars with --quiet."""
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.ERROR)
    logging.getLogger("prune_peak").setLevel(logging.ERROR if quiet else logging.WARNING)


def import_libraries() -> None:
    """torch, transformers, and what every command imports of this package: seconds, with a bar."""
    from ..progress import phase

    # transformers imports torchao, which warns about itself
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    with phase("start"):
        from transformers.utils import logging as transformers_logging

        import_module("prune_peak.job")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
