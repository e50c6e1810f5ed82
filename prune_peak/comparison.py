"""Models side by side at one exam: `evaluate()`, with differences from the first model, errors and a paired test."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibration import DTYPES, default_dtype
from .compression import EVALUATED
from .errors import PrunePeakError, UsageError
from .evaluation import Exam, Grades, Quality, set_image_exam, set_text_exam, sum_up, take_exam
from .source import Source, open_source
from .texts import SEQUENCE_LENGTH, load_tokenizer, special_tokens

FLIPS = 10_000  # of the signs of the differences, for the test


@dataclass(frozen=True)
class Difference:
    """How far a model is from the first one, window by window of the same exam."""

    mean: float
    standard_error: float | None  # over windows
    p: float | None  # two-sided sign-flip test: how often chance alone would give as much


@dataclass(frozen=True)
class Entry:
    """One model of a comparison."""

    model: str
    model_class: str
    parameters: int
    bytes: int
    quality: Quality
    loss: Difference | None  # of the cross-entropy, nats; None for the first model
    accuracy: Difference | None  # of the top-1 accuracy


@dataclass(frozen=True)
class Comparison:
    """What `evaluate` found: the models in the order they were given, and what they were asked."""

    entries: tuple[Entry, ...]
    opening: str | None = None  # the special tokens that every window begins with, as text; None for images
    stride: int | None = None  # tokens from the start of one window to that of the next

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    models: Sequence[str],
    *,
    text: str | Path | None = None,
    images: str | Path | None = None,
    windows: int = EVALUATED,
    sequence_length: int = SEQUENCE_LENGTH,
    dtype: str | None = None,
    revision: str | None = None,
) -> Comparison:
    """Measure models at one exam: perplexity on a text, a masked LM's accuracy there, or accuracy on labelled images.

    Args:
        models: folders or Hub ids; the first is what the others are compared with.
        text: a .txt or .jsonl file, or a Hub data set.
        images: instead, a folder of images by their labels: `images/<label>/<image>`.
        windows: at most so many, from the start of the text.
        sequence_length: tokens a window, special tokens included.
        dtype: the type to compute in; by default that of each model's files, but float32 for float16.
        revision: of Hub models.

    Raises:
        UsageError: neither text nor images, or both.
        PrunePeakError: a model that predicts neither, or models that read the text as different tokens.

    Example:
        >>> comparison = evaluate(["SmolLM2-135M", "SmolLM2-135M-peak-0.3"], text="test.txt")    # doctest: +SKIP
        >>> [entry.quality.value for entry in comparison.entries]                                # doctest: +SKIP
    """
    if (text is None) == (images is None):
        raise UsageError("pass one of --text and --images: what to evaluate on.")
    if windows < 1:
        raise UsageError(f"--windows {windows}: expected at least one.")
    if dtype not in (None, *DTYPES):
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    sources = [open_source(model, revision) for model in models]
    if text is None:
        exams = [set_image_exam(source, str(images)) for source in sources]
    else:
        exams = [set_text_exam(source, str(text), windows, sequence_length) for source in sources]
    for source, exam in zip(sources[1:], exams[1:], strict=True):
        _check_same(sources[0], exams[0], source, exam)
    entries: list[Entry] = []
    first: Grades | None = None
    for source, exam in zip(sources, exams, strict=True):
        compute = DTYPES[dtype or default_dtype(source)]
        grades = take_exam(source, exam, compute)
        entries.append(
            Entry(
                model=source.label,
                model_class=source.model_class.__name__,
                parameters=source.parameters,
                bytes=source.size,
                quality=sum_up(exam, grades, compute),
                loss=compare(first.losses, grades.losses) if first else None,
                accuracy=compare(first.hits, grades.hits) if first else None,
            )
        )
        first = first or grades
    if text is None:
        return Comparison(tuple(entries))
    start, end = special_tokens(tokenizer := load_tokenizer(sources[0]))
    length = exams[0].targets[0].shape[1]
    return Comparison(tuple(entries), tokenizer.decode(start) if start else "", length - len(start) - len(end))


def _check_same(first: Source, theirs: Exam, other: Source, ours: Exam) -> None:
    if theirs.metric != ours.metric:
        raise PrunePeakError(f"{first.name} is measured by {theirs.metric}, {other.name} by {ours.metric}.")
    inputs = [
        torch.cat([batch[first.model_class.main_input_name] for batch in exam.batches]) for exam in (theirs, ours)
    ]
    answers = [torch.cat(list(exam.targets)) for exam in (theirs, ours)]
    if not (torch.equal(*inputs) and torch.equal(*answers)):
        raise PrunePeakError(
            f"{first.name} and {other.name} read {theirs.text} differently (other tokens, pixels or labels), so their "
            "numbers cannot be compared. Evaluate them apart."
        )


def compare(first: Tensor, other: Tensor) -> Difference:
    """The mean difference of paired values, (windows,), its standard error, and how likely chance alone gives as much.

    The test flips the signs of the differences at random: were the models alike, either sign would be as likely.

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
    """The protocol in one sentence; no number of a comparison means much without it."""
    quality = comparison.entries[0].quality
    opening = ""
    if comparison.stride is not None:
        opening = f" ({comparison.opening or 'no special token'} at the start of each, stride {comparison.stride})"
    over = "images" if comparison.stride is None else "windows"
    return (
        f"{quality.metric.capitalize()} on {quality.text}: {quality.protocol}{opening}; "
        f"± is the standard error over {over}."
    )
