"""`prepare()`: what a run of `compress` is, refused or decided before any activation is measured."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .conversion.choice import choose_conversion
from .conversion.layout import Conversion
from .data.data_sets import check_data
from .data.texts import load_tokenizer
from .data.windows import name_data
from .errors import UsageError, spell
from .evaluation.quality import EvalSet, build_given_eval_set
from .export.folder import check_side_files
from .export.recipe import VERSIONS
from .export.tokenizer import check_tokenizer
from .memory import Workload, estimate_workload, plan_execution
from .models.execution import ExecutionConfig, find_device
from .models.forward import check_forward
from .models.loading import Model, ModelSpec, open_model
from .models.stacks import choose_stacks
from .options import AUTO, Budget, CompressOptions
from .progress import phase
from .proof import prove
from .pruning.budget import Widths, drop_last, find_allocations
from .sites.blocks import Blocks, BlocksSite
from .sites.finding import find_sites
from .sites.site import Site
from .stats.calibration import Calibration, measure
from .stats.stats_file import Statistics, load_statistics
from .version import __version__

log = logging.getLogger(__name__)

NOT_RECORDED = ("output", "stats", "revision", "force")  # options that do not change what is written


@dataclass(frozen=True)
class Job:
    """One run of `compress`."""

    options: CompressOptions
    source: Model
    folder: Path  # to write
    sites: Sequence[Site]
    allocations: Sequence[Widths]  # ways to meet the budget; several for a size target over several kinds of site
    conversion: Conversion  # of the first allocation
    statistics: Statistics | None  # from a file
    eval_set: EvalSet | None  # None: held-out windows of the calibration
    workload: Workload
    execution: ExecutionConfig

    @property
    def record(self) -> dict[str, Any]:
        """The options that decide the result, as the recipe shows them: names of data, not where they are."""
        record = {name: value for name, value in asdict(self.options).items() if name not in NOT_RECORDED}
        if self.options.evaluate is not None:
            record["evaluate"] = [name_data(data) for data in self.options.evaluate]
        record["calibration"] = [name_data(data) for data in self.options.calibration]
        record |= {"sites": sorted({site.label for site in self.sites}), "device": self.execution.device.type}
        return record if self.statistics is None else record | dict(self.statistics.options)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that an unfinished run must share with this one to be resumed."""
        return self.record | {"source": self.source.digest, "versions": VERSIONS, "prune_peak": __version__}

    def calibrate(self) -> Calibration:
        """The calibration: from the statistics file, or to be measured when it is observed."""
        if self.statistics is not None:
            return Calibration(self.statistics.windows, self.statistics.options, self.statistics.read_sites)
        return measure(self.source, self.options, self.execution)

    def convert(self, widths: Widths) -> Conversion:
        """What the sites with a width become; the others stay whole."""
        return convert(self.source, self.sites, widths, self.options.output_class)


def prepare(model: str, options: CompressOptions) -> Job:
    """Open a model and decide what a run does.

    Raises:
        UsageError: options that contradict each other or the model.
        PrunePeakError: a model, statistics, data or a memory budget that cannot be used.
    """
    find_device(options.device)  # raises
    with phase("open the model"):
        source = choose_stacks(open_model(model, options.revision), options.stack)
        check_forward(source)
        sites, allocations = plan_widths(source, options, options.output_class)
        conversion = convert(source, sites, allocations[0], options.output_class)
    statistics = None
    if options.stats is not None and Blocks.label in options.kinds:
        raise UsageError(
            f"a statistics file holds nothing of whole blocks, which are compared on the calibration data. Remove "
            f"{spell('stats', options.stats)}."
        )
    if options.stats is not None:
        statistics = load_statistics(Path(options.stats), source, sites)
        statistics.check(sites, options.refit, options.fill == AUTO, len(allocations) > 1)
        workload = statistics.workload(source, sites, options.needs_covariances)
    else:
        workload = estimate_workload(source, sites, options, options.needs_covariances)
    measured = () if options.stats is not None else options.calibration
    if measured and not source.sees_images:
        load_tokenizer(source)  # raises
    check_data([*measured, *(options.evaluate or ())], source.sees_images, options.reading)
    eval_set = None
    if options.evaluate is not None:
        eval_set = build_given_eval_set(source, options.evaluate, options.sequence_length, reading=options.reading)
    folder = Path(options.output or f"{Path(model).resolve().name}-peak-{options.label}")
    if source.folder.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{spell('output', folder)} contains the model itself; choose another.")
    execution = plan_execution(source, workload, options.max_memory, options.device)
    check_tokenizer(source, conversion)
    check_side_files(source.folder)
    if conversion.zero_filled:
        _warn_zero_fill(conversion, options.refit)
    if not source.family.streamable:
        log.warning("%s runs whole, all its weights in memory: its blocks cannot run one by one.", source.name)
    return Job(options, source, folder, sites, allocations, conversion, statistics, eval_set, workload, execution)


def plan_widths(spec: ModelSpec, budget: Budget, output_class: str) -> tuple[list[Site], list[Widths]]:
    """The sites to prune, and the ways to meet the budget.

    Raises:
        PrunePeakError: nothing would be pruned, nothing kept, or the target cannot be reached.
    """
    prove(spec, budget.kinds)
    sites = find_sites(spec.meta_model, spec.family, budget.kinds, budget.unit, budget.keep_shape)
    able = [site for site in sites if isinstance(site, BlocksSite) and site.removed]
    if able:
        return sites, [drop_last(spec, able, budget, output_class)]
    return sites, find_allocations(spec, sites, budget, output_class)


def convert(spec: ModelSpec, sites: Sequence[Site], widths: Mapping[str, int], output_class: str) -> Conversion:
    """What the sites with a width become; the others stay whole."""
    pruned = [site for site in sites if site.name in widths]
    return choose_conversion(spec, pruned, widths, spec.dtype, output_class)


def _warn_zero_fill(conversion: Conversion, refit: bool) -> None:
    log.warning(
        "%s: pruned neurons are held at zero, because no stock class has a bias for other constants here (%s)%s.",
        " and ".join(conversion.zero_filled),
        conversion.reason,
        "; the refit changes the kept weights only" if refit else "",
    )
