"""`heal()`: a compressed model learns back from the original, and is written as another folder."""

import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from .data.data_sets import check_data, reading_of
from .data.windows import name_data, window_length
from .errors import PrunePeakError, UsageError, VerificationError, spell
from .evaluation.divergence import Distance, measure_distance
from .evaluation.talk import warn_of_answers_before
from .export.card import write_card
from .export.digests import digest_files
from .export.folder import copy_side_files
from .export.recipe import RECIPE_FILE, VERSIONS, read_recipe, write_json
from .export.resume import ResumableRun
from .healing.options import HealOptions
from .healing.training import STEP_TOKENS, into_batches, train
from .healing.windows import HELD_OUT, HELD_OUT_FILE, HealingData, choose_data, load_data, recorded_reading
from .io.writer import Writer
from .memory import MACHINE_SHARE, estimate_healing, gigabytes, physical_memory
from .models.execution import find_device
from .models.loading import Model, open_model
from .models.weight_names import split_merged
from .option_fields import takes
from .options import FULL, LORA, METHODS, PROCESSOR, SELF, DataOptions
from .progress import next_stage, stages
from .verification import Verification, verify
from .version import __version__

log = logging.getLogger(__name__)

DATA_FILE, TRAINING = "data.safetensors", "training"  # in the partial folder
KEPT_CHECKPOINTS = 3  # the best, the newest, and one that is being written
SPEED_PROBE = 1024  # rows and columns of the matrices that are multiplied to measure the speed
ENOUGH = 0.9  # of the tokens asked for
HELD_OUT_PASSES = 5  # through both models
OVERHEAD = 1.6  # time of a run, evaluations included, over that of its products


@dataclass(frozen=True)
class HealJob:
    """One run of `heal`, decided before any training."""

    options: HealOptions
    folder: Path  # the compressed one
    recipe: Mapping[str, Any]
    original: Model
    model: Model  # compressed
    data: str
    reading: DataOptions  # of the data
    method: str
    output: Path
    device: torch.device
    memory: int  # bytes that it takes at most
    tokens_at_once: int  # in one pass

    @property
    def record(self) -> dict[str, Any]:
        """What decides the result."""
        return {
            "data": self.data if self.data == SELF else name_data(self.data),
            "tokens": self.options.tokens,
            "method": self.method,
            "seed": self.options.seed,
            "device": self.device.type,
            **asdict(self.reading),
        }

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that an unfinished run must share with this one to be resumed."""
        shared = {"parent": self.recipe["tensors"], "versions": VERSIONS, "prune_peak": __version__}
        return self.record | shared | {"tokens_at_once": self.tokens_at_once}

    @property
    def minutes(self) -> float:
        """An estimate, from the speed of a product of matrices."""
        pair = torch.ones(2, SPEED_PROBE, SPEED_PROBE, device=self.device)
        seconds = math.inf
        for _ in range(3):
            start = time.perf_counter()
            (pair[0] @ pair[1]).sum().item()
            seconds = min(seconds, time.perf_counter() - start)
        speed = 2 * SPEED_PROBE**3 / seconds
        work = self.options.tokens * (2 * self.original.parameters + 6 * self.model.parameters)
        measured = HELD_OUT_PASSES * HELD_OUT * 2 * (self.original.parameters + self.model.parameters)
        return (OVERHEAD * work + measured) / speed / 60

    @property
    def disk(self) -> int:
        """Bytes of checkpoints while it runs, and of the result."""
        trained = self.model.parameters if self.method == FULL else self.model.parameters // 20
        return 12 * trained * KEPT_CHECKPOINTS + self.model.size


@dataclass(frozen=True)
class HealResult:
    """What `heal` did."""

    output: Path
    method: str
    data: str
    tokens: int
    divergence_before: float  # KL(original || model) per token on held-out windows, nats
    divergence_after: float
    perplexity_original: float  # on the same windows
    perplexity_before: float
    perplexity_after: float
    verification: Verification

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"output": str(self.output)}


@takes(HealOptions)
@stages(4)
def heal(folder: str | Path, **options: Any) -> HealResult | None:
    """Let a folder that `compress` wrote learn back from the original, and write another folder.

    The loss is the divergence of the predictions from the original's. The best state on held-out windows is kept.

    Args:
        folder: what `compress` wrote; it is not changed.
        {options}

    Returns:
        The result; None in the processes of `accelerate launch` other than the first.

    Raises:
        UsageError: options that contradict each other.
        PrunePeakError: a model that predicts no next tokens, another original, data or memory that do not suffice, or
            no improvement; then nothing is written.

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
        if after.kl >= before[1].kl:
            raise PrunePeakError(
                f"{folder} does not get better by this: the divergence on held-out windows of {data.source} was "
                f"{before[1].kl:.4f} and is {after.kl:.4f}. Nothing was written. Pass more or other {spell('data')}."
            )
        recipe = _describe(job, data, before, after) | {"tensors": digests}
        next_stage()
        verification = _finish(job, run.checkpoint, recipe, data)
        run.finish()
    return HealResult(
        output=job.output,
        method=job.method,
        data=data.source,
        tokens=job.options.tokens,
        divergence_before=before[1].kl,
        divergence_after=after.kl,
        perplexity_original=before[0].perplexity,
        perplexity_before=before[1].perplexity,
        perplexity_after=after.perplexity,
        verification=verification,
    )


def _train(job: HealJob, data: HealingData, folder: Path) -> tuple[list[Distance], Mapping[str, torch.Tensor]]:
    """The distances of original and compressed model from the original, and the best weights."""
    original, model = (each.load(torch.float32).to(job.device) for each in (job.original, job.model))
    held_out = into_batches(data.held_out, job.device)
    before = [measure_distance(original, each, held_out) for each in (original, model)]  # by every process alike
    on_cpu = job.device.type == PROCESSOR
    best = train(
        original, model, data, job.options.tokens, job.method, folder, job.options.seed, job.tokens_at_once, on_cpu
    )
    return before, best.state_dict()


def _measure_written(job: HealJob, folder: Path, data: HealingData) -> Distance:
    original, written = (each.load(torch.float32).to(job.device) for each in (job.original, open_model(str(folder))))
    return measure_distance(original, written, into_batches(data.held_out, job.device))


def prepare_heal(folder: Path, options: HealOptions) -> HealJob:
    """Open both models and decide what a run does.

    Raises:
        UsageError, PrunePeakError: as `heal`.
    """
    device = find_device(options.device)
    recipe = read_recipe(folder)
    if "healing" in recipe:
        raise UsageError(
            f"{folder} is healed already. Heal the folder that compress wrote, with more {spell('tokens')}."
        )
    model = open_model(str(folder))
    if not model.meta_model.can_generate() or model.reads_pairs:
        raise PrunePeakError(
            f"{folder} is a {model.model_class.__name__}; heal supports causal language models only so far."
        )
    original = _open_original(folder, recipe, options)
    data = options.data or _data_of(folder, recipe)
    reading = reading_of(data, recorded_reading(recipe["options"])) if options.data is None else options.reading
    check_data([data], original.sees_images, reading)
    output = Path(options.output or f"{folder.resolve().parent / folder.resolve().name}-healed")
    if folder.resolve().is_relative_to(output.resolve()) or original.folder.resolve().is_relative_to(output.resolve()):
        raise UsageError(f"{spell('output', output)} contains the model itself; choose another.")
    budget = options.max_memory or int(MACHINE_SHARE * physical_memory())
    length = window_length(original, recipe["options"]["sequence_length"])
    needs = {
        (method, tokens): estimate_healing(original, model, tokens, method)
        for method in ([options.method] if options.method else METHODS)
        for tokens in (max(length, STEP_TOKENS), max(length, STEP_TOKENS // 2))
    }
    fitting = [choice for choice, need in needs.items() if need <= budget or device.type != PROCESSOR]
    if not fitting:
        lora = spell("method", LORA)
        method, tokens = min(needs, key=lambda choice: needs[choice])
        raise PrunePeakError(
            f"to heal {folder} by {method} needs {gigabytes(needs[method, tokens])} of memory; the budget is "
            f"{gigabytes(budget)}. Pass a larger {spell('max_memory')}{'' if method == LORA else f', or {lora}'}."
        )
    method, tokens = fitting[0]
    memory = needs[method, tokens]
    return HealJob(options, folder, recipe, original, model, data, reading, method, output, device, memory, tokens)


def _open_original(folder: Path, recipe: Mapping[str, Any], options: HealOptions) -> Model:
    source = recipe["source"]
    name = options.original or (source["model"] if source["revision"] else None)
    if name is None:
        raise UsageError(
            f"{folder} was compressed from a local folder, {source['model']}; pass {spell('original', 'DIR')}."
        )
    original = open_model(name, options.revision or (None if options.original else source["revision"]))
    if original.digest != source["digest"]:
        raise PrunePeakError(
            f"{name} is not the model that {folder} was compressed from. Pass that with {spell('original')}."
        )
    return original


def _data_of(folder: Path, recipe: Mapping[str, Any]) -> str:
    names: list[str] = recipe["options"]["calibration"]
    if names == [SELF] or Path(names[0]).is_file() or "/" in names[0]:
        return names[0]
    raise UsageError(
        f"{folder} was calibrated on {names[0]}, which is not here; pass {spell('data', 'FILE')}, or "
        f"{spell('data', SELF)}."
    )


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
            "held_out_tokens": sum(len(row["input_ids"]) for row in data.held_out),
            "divergence": {"before": before[1].kl, "after": after.kl},
            "perplexity": {
                "original": before[0].perplexity,
                "before": before[1].perplexity,
                "after": after.perplexity,
            },
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
