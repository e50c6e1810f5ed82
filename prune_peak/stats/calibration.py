"""`calibrate()`: measure a model once and keep its statistics in a file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.data_sets import check_data
from ..data.sampling import sample_windows
from ..data.windows import Windows, name_data
from ..errors import PrunePeakError, UsageError, spell
from ..memory import estimate_workload, plan_execution
from ..models.execution import DTYPES, ExecutionConfig, default_dtype, find_device
from ..models.loading import Model, open_model
from ..option_fields import takes
from ..options import NEURON, CalibrateOptions, CalibrationOptions
from ..progress import next_stage, stages
from ..sites.finding import find_sites, prunable_kinds
from ..sites.site import Site
from .collection import SiteStats, collect_together
from .stats_file import Statistics, load_statistics, write_statistics


@takes(CalibrateOptions)
@stages(2)
def calibrate(model: str, output: str | Path, **options: Any) -> Statistics:
    """Measure a model once and keep its statistics in a file, for `compress(stats=...)` at several ratios.

    Args:
        model: a folder or a Hub id.
        {options}

    Raises:
        PrunePeakError: bad input, or a file that exists and `force` is not given.

    Example:
        >>> calibrate("examples/opt-mini", "opt-mini.stats", covariances=True)   # doctest: +SKIP
        >>> compress("examples/opt-mini", 0.2, stats="opt-mini.stats")           # doctest: +SKIP
    """
    given = CalibrateOptions(output=output, **options)
    path, covariances = Path(output), given.covariances
    if path.is_dir():
        raise UsageError(f"{spell('output', path)} is a folder; expected a file to write.")
    if path.exists() and not given.force:
        raise PrunePeakError(
            f"{path} exists; pass {spell('force', True)} to replace it, or choose another {spell('output')}."
        )
    find_device(given.device)  # raises
    source = open_model(model, given.revision)
    check_data(given.calibration, source.sees_images, given.reading)
    kinds, attention = prunable_kinds(source.meta_model, source.family), source.family.attention
    # where heads can become narrower, that needs covariances of queries and keys
    unit = {"unit": NEURON} if covariances and attention and attention.head_dim_prunable else {"keep_shape": True}
    sites = find_sites(source.meta_model, source.family, kinds, **unit)
    others = set(prunable_kinds(source.meta_model, source.family, keep_shape=False)) - set(kinds)  # of experts
    sites += find_sites(source.meta_model, source.family, sorted(others))
    sites.sort(key=lambda site: site.block)
    execution = plan_execution(
        source, estimate_workload(source, sites, given, covariances), given.max_memory, given.device
    )
    calibration = measure(source, given, execution)
    next_stage()
    stats = calibration.observe(sites, covariances)
    write_statistics(path, source, calibration.windows, calibration.options, stats, len(sites), covariances)
    return load_statistics(path, source, sites)


@dataclass(frozen=True)
class Calibration:
    """The windows of a calibration, and the statistics of any sites on them, measured when they are asked for."""

    windows: Windows
    options: Mapping[str, Any]  # as recipe and statistics file show them
    observe: Callable[[Sequence[Site], bool], Iterable[SiteStats]]  # sites, and whether with covariances

    @property
    def dtype(self) -> torch.dtype:
        """The type to compute in."""
        return DTYPES[self.options["dtype"]]


def measure(source: Model, options: CalibrationOptions, execution: ExecutionConfig) -> Calibration:
    """Sample the windows of a calibration, and be ready to measure on them."""
    windows = sample_windows(
        source,
        options.calibration,
        options.samples,
        options.sequence_length,
        options.seed,
        options.reading,
        execution,
    )
    name = options.dtype or default_dtype(source)

    def observe(sites: Sequence[Site], covariances: bool) -> Iterable[SiteStats]:
        return collect_together(source, sites, windows.calibration, DTYPES[name], covariances, execution)

    record = {
        "calibration": [name_data(data) for data in options.calibration],
        "samples": len(windows.calibration),
        "sequence_length": None if source.sees_images else windows.calibration.shape[-1],
        "dtype": name,
        "seed": options.seed,
        **asdict(options.reading),
    }
    return Calibration(windows, record, observe)
