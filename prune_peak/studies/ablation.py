"""`ablate()`: what held neurons cost a model, over fills, fractions and kinds of site.

The experiment of arXiv 2408.17322 on any supported model, MLPs included. No checkpoint is written.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from shlex import quote
from typing import Any

from ..evaluation.quality import WindowScores
from ..models.execution import DTYPES, default_dtype
from ..models.loading import Model, open_model
from ..option_fields import spell_command, takes
from ..options import FILLS, RANKED, RESAMPLE
from ..progress import next_stage, open_bar, stages
from ..report import Section, write_report, write_table
from ..sites.finding import prunable_kinds
from ..sites.site import Site
from .curves import CROSS_ENTROPY, Curve, build_curves, compare_areas, is_significant, mean_and_error
from .options import AblateOptions
from .plots import MISSING, can_draw, draw_degradation
from .runner import TrialRunner, find_studied, load_whole, summarize
from .study_data import StudyData, load_study_data
from .trials import BASELINE, Trial, TrialLog

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """What `ablate` measured, and where it is written."""

    output: Path
    protocol: Mapping[str, Any]  # what was measured, on which data
    measurements: Sequence[Mapping[str, Any]]  # a row per site, fill, fraction and seed
    areas: Sequence[Mapping[str, Any]]  # under each curve
    comparisons: Sequence[Mapping[str, Any]]  # every two fills, and whether the difference is significant
    curves: Sequence[Curve]

    def to_json(self) -> list[dict[str, Any]]:
        return [dict(row) for row in self.measurements]


@takes(AblateOptions)
@stages(3)
def ablate(model: str, output: str | Path | None = None, **options: Any) -> Study:
    """Hold shares of a model's neurons, and measure cross-entropy and top-1 accuracy.

    A trial is one kind of site, one fill, one fraction and one seed. Finished trials are kept in
    `<output>/trials.jsonl`; a study that was stopped resumes from there.

    Args:
        model: a folder or a Hub id.
        {options}

    Raises:
        PrunePeakError: bad input, before work starts.

    Example:
        >>> study = ablate("examples/llama-mini", calibration="notes.txt", fill=["zero", "peak"])  # doctest: +SKIP
        >>> study.areas[0]["fill"]                                                                 # doctest: +SKIP
        'zero'
    """
    given = AblateOptions(output=output, **options)
    source = open_model(model, given.revision)
    kinds = given.sites or prunable_kinds(source.meta_model, source.family)
    sites = find_studied(source, kinds)
    name = Path(model).resolve().name
    folder = Path(output or f"{name}-ablation")
    data = load_study_data(source, given)
    protocol = _describe_protocol(source, name, data, given)
    fills = given.fill or (*FILLS, RESAMPLE)
    seeds = range(given.seed, given.seed + (1 if given.select == RANKED else given.seeds))
    fractions = sorted({0.0, *given.fraction})
    trials = [BASELINE] + [
        Trial(kind, fill, fraction, seed)
        for seed, kind, fill in product(seeds, kinds, fills)  # seeds first: a stopped study has whole curves
        for fraction in given.fraction
        if fraction
    ]
    with TrialLog(folder / "trials.jsonl", protocol | data.digests, given.force) as file:
        missing = [trial for trial in trials if trial not in file.results]
        if len(missing) < len(trials):
            log.warning("%d of %d trials were measured before.", len(trials) - len(missing), len(trials))
        if missing:
            _measure(source, sites, data, protocol, file, missing, len(trials) - len(missing))
        results = dict(file.results)
    curves = build_curves(results, kinds, fills, fractions, seeds)
    study = Study(
        folder,
        protocol | {"fills": list(fills), "seeds": list(seeds), "trials": len(trials)},
        measurements=list(_measurement_rows(results, protocol, product(kinds, fills, fractions, seeds))),
        areas=list(_area_rows(name, curves)),
        comparisons=list(_comparison_rows(name, curves)),
        curves=curves,
    )
    _write(study, name, f"prune-peak ablate {quote(str(model))} {spell_command(given)}")
    return study


def _measure(
    source: Model,
    sites: Sequence[Site],
    data: StudyData,
    protocol: Mapping[str, Any],
    file: TrialLog,
    missing: Sequence[Trial],
    done: int,
) -> None:
    """Measure the missing trials, and add each to the file; `done` were measured before."""
    dtype = DTYPES[protocol["dtype"]]
    next_stage()
    summaries = summarize(source, sites, data.calibration, dtype)
    next_stage()
    runner = TrialRunner(load_whole(source, dtype), sites, summaries, data.eval_set, protocol["score"])
    with open_bar("ablate", "trial", done + len(missing), done) as bar:
        for trial in missing:
            file.add(trial, runner.measure(trial))
            bar.update()


def _describe_protocol(source: Model, name: str, data: StudyData, options: AblateOptions) -> dict[str, Any]:
    targets = data.eval_set.targets
    return {
        "model": name,
        "class": source.model_class.__name__,
        "digest": source.digest,
        "metric": data.eval_set.metric,
        "calibration": data.source,
        "text": data.eval_set.text,
        "calibration_windows": len(data.calibration),
        "windows": sum(len(part) for part in targets),
        "sequence_length": None if source.sees_images else targets[0].shape[1],
        "dtype": options.dtype or default_dtype(source),
        "select": options.select,
        "score": options.score if options.select == RANKED else None,
    }


def _write(study: Study, name: str, command: str) -> None:
    for table in ("measurements", "areas", "comparisons"):
        write_table(study.output / table, getattr(study, table))
    (study.output / "protocol.json").write_text(json.dumps(study.protocol, indent=2) + "\n", encoding="utf-8")
    picture = study.output / "degradation.png" if can_draw() else None
    if picture is not None:
        draw_degradation(study.curves, name, picture)
    else:
        log.warning(MISSING)
    title = f"What held neurons cost {name}"
    write_report(study.output / "report.html", title, conclude(study), list(_sections(study, picture)), command)


def conclude(study: Study) -> str:
    """The best and the worst fill of every kind of site, in one sentence."""
    parts = []
    for site in dict.fromkeys(row["site"] for row in study.areas):
        costs = {r["fill"]: r["area"] for r in study.areas if (r["site"], r["metric"]) == (site, CROSS_ENTROPY)}
        best, worst = min(costs, key=lambda fill: costs[fill]), max(costs, key=lambda fill: costs[fill])
        if len(costs) == 1:
            parts.append(f"in {site} neurons, {best} costs {costs[best]:.3f} nats")
            continue
        pair = [r for r in study.comparisons if r["site"] == site and {r["fill"], r["other"]} == {best, worst}]
        told = any(r["significant"] for r in pair if r["metric"] == CROSS_ENTROPY)
        part = f"in {site} neurons, {best} costs least ({costs[best]:.3f} nats) and {worst} most ({costs[worst]:.3f})"
        parts.append(part + ("" if told else ", which the errors do not tell apart"))
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _sections(study: Study, picture: Path | None) -> Iterator[Section]:
    protocol = study.protocol
    length, seeds = protocol["sequence_length"], len(protocol["seeds"])
    unit = f"windows of {length} tokens" if length else "images"
    yield Section(
        "What was measured",
        f"{protocol['class']} {protocol['model']}, {protocol['dtype']}, on {protocol['windows']} {unit} of "
        f"{protocol['text']}, {seeds} seed{'s' * (seeds > 1)}. Neurons of one kind of site are held in all blocks, at "
        f"constants of {protocol['calibration_windows']} others of {protocol['calibration']}.",
    )
    if picture is not None:
        yield Section("Degradation", "What is lost by the share of the neurons held, for every fill.", picture)
    keys = ("site", "metric", "fill")
    yield Section(
        "Areas",
        "Area under the curve: cross-entropy gained in nats, or top-1 accuracy lost, over the shares of neurons held. "
        "Smaller is better.",
        rows=[{key: row[key] for key in (*keys, "area", "area_stderr")} for row in study.areas],
    )
    yield Section(
        "Differences",
        "The area of the first fill less that of the other, window by window and seed by seed. Significant: more than "
        "three standard errors.",
        rows=[
            {key: row[key] for key in (*keys, "other", "difference", "difference_stderr", "significant")}
            for row in study.comparisons
        ],
    )


def _measurement_rows(
    results: Mapping[Trial, WindowScores],
    protocol: Mapping[str, Any],
    coordinates: Iterator[tuple[str, str, float, int]],
) -> Iterator[dict[str, Any]]:
    for site, fill, fraction, seed in coordinates:
        scores = results[Trial(site, fill, fraction, seed) if fraction else BASELINE]
        (loss, loss_error), (hits, hits_error) = (mean_and_error(part[None]) for part in (scores.losses, scores.hits))
        yield {
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
            "windows": len(scores.losses),
        }


def _area_rows(model: str, curves: Sequence[Curve]) -> Iterator[dict[str, Any]]:
    for curve in curves:
        area, error = mean_and_error(curve.areas())
        yield {"model": model, "site": curve.site, "fill": curve.fill, "metric": curve.metric} | {
            "from": curve.fractions[0],
            "to": curve.fractions[-1],
            "area": area,
            "area_stderr": error,
        }


def _comparison_rows(model: str, curves: Sequence[Curve]) -> Iterator[dict[str, Any]]:
    for first, second, difference, error in compare_areas(curves):
        yield {"model": model, "site": first.site, "metric": first.metric, "fill": first.fill} | {
            "other": second.fill,
            "difference": difference,
            "difference_stderr": error,
            "significant": is_significant(difference, error),
        }
