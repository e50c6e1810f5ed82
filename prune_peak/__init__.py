"""Make transformer checkpoints smaller without training: fold the peak of pruned neurons, delete them, load with stock
transformers.

Example:
    >>> import prune_peak
    >>> result = prune_peak.compress("examples/opt-mini", 0.3, "smaller")  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from .errors import PrunePeakError, UsageError, VerificationError

if TYPE_CHECKING:
    from .ablation import ablated
    from .analysis import analyze
    from .comparison import evaluate
    from .compression import Compression, compress, save_statistics
    from .gguf_file import export_gguf
    from .hub import push
    from .inspection import inspect
    from .selection import Choice
    from .source import Source, open_source
    from .study import ablate, find_studied, load_whole
    from .verification import Verification, verify

__version__ = "0.1.0.dev0"
__all__ = [
    "Choice",
    "Compression",
    "PrunePeakError",
    "Source",
    "UsageError",
    "Verification",
    "VerificationError",
    "ablate",
    "ablated",
    "analyze",
    "compress",
    "evaluate",
    "export_gguf",
    "find_studied",
    "inspect",
    "load_whole",
    "open_source",
    "push",
    "save_statistics",
    "verify",
]

_ROOMS = {
    "Choice": "selection",
    "Compression": "compression",
    "Source": "source",
    "Verification": "verification",
    "ablate": "study",
    "ablated": "ablation",
    "analyze": "analysis",
    "compress": "compression",
    "evaluate": "comparison",
    "export_gguf": "gguf_file",
    "find_studied": "study",
    "inspect": "inspection",
    "load_whole": "study",
    "open_source": "source",
    "push": "hub",
    "save_statistics": "compression",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `prune-peak --help` must not wait for them
    if name in _ROOMS:
        from importlib import import_module

        return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
