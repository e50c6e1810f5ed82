"""The whole way from a model to a smaller one that stock transformers loads."""

import json
import logging
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers

from . import __version__
from .budget import Budget, Widths
from .calibration import DTYPES, Observed, calibrate_together, default_dtype, weigh
from .card import write_card
from .errors import PrunePeakError, UsageError, VerificationError
from .evaluation import Exam, Quality, has_exam, measure_quality, set_exam, set_image_exam, set_text_exam, tell_collapse
from .export import RECIPE_FILE, Export
from .hosts import AUTO as AUTO_HOST
from .hosts import Layout, Target, choose_target, lay_out, layout_bytes
from .images import choose_images
from .machine import PROCESSOR, Machine, plan_machine
from .planning import Decision, Rules, choose, choose_split
from .progress import Progress
from .refit import ELIMINATION, Refit
from .selection import AUTO, DEVIATION
from .sites import HEAD, NEURON, Site, cuttable_kinds, find_sites
from .source import Source, open_source
from .stats_file import Statistics, load_statistics, write_statistics
from .texts import (
    SAMPLES,
    SELF,
    SEQUENCE_LENGTH,
    Windows,
    choose_windows,
    name_text,
    own_windows,
    window_length,
)
from .verification import Verification, verify

log = logging.getLogger(__name__)

EVALUATED = 24  # windows of an --evaluate text, from its start
VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}


@dataclass(frozen=True)
class Size:
    """How large a checkpoint is."""

    neurons: Mapping[str, int]  # by the kind of site, over all blocks
    parameters: int
    bytes: int
    cache: int  # bytes that a token takes in the KV cache; 0 where there is none


@dataclass(frozen=True)
class Compression:
    """What `compress` did: where the result is, and its numbers before and after."""

    output: Path
    model_class: str
    sees_images: bool
    before: Size
    after: Size
    share: Mapping[str, float]  # of the neurons that were cut, by the kind of site
    keep_shape: bool  # they are zero, not gone
    quality_before: Quality | None  # None where the model predicts no tokens
    quality_after: Quality | None
    fills: Mapping[str, int]  # how many sites took which fill
    zero_filled: Sequence[str]  # kinds of site whose constants had no place, and so are zero
    refits: Mapping[str, Refit]  # by the site's name; empty without the refit
    scores_lost: Mapping[str, float]  # by the site's name, where heads got narrower: of their scores' variance
    warnings: Sequence[str]  # what nobody may overlook; empty where all is well
    verification: Verification

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"output": str(self.output)}


def compress(
    model: str,
    ratio: float | Mapping[str, float] | None = None,
    output: str | Path | None = None,
    *,
    target_params: float | None = None,
    target_bytes: int | None = None,
    sites: Sequence[str] | None = None,
    unit: str = HEAD,
    keep_shape: bool = False,
    fill: str = "peak",
    refit: bool = True,
    score: str | None = None,
    calibration: str = SELF,
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    stats: str | Path | None = None,
    multiple_of: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    evaluate: str | Path | None = None,
    host: str = AUTO_HOST,
    max_memory: int | None = None,
    device: str = PROCESSOR,
    force: bool = False,
) -> Compression:
    """Cut a share of a model's neurons and write a smaller checkpoint that stock transformers loads.

    Args:
        model: a folder or a Hub id.
        ratio: the share of the neurons to cut at every site, or a share for each kind: {"mlp": 0.2, "attention": 0.33}.
        target_params, target_bytes: instead of a ratio, the share of all parameters, or the bytes, that the result may
            have at most; over two kinds of site, the split that loses least on held-out windows is taken.
        sites: "mlp" (the default), "attention", or both; those that the ratio names, where it names any.
        unit: what leaves an attention together: a "head" (as many of every KV group), a whole KV "group", or a "neuron"
            alone: where heads can get narrower (vision transformers), or with `keep_shape`.
        keep_shape: zero what is cut, in place of deleting it. It saves nothing, and is the one way to cut an attention
            that no stock class can hold narrower.
        output: the folder to write; `./<name>-peak-<ratio>` by default.
        fill: the constant a cut neuron is held at: peak, mean, median, zero, or auto: per site, what is best on
            held-out tokens.
        refit: let the kept columns and the bias take over, by least squares, what the cut neurons did.
        score: what ranks the neurons: elimination (needs the refit, and is its default), deviation (about the fill; the
            default without), activation-norm, variance, weight-norm or random.
        calibration: a .txt or .jsonl file, a folder of images, a Hub data set, or "self" for text that the model writes
            itself.
        samples, sequence_length: windows (or images) of calibration, and the tokens of a window.
        stats: a file that `calibrate` wrote, in place of a calibration.
        multiple_of: kept widths are a multiple of this (default 32; 8 for widths below 512).
        dtype: the type to compute in; the files keep the source's.
        evaluate: a text to measure the quality on, before and after (perplexity, or a masked LM's accuracy at masked
            tokens); held-out windows of the calibration otherwise.
        host: the class to write: "auto", the best that holds shapes and constants; "own", the model's, where constants
            that it has no bias for are zero; or a name such as "granite".
        max_memory: bytes that may be resident; most of the machine's memory by default.
        device: where the block at hand runs: "cpu" or "cuda".
        force: replace an existing output.

    Raises:
        PrunePeakError: bad input, before work starts, or a result that does not verify.

    Example:
        >>> result = compress("examples/opt-mini", 0.3, "out", force=True)  # doctest: +SKIP
        >>> result.after.parameters < result.before.parameters              # doctest: +SKIP
        True
    """
    rules = Rules(fill, score or (ELIMINATION if refit else DEVIATION), refit, seed)
    rules.check()
    _check_samples(samples)
    budget = Budget(ratio, target_params, target_bytes, keep_shape)
    source = open_source(model, revision)
    found = find_sites(source.blank, source.family, budget.kinds(sites), unit, keep_shape)
    statistics = None if stats is None else load_statistics(Path(stats), source, found)
    exam = None if evaluate is None else _set_exam_on(str(evaluate), source, sequence_length)
    splits = budget.splits(source, found, multiple_of, host)
    if statistics is not None:
        statistics.check(found, rules.refit, rules.fill == AUTO, len(splits) > 1)
    if statistics is not None:
        load = statistics.weigh(source, found, rules.needs_evidence)
    else:
        load = weigh(source, found, calibration, samples, sequence_length, dtype, seed, rules.needs_evidence)
    machine = plan_machine(source, load, max_memory, device)
    options = {
        **budget.options,
        **asdict(rules),
        "sites": sorted({site.kind for site in found}),
        "unit": unit,
        "keep_shape": keep_shape,
        "multiple_of": multiple_of,
        "evaluate": None if evaluate is None else name_text(evaluate),
        "host": host,
        "calibration": name_text(calibration),
        "samples": samples,
        "sequence_length": sequence_length,
        "dtype": dtype,
        "max_memory": max_memory,
        "device": machine.device.type,
    }
    if statistics is not None:
        options |= statistics.options
    question = options | {"source": source.digest, "versions": VERSIONS, "prune_peak": __version__}
    folder = Path(output) if output is not None else Path(f"{Path(model).resolve().name}-peak-{budget.label}")
    if source.folder.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"--output {folder} is where the model itself lies; choose another.")
    target, layout = _aim(source, found, splits[0], host)
    if target.zero_filled:
        _say_zero(target, refit)
    with Progress(folder, question, layout_bytes(layout), force) as progress:
        if statistics is None:
            measured = measure(source, calibration, samples, sequence_length, dtype, seed, machine)
        else:
            measured = _measured_before(statistics)
        progress.insist("calibration", measured.windows.digest)
        kept = _settle_widths(source, found, splits, host, measured, rules, progress, machine)
        target, layout = _aim(source, found, kept, host)
        decisions, digests = _cut(source, target, layout, kept, measured, rules, progress)
        _say_few(rules, decisions)
        exam = exam or _set_held_out_exam(source, measured.windows)
        written = open_source(str(progress.checkpoint))
        compute = DTYPES[measured.options["dtype"]]
        before = measure_quality(source, exam, compute, machine) if exam else None
        after = measure_quality(written, exam, compute, machine) if exam else None
        cleared = {site.kind: site.neurons - kept[site.kind] for site in target.sites if site.in_place}
        refits = {name: decision.refit for name, decision in decisions.items() if decision.refit is not None}
        collapse = tell_collapse(before, after) if before and after else None
        options |= {"sites": sorted(kept), **measured.options}
        recipe = _tell_recipe(source, target, options, measured.windows) | {
            "before": asdict(_measure_size(source, {})),
            "after": asdict(_measure_size(written, cleared)),
            "quality": {"before": before and asdict(before), "after": after and asdict(after)},
            "warnings": [collapse] if collapse else [],
            "kept": kept,
            "fills": {name: decision.fill for name, decision in decisions.items()},
            "sites": {site.name: _tell_outcome(site, decisions[site.name]) for site in target.sites},
            "refits": {name: asdict(fitted) for name, fitted in refits.items()},
            "tensors": digests,
        }
        verification = _verify(progress.checkpoint, source, recipe, machine)
        write_card(progress.checkpoint, recipe, source)
        progress.finish()
    return Compression(
        output=folder,
        model_class=target.model_class.__name__,
        sees_images=source.sees_images,
        before=Size(**recipe["before"]),
        after=Size(**recipe["after"]),
        share={site.kind: 1 - kept[site.kind] / site.neurons for site in target.sites},
        keep_shape=keep_shape,
        quality_before=before,
        quality_after=after,
        fills=dict(Counter(decision.fill for decision in decisions.values())),
        zero_filled=target.zero_filled,
        refits=refits,
        scores_lost={name: made.scores_lost for name, made in decisions.items() if made.scores_lost is not None},
        warnings=recipe["warnings"],
        verification=verification,
    )


def save_statistics(
    model: str,
    output: str | Path,
    *,
    calibration: str = SELF,
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    dtype: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    max_memory: int | None = None,
    device: str = PROCESSOR,
    gram: bool = False,
    force: bool = False,
) -> Statistics:
    """Measure a model once and keep its statistics in a file, for `compress(stats=...)` at several ratios.

    Args:
        model, calibration, samples, sequence_length, dtype, seed, revision: as `compress` takes them.
        output: the file to write.
        gram: keep the products of neurons as well, which the refit needs: two matrices of neurons by neurons a site.
        force: replace an existing output.

    Raises:
        PrunePeakError: bad input, or a file that is there already and `force` is not given.

    Example:
        >>> save_statistics("examples/opt-mini", "opt-mini.stats", gram=True)   # doctest: +SKIP
        >>> compress("examples/opt-mini", 0.2, stats="opt-mini.stats")          # doctest: +SKIP
    """
    _check_samples(samples)
    path = Path(output)
    if path.is_dir():
        raise UsageError(f"--output {path} is a folder; expected a file to write.")
    if path.exists() and not force:
        raise PrunePeakError(f"{path} exists; pass --force to replace it, or choose another --output.")
    source = open_source(model, revision)
    kinds = cuttable_kinds(source.family, keep_shape=True)
    if gram and source.family.attention is not None and source.family.attention.plain:  # heads that can get narrower
        sites = find_sites(source.blank, source.family, kinds, NEURON)
    else:
        sites = find_sites(source.blank, source.family, kinds, keep_shape=True)
    load = weigh(source, sites, calibration, samples, sequence_length, dtype, seed, for_refit=gram)
    machine = plan_machine(source, load, max_memory, device)
    measured = measure(source, calibration, samples, sequence_length, dtype, seed, machine)
    write_statistics(path, source, measured.windows, measured.options, measured.observe(sites, gram), len(sites), gram)
    return load_statistics(path, source, sites)


@dataclass(frozen=True)
class Measured:
    """What a calibration is taken over, and the statistics of any sites on it, measured as they are asked for."""

    windows: Windows
    options: Mapping[str, Any]
    observe: Callable[[Sequence[Site], bool], Iterable[Observed]]  # sites, and whether with products of neurons


def measure(
    source: Source,
    calibration: str = SELF,
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    dtype: str | None = None,
    seed: int = 0,
    machine: Machine = Machine(),  # noqa: B008 - frozen
) -> Measured:
    """Find the windows of a calibration, and be ready to measure on them."""
    length = None if source.sees_images else window_length(source, sequence_length)
    if length is None:
        windows = choose_images(calibration, source, samples, seed)
    elif calibration == SELF:
        windows = own_windows(source, samples, length, seed)
    else:
        windows = choose_windows(calibration, source, samples, length, seed)
    found = len(windows.calibration)
    if found < samples:
        what = "images" if length is None else f"windows of {length} tokens"
        log.warning("%s gives %d %s, not %d; used them all.", calibration, found, what, samples)
    options: dict[str, Any] = {
        "calibration": name_text(calibration),
        "samples": found,
        "sequence_length": length,
        "dtype": dtype or default_dtype(source),
        "seed": seed,
    }

    def observe(sites: Sequence[Site], for_refit: bool) -> Iterable[Observed]:
        compute = DTYPES[options["dtype"]]
        return calibrate_together(source, sites, windows.calibration, compute, for_refit, machine)

    return Measured(windows, options, observe)


def _measured_before(statistics: Statistics) -> Measured:
    def observe(sites: Sequence[Site], for_refit: bool) -> Iterable[Observed]:
        return map(statistics.observed, sites)

    return Measured(statistics.windows, statistics.options, observe)


def _aim(source: Source, sites: Sequence[Site], kept: Widths, host: str) -> tuple[Target, Layout]:
    """What the sites become for which widths are given, and every tensor of it."""
    cut = [site for site in sites if site.kind in kept]
    target = choose_target(source, cut, kept, source.dtype, host)
    return target, lay_out(target)


def _settle_widths(
    source: Source,
    sites: Sequence[Site],
    splits: Sequence[Widths],
    host: str,
    measured: Measured,
    rules: Rules,
    progress: Progress,
    machine: Machine,
) -> Widths:
    """How many neurons stay at every site: measured, where a target can be split over two kinds in several ways."""
    recalled = progress.recall("kept")
    kept: Widths = recalled if recalled in splits else splits[0]
    if len(splits) > 1 and recalled not in splits:
        widest = {site.kind: kept.get(site.kind, site.neurons) for site in sites}
        aimed = choose_target(source, sites, widest, source.dtype, host).sites
        exam = _set_held_out_exam(source, measured.windows)
        compute = DTYPES[measured.options["dtype"]]
        kept = choose_split(source, measured.observe(aimed, True), splits, rules, exam, compute, machine)
        progress.remember("kept", kept)
    return kept


def _cut(
    source: Source,
    target: Target,
    layout: Layout,
    kept: Widths,
    measured: Measured,
    rules: Rules,
    progress: Progress,
) -> tuple[dict[str, Decision], dict[str, str]]:
    """Decide every site and write the checkpoint, block by block; the decisions, and the digests of the tensors."""
    decisions: dict[str, Decision] = {}
    with Export(target, layout, progress.checkpoint) as export:
        for block in sorted({site.block for site in target.sites}):
            recalled = progress.recall_block(block)
            if recalled and export.holds_block({name: d.choice for name, d in recalled[0].items()}, recalled[1]):
                decisions |= recalled[0]
        rest = [site for site in target.sites if site.name not in decisions]
        for block, seen in groupby(measured.observe(rest, rules.needs_evidence), lambda seen: seen.site.block):
            made = {observed.site.name: choose(source, observed, kept[observed.site.kind], rules) for observed in seen}
            progress.note(block, made, export.write_block(block, {name: d.choice for name, d in made.items()}))
            decisions |= {name: replace(d, choice=d.choice.without_reader()) for name, d in made.items()}
            del made  # before the next block is decided
        return decisions, export.finish()


def _verify(folder: Path, source: Source, recipe: dict[str, Any], machine: Machine) -> Verification:
    """Check the folder by its recipe, and write the recipe with what was seen.

    Raises:
        VerificationError: it does not compute what it should, or was made of files that changed meanwhile.
    """
    _write_json(folder / RECIPE_FILE, recipe)
    source.checkpoint.check_unchanged()
    verification = verify(folder, source, machine)
    source.checkpoint.check_unchanged()
    if not verification.passed:
        failed = [f"{check['check']} ({check['seen']})" for check in verification.checks if not check["passed"]]
        raise VerificationError(
            f"the compressed model does not compute what it should, so it was not kept: {'; '.join(failed)}."
        )
    recipe |= {"verification": verification.checks}
    _write_json(folder / RECIPE_FILE, recipe)
    return verification


def _say_few(rules: Rules, decisions: Mapping[str, Decision]) -> None:
    others = {decision.score for decision in decisions.values()} - {rules.score}
    if others:
        log.warning(
            "Fewer tokens than neurons at some sites: there %s chose them, not %s. More --samples choose better.",
            " ".join(others),
            rules.score,
        )


def _say_zero(target: Target, refit: bool) -> None:
    log.warning(
        "%s: cut neurons are held at zero, for no stock class has a place for other constants here (%s)%s.",
        " and ".join(target.zero_filled),
        target.why,
        "; the refit changes the kept weights alone" if refit else "",
    )


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise UsageError(f"--samples {samples}: expected at least one window.")


def _set_exam_on(name: str, source: Source, sequence_length: int) -> Exam:
    """The exam of an --evaluate text, on its first windows; or of a folder of labelled images."""
    return (
        set_image_exam(source, name) if source.sees_images else set_text_exam(source, name, EVALUATED, sequence_length)
    )


def _set_held_out_exam(source: Source, windows: Windows) -> Exam | None:
    """An exam on windows that nothing was measured on; None where the model predicts no tokens, or cannot be asked."""
    if not has_exam(source) or not len(windows.held_out):
        return None
    try:
        return set_exam(source, windows.held_out, f"held-out windows of {windows.source}")
    except PrunePeakError as error:
        log.warning("The quality before and after is not measured: %s", error)
        return None


def _measure_size(source: Source, cut: Mapping[str, int]) -> Size:
    """The size of a model, some of whose neurons (by the kind of site) are there but zero."""
    neurons: Counter[str] = Counter()
    cache = 0
    kinds = cuttable_kinds(source.family, keep_shape=True)
    for site in find_sites(source.blank, source.family, kinds, keep_shape=True):
        neurons[site.kind] += site.neurons - cut.get(site.kind, 0)
        if site.kind == "attention" and source.blank.can_generate():
            groups, _, head_dim = site.heads
            cache += 2 * groups * head_dim * source.dtype.itemsize
    return Size(dict(neurons), source.parameters, source.size, cache)


def _tell_outcome(site: Site, decision: Decision) -> dict[str, Any]:
    outcome = {
        "kind": site.kind,
        "block": site.block,
        "neurons": site.neurons,
        "kept": len(decision.choice.keep),
        "lost": decision.lost,
        "score": decision.score,
    }
    return outcome if decision.scores_lost is None else outcome | {"scores_lost": decision.scores_lost}


def _tell_recipe(source: Source, target: Target, options: Mapping[str, Any], windows: Windows) -> dict[str, Any]:
    """What was done with what; no dates and no times, so that the same command gives the same bytes."""
    return {
        "prune_peak": __version__,
        "source": {"model": source.label, "revision": source.revision, "digest": source.digest},
        "options": dict(options),
        "calibration_digest": windows.digest,
        "host": target.model_class.__name__,
        "versions": VERSIONS,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
