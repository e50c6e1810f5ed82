"""Make transformer checkpoints smaller without training: fold the peak of pruned neurons, delete them, load with stock
transformers.

Example:
    >>> import prune_peak
    >>> result = prune_peak.compress("examples/opt-mini", 0.3, "smaller")  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from .errors import PrunePeakError, UsageError, VerificationError

if TYPE_CHECKING:
    from .comparison import evaluate
    from .compression import Compression, compress
    from .gguf_file import export_gguf
    from .hub import push
    from .source import Source, open_source
    from .verification import Verification, verify

__version__ = "0.1.0.dev0"
__all__ = [
    "Compression",
    "PrunePeakError",
    "Source",
    "UsageError",
    "Verification",
    "VerificationError",
    "compress",
    "evaluate",
    "export_gguf",
    "open_source",
    "push",
    "verify",
]

_ROOMS = {
    "Compression": "compression",
    "Source": "source",
    "Verification": "evaluation",
    "compress": "compression",
    "evaluate": "comparison",
    "export_gguf": "gguf_file",
    "open_source": "source",
    "push": "hub",
    "verify": "evaluation",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `prune-peak --help` must not wait for them
    if name in _ROOMS:
        from importlib import import_module

        return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
