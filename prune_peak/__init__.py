"""Make transformer checkpoints smaller: fold the peaks of pruned neurons, delete them, load with stock transformers.

Example:
    >>> import prune_peak
    >>> result = prune_peak.compress("examples/opt-mini", 0.3, "smaller")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import PrunePeakError, UsageError, VerificationError
from .version import __version__

if TYPE_CHECKING:
    from .compression import CompressionResult as CompressionResult
    from .compression import compress as compress
    from .evaluation.comparison import evaluate as evaluate
    from .export.formats import export_model as export_model
    from .hub import push as push
    from .inspection import inspect as inspect
    from .models.loading import Model as Model
    from .models.loading import open_model as open_model
    from .recovery import HealResult as HealResult
    from .recovery import heal as heal
    from .sites.hooks import ablated as ablated
    from .sites.plan import SitePlan as SitePlan
    from .stats.calibration import calibrate as calibrate
    from .studies.ablation import ablate as ablate
    from .studies.analysis import analyze as analyze
    from .studies.runner import find_studied as find_studied
    from .studies.runner import load_whole as load_whole
    from .verification import Verification as Verification
    from .verification import verify as verify

# Imported when they are used: torch and transformers take seconds to import, and `prune-peak --help` needs neither
_MODULES = {
    "SitePlan": "sites.plan",
    "CompressionResult": "compression",
    "Model": "models.loading",
    "Verification": "verification",
    "ablate": "studies.ablation",
    "ablated": "sites.hooks",
    "analyze": "studies.analysis",
    "calibrate": "stats.calibration",
    "compress": "compression",
    "evaluate": "evaluation.comparison",
    "export_model": "export.formats",
    "find_studied": "studies.runner",
    "HealResult": "recovery",
    "heal": "recovery",
    "inspect": "inspection",
    "load_whole": "studies.runner",
    "open_model": "models.loading",
    "push": "hub",
    "verify": "verification",
}

__all__ = ["PrunePeakError", "UsageError", "VerificationError", "__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
