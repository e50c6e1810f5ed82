"""Quality of a model on an evaluation set: perplexity, masked-token accuracy, image accuracy."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..data.images import read_labelled
from ..data.pairs import read_pairs
from ..data.texts import load_tokenizer, read_windows
from ..data.windows import BATCH_IMAGES, IGNORED, PADDING, Windows, into_batches, join, name_data, window_length
from ..errors import PrunePeakError, spell
from ..models.execution import ExecutionConfig
from ..models.loading import DECODER_IDS, Model, ModelSpec
from ..models.stream import Batch
from ..models.whole import open_stream
from ..options import FIRST_PART, DataOptions
from ..progress import open_bar
from .options import EVALUATED

log = logging.getLogger(__name__)

PERPLEXITY, MASKED_ACCURACY, IMAGE_ACCURACY = "perplexity", "masked-token accuracy", "image accuracy"
MASKED = 0.15  # share of a window's ordinary tokens that are masked for a masked LM, as in BERT
EXPLODED, COLLAPSED = 10, 0.5  # times the original's perplexity, or accuracy: beyond it a model is unusable
LARGEST_LOSS = 700.0  # nats; the perplexity of a larger loss is not a float
LOGITS_AT_ONCE = 2**18  # float32 logits that fit a processor's cache; all at once takes twice the time


@dataclass(frozen=True)
class EvalSet:
    """What a model is to predict, and the correct predictions."""

    metric: str  # PERPLEXITY, or an accuracy
    text: str  # name of the data
    batches: Sequence[Batch]
    targets: Sequence[Tensor]  # int64, one per prediction of a batch, or IGNORED


@dataclass(frozen=True)
class WindowScores:
    """How a model does on an evaluation set, window by window: (windows,) float64 each."""

    losses: Tensor  # mean cross-entropy, nats per prediction
    hits: Tensor  # share of predictions whose most likely token is correct


@dataclass(frozen=True)
class EvalResult:
    """The scores of a model, summarized, and how they were measured; standard errors are over windows."""

    metric: str
    value: float  # of the metric
    standard_error: float | None
    loss: float  # cross-entropy, nats per prediction
    loss_error: float | None
    accuracy: float  # top-1
    accuracy_error: float | None
    windows: int
    length: int
    tokens: int  # predicted
    text: str
    dtype: str

    @property
    def protocol(self) -> str:
        """How it was measured, in words."""
        if self.metric == IMAGE_ACCURACY:
            return f"{self.windows:,} images, {self.dtype}"
        windows = f"{self.windows} non-overlapping windows of {self.length} tokens"
        return f"{windows}, {self.tokens:,} predicted, {self.dtype}"


def is_evaluable(model: Model) -> bool:
    """Whether a model predicts tokens: a causal or a masked language model."""
    return model.meta_model.can_generate() or _is_masked(model)


def _is_masked(model: Model) -> bool:
    return not model.reads_pairs and model.model_class.__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


def build_eval_set(model: Model, windows: Tensor, text: str) -> EvalSet:
    """Predict every next token of windows, (windows, length), or of the decoder's, (pairs, 2, length); or, for a
    masked LM, the masked tokens.

    Raises:
        PrunePeakError: a masked LM whose tokenizer has no mask token.
    """
    if model.reads_pairs:
        batches = into_batches(windows, tokens=1)
        next_tokens = [batch[DECODER_IDS].roll(-1, dims=1) for batch in batches]  # no padding in one pair
        for each in next_tokens:
            each[:, -1] = IGNORED
        return EvalSet(PERPLEXITY, f"targets of {text}", batches, next_tokens)
    if not _is_masked(model):
        targets = windows.roll(-1, dims=1)
        targets[:, -1] = IGNORED
        return EvalSet(PERPLEXITY, text, into_batches(windows, tokens=1), targets.split(1))
    inputs, targets = mask_tokens(model, windows)
    return EvalSet(MASKED_ACCURACY, text, into_batches(inputs, tokens=1), targets.split(1))


def mask_tokens(model: ModelSpec, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Mask a seeded 15 % of the ordinary tokens of each window, (windows, length).

    Returns:
        The masked windows, and what was masked (IGNORED elsewhere), (windows, length) each.

    Raises:
        PrunePeakError: the tokenizer has no mask token.
    """
    tokenizer = load_tokenizer(model)
    if tokenizer.mask_token_id is None:
        raise PrunePeakError(f"the tokenizer of {model.name} has no mask token, which a masked LM is evaluated with.")
    ordinary = ~torch.isin(windows, torch.tensor(tokenizer.all_special_ids))
    order = torch.rand(windows.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~ordinary, 2.0)
    count = (MASKED * ordinary.sum(1, keepdim=True)).round().clamp_min(1)
    masked = ordinary & (order.argsort(1).argsort(1) < count)
    return windows.masked_fill(masked, tokenizer.mask_token_id), windows.masked_fill(~masked, IGNORED)


def build_given_eval_set(
    model: Model,
    data: Sequence[str],
    sequence_length: int,
    windows: int = EVALUATED,
    reading: DataOptions = FIRST_PART,
) -> EvalSet:
    """The evaluation set of texts, from their first `windows` windows in all; or of folders of labelled images.

    Raises:
        PrunePeakError: the model predicts neither tokens nor labels, or the data cannot be read.
    """
    if model.sees_images:
        return _build_image_eval_set(model, data)
    if not is_evaluable(model):
        raise PrunePeakError(f"{model.name} is a {model.model_class.__name__}, which predicts no text to evaluate.")
    length = window_length(model, sequence_length)
    if model.reads_pairs:
        found = torch.cat([read_pairs(name, model, length, reading)[:windows] for name in data])
        if bool((found[:, 1] == PADDING).all(1).any()):
            raise PrunePeakError(
                f"{' and '.join(data)} has no targets; expected rows with a text and a target to evaluate."
            )
    else:
        found = torch.cat([read_windows(name, model, length, reading, windows) for name in data])
    return build_eval_set(model, found[:windows], " and ".join(map(name_data, data)))


def _build_image_eval_set(model: Model, folders: Sequence[str]) -> EvalSet:
    """Predict the label of every image of folders, `folder/<label>/<image>`."""
    if "ForImageClassification" not in model.model_class.__name__:
        raise PrunePeakError(f"{model.name} is a {model.model_class.__name__}, which does not classify images.")
    parts = [read_labelled(name, model) for name in folders]
    pixels, labels = join([images for images, _ in parts]), torch.cat([found for _, found in parts])
    name = " and ".join(Path(folder).name for folder in folders)
    return EvalSet(IMAGE_ACCURACY, name, into_batches(pixels), labels[:, None].split(BATCH_IMAGES))


def build_held_out_eval_set(model: Model, windows: Windows) -> EvalSet | None:
    """The evaluation set of held-out windows; None where the model cannot be evaluated on them."""
    if not is_evaluable(model) or not len(windows.held_out):
        return None
    try:
        return build_eval_set(model, windows.held_out, f"held-out windows of {windows.source}")
    except PrunePeakError as error:
        log.warning("The quality before and after is not measured: %s", error)
        return None


def score_logits(logits: Tensor, targets: Tensor) -> WindowScores:
    """Score one batch: logits are (windows, ..., classes), targets the same without the last axis."""
    asked = (targets != IGNORED).view(len(targets), -1)
    answers = targets.flatten().to(logits.device)
    rows = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    losses, hits = [], []
    for part, wanted in zip(logits.flatten(0, -2).split(rows), answers.split(rows), strict=True):
        exact = part.float()
        losses.append(cross_entropy(exact, wanted, reduction="none", ignore_index=IGNORED))
        hits.append(exact.argmax(-1) == wanted)
    means = (torch.cat(values).cpu().view_as(asked).double().sum(1) / asked.sum(1) for values in (losses, hits))
    return WindowScores(*means)


def evaluate_model(
    model: Model,
    eval_set: EvalSet,
    dtype: torch.dtype | None = None,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - frozen
    name: str | None = None,
) -> WindowScores:
    """Score a model block by block: memory holds one block.

    Args:
        name: of the model, for the progress bar.

    Raises:
        PrunePeakError: its outputs are not finite.
    """
    stream = open_stream(model, eval_set.batches, dtype or model.dtype, execution)
    parts = []
    with open_bar(f"{eval_set.metric} of {name or model.label}", "step", stream.passes + len(eval_set.batches)) as bar:
        for _ in stream.steps():
            bar.update()
        for output, targets in zip(stream.outputs(), eval_set.targets, strict=True):
            parts.append(score_logits(output.logits, targets))
            bar.update()
    scores = concatenate(parts)
    if not bool(scores.losses.isfinite().all()):
        raise PrunePeakError(
            f"the outputs of {model.name} are not finite in {str(stream.dtype).removeprefix('torch.')} on "
            f"{eval_set.text}. Pass {spell('dtype', 'float32')}, or check the source checkpoint."
        )
    return scores


def concatenate(scores: Sequence[WindowScores]) -> WindowScores:
    """The scores of several batches."""
    return WindowScores(torch.cat([part.losses for part in scores]), torch.cat([part.hits for part in scores]))


def measure_quality(
    model: Model,
    eval_set: EvalSet,
    dtype: torch.dtype | None = None,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - frozen
    name: str | None = None,
) -> EvalResult:
    """Evaluate a model and summarize its scores."""
    return summarize_scores(eval_set, evaluate_model(model, eval_set, dtype, execution, name), dtype or model.dtype)


def summarize_scores(eval_set: EvalSet, scores: WindowScores, dtype: torch.dtype) -> EvalResult:
    """Scores as means and standard errors, in the metric of the evaluation set."""
    loss, loss_error = _mean_and_error(scores.losses)
    accuracy, accuracy_error = _mean_and_error(scores.hits)
    value, error = accuracy, accuracy_error
    if eval_set.metric == PERPLEXITY:
        value = math.exp(min(loss, LARGEST_LOSS))
        error = None if loss_error is None else value * loss_error
    return EvalResult(
        metric=eval_set.metric,
        value=value,
        standard_error=error,
        loss=loss,
        loss_error=loss_error,
        accuracy=accuracy,
        accuracy_error=accuracy_error,
        windows=len(scores.losses),
        length=max(targets.shape[1] for targets in eval_set.targets),
        tokens=sum(int((targets != IGNORED).sum()) for targets in eval_set.targets),
        text=eval_set.text,
        dtype=str(dtype).removeprefix("torch."),
    )


def check_collapse(before: EvalResult, after: EvalResult) -> str | None:
    """A warning if the pruned model is unusable."""
    if before.metric == PERPLEXITY and after.value > EXPLODED * before.value:
        what = f"{before.value:.2f} to {after.value:.4g}, more than {EXPLODED} times the original's"
    elif before.metric != PERPLEXITY and after.value < COLLAPSED * before.value and after.loss > before.loss:
        what = f"{before.value:.1%} to {after.value:.1%}, less than half of the original's"
    else:
        return None
    return (
        f"this model is unusable: its {before.metric} on {before.text} went from {what}. Prune less, or calibrate on "
        "more text of the kind that it will read."
    )


def _mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean over windows, and its standard error (None for a single window)."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return values.mean().item(), error
