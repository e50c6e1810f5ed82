"""`evaluate()`: models side by side, with differences from the first model, standard errors and a paired test."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.data_sets import check_data
from ..data.texts import load_tokenizer, special_tokens
from ..errors import PrunePeakError, UsageError, spell
from ..models.execution import DTYPES, default_dtype
from ..models.loading import Model, open_model
from ..option_fields import takes
from ..progress import next_stage, stages
from .options import EvaluateOptions
from .quality import (
    IMAGE_ACCURACY,
    EvalResult,
    EvalSet,
    WindowScores,
    build_given_eval_set,
    evaluate_model,
    summarize_scores,
)

FLIPS = 10_000  # of the signs of the differences, for the test


@dataclass(frozen=True)
class Difference:
    """The paired difference of a model from the first one, over windows."""

    mean: float
    standard_error: float | None  # over windows
    p: float | None  # two-sided sign-flip test


@dataclass(frozen=True)
class Entry:
    """One model of a comparison."""

    model: str
    model_class: str
    parameters: int
    bytes: int
    quality: EvalResult
    loss: Difference | None  # of the cross-entropy, nats; None for the first model
    accuracy: Difference | None  # of the top-1 accuracy


@dataclass(frozen=True)
class Comparison:
    """Models on one data set, in the order they were given."""

    entries: tuple[Entry, ...]
    opening: str | None = None  # the special tokens that every window begins with, as text; None for images
    stride: int | None = None  # tokens from the start of one window to that of the next

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@takes(EvaluateOptions)
def evaluate(models: Sequence[str], data: Sequence[str] | str | Path, **options: Any) -> list[Comparison]:
    """Compare models on data: perplexity on a text, a masked LM's accuracy there, or accuracy on labelled images.

    Args:
        models: folders or Hub ids; the others are compared with the first.
        {options}

    Returns:
        One comparison per data set.

    Raises:
        UsageError: no data.
        PrunePeakError: a model that predicts neither tokens nor labels, or models that tokenize the text differently.

    Example:
        >>> [comparison] = evaluate(["SmolLM2-135M", "SmolLM2-135M-peak-0.3"], data="test.txt")    # doctest: +SKIP
        >>> [entry.quality.value for entry in comparison.entries]                                  # doctest: +SKIP
    """
    given = EvaluateOptions(data=data, **options)  # type: ignore[arg-type]  # one type of sequence is made of all
    if not given.data:
        raise UsageError(f"nothing to evaluate on; pass {spell('data', 'DATA')}.")
    sources = [open_model(model, given.revision) for model in models]
    names = given.data
    for source in sources:
        check_data(names, source.sees_images, given.reading)
    eval_sets = [
        [
            build_given_eval_set(source, [name], given.sequence_length, given.windows, given.reading)
            for source in sources
        ]
        for name in names
    ]
    for sets in eval_sets:
        for source, eval_set in zip(sources[1:], sets[1:], strict=True):
            _check_same(sources[0], sets[0], source, eval_set)
    with stages(len(names) * len(sources)):
        return [_compare_models(sources, sets, given.dtype) for sets in eval_sets]


def _compare_models(sources: Sequence[Model], eval_sets: Sequence[EvalSet], dtype: str | None) -> Comparison:
    entries: list[Entry] = []
    first: WindowScores | None = None
    for source, eval_set in zip(sources, eval_sets, strict=True):
        compute = DTYPES[dtype or default_dtype(source)]
        scores = evaluate_model(source, eval_set, compute)
        next_stage()
        entries.append(
            Entry(
                model=source.label,
                model_class=source.model_class.__name__,
                parameters=source.parameters,
                bytes=source.size,
                quality=summarize_scores(eval_set, scores, compute),
                loss=compare(first.losses, scores.losses) if first else None,
                accuracy=compare(first.hits, scores.hits) if first else None,
            )
        )
        first = first or scores
    if sources[0].sees_images or sources[0].reads_pairs:
        return Comparison(tuple(entries))
    start, end = special_tokens(tokenizer := load_tokenizer(sources[0]))
    length = eval_sets[0].targets[0].shape[1]
    return Comparison(tuple(entries), tokenizer.decode(start) if start else "", length - len(start) - len(end))


def _check_same(first: Model, theirs: EvalSet, other: Model, ours: EvalSet) -> None:
    if theirs.metric != ours.metric:
        raise PrunePeakError(f"{first.name} is measured by {theirs.metric}, {other.name} by {ours.metric}.")
    inputs = [
        torch.cat([batch[first.model_class.main_input_name].flatten() for batch in eval_set.batches])
        for eval_set in (theirs, ours)
    ]
    answers = [torch.cat([each.flatten() for each in eval_set.targets]) for eval_set in (theirs, ours)]
    if not (torch.equal(*inputs) and torch.equal(*answers)):
        raise PrunePeakError(
            f"{first.name} and {other.name} turn {theirs.text} into different tokens, pixels or labels, so their "
            "results cannot be compared. Evaluate them separately."
        )


def compare(first: Tensor, other: Tensor) -> Difference:
    """The mean difference of paired values, (windows,), its standard error and p-value.

    The test flips the signs of the differences at random: for equal models both signs are equally likely.

    Example:
        >>> compare(torch.zeros(8), torch.ones(8)).mean
        1.0
    """
    differences = (other - first).double()
    mean, count = differences.mean().item(), len(differences)
    if count == 1:
        return Difference(mean, None, None)
    signs = torch.randint(2, (FLIPS, count), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    chance = (signs @ differences / count).abs() >= abs(mean) * (1 - 1e-12)
    p = (1 + int(chance.sum())) / (1 + FLIPS)
    return Difference(mean, (differences.std() / count**0.5).item(), p)


def describe(comparison: Comparison) -> str:
    """How a comparison was measured, in one sentence."""
    quality = comparison.entries[0].quality
    opening = ""
    if comparison.stride is not None:
        opening = f" ({comparison.opening or 'no special token'} at the start of each, stride {comparison.stride})"
    over = "images" if quality.metric == IMAGE_ACCURACY else "windows"
    return (
        f"{quality.metric.capitalize()} on {quality.text}: {quality.protocol}{opening}; "
        f"± is the standard error over {over}."
    )
