"""The file of statistics: what a calibration saw of every site, to cut at many ratios without measuring again.

One safetensors file, written and read site by site. It holds the windows, and of every site `<site>/stats/...`; with
the products of neurons, for the refit, also `<site>/grams/...` (or with fewer tokens than neurons `<site>/tape/...`,
the activations), the power of the hidden states, and the moments of queries and keys where heads can get narrower.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibration import DTYPES, Observed, weigh
from .checkpoint import TensorFile, stream_tensors
from .errors import PrunePeakError
from .evidence import Grams, Moments, Tape
from .machine import Load
from .sites import Site
from .source import Source
from .stats import Stats
from .strangers import parse_json
from .texts import SEQUENCE_LENGTH, Windows

STATISTICS = "prune_peak_statistics"  # the key of the metadata that tells such a file
OPTIONS = {"calibration": str, "samples": int, "sequence_length": int, "dtype": str, "seed": int}  # that it tells
HEADER_OF_A_SITE = 5000  # bytes at most, of two dozen tensors


@dataclass(frozen=True)
class Statistics:
    """An opened file of statistics."""

    windows: Windows
    options: Mapping[str, Any]  # of the calibration, as the recipe tells them
    has_products: bool  # of neurons, for the refit
    sites: int
    _file: TensorFile

    def check(
        self, sites: Sequence[Site], refit: bool, is_fill_open: bool = False, is_split_open: bool = False
    ) -> None:
        """Whether this is enough for what is asked for.

        Raises:
            PrunePeakError: products are needed, and are not there.
        """
        uses = {
            "the refit": refit,
            "--fill auto": is_fill_open,
            "--unit neuron": any(site.narrowed for site in sites),
            "a target over two kinds of site": is_split_open,
        }
        needs = [use for use, is_wanted in uses.items() if is_wanted]
        if needs and not self.has_products:
            instead = ", or add --no-refit" if needs == ["the refit"] else ""
            raise PrunePeakError(
                f"{self._file.path} holds no products of neurons, needed for {' and '.join(needs)}. Make it with "
                f"`prune-peak calibrate --gram`{instead}."
            )

    def weigh(self, source: Source, sites: Sequence[Site], for_refit: bool) -> Load:
        """What deciding by this puts on the machine: no text to sample, and no hidden states of the calibration."""
        calibration, samples, length, dtype, seed = (self.options[name] for name in OPTIONS)
        load = weigh(source, sites, calibration, samples, length or SEQUENCE_LENGTH, dtype, seed, for_refit)
        return replace(load, is_measured=True, samples_text=False)

    def observed(self, site: Site) -> Observed:
        """What was seen of a site."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in self._file.read(f"{site.name}/").items():
            part, _, field = name.partition("/")
            parts.setdefault(part, {})[field] = value
        try:
            stats = Stats.from_tensors(parts["stats"])
            if not self.has_products:
                return Observed(site, stats)
            kind, of = (Grams, "grams") if "grams" in parts else (Tape, "tape")
            gathered = kind.from_tensors(parts[of], site.neurons)
            power = parts["power"]["median"].item()
            if not 0 < power < math.inf:
                raise ValueError(f"the power of the hidden states is {power}")
            narrowed = tuple(Moments.from_tensors(parts[name], site.neurons) for name in site.narrowed)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise PrunePeakError(
                f"{self._file.path} does not hold all of {site.name} ({error!r}). Calibrate it anew."
            ) from None
        return Observed(site, stats, gathered, power, narrowed)


def write_statistics(
    path: Path,
    source: Source,
    windows: Windows,
    options: Mapping[str, Any],
    observed: Iterable[Observed],
    sites: int,
    has_products: bool,
) -> None:
    """Write what is seen of the sites, as it is seen.

    Raises:
        PrunePeakError: the file cannot be written.
    """
    about = {"model": source.digest, "text": windows.source, "options": dict(options), "products": has_products}
    metadata = {STATISTICS: json.dumps(about, sort_keys=True)}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "calibration", windows.calibration
        yield "held_out", windows.held_out
        for seen in observed:
            for name, value in _tell(seen).items():
                yield f"{seen.site.name}/{name}", value

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream_tensors(tensors(), path, metadata, HEADER_OF_A_SITE * (sites + 1))
    except OSError as error:
        raise PrunePeakError(f"{path} cannot be written ({error}).") from None


def _tell(seen: Observed) -> dict[str, Tensor]:
    parts: dict[str, Mapping[str, Tensor]] = {"stats": seen.stats.to_tensors()}
    if seen.gathered is not None:
        parts["grams" if isinstance(seen.gathered, Grams) else "tape"] = seen.gathered.to_tensors()
        parts["power"] = {"median": torch.tensor(seen.power, dtype=torch.float64)}
        parts |= {name: vars(moments) for name, moments in zip(seen.site.narrowed, seen.narrowed, strict=True)}
    return {f"{part}/{name}": value for part, fields in parts.items() for name, value in fields.items()}


def load_statistics(path: Path, source: Source, sites: Sequence[Site]) -> Statistics:
    """Open statistics that `calibrate` kept of this very model, of these sites at least.

    Raises:
        PrunePeakError: not such a file, or of another model.
    """
    file = TensorFile(path)
    try:
        about = parse_json(file.metadata[STATISTICS])
        windows = Windows(about["text"], file.read("calibration")[""], file.read("held_out")[""])
        model, has_products = about["model"], bool(about["products"])
        options = {name: about["options"][name] for name in OPTIONS}
        _check_windows(windows, source)
        length = None if windows.calibration.is_floating_point() else windows.calibration.shape[1]
        told = all(type(options[name]) is kind for name, kind in OPTIONS.items() if name != "sequence_length")
        if not told or (options["samples"], options["sequence_length"]) != (len(windows.calibration), length):
            raise ValueError(f"options are {options}")
        if options["dtype"] not in DTYPES:
            raise ValueError(f"dtype is {options['dtype']!r}")
    except (KeyError, ValueError, TypeError) as error:
        raise PrunePeakError(
            f"{path} is not a file of statistics that `prune-peak calibrate` wrote ({error!r})."
        ) from None
    if model != source.digest:
        raise PrunePeakError(f"{path} holds the statistics of another model than {source.name}. Calibrate it anew.")
    if any(file.shapes.get(f"{site.name}/stats/pivot") != (site.neurons,) for site in sites):
        raise PrunePeakError(f"{path} does not hold statistics of every site of {source.name}. Calibrate it anew.")
    kept = sum(name.endswith("/stats/pivot") for name in file.shapes)
    return Statistics(windows, options, has_products, kept, file)


def _check_windows(windows: Windows, source: Source) -> None:
    """See that the windows are of a text's name, and of tokens or images as the model takes them."""
    for part in (windows.calibration, windows.held_out):
        if part.is_floating_point():
            fits = source.sees_images and part.dim() == 4
        else:
            known = not part.numel() or 0 <= int(part.min()) <= int(part.max()) < source.config.vocab_size
            fits = part.dtype is torch.int64 and part.dim() == 2 and known
        if not fits or not isinstance(windows.source, str):
            raise ValueError(f"windows of {windows.source!r} are {tuple(part.shape)} {part.dtype}")
