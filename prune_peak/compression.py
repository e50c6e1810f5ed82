"""`compress()`: from a model to a smaller one that stock transformers loads."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from .conversion.layout import Conversion
from .data.chat import find_template
from .data.texts import has_tokenizer
from .errors import VerificationError, spell
from .evaluation.quality import EvalResult, build_held_out_eval_set, check_collapse, measure_quality
from .evaluation.talk import ASKED, Talk, describe_talk, measure_talk, read_prompts, warn_of_talk
from .export.card import write_card
from .export.digests import digest_files
from .export.folder import FolderWriter
from .export.recipe import (
    RECIPE_FILE,
    Size,
    describe_run,
    describe_shares,
    describe_sites,
    describe_steps,
    measure_shares,
    measure_size,
    write_json,
)
from .export.resume import ResumableRun
from .export.tokenizer import keep_tokenizer
from .job import Job, prepare
from .models.loading import Model, open_model
from .models.stacks import choose_stacks
from .option_fields import takes
from .options import CompressOptions, Ratio
from .progress import next_stage, stages
from .pruning.allocation import choose_allocation
from .pruning.block_choice import choose_blocks
from .pruning.budget import Widths
from .pruning.site_pruning import plan_site
from .sites.blocks import BlocksSite
from .sites.plan import RefitResult, SiteResult
from .stats.calibration import Calibration
from .verification import Verification, verify

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` did: where the result is, and its numbers before and after."""

    output: Path
    model_class: str
    sees_images: bool
    has_inputs: bool  # whether the tokenizer (or the image processor) is in the folder
    before: Size
    after: Size
    share: Mapping[str, float]  # of the neurons that were pruned, by the kind of site
    pruned: str  # the same in words, with what was asked for
    keep_shape: bool  # pruned weights are zero, not deleted
    quality_before: EvalResult | None  # None where the model predicts no tokens
    quality_after: EvalResult | None
    talk: Sequence[Talk]  # of the model before and after; empty for large models and without a chat template
    fills: Mapping[str, int]  # number of sites by fill
    zero_filled: Sequence[str]  # kinds of site whose constants are zero, because the class has no bias for them
    refits: Mapping[str, RefitResult]  # by the site's name; empty without the refit
    scores_lost: Mapping[str, float]  # by the site's name, for narrower heads: share of the attention scores' variance
    warnings: Sequence[str]
    verification: Verification

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"output": str(self.output)}


@takes(CompressOptions)
@stages(4)
def compress(
    model: str, ratio: Ratio | None = None, output: str | Path | None = None, **options: Any
) -> CompressionResult:
    """Prune a share of a model's neurons and write a smaller checkpoint that stock transformers loads.

    Args:
        model: a folder or a Hub id.
        {options}

    Raises:
        PrunePeakError: bad input, before work starts, or a result that does not verify.

    Example:
        >>> result = compress("examples/opt-mini", 0.3, "out", force=True)  # doctest: +SKIP
        >>> result.after.parameters < result.before.parameters              # doctest: +SKIP
        True
    """
    job = prepare(model, CompressOptions(ratio=ratio, output=output, **options))
    with ResumableRun(job.folder, job.fingerprint, job.conversion.layout_bytes, job.options.force) as run:
        calibration = job.calibrate()
        run.require_unchanged("calibration", calibration.windows.digest)
        next_stage()
        conversion = _choose_conversion(job, calibration, run)
        results, digests = _write_pruned(job, conversion, calibration, run)
        keep_tokenizer(job.source, conversion, run.checkpoint)
        _warn_few_tokens(job, results)
        next_stage()
        written = choose_stacks(open_model(str(run.checkpoint)), job.options.stack)
        quality = _evaluate_both(job, written, calibration)
        talk = _compare_talk(job, written)
        recipe = _describe(job, written, conversion, calibration, results, quality) | describe_talk(talk)
        recipe["warnings"] += warn_of_talk(talk)
        recipe |= {"tensors": digests, "files": digest_files(run.checkpoint)}
        next_stage()
        verification = _verify(job, run.checkpoint, recipe)
        write_card(run.checkpoint, recipe, job.source)
        run.finish()
    return _summarize(job, conversion, recipe, results, quality, talk, verification)


def _choose_conversion(job: Job, calibration: Calibration, run: ResumableRun) -> Conversion:
    """The allocation that loses least where there are several, converted; an unfinished run has chosen already."""
    blocks = [site for site in job.sites if isinstance(site, BlocksSite)]
    if len(job.allocations) == 1 and not blocks:
        return job.conversion
    stored: Widths | None = run.lookup("kept")
    if stored is not None and (stored in job.allocations or blocks):
        return job.convert(stored)
    if blocks:
        widths = choose_blocks(job.source, blocks, len(job.allocations[0]), calibration, job.options, job.execution)
        run.store("kept", widths)
        return job.convert(widths)
    widest = {site.name: job.allocations[0].get(site.name, site.neurons) for site in job.sites}
    sites = job.convert(widest).sites
    eval_set = build_held_out_eval_set(job.source, calibration.windows)
    observed = calibration.observe(sites, True)
    widths = choose_allocation(
        job.source, observed, job.allocations, job.options, eval_set, calibration.dtype, job.execution
    )
    run.store("kept", widths)
    return job.convert(widths)


def _write_pruned(
    job: Job, conversion: Conversion, calibration: Calibration, run: ResumableRun
) -> tuple[dict[str, SiteResult], dict[str, str]]:
    """Prune and write block by block: the results by site, and the digests of the tensors."""
    results: dict[str, SiteResult] = {}
    kept = conversion.kept
    with FolderWriter(job.source, conversion, run.checkpoint) as folder:
        for block in sorted({site.block for site in conversion.sites}):
            stored = run.load_block(block)
            if stored and folder.holds_block({name: result.plan for name, result in stored[0].items()}, stored[1]):
                results |= stored[0]
        rest = [site for site in conversion.sites if site.name not in results]
        observed = calibration.observe(rest, job.options.needs_covariances)
        for block, stats in groupby(observed, lambda stats: stats.site.block):
            made = {each.site.name: plan_site(job.source, each, kept[each.site.name], job.options) for each in stats}
            plans = {name: result.plan for name, result in made.items()}
            run.save_block(block, made, folder.write_block(block, plans))
            results |= {name: replace(result, plan=result.plan.without_weights()) for name, result in made.items()}
            del made, plans  # before the next block is planned
        return results, folder.finish()


def _evaluate_both(job: Job, written: Model, calibration: Calibration) -> tuple[EvalResult | None, EvalResult | None]:
    """The quality of the source and of the result, on the same evaluation set."""
    eval_set = job.eval_set or build_held_out_eval_set(job.source, calibration.windows)
    if eval_set is None:
        return None, None
    before, after = (
        measure_quality(model, eval_set, calibration.dtype, job.execution, name)
        for name, model in {"the original": job.source, "the result": written}.items()
    )
    return before, after


def _compare_talk(job: Job, written: Model) -> list[Talk]:
    """Answers of the source and of the result to some prompts; none of large models and of those without a template."""
    if not job.execution.talks or find_template(job.source) is None:
        return []
    return measure_talk([job.source, written], read_prompts()[:ASKED], job.execution.device)


def _describe(
    job: Job,
    written: Model,
    conversion: Conversion,
    calibration: Calibration,
    results: Mapping[str, SiteResult],
    quality: tuple[EvalResult | None, EvalResult | None],
) -> dict[str, Any]:
    """The recipe, before the verification."""
    before, after = quality
    warning = check_collapse(before, after) if before and after else None
    zeroed = {
        (site.label, site.block): site.neurons - conversion.kept[site.name]
        for site in conversion.sites
        if not site.kind.deletes
    }
    record = job.record | {"sites": sorted({site.label for site in conversion.sites}), **calibration.options}
    return describe_run(job.source, conversion, record, calibration.windows) | {
        "before": asdict(measure_size(job.source, {})),
        "after": asdict(measure_size(written, zeroed)),
        "quality": {"before": before and asdict(before), "after": after and asdict(after)},
        "warnings": [warning] if warning else [],
        "steps": describe_steps(conversion.sites, job.options.multiple_of),
        **describe_sites(conversion.sites, results),
    }


def _verify(job: Job, folder: Path, recipe: dict[str, Any]) -> Verification:
    """Check the folder by its recipe, and write the recipe with the checks.

    Raises:
        VerificationError: it does not compute what it should, or files that it was made of have changed.
    """
    write_json(folder / RECIPE_FILE, recipe)
    job.source.checkpoint.check_unchanged()
    verification = verify(folder, job.source, job.execution)
    job.source.checkpoint.check_unchanged()
    if not verification.passed:
        failed = [f"{check['check']} ({check['seen']})" for check in verification.checks if not check["passed"]]
        raise VerificationError(
            f"the compressed model does not compute what it should, so it was not kept: {'; '.join(failed)}."
        )
    recipe |= {"verification": verification.checks}
    write_json(folder / RECIPE_FILE, recipe)
    return verification


def _summarize(
    job: Job,
    conversion: Conversion,
    recipe: Mapping[str, Any],
    results: Mapping[str, SiteResult],
    quality: tuple[EvalResult | None, EvalResult | None],
    talk: Sequence[Talk],
    verification: Verification,
) -> CompressionResult:
    share = measure_shares(conversion.sites, conversion.kept)
    return CompressionResult(
        output=job.folder,
        model_class=recipe["output_class"],
        sees_images=job.source.sees_images,
        has_inputs=job.source.sees_images or has_tokenizer(job.folder),
        before=Size(**recipe["before"]),
        after=Size(**recipe["after"]),
        share=share,
        pruned=describe_shares(job.options.ratio, share, recipe["steps"]),
        keep_shape=job.options.keep_shape,
        quality_before=quality[0],
        quality_after=quality[1],
        talk=talk,
        fills=dict(Counter(result.fill for result in results.values())),
        zero_filled=conversion.zero_filled,
        refits={name: result.refit for name, result in results.items() if result.refit is not None},
        scores_lost={name: r.scores_lost for name, r in results.items() if r.scores_lost is not None},
        warnings=recipe["warnings"],
        verification=verification,
    )


def _warn_few_tokens(job: Job, results: Mapping[str, SiteResult]) -> None:
    others = {result.score for result in results.values()} - {job.options.score}
    if others:
        log.warning(
            "Some sites have more neurons than there are tokens: %s chose their neurons, not %s. Pass more %s.",
            " ".join(others),
            job.options.score,
            spell("samples"),
        )
