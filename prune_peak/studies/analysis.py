"""`analyze()`: how neurons are distributed, and whether peaks and means are stable from one text to another."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..data.data_sets import check_data
from ..data.images import choose_images
from ..data.sampling import split_windows
from ..data.windows import Windows, into_batches, window_length
from ..errors import PrunePeakError, UsageError, spell
from ..evaluation.quality import build_eval_set, is_evaluable
from ..models.execution import DTYPES, default_dtype
from ..models.families import block_paths
from ..models.loading import Model, open_model
from ..option_fields import spell_command, takes
from ..options import SELF
from ..progress import next_stage, open_bar, stages
from ..report import Section, write_report, write_table
from ..sites.site import Site
from .curves import is_significant, mean_and_error
from .distributions import (
    REST,
    Distribution,
    Drift,
    Neuron,
    compare,
    describe,
    find_extreme_neurons,
    measure_distributions,
)
from .options import AnalyzeOptions
from .plots import MISSING, can_draw, draw_blocks, draw_drift, draw_heads, draw_histograms
from .runner import TrialRunner, find_studied, load_whole, summarize
from .trials import BASELINE, Trial

log = logging.getLogger(__name__)

ZERO, MEASURED_FILLS = "zero", ("mean", "median", "peak")
CROSS_FRACTION, CROSS_SEEDS = 0.3, 3
NOISE = "the same, other windows"  # a second sample of a text, to see how far two samples of it differ
TABLES = ("distributions", "stability", "cross")
Drifts = Mapping[tuple[str, str], Sequence[Drift]]


@dataclass(frozen=True)
class Analysis:
    """What `analyze` measured, and where it is written."""

    output: Path
    protocol: Mapping[str, Any]
    distributions: Sequence[Mapping[str, Any]]  # a row per text, site, head (None: the whole site) and kind of token
    stability: Sequence[Mapping[str, Any]]  # a row per pair of texts and site
    cross: Sequence[Mapping[str, Any]]  # a row per calibration text, evaluation text, kind of site and fill

    def to_json(self) -> dict[str, Any]:
        return {"protocol": dict(self.protocol)} | {name: list(getattr(self, name)) for name in TABLES}


@takes(AnalyzeOptions)
@stages(3)
def analyze(model: str, output: str | Path | None = None, **options: Any) -> Analysis:
    """Measure how every neuron of a model is distributed, and write tables, pictures and a report.

    With several data sets it also measures how far peaks and means drift between them, and the loss of the model on one
    text when its neurons are held at the constants of another.

    Args:
        model: a folder or a Hub id.
        {options}

    Raises:
        PrunePeakError: bad input, before work starts.

    Example:
        >>> analysis = analyze("examples/llama-mini", data="notes.txt")  # doctest: +SKIP
        >>> analysis.distributions[0]["peak_off_zero"]                   # doctest: +SKIP
        0.13
    """
    given = AnalyzeOptions(output=output, **options)
    source = open_model(model, given.revision)
    sites = [site for site in find_studied(source) if site.block < len(block_paths(source.meta_model, source.family))]
    chosen = [_find_neuron(sites, wanted) for wanted in given.neuron]
    name = Path(model).resolve().name
    folder = Path(output or f"{name}-analysis")
    if folder.exists() and not given.force:
        raise PrunePeakError(
            f"{folder} exists; pass {spell('force', True)} to write into it, or choose another {spell('output')}."
        )
    splits = _split(source, given)
    compute = DTYPES[given.dtype or default_dtype(source)]
    protocol = {
        "model": name,
        "class": source.model_class.__name__,
        "texts": list(splits),
        "windows": given.samples,
        "evaluated_windows": given.windows if len(splits) > 1 else 0,
        "sequence_length": None if source.sees_images else window_length(source, given.sequence_length),
        "dtype": str(compute).removeprefix("torch."),
        "seed": given.seed,
    }
    turns = 2 if len(splits) > 1 else 1
    next_stage()
    measured = {text: _measure(source, sites, split.calibration[::turns], compute) for text, split in splits.items()}
    drifts: dict[tuple[str, str], list[Drift]] = {}
    cross: list[dict[str, Any]] = []
    if turns > 1:
        for text, split in splits.items():
            drifts[text, NOISE] = compare(measured[text], _measure(source, sites, split.calibration[1::2], compute))
        drifts |= {(one, other): compare(measured[one], measured[other]) for one, other in combinations(splits, 2)}
        if is_evaluable(source):
            next_stage()
            cross = list(_cross_rows(_cross(source, sites, splits, compute, given.seed)))
    rows = [{"text": text} | row for text, found in measured.items() for each in found for row in describe(each)]
    stability = [row for (one, other), each in drifts.items() for row in _drift_rows(one, other, each)]
    analysis = Analysis(folder, protocol, rows, stability, cross)
    command = f"prune-peak analyze {quote(str(model))} {spell_command(given)}"
    _write(analysis, measured[next(iter(splits))], drifts, chosen, command)
    return analysis


def _split(source: Model, options: AnalyzeOptions) -> dict[str, Windows]:
    """The windows of every data set, by its name; with several, enough to measure each of them twice."""
    if SELF in options.data and not source.meta_model.can_generate():
        raise PrunePeakError(
            f"{source.name} generates no text; pass a text or a folder of images with {spell('data')}."
        )
    check_data(options.data, source.sees_images, options.reading)
    turns = 2 if len(options.data) > 1 else 1
    names: dict[str, str] = {}
    for data in options.data:
        label = "the model's own text" if data == SELF else Path(data).name
        if label in names:
            raise UsageError(f"{spell('data')}: two data sets are named {label}; expected different names.")
        names[label] = data
    splits: dict[str, Windows] = {}
    for label, data in sorted(names.items(), key=lambda item: item[1] == SELF):  # reading fails sooner
        samples = turns * options.samples
        if source.sees_images:
            splits[label] = choose_images(data, source, samples, options.seed, options.reading)
        else:
            length = window_length(source, options.sequence_length)
            splits[label] = split_windows(source, data, samples, options.windows, length, options.seed, options.reading)
        if len(splits[label].calibration) < turns:
            raise PrunePeakError(
                f"{label} is too short: with several data sets each is measured twice. Pass a longer one, or a smaller "
                f"{spell('sequence_length')}."
            )
    return {label: splits[label] for label in names}


def _find_neuron(sites: Sequence[Site], wanted: str) -> Neuron:
    """A neuron by its kind of site, block and index."""
    try:
        kind, block, index = wanted.split(":")
        site = next(site for site in sites if (site.label, site.block) == (kind, int(block)))
        if not 0 <= int(index) < site.neurons:
            raise ValueError
    except (ValueError, StopIteration):
        blocks, neurons = sites[-1].block, ", ".join(f"{site.neurons} {site.label}" for site in sites[:2])
        raise UsageError(
            f"{spell('neuron', wanted)}: expected KIND:BLOCK:NEURON, such as mlp:0:17, of blocks 0 to {blocks} with "
            f"{neurons} "
            "neurons each."
        ) from None
    return Neuron(site, int(index), "chosen")


def _measure(source: Model, sites: Sequence[Site], windows: Tensor, dtype: torch.dtype) -> list[Distribution]:
    return list(measure_distributions(source, sites, into_batches(windows), dtype))


def _drift_rows(one: str, other: str, drifts: Sequence[Drift]) -> Iterator[dict[str, Any]]:
    """The median over the neurons of a site, and the 90th percentile."""
    for drift in drifts:
        row: dict[str, Any] = {"text": one, "other": other, "site": drift.site.label, "block": drift.site.block}
        for name, values in (("peak", drift.peak), ("mean", drift.mean)):
            finite = values[values.isfinite()]
            row |= {f"{name}_drift": finite.median().item(), f"{name}_drift_p90": finite.quantile(0.9).item()}
        yield row


Changes = dict[tuple[str, str, str, str], list[Tensor]]  # calibrated, evaluated, kind, fill: by seed, (windows,)


def _cross(
    source: Model, sites: Sequence[Site], splits: Mapping[str, Windows], dtype: torch.dtype, seed: int
) -> Changes:
    """The loss on every text with neurons held at the constants of every text."""
    model = load_whole(source, dtype)
    summaries = {text: summarize(source, sites, split.calibration[::2], dtype) for text, split in splits.items()}
    kinds = list(dict.fromkeys(site.label for site in sites))
    first, seeds = next(iter(splits)), range(seed, seed + CROSS_SEEDS)
    changes: Changes = {}
    total = len(splits) * len(kinds) * CROSS_SEEDS * (1 + len(splits) * len(MEASURED_FILLS))
    with open_bar("cross", "trial", total) as bar:
        for evaluated, split in splits.items():
            eval_set = build_eval_set(source, split.held_out, evaluated)
            baseline = TrialRunner(model, sites, {}, eval_set).measure(BASELINE)
            for calibrated, kind, fill, number in product(splits, kinds, (ZERO, *MEASURED_FILLS), seeds):
                key = (calibrated, evaluated, kind, fill)
                if fill == ZERO and calibrated != first:  # does not depend on the calibration
                    changes[key] = changes[first, evaluated, kind, ZERO]
                    continue
                runner = TrialRunner(model, sites, summaries[calibrated], eval_set)
                scores = runner.measure(Trial(kind, fill, CROSS_FRACTION, number))
                changes.setdefault(key, []).append(scores.losses - baseline.losses)
                bar.update()
    return changes


def _cross_rows(changes: Changes) -> Iterator[dict[str, Any]]:
    for (calibrated, evaluated, kind, fill), each in changes.items():
        change, error = mean_and_error(torch.stack(each))
        mean = torch.stack(changes[calibrated, evaluated, kind, "mean"])
        against, against_error = mean_and_error(torch.stack(each) - mean)
        yield {"calibrated": calibrated, "evaluated": evaluated, "site": kind, "fill": fill} | {
            "fraction": CROSS_FRACTION,
            "cross_entropy_gained": change,
            "cross_entropy_gained_stderr": error,
            "more_than_mean": against,
            "more_than_mean_stderr": against_error,
            "significant": is_significant(against, against_error) if fill != "mean" else False,
        }


def _write(
    analysis: Analysis, measured: Sequence[Distribution], drifts: Drifts, chosen: Sequence[Neuron], command: str
) -> None:
    folder, protocol = analysis.output, analysis.protocol
    folder.mkdir(parents=True, exist_ok=True)
    for table in TABLES:
        if getattr(analysis, table):
            write_table(folder / table, getattr(analysis, table))
    (folder / "protocol.json").write_text(json.dumps(protocol, indent=2) + "\n", encoding="utf-8")
    pictures: dict[str, str] = {}
    if can_draw():
        pictures = _draw(folder, measured, drifts, chosen)
    else:
        log.warning(MISSING)
    sections = [_describe_protocol(protocol)]
    for name, caption in pictures.items():
        title = name.removesuffix(".png").replace("-", " ").capitalize()
        sections.append(Section(title, caption, picture=folder / name))
    title = f"How the neurons of {protocol['model']} are distributed"
    sections += _table_sections(analysis)
    write_report(folder / "report.html", title, conclude(analysis), sections, command)


def conclude(analysis: Analysis) -> str:
    """Where peaks lie, and whether they hold, in one sentence: medians over blocks."""
    parts = []
    for kind in dict.fromkeys(row["site"] for row in analysis.distributions):
        shares = [r["peak_off_zero"] for r in analysis.distributions if _is_whole(r, kind)]
        part = f"{median(shares):.0%} of the {kind} neurons have their peak off zero"
        moves = [row for row in analysis.stability if row["site"] == kind and row["other"] != NOISE]
        if moves:
            peak, mean = (median([row[f"{name}_drift"] for row in moves]) for name in ("peak", "mean"))
            part += f" (between texts, peaks move {peak:.2f} deviations and means {mean:.2f})"
        parts.append(part)
    return f"{', and '.join(parts)}."


def _is_whole(row: Mapping[str, Any], kind: str) -> bool:
    return row["site"] == kind and row["head"] is None and row["tokens"] == REST and row["peak_off_zero"] is not None


def _draw(folder: Path, measured: Sequence[Distribution], drifts: Drifts, chosen: Sequence[Neuron]) -> dict[str, str]:
    """Draw the pictures: their captions, by file name."""
    pictures: dict[str, str] = {}
    kinds = dict.fromkeys(each.site.label for each in measured)
    for kind in kinds:
        shown = [neuron for neuron in chosen if neuron.site.label == kind] + find_extreme_neurons(measured, kind)
        name = f"histograms-{kind}.png"
        pictures[name] = (
            f"Histograms of {kind} neurons, typical and extreme ones, without the first token of each window. The two "
            "end bins, which count everything beyond, are left out."
        )
        draw_histograms(shown, measured, folder / name)
    if "attention" in kinds:
        pictures["heads.png"] = "Attention heads by block: medians over the neurons of a head."
        draw_heads(measured, folder / "heads.png")
    pictures["blocks.png"] = "MLP neurons by block: the share of neurons at every value. A column adds up to 1."
    draw_blocks(measured, folder / "blocks.png")
    if drifts:
        pictures["drift.png"] = (
            "Drift of peaks (full lines) and means (dashed) between texts, by block: medians over neurons."
        )
        draw_drift(drifts, folder / "drift.png")
    return pictures


def _describe_protocol(protocol: Mapping[str, Any]) -> Section:
    samples, length = protocol["windows"], protocol["sequence_length"]
    amount = f"{samples} windows of {length} tokens each." if length else f"{samples} images each."
    texts = ", ".join(protocol["texts"])
    words = f"{protocol['class']} {protocol['model']}, {protocol['dtype']}, on {texts}: {amount}"
    return Section("What was measured", words)


def _table_sections(analysis: Analysis) -> Iterator[Section]:
    rows = analysis.distributions
    yield Section(
        "Sites",
        "Medians over the neurons of a site. Distances of the peak are in standard deviations of the neuron. "
        "peak_off_zero is the share of neurons whose peak is more than half a deviation from zero. bimodal is the "
        "share whose Sarle coefficient exceeds 5/9. Kurtosis is in excess of a normal distribution's.",
        rows=[row for row in rows if row["head"] is None],
    )
    yield Section(
        "Heads",
        "The same for every head, without the first token of a window.",
        rows=[row for row in rows if row["head"] is not None and row["tokens"] == REST],
    )
    if analysis.stability:
        yield Section(
            "Stability",
            "Drift of peak and mean from one text to another, in deviations: the median over the neurons of a site, "
            f"and the 90th percentile. “{NOISE}” is the drift between two samples of one text.",
            rows=analysis.stability,
        )
    if analysis.cross:
        yield Section(
            "Calibrated on one text, evaluated on another",
            f"{CROSS_FRACTION:.0%} of the neurons of one kind of site, drawn at random ({CROSS_SEEDS} seeds), are held "
            "at constants of one text while the model reads another: cross-entropy gained, in nats, and the difference "
            "from the mean. Significant: more than three standard errors.",
            rows=analysis.cross,
        )
