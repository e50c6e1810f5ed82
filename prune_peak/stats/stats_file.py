"""The statistics file: calibration statistics of every site, to compress at several ratios.

One safetensors file, written and read site by site. It holds the windows, and for every site `<site>/stats/...`. With
covariances, for the refit, it also holds `<site>/gram/...` (with fewer tokens than neurons the activations,
`<site>/activations/...`), the power of the hidden states, and the moments of queries and keys if heads can get
narrower.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.windows import PADDING, Windows
from ..errors import PrunePeakError, spell
from ..io.tensor_files import TensorFile, stream_tensors
from ..io.untrusted import parse_json
from ..memory import Workload, estimate_workload
from ..models.execution import DTYPES
from ..models.loading import Model
from ..options import CalibrationOptions
from ..progress import open_bar
from ..sites.experts import ExpertsSite
from ..sites.site import Site
from .collection import SiteStats
from .covariance import ActivationBuffer, Moments, SplitGram
from .expert_use import read_use
from .histogram import Stats

STATISTICS = "prune_peak_statistics"  # metadata key that marks a statistics file
OPTIONS = tuple(item.name for item in fields(CalibrationOptions) if item.name != "revision")  # in the header
GROUPS: dict[type, str] = {SplitGram: "gram", ActivationBuffer: "activations"}  # the tensors of an accumulator
SITE_HEADER_BYTES = 5000  # at most, for two dozen tensors


@dataclass(frozen=True)
class Statistics:
    """An open statistics file."""

    windows: Windows
    options: Mapping[str, Any]  # of the calibration, as in the recipe
    has_covariances: bool  # for the refit
    sites: int
    _file: TensorFile

    def check(
        self, sites: Sequence[Site], refit: bool, is_fill_open: bool = False, is_split_open: bool = False
    ) -> None:
        """Raise PrunePeakError if an option needs covariances and the file holds none."""
        uses = {
            "the refit": refit,
            f"{spell('fill', 'auto')}": is_fill_open,
            f"{spell('unit', 'neuron')}": any(site.observed_outputs for site in sites),
            "a target over two kinds of site": is_split_open,
        }
        needs = [use for use, is_wanted in uses.items() if is_wanted]
        if needs and not self.has_covariances:
            instead = f", or add {spell('refit', False)}" if needs == ["the refit"] else ""
            raise PrunePeakError(
                f"{self._file.path} holds no covariances, required for {' and '.join(needs)}. Write it again with "
                f"`prune-peak calibrate {spell('covariances', True)}`{instead}."
            )

    def workload(self, source: Model, sites: Sequence[Site], for_refit: bool) -> Workload:
        """The work of pruning by these statistics: no text to sample, and no hidden states of the calibration."""
        options = CalibrationOptions(**{name: value for name, value in self.options.items() if value is not None})
        return replace(estimate_workload(source, sites, options, for_refit), is_measured=True, samples_text=False)

    def read_sites(self, sites: Sequence[Site], covariances: bool) -> Iterator[SiteStats]:
        """Read the statistics of sites, one by one."""
        with open_bar("prune", "site", len(sites)) as bar:
            for site in sites:
                yield self.read_site(site)
                bar.update()

    def read_site(self, site: Site) -> SiteStats:
        """Read the statistics of a site; raise PrunePeakError if a tensor is missing or invalid."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in self._file.read(f"{site.name}/").items():
            part, _, field = name.partition("/")
            parts.setdefault(part, {})[field] = value
        try:
            stats = Stats.from_tensors(parts["stats"])
            use = read_use(parts["use"], site.neurons) if isinstance(site, ExpertsSite) else None
            if use is not None or not self.has_covariances:
                return SiteStats(site, stats, use=use)
            kind = SplitGram if GROUPS[SplitGram] in parts else ActivationBuffer
            accumulator = kind.from_tensors(parts[GROUPS[kind]], site.neurons)
            power = parts["power"]["median"].item() if "power" in parts else None  # of a model that ran whole
            if power is not None and not 0 < power < math.inf:
                raise ValueError(f"the power of the hidden states is {power}")
            outputs = tuple(Moments.from_tensors(parts[name], site.neurons) for name in site.observed_outputs)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise PrunePeakError(
                f"{self._file.path} does not hold all of {site.name} ({error!r}). Run `prune-peak calibrate` again."
            ) from None
        return SiteStats(site, stats, accumulator, power, outputs)


def write_statistics(
    path: Path,
    source: Model,
    windows: Windows,
    options: Mapping[str, Any],
    measured: Iterable[SiteStats],
    sites: int,
    has_covariances: bool,
) -> None:
    """Write the statistics of each site as soon as it is measured; raise PrunePeakError if that fails."""
    about = {"model": source.digest, "text": windows.source, "options": dict(options)}
    metadata = {STATISTICS: json.dumps(about | {"covariances": has_covariances}, sort_keys=True)}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "calibration", windows.calibration
        yield "held_out", windows.held_out
        for site_stats in measured:
            for name, value in _to_tensors(site_stats).items():
                yield f"{site_stats.site.name}/{name}", value.cpu()

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream_tensors(tensors(), path, metadata, SITE_HEADER_BYTES * (sites + 1))
    except OSError as error:
        raise PrunePeakError(f"{path} cannot be written ({error}).") from None


def _to_tensors(measured: SiteStats) -> dict[str, Tensor]:
    parts: dict[str, Mapping[str, Tensor]] = {"stats": measured.stats.to_tensors()}
    if measured.use is not None:
        parts["use"] = {name: value for name, value in vars(measured.use).items() if value is not None}
    if measured.accumulator is not None:
        parts[GROUPS[type(measured.accumulator)]] = measured.accumulator.to_tensors()
        if measured.power is not None:
            parts["power"] = {"median": torch.tensor(measured.power, dtype=torch.float64)}
        parts |= zip(measured.site.observed_outputs, map(vars, measured.outputs), strict=True)
    return {f"{part}/{name}": value for part, fields in parts.items() for name, value in fields.items()}


def load_statistics(path: Path, source: Model, sites: Sequence[Site]) -> Statistics:
    """Open a statistics file that `calibrate` wrote for this model, and that holds at least these sites.

    Raises:
        PrunePeakError: not a statistics file, or one of another model or of other sites.
    """
    file = TensorFile(path)
    try:
        about = parse_json(file.metadata[STATISTICS])
        windows = Windows(about["text"], file.read("calibration")[""], file.read("held_out")[""])
        model, has_covariances = about["model"], bool(about["covariances"])
        options = {name: about["options"][name] for name in OPTIONS}
        _check_windows(windows, source)
        length = None if windows.calibration.is_floating_point() else windows.calibration.shape[-1]
        names = options["calibration"]
        are_typed = (
            isinstance(names, list) and all(type(name) is str for name in names) and type(options["seed"]) is int
        )
        if not are_typed or (options["samples"], options["sequence_length"]) != (len(windows.calibration), length):
            raise ValueError(f"options are {options}")
        if options["dtype"] not in DTYPES:
            raise ValueError(f"dtype is {options['dtype']!r}")
    except (KeyError, ValueError, TypeError) as error:
        raise PrunePeakError(f"{path} is not a statistics file of `prune-peak calibrate` ({error!r}).") from None
    retry = "Run `prune-peak calibrate` again."
    if model != source.digest:
        raise PrunePeakError(f"{path} holds statistics of another model, not of {source.name}. {retry}")
    if any(file.shapes.get(f"{site.name}/stats/pivot") != (site.neurons,) for site in sites):
        raise PrunePeakError(f"{path} does not hold statistics of every site of {source.name}. {retry}")
    count = sum(name.endswith("/stats/pivot") for name in file.shapes)
    return Statistics(windows, options, has_covariances, count, file)


def _check_windows(windows: Windows, source: Model) -> None:
    """Raise ValueError unless the windows hold tokens or images for this model, and the name of a text."""
    for part in (windows.calibration, windows.held_out):
        if part.is_floating_point():
            fits = source.sees_images and part.dim() == 4
        else:
            tokens = part[part != PADDING] if source.reads_pairs else part
            in_vocabulary = not tokens.numel() or 0 <= int(tokens.min()) <= int(tokens.max()) < source.vocabulary
            fits = part.dtype is torch.int64 and part.dim() == (3 if source.reads_pairs else 2) and in_vocabulary
        if not fits or not isinstance(windows.source, str):
            raise ValueError(f"windows of {windows.source!r} are {tuple(part.shape)} {part.dtype}")
