"""The analysis: how neurons are distributed, and whether peaks and means hold from one text to another."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .calibration import DTYPES, default_dtype, into_batches
from .cells import INTACT, Cell
from .curves import is_significant, mean_and_error
from .distributions import REST, Distribution, Move, Neuron, compare, describe, find_striking, measure_distributions
from .errors import PrunePeakError, UsageError
from .evaluation import has_exam, set_exam
from .images import choose_images
from .material import split_windows
from .pictures import MISSING, can_draw, draw_blocks, draw_heads, draw_histograms, draw_moves
from .report import Section, write_report
from .sites import Site
from .source import Source, open_source
from .study import SEEDS, Bench, find_studied, load_whole, summarize
from .tables import write_table
from .texts import SELF, SEQUENCE_LENGTH, Windows, window_length

log = logging.getLogger(__name__)

SAMPLES, WINDOWS = 16, 8  # of a text: windows to measure on, and to evaluate on
ZERO, MEASURED_FILLS = "zero", ("mean", "median", "peak")
CROSS_FILLS, CROSS_FRACTION = (ZERO, *MEASURED_FILLS), 0.3
NOISE = "the same, other windows"  # what a text is compared with to see how far two samples of it lie apart


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found, and where it is written."""

    output: Path
    protocol: Mapping[str, Any]
    distributions: Sequence[Mapping[str, Any]]  # a row a text, site, head (None: the whole site) and kind of token
    stability: Sequence[Mapping[str, Any]]  # a row a pair of texts and site
    cross: Sequence[Mapping[str, Any]]  # a row a text calibrated on, a text evaluated on, kind of site and fill

    def to_json(self) -> dict[str, Any]:
        tables = ("distributions", "stability", "cross")
        return {"protocol": dict(self.protocol)} | {name: list(getattr(self, name)) for name in tables}


def analyze(
    model: str,
    output: str | Path | None = None,
    *,
    texts: Sequence[str] = (SELF,),
    neurons: Sequence[str] = (),
    samples: int = SAMPLES,
    windows: int = WINDOWS,
    sequence_length: int = SEQUENCE_LENGTH,
    dtype: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    force: bool = False,
) -> Analysis:
    """Measure how every neuron of a model is distributed, and write tables, pictures and a report.

    With several texts it also says how far peaks and means move between them, and what a model loses when its neurons
    are held at what one text says while it reads another.

    Args:
        model: a folder or a Hub id.
        output: the folder to write; `./<name>-analysis` by default.
        texts: .txt or .jsonl files, folders of images, Hub data sets, or "self" for text that the model writes itself.
        neurons: further neurons to draw, as "mlp:3:17" (kind of site, block, neuron).
        samples, sequence_length: windows of each text to measure on, and their tokens.
        windows: others of each text to evaluate on, with several texts.
        dtype: the type to compute in.
        seed: of all that is drawn at random.
        force: replace an existing output.

    Raises:
        PrunePeakError: bad input, before work starts.

    Example:
        >>> analysis = analyze("examples/llama-mini", texts=["notes.txt"])  # doctest: +SKIP
        >>> analysis.distributions[0]["peak_off_zero"]                      # doctest: +SKIP
        0.13
    """
    for name, count in (("samples", samples), ("windows", windows)):
        if count < 1:
            raise UsageError(f"--{name} {count}: expected at least one.")
    if dtype not in (None, *DTYPES):
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    source = open_source(model, revision)
    sites = [site for site in find_studied(source) if site.block < source.config.num_hidden_layers]
    asked = [_find_neuron(sites, wanted) for wanted in neurons]
    name = Path(model).resolve().name
    folder = Path(output) if output is not None else Path(f"{name}-analysis")
    if folder.exists() and not force:
        raise PrunePeakError(f"{folder} exists; pass --force to write into it, or choose another --output.")
    if SELF in texts and not source.blank.can_generate():
        raise PrunePeakError(f"{source.name} writes no text of its own; pass a text or a folder of images with --text.")
    length = None if source.sees_images else window_length(source, sequence_length)
    turns = 2 if len(texts) > 1 else 1  # with several texts, each is measured on twice: how far do two samples differ?
    splits = {_label(text): _split(source, text, turns * samples, windows, length, seed) for text in texts}
    if len(splits) < len(texts):
        raise UsageError("--text: two texts have the same name; expected different ones.")
    for text, split in splits.items():
        if len(split.calibration) < turns:
            raise PrunePeakError(
                f"{text} is too short to be measured twice, as several texts are. Pass a longer one, or a smaller "
                "--sequence-length."
            )
    compute = DTYPES[dtype or default_dtype(source)]
    protocol = {
        "model": name,
        "class": source.model_class.__name__,
        "texts": list(splits),
        "windows": samples,
        "evaluated_windows": windows if len(splits) > 1 else 0,
        "sequence_length": length,
        "dtype": str(compute).removeprefix("torch."),
        "seed": seed,
    }
    measured = {text: _measure(source, sites, split.calibration[::turns], compute) for text, split in splits.items()}
    moves: dict[tuple[str, str], list[Move]] = {}
    cross: list[dict[str, Any]] = []
    if turns > 1:
        for text, split in splits.items():
            moves[text, NOISE] = compare(measured[text], _measure(source, sites, split.calibration[1::2], compute))
        moves |= {(one, other): compare(measured[one], measured[other]) for one, other in combinations(splits, 2)}
        if has_exam(source):
            cross = _cross(source, sites, splits, compute, seed)
    analysis = Analysis(
        folder,
        protocol,
        [{"text": text} | row for text, found in measured.items() for each in found for row in describe(each)],
        [row for (one, other), each in moves.items() for row in _tell_moves(one, other, each)],
        cross,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for table in ("distributions", "stability", "cross"):
        if getattr(analysis, table):
            write_table(folder / table, getattr(analysis, table))
    (folder / "protocol.json").write_text(json.dumps(protocol, indent=2) + "\n", encoding="utf-8")
    _report(analysis, measured[next(iter(splits))], moves, asked)
    return analysis


def _label(text: str) -> str:
    return "the model's own text" if text == SELF else Path(text).name


def _split(source: Source, text: str, measured: int, scored: int, length: int | None, seed: int) -> Windows:
    if length is None:
        return choose_images(text, source, measured, seed)
    return split_windows(source, text, measured, scored, length, seed)


def _find_neuron(sites: Sequence[Site], wanted: str) -> Neuron:
    """A neuron by its kind of site, block and number."""
    try:
        kind, block, index = wanted.split(":")
        site = next(site for site in sites if (site.kind, site.block) == (kind, int(block)))
        if not 0 <= int(index) < site.neurons:
            raise ValueError
    except (ValueError, StopIteration):
        blocks, neurons = sites[-1].block, ", ".join(f"{site.neurons} {site.kind}" for site in sites[:2])
        raise UsageError(
            f"--neuron {wanted}: expected KIND:BLOCK:NEURON, such as mlp:0:17, of blocks 0 to {blocks} with {neurons} "
            "neurons each."
        ) from None
    return Neuron(site, int(index), "chosen")


def _measure(source: Source, sites: Sequence[Site], windows: Tensor, dtype: torch.dtype) -> list[Distribution]:
    return list(measure_distributions(source, sites, into_batches(windows), dtype))


def _tell_moves(one: str, other: str, moves: Sequence[Move]) -> list[dict[str, Any]]:
    """Medians over neurons, and what a tenth of them exceeds."""
    rows = []
    for move in moves:
        row: dict[str, Any] = {"text": one, "other": other, "site": move.site.kind, "block": move.site.block}
        for name, values in (("peak", move.peak), ("mean", move.mean)):
            known = values[values.isfinite()]
            row |= {f"{name}_moves": known.median().item(), f"{name}_moves_most": known.quantile(0.9).item()}
        rows.append(row)
    return rows


def _cross(
    source: Source, sites: Sequence[Site], splits: Mapping[str, Windows], dtype: torch.dtype, seed: int
) -> list[dict[str, Any]]:
    """What held neurons cost on every text at the constants of every text."""
    model = load_whole(source, dtype)
    summaries = {text: summarize(source, sites, split.calibration[::2], dtype) for text, split in splits.items()}
    seeds = range(seed, seed + SEEDS)
    kinds = list(dict.fromkeys(site.kind for site in sites))
    changes: dict[tuple[str, str, str, str], list[Tensor]] = {}
    with tqdm(total=len(splits) * len(kinds) * SEEDS * (1 + len(splits) * len(MEASURED_FILLS)), desc="cross") as bar:
        for evaluated, split in splits.items():
            exam = set_exam(source, split.held_out, evaluated)
            intact = Bench(model, sites, {}, exam).measure(INTACT)
            for calibrated, kind, fill, number in product(splits, kinds, CROSS_FILLS, seeds):
                key = (calibrated, evaluated, kind, fill)
                first = next(iter(splits))
                if fill == ZERO and calibrated != first:  # zero is zero whatever it was calibrated on
                    changes[key] = changes[first, evaluated, kind, ZERO]
                    continue
                grades = Bench(model, sites, summaries[calibrated], exam).measure(
                    Cell(kind, fill, CROSS_FRACTION, number)
                )
                changes.setdefault(key, []).append(grades.losses - intact.losses)
                bar.update()
    rows = []
    for (calibrated, evaluated, kind, fill), each in changes.items():
        change, error = mean_and_error(torch.stack(each))
        against, against_error = mean_and_error(
            torch.stack(each) - torch.stack(changes[calibrated, evaluated, kind, "mean"])
        )
        rows.append(
            {
                "calibrated": calibrated,
                "evaluated": evaluated,
                "site": kind,
                "fill": fill,
                "fraction": CROSS_FRACTION,
                "cross_entropy_gained": change,
                "cross_entropy_gained_stderr": error,
                "more_than_mean": against,
                "more_than_mean_stderr": against_error,
                "significant": is_significant(against, against_error) if fill != "mean" else False,
            }
        )
    return rows


def _report(
    analysis: Analysis,
    measured: Sequence[Distribution],
    moves: Mapping[tuple[str, str], Sequence[Move]],
    asked: Sequence[Neuron],
) -> None:
    """Draw the pictures, where matplotlib is there, and write the report."""
    folder = analysis.output
    drawn: dict[str, str] = {}
    if can_draw():
        for kind in dict.fromkeys(each.site.kind for each in measured):
            shown = [neuron for neuron in asked if neuron.site.kind == kind] + find_striking(measured, kind)
            drawn[f"histograms-{kind}.png"] = (
                f"Histograms of {kind} neurons, typical and extreme ones, over all tokens but a window's first. The "
                "two end bins, which hold everything beyond, are left out."
            )
            draw_histograms(shown, measured, folder / f"histograms-{kind}.png")
        if any(each.site.kind == "attention" for each in measured):
            drawn["heads.png"] = "Attention heads by block: medians over the neurons of a head."
            draw_heads(measured, folder / "heads.png")
        drawn["blocks.png"] = "MLP neurons by block: how many lie where. A column adds up to 1."
        draw_blocks(measured, folder / "blocks.png")
        if moves:
            drawn["moves.png"] = (
                "How far peaks (full lines) and means (dashed) move from text to text, by block: medians over neurons."
            )
            draw_moves(moves, folder / "moves.png")
    else:
        log.warning(MISSING)
    protocol = analysis.protocol
    samples, length = protocol["windows"], protocol["sequence_length"]
    sections = [
        Section(
            "What was measured",
            f"{protocol['class']} {protocol['model']}, {protocol['dtype']}, on {', '.join(protocol['texts'])}: "
            + (f"{samples} windows of {length} tokens each." if length else f"{samples} images each."),
        ),
        *(
            Section(path.removesuffix(".png").replace("-", " ").capitalize(), words, picture=folder / path)
            for path, words in drawn.items()
        ),
        Section(
            "Sites",
            "Medians over the neurons of a site; the peak's distances are in standard deviations of the neuron, "
            "peak_off_zero is the share of neurons whose peak lies more than half a deviation from zero, bimodal that "
            "of neurons whose Sarle coefficient exceeds 5/9. Kurtosis is in excess of a normal distribution's.",
            rows=[row for row in analysis.distributions if row["head"] is None],
        ),
        Section(
            "Heads",
            "The same for every head, the first token of a window left out.",
            rows=[row for row in analysis.distributions if row["head"] is not None and row["tokens"] == REST],
        ),
    ]
    if analysis.stability:
        words = (
            "How far a neuron's peak and mean move from one text to another, in deviations: medians over the neurons "
            f"of a site, and what a tenth of them exceeds. “{NOISE}” says how far two samples of one text lie apart."
        )
        sections.append(Section("Stability", words, rows=analysis.stability))
    if analysis.cross:
        words = (
            f"{CROSS_FRACTION:.0%} of the neurons of one kind of site, chosen at random ({SEEDS} seeds), held at what "
            "one text says while the model reads another: cross-entropy gained, in nats, and how much more that is "
            "than with the mean; significant: by more than three standard errors."
        )
        sections.append(Section("Calibrated on one text, evaluated on another", words, rows=analysis.cross))
    write_report(folder / "report.html", f"How the neurons of {protocol['model']} are distributed", sections)
