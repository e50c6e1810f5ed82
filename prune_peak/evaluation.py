"""What a checkpoint is worth: exams.

An exam is what a model is to predict: every next token (perplexity), or masked tokens or images' labels (accuracy).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .blocks import Batch, BlockStream
from .calibration import BATCH_IMAGES, into_batches
from .errors import PrunePeakError
from .images import read_labelled
from .machine import Machine
from .source import Source
from .texts import load_tokenizer, name_text, read_windows, window_length

PERPLEXITY, MASKED_ACCURACY, IMAGE_ACCURACY = "perplexity", "masked-token accuracy", "image accuracy"
MASKED = 0.15  # share of a window's ordinary tokens that a masked LM is asked for, BERT's own
EXPLODED, COLLAPSED = 10, 0.5  # times the original's perplexity, or accuracy: beyond, hardly anything is left
LARGEST_LOSS = 700.0  # nats; the perplexity of more is no float
NOT_ASKED = -100  # the target that cross-entropy leaves out
GRADED_AT_ONCE = 2**18  # logits, few enough for a processor's cache in float32: all at once takes twice the time


@dataclass(frozen=True)
class Exam:
    """What a model is asked to predict, and the right answers: the same ones for an original and its result."""

    metric: str  # what it is summed up in: PERPLEXITY, or an accuracy
    text: str  # where the windows come from
    batches: Sequence[Batch]
    targets: Sequence[Tensor]  # int64, one for each prediction of a batch; NOT_ASKED where nothing is asked


@dataclass(frozen=True)
class Grades:
    """How a model did at an exam, window by window: (windows,) float64 each."""

    losses: Tensor  # mean cross-entropy, nats a prediction
    hits: Tensor  # share of predictions whose most likely token is the right one


@dataclass(frozen=True)
class Quality:
    """What an exam says of a model, and the protocol it was taken by; standard errors are over windows."""

    metric: str
    value: float  # of the metric
    standard_error: float | None
    loss: float  # cross-entropy, nats a prediction
    loss_error: float | None
    accuracy: float  # top-1
    accuracy_error: float | None
    windows: int
    length: int
    tokens: int  # predicted ones
    text: str
    dtype: str

    @property
    def protocol(self) -> str:
        """How it was measured, in words."""
        if self.metric == IMAGE_ACCURACY:
            return f"{self.windows:,} images, {self.dtype}"
        windows = f"{self.windows} windows of {self.length} tokens that do not overlap"
        return f"{windows}, {self.tokens:,} predicted, {self.dtype}"


def has_exam(source: Source) -> bool:
    """Whether a model predicts tokens: a causal or a masked language model."""
    return source.blank.can_generate() or _is_masked(source)


def set_exam(source: Source, windows: Tensor, text: str) -> Exam:
    """Predict every next token of windows of tokens, (windows, length); or those that are masked, in a masked LM.

    A seeded 15 % of the tokens that are not special are masked, as many in every window of one text.

    Raises:
        PrunePeakError: a masked LM whose tokenizer has no mask token.
    """
    if not _is_masked(source):
        targets = windows.roll(-1, dims=1)
        targets[:, -1] = NOT_ASKED
        return Exam(PERPLEXITY, text, into_batches(windows, tokens=1), targets.split(1))
    tokenizer = load_tokenizer(source)
    if tokenizer.mask_token_id is None:
        raise PrunePeakError(f"the tokenizer of {source.name} has no mask token, which predicting masked tokens needs.")
    ordinary = ~torch.isin(windows, torch.tensor(tokenizer.all_special_ids))
    order = torch.rand(windows.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~ordinary, 2.0)
    count = (MASKED * ordinary.sum(1, keepdim=True)).round().clamp_min(1)
    masked = ordinary & (order.argsort(1).argsort(1) < count)
    inputs = windows.masked_fill(masked, tokenizer.mask_token_id)
    targets = windows.masked_fill(~masked, NOT_ASKED)
    return Exam(MASKED_ACCURACY, text, into_batches(inputs, tokens=1), targets.split(1))


def set_text_exam(source: Source, text: str, windows: int, sequence_length: int) -> Exam:
    """The exam of a text, on its first windows.

    Raises:
        PrunePeakError: the model predicts no tokens, or there is no such text.
    """
    if not has_exam(source):
        raise PrunePeakError(f"{source.name} is a {source.model_class.__name__}: it predicts no text to evaluate.")
    found = read_windows(text, source, window_length(source, sequence_length))
    return set_exam(source, found[:windows], name_text(text))


def set_image_exam(source: Source, folder: str) -> Exam:
    """Name the label of every image of a folder, `folder/<label>/<image>`.

    Raises:
        PrunePeakError: the model is no image classifier, or the folder is not of that form.
    """
    if not source.sees_images or "ForImageClassification" not in source.model_class.__name__:
        raise PrunePeakError(f"{source.name} is a {source.model_class.__name__}: it names no images' labels.")
    pixels, labels = read_labelled(folder, source)
    return Exam(IMAGE_ACCURACY, Path(folder).name, into_batches(pixels), labels[:, None].split(BATCH_IMAGES))


def _is_masked(source: Source) -> bool:
    return source.model_class.__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


def grade(logits: Tensor, targets: Tensor) -> Grades:
    """Grade one batch of an exam: logits are (windows, ..., classes), targets the same without the last axis."""
    asked = (targets != NOT_ASKED).view(len(targets), -1)
    rows = max(1, GRADED_AT_ONCE // logits.shape[-1])
    losses, hits = [], []
    for part, answers in zip(logits.flatten(0, -2).split(rows), targets.flatten().split(rows), strict=True):
        exact = part.float()
        losses.append(cross_entropy(exact, answers, reduction="none", ignore_index=NOT_ASKED))
        hits.append(exact.argmax(-1) == answers)
    means = (torch.cat(values).view_as(asked).double().sum(1) / asked.sum(1) for values in (losses, hits))
    return Grades(*means)


def take_exam(
    source: Source,
    exam: Exam,
    dtype: torch.dtype | None = None,
    machine: Machine = Machine(),  # noqa: B008 - frozen
) -> Grades:
    """Grade a model, block-streamed: memory holds one block.

    Raises:
        PrunePeakError: its outputs are not finite.
    """
    stream = BlockStream(source, exam.batches, dtype or source.dtype, machine)
    for _ in tqdm(stream.steps(), total=source.config.num_hidden_layers, desc=exam.metric, unit="block"):
        pass
    grades = [grade(output.logits, targets) for output, targets in zip(stream.outputs(), exam.targets, strict=True)]
    losses = torch.cat([part.losses for part in grades])
    if not bool(losses.isfinite().all()):
        raise PrunePeakError(
            f"{source.name} gives outputs that are not finite in {str(stream.dtype).removeprefix('torch.')} on "
            f"{exam.text}. Pass --dtype float32, or check the source checkpoint."
        )
    return Grades(losses, torch.cat([part.hits for part in grades]))


def measure_quality(
    source: Source,
    exam: Exam,
    dtype: torch.dtype | None = None,
    machine: Machine = Machine(),  # noqa: B008 - frozen
) -> Quality:
    """Let a model take an exam, and sum it up."""
    return sum_up(exam, take_exam(source, exam, dtype, machine), dtype or source.dtype)


def sum_up(exam: Exam, grades: Grades, dtype: torch.dtype) -> Quality:
    """What the grades of an exam say, in its metric."""
    loss, loss_error = _mean_and_error(grades.losses)
    accuracy, accuracy_error = _mean_and_error(grades.hits)
    value, error = accuracy, accuracy_error
    if exam.metric == PERPLEXITY:
        value = math.exp(min(loss, LARGEST_LOSS))
        error = None if loss_error is None else value * loss_error
    return Quality(
        metric=exam.metric,
        value=value,
        standard_error=error,
        loss=loss,
        loss_error=loss_error,
        accuracy=accuracy,
        accuracy_error=accuracy_error,
        windows=len(grades.losses),
        length=exam.targets[0].shape[1],
        tokens=sum(int((targets != NOT_ASKED).sum()) for targets in exam.targets),
        text=exam.text,
        dtype=str(dtype).removeprefix("torch."),
    )


def tell_collapse(before: Quality, after: Quality) -> str | None:
    """What nobody may overlook: that hardly anything of a model is left."""
    if before.metric == PERPLEXITY and after.value > EXPLODED * before.value:
        what = f"{before.value:.2f} to {after.value:.4g}, more than {EXPLODED} times the original's"
    elif before.metric != PERPLEXITY and after.value < COLLAPSED * before.value and after.loss > before.loss:
        what = f"{before.value:.1%} to {after.value:.1%}, less than half of the original's"
    else:
        return None
    return (
        f"hardly anything of this model is left: its {before.metric} on {before.text} went from {what}. Cut less, "
        "or calibrate on more text, and on the kind that it will read."
    )


def _mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean over windows, and its standard error where there are two."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return values.mean().item(), error
