"""`heal()`: a compressed model learns back from the original, and is written as another folder."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from .errors import PrunePeakError, VerificationError, spell
from .evaluation.talk import warn_of_answers_before
from .export.card import write_card
from .export.digests import digest_files
from .export.folder import copy_side_files
from .export.recipe import RECIPE_FILE, VERSIONS, write_json
from .export.resume import ResumableRun
from .healing.job import HealJob, prepare_heal
from .healing.objectives import Distance, measure_distance
from .healing.options import HealOptions
from .healing.training import into_batches, train
from .healing.windows import HELD_OUT_FILE, HealingData, choose_data, load_data
from .io.writer import Writer
from .models.loading import open_model
from .models.weight_names import split_merged
from .option_fields import takes
from .options import PROCESSOR, SELF
from .progress import next_stage, stages
from .verification import Verification, verify

log = logging.getLogger(__name__)

DATA_FILE, TRAINING = "data.safetensors", "training"  # in the partial folder
ENOUGH = 0.9  # of the tokens asked for


@dataclass(frozen=True)
class HealResult:
    """What `heal` did."""

    output: Path
    method: str
    data: str
    tokens: int
    distance: str  # what was minimized: of a language model, KL(original || model) per token
    divergence_before: float  # this distance on held-out data
    divergence_after: float
    metric: str  # another figure on the same data: of a causal language model, the perplexity
    score_original: float
    score_before: float
    score_after: float
    verification: Verification

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"output": str(self.output)}


@takes(HealOptions)
@stages(4)
def heal(folder: str | Path, **options: Any) -> HealResult | None:
    """Let a folder that `compress` wrote learn back from the original, and write another folder.

    The loss is the divergence of the predictions from the original's; of an encoder without a head, the distance of the
    hidden states. The best state on held-out data is kept.

    Args:
        folder: what `compress` wrote; it is not changed.
        {options}

    Returns:
        The result; None in the processes of `accelerate launch` other than the first.

    Raises:
        UsageError: options that contradict each other.
        PrunePeakError: a head that is not supported, another original, data or memory that do not suffice, or no
            improvement; then nothing is written.

    Example:
        >>> result = heal("SmolLM2-135M-peak-0.3", original="SmolLM2-135M", data="notes.txt")  # doctest: +SKIP
        >>> result.divergence_after < result.divergence_before                                 # doctest: +SKIP
        True
    """
    job = prepare_heal(Path(folder), HealOptions(**options))
    state = PartialState(cpu=job.device.type == PROCESSOR)
    partial = job.output.parent / f"{job.output.name}.partial"
    if not state.is_main_process:
        state.wait_for_everyone()  # for the data
        _train(job, load_data(partial / DATA_FILE), partial / TRAINING)
        return None
    with ResumableRun(job.output, job.fingerprint, job.disk, job.options.force) as run:
        data = _prepare_data(job, partial / DATA_FILE)
        run.require_unchanged("data", data.digest)
        state.wait_for_everyone()
        next_stage()
        before, best = _train(job, data, partial / TRAINING)
        next_stage()
        digests = _write(job, run.checkpoint, best)
        after = _measure_written(job, run.checkpoint, data)
        if after.divergence >= before[1].divergence:
            raise PrunePeakError(
                f"{folder} does not get better by this: the divergence on held-out windows of {data.source} was "
                f"{before[1].divergence:.4f} and is {after.divergence:.4f}. Nothing was written. Pass more or other "
                f"{spell('data')}."
            )
        recipe = _describe(job, data, before, after) | {"tensors": digests}
        next_stage()
        verification = _finish(job, run.checkpoint, recipe, data)
        run.finish()
    return _conclude(job, data, before, after, verification)


def _conclude(
    job: HealJob, data: HealingData, before: list[Distance], after: Distance, verification: Verification
) -> HealResult:
    return HealResult(
        output=job.output,
        method=job.method,
        data=data.source,
        tokens=job.options.tokens,
        distance=job.objective.distance,
        divergence_before=before[1].divergence,
        divergence_after=after.divergence,
        metric=job.objective.metric,
        score_original=before[0].score,
        score_before=before[1].score,
        score_after=after.score,
        verification=verification,
    )


def _train(job: HealJob, data: HealingData, folder: Path) -> tuple[list[Distance], Mapping[str, torch.Tensor]]:
    """The distances of original and compressed model from the original, and the best weights."""
    original, model = (each.load(torch.float32).to(job.device) for each in (job.original, job.model))
    objective, options = job.objective, job.options
    held_out = into_batches(objective, data.held_out, job.device)
    before = [measure_distance(objective, original, each, held_out) for each in (original, model)]  # by every process
    on_cpu = job.device.type == PROCESSOR
    best = train(
        *(objective, original, model, data, options.tokens, job.method, folder, options.seed),
        *(job.tokens_at_once, on_cpu),
    )
    return before, best.state_dict()


def _measure_written(job: HealJob, folder: Path, data: HealingData) -> Distance:
    original, written = (each.load(torch.float32).to(job.device) for each in (job.original, open_model(str(folder))))
    return measure_distance(job.objective, original, written, into_batches(job.objective, data.held_out, job.device))


def _prepare_data(job: HealJob, path: Path) -> HealingData:
    """The data, made once; a resumed run finds it."""
    if not path.is_file():
        choose_data(job.original, job.recipe, job.data, job.options.tokens, job.options.seed, job.reading).save(path)
    data = load_data(path)
    if data.tokens < job.options.tokens * ENOUGH:
        log.warning(
            "%s has %d tokens to learn on, fewer than %s: they are learned %.1f times.",
            data.source,
            data.tokens,
            spell("tokens", job.options.tokens),
            job.options.tokens / data.tokens,
        )
    return data


def _write(job: HealJob, folder: Path, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The weights in the types of the compressed folder, and its other files."""
    model = job.model
    layout = {disk: (model.checkpoint.shape(disk), model.checkpoint.dtype(disk)) for disk in model.disk_names}
    with Writer(folder, layout) as writer:
        for name, disk in model.names.items():
            writer.write(disk, state[name].cpu().to(layout[disk][1]).contiguous())
        merged = {name: state[name].cpu() for name in model.merged}
        for disk, tensor in split_merged(model.meta_model, merged).items():
            writer.write(disk, tensor.to(layout[disk][1]).contiguous())
        digests = writer.finish()
    shutil.copyfile(job.folder / "config.json", folder / "config.json")
    copy_side_files(job.folder, folder)
    return digests


def _describe(job: HealJob, data: HealingData, before: list[Distance], after: Distance) -> dict[str, Any]:
    """The recipe: that of the compressed folder, and what healing did."""
    return {
        **job.recipe,
        "quality": {"before": None, "after": None},  # of the compressed model, like `talk`
        "talk": {},
        "warnings": warn_of_answers_before(job.recipe),
        "versions": VERSIONS,
        "healing": {
            **job.record,
            "source": data.source,
            "data_digest": data.digest,
            "parent_tensors": job.recipe["tensors"],
            "held_out_tokens": data.held_out_tokens,
            "aim": job.objective.aim,
            "distance": job.objective.distance,
            "divergence": {"before": before[1].divergence, "after": after.divergence},
            "metric": job.objective.metric,
            "score": {"original": before[0].score, "before": before[1].score, "after": after.score},
        },
    }


def _finish(job: HealJob, folder: Path, recipe: dict[str, Any], data: HealingData) -> Verification:
    """Write recipe and card, and verify.

    Raises:
        VerificationError: a check fails.
    """
    if job.data == SELF:
        HealingData(data.source, [], data.held_out).save(folder / HELD_OUT_FILE)
    recipe |= {"files": digest_files(folder)}
    write_json(folder / RECIPE_FILE, recipe)
    verification = verify(folder, job.original, data=None if job.data == SELF else job.data)
    if not verification.passed:
        failed = [f"{check['check']} ({check['seen']})" for check in verification.checks if not check["passed"]]
        raise VerificationError(f"the healed model is not what it should be, so it was not kept: {'; '.join(failed)}.")
    recipe |= {"verification": verification.checks}
    write_json(folder / RECIPE_FILE, recipe)
    write_card(folder, recipe, job.original)
    return verification
