"""The study: what held neurons cost a model, over fills, fractions and kinds of site, by hooks on the stock model.

The experiment of arXiv 2408.17322 on any supported model, its MLPs included. Nothing is written but the results.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .ablation import ablated, draw_others, resampled
from .arithmetic import fast_products
from .blocks import Batch
from .calibration import DTYPES, calibrate, default_dtype, into_batches
from .cells import INTACT, Cell, CellFile
from .curves import Curve, compare_areas, draw_curves, is_significant, mean_and_error
from .errors import UsageError
from .evaluation import Exam, Grades, grade
from .material import find_material
from .pictures import MISSING, can_draw, draw_degradation
from .selection import RANDOM, SCORES, Choice, choose_fill
from .sites import KINDS, NEURON, Site, cuttable_kinds, find_sites
from .source import Source, open_source
from .stats import Summary
from .tables import write_table
from .texts import SELF, SEQUENCE_LENGTH

log = logging.getLogger(__name__)

RESAMPLE, RANKED = "resample", "ranked"
STUDIED_FILLS = ("zero", "mean", "median", "peak", RESAMPLE)
FRACTIONS = tuple(step / 10 for step in range(10))
WINDOWS, SEEDS = 8, 3
SITE_SEEDS = 1_000_000  # every site draws from a seed of its own
TOKENS_AT_ONCE, IMAGES_AT_ONCE = 1024, 16  # that run through the model together; logits of large vocabularies are large


@dataclass(frozen=True)
class Study:
    """What `ablate` found, and where it is written."""

    output: Path
    protocol: Mapping[str, Any]  # what was measured, on what
    measurements: Sequence[Mapping[str, Any]]  # one row a site, fill, fraction and seed
    areas: Sequence[Mapping[str, Any]]  # under each curve
    comparisons: Sequence[Mapping[str, Any]]  # every two fills, and whether the difference is significant
    curves: Sequence[Curve]

    def to_json(self) -> list[dict[str, Any]]:
        return [dict(row) for row in self.measurements]


def ablate(
    model: str,
    output: str | Path | None = None,
    *,
    fills: Sequence[str] = STUDIED_FILLS,
    fractions: Sequence[float] = FRACTIONS,
    sites: Sequence[str] | None = None,
    select: str = RANDOM,
    score: str = "variance",
    seeds: int = SEEDS,
    calibration: str = SELF,
    text: str | None = None,
    images: str | None = None,
    samples: int = WINDOWS,
    windows: int | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
    dtype: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    force: bool = False,
) -> Study:
    """Hold shares of a model's neurons, and measure cross-entropy and top-1 accuracy.

    A cell is one kind of site, one fill, one fraction and one seed; the cells are kept in `<output>/cells.jsonl` as
    they come, and a study that was stopped goes on from there.

    Args:
        model: a folder or a Hub id.
        output: the folder to write; `./<name>-ablation` by default.
        fills: of zero, mean, median, peak and resample (the neuron's value for another token).
        fractions: of the neurons of every site that are held, from 0 to 1.
        sites: "mlp", "attention", or both (the default, where the family's row knows both); one kind is held at a time,
            in all blocks.
        select: "random", or "ranked": those go first whose `score` is lowest.
        score: a name of `SCORES`; with the default, variance, all fills hold the same neurons.
        seeds: how many random choices of neurons; a ranked study has one.
        calibration: a .txt or .jsonl file, a folder of images, a Hub data set, or "self" for text that the model writes
            itself (a model that sees images: for others of `images`).
        text: a text to evaluate on; by default, other windows of the calibration.
        images: for a model that sees images, the labelled ones to evaluate on, `FOLDER/<label>/<image>`.
        samples, sequence_length: windows (or images) of calibration, and the tokens of a window.
        windows: windows (or images) of evaluation, never the same; as many as of calibration by default.
        dtype: the type to compute in.
        seed: the first of the seeds, and that of all else that is drawn at random.
        force: begin anew where the output holds the cells of another question.

    Raises:
        PrunePeakError: bad input, before work starts.

    Example:
        >>> study = ablate("examples/llama-mini", calibration="notes.txt", fills=["zero", "peak"])  # doctest: +SKIP
        >>> study.areas[0]["fill"]                                                                   # doctest: +SKIP
        'zero'
    """
    _check_options(fills, fractions, select, score, dtype, seeds, samples, windows)
    seeds = 1 if select == RANKED else seeds
    source = open_source(model, revision)
    if (text if source.sees_images else images) is not None:
        right, wrong = ("--images", "--text") if source.sees_images else ("--text", "--images")
        raise UsageError(f"{wrong} is not for {source.name}, a {source.model_class.__name__}; pass {right}.")
    sites = sites or cuttable_kinds(source.family, keep_shape=True)
    studied = find_studied(source, sites)
    compute = dtype or default_dtype(source)
    material = find_material(source, calibration, text or images, samples, windows or samples, sequence_length, seed)
    exam = material.exam
    name = Path(model).resolve().name
    protocol: dict[str, Any] = {
        "model": name,
        "class": source.model_class.__name__,
        "digest": source.digest,
        "metric": exam.metric,
        "calibration": material.source,
        "text": exam.text,
        "calibration_windows": len(material.calibration),
        "windows": sum(len(part) for part in exam.targets),
        "sequence_length": None if source.sees_images else exam.targets[0].shape[1],
        "dtype": compute,
        "select": select,
        "score": score if select == RANKED else None,
    }
    question = protocol | material.digests
    seed_list = range(seed, seed + seeds)
    cells = [INTACT] + [
        Cell(site, fill, fraction, number)
        for number in seed_list  # first, so that a study that is stopped has whole curves of fewer seeds
        for site in sites
        for fill in fills
        for fraction in fractions
        if fraction
    ]
    folder = Path(output) if output is not None else Path(f"{name}-ablation")
    with CellFile(folder / "cells.jsonl", question, force) as file:
        missing = [cell for cell in cells if cell not in file.graded]
        if len(missing) < len(cells):
            log.warning("%d of %d cells were there already.", len(cells) - len(missing), len(cells))
        if missing:
            summaries = summarize(source, studied, material.calibration, DTYPES[compute])
            whole = load_whole(source, DTYPES[compute])
            bench = Bench(whole, studied, summaries, exam, score if select == RANKED else None)
            for cell in tqdm(missing, desc="ablate", unit="cell"):
                file.add(cell, bench.measure(cell))
        graded = dict(file.graded)
    steps = sorted({0.0, *fractions})
    curves = draw_curves(graded, sites, fills, steps, seed_list)
    study = Study(
        folder,
        protocol | {"fills": list(fills), "seeds": list(seed_list), "cells": len(cells)},
        measurements=_tell_measurements(graded, protocol, sites, fills, steps, seed_list),
        areas=_tell_areas(name, curves),
        comparisons=_tell_comparisons(name, curves),
        curves=curves,
    )
    for table in ("measurements", "areas", "comparisons"):
        write_table(folder / table, getattr(study, table))
    (folder / "protocol.json").write_text(json.dumps(study.protocol, indent=2) + "\n", encoding="utf-8")
    if can_draw():
        draw_degradation(curves, name, folder / "degradation.png")
    else:
        log.warning(MISSING)
    return study


def _check_options(
    fills: Sequence[str],
    fractions: Sequence[float],
    select: str,
    score: str,
    dtype: str | None,
    seeds: int,
    samples: int,
    windows: int | None,
) -> None:
    for fill in fills:
        if fill not in STUDIED_FILLS:
            raise UsageError(f"--fill {fill}: expected one of {', '.join(STUDIED_FILLS)}.")
    for fraction in fractions:
        if not 0 <= fraction <= 1:
            raise UsageError(f"--fraction {fraction}: expected a share from 0 to 1.")
    if select not in (RANDOM, RANKED):
        raise UsageError(f"--select {select}: expected {RANDOM} or {RANKED}.")
    if score not in SCORES:
        raise UsageError(f"--score {score}: expected one of {', '.join(SCORES)}.")
    if dtype not in (None, *DTYPES):
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    for name, count in (("seeds", seeds), ("samples", samples), ("windows", windows)):
        if count is not None and count < 1:
            raise UsageError(f"--{name} {count}: expected at least one.")


def find_studied(source: Source, kinds: Sequence[str] | None = None) -> list[Site]:
    """The sites whose neurons a study holds, one by one, whatever shapes a checkpoint could have; all, by default."""
    kinds = kinds or cuttable_kinds(source.family, keep_shape=True)
    return find_sites(source.blank, source.family, kinds, NEURON, keep_shape=True)


def summarize(source: Source, sites: Sequence[Site], windows: Tensor, dtype: torch.dtype) -> dict[str, Summary]:
    """What is known of every site's neurons on windows: one calibration, by the site's name."""
    observed = calibrate(source, sites, into_batches(windows), dtype)
    return {seen.site.name: seen.stats.summarize() for seen in observed}


def load_whole(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The stock model with all its weights, by transformers."""
    model: PreTrainedModel = source.model_class.from_pretrained(source.folder, dtype=dtype).eval()
    model.config.use_cache = False
    return model


class Bench:
    """A stock model and an exam, to measure cells.

    Args:
        summaries: of every site, by its name.
        score: what ranks the neurons; None for a random order.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        summaries: Mapping[str, Summary],
        exam: Exam,
        score: str | None = None,
    ) -> None:
        self.model = model
        self.sites = sites
        self.summaries = summaries
        self.score = score
        self.batches = list(_gather(exam))

    def measure(self, cell: Cell) -> Grades:
        """Cross-entropy and top-1 under a cell's hooks, window by window."""
        with self._hold(cell):
            return self.take_exam()

    @torch.inference_mode()
    def take_exam(self) -> Grades:
        """The model as it stands, under whatever hooks it has."""
        with fast_products():
            grades = [grade(self.model(**batch).logits, targets) for batch, targets in self.batches]
        return Grades(torch.cat([part.losses for part in grades]), torch.cat([part.hits for part in grades]))

    def _hold(self, cell: Cell) -> AbstractContextManager[None]:
        if cell == INTACT:
            return nullcontext()
        sites = [site for site in self.sites if site.kind == cell.site]
        keeps = {site.name: self._keep(site, cell) for site in sites}
        if cell.fill == RESAMPLE:
            return resampled(self.model, sites, keeps, draw_others(torch.Generator().manual_seed(cell.seed)))
        fills = {site.name: choose_fill(self.summaries[site.name], cell.fill) for site in sites}
        return ablated(self.model, sites, {name: Choice(keep, fills[name]) for name, keep in keeps.items()})

    def _keep(self, site: Site, cell: Cell) -> Tensor:
        """What a cell leaves of a site; a larger fraction cuts what a smaller one cuts, and more."""
        if self.score is None:
            own = SITE_SEEDS * cell.seed + len(KINDS) * site.block + KINDS.index(site.kind)
            order = torch.randperm(site.neurons, generator=torch.Generator().manual_seed(own))
        else:
            weight = site.as_matrix(self.model.get_parameter(site.weight))
            summary = self.summaries[site.name]
            # what resampling puts in a neuron's place is its mean on average
            about = choose_fill(summary, "mean" if cell.fill == RESAMPLE else cell.fill)
            order = SCORES[self.score](summary, about, weight).argsort(stable=True)
        return order[round(cell.fraction * site.neurons) :].sort().values


def _gather(exam: Exam) -> Iterator[tuple[Batch, Tensor]]:
    """An exam in batches of several windows, so that a token can take its values from another window's."""
    batch = {name: torch.cat([part[name] for part in exam.batches]) for name in exam.batches[0]}
    targets = torch.cat(list(exam.targets))
    at_once = max(2, TOKENS_AT_ONCE // batch["input_ids"].shape[1]) if "input_ids" in batch else IMAGES_AT_ONCE
    count = max(1, len(targets) // at_once)
    parts = {name: tensor.tensor_split(count) for name, tensor in batch.items()}
    for number, part in enumerate(targets.tensor_split(count)):
        yield {name: tensors[number] for name, tensors in parts.items()}, part


def _tell_measurements(
    graded: Mapping[Cell, Grades],
    protocol: Mapping[str, Any],
    sites: Sequence[str],
    fills: Sequence[str],
    fractions: Sequence[float],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    rows = []
    for site, fill, fraction, seed in product(sites, fills, fractions, seeds):
        grades = graded[Cell(site, fill, fraction, seed) if fraction else INTACT]
        (loss, loss_error), (hits, hits_error) = (mean_and_error(part[None]) for part in (grades.losses, grades.hits))
        rows.append(
            {
                "model": protocol["model"],
                "site": site,
                "fill": fill,
                "fraction": fraction,
                "select": protocol["select"],
                "seed": seed,
                "cross_entropy": loss,
                "cross_entropy_stderr": loss_error,
                "top1": hits,
                "top1_stderr": hits_error,
                "windows": len(grades.losses),
            }
        )
    return rows


def _tell_areas(model: str, curves: Sequence[Curve]) -> list[dict[str, Any]]:
    rows = []
    for curve in curves:
        area, error = mean_and_error(curve.areas())
        rows.append(
            {
                "model": model,
                "site": curve.site,
                "fill": curve.fill,
                "metric": curve.metric,
                "from": curve.fractions[0],
                "to": curve.fractions[-1],
                "area": area,
                "area_stderr": error,
            }
        )
    return rows


def _tell_comparisons(model: str, curves: Sequence[Curve]) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "site": first.site,
            "metric": first.metric,
            "fill": first.fill,
            "other": second.fill,
            "difference": difference,
            "difference_stderr": error,
            "significant": is_significant(difference, error),
        }
        for first, second, difference, error in compare_areas(curves)
    ]
