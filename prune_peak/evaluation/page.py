"""The page of `evaluate --report`: models side by side, with what they answer."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..report import Section, write_report
from .comparison import Comparison, Difference, describe
from .latency import Latency
from .lm_eval_tasks import Scores
from .quality import PERPLEXITY
from .talk import Talk

Measured = TypeVar("Measured", Talk, Scores)


def write_page(
    path: Path,
    comparisons: Sequence[Comparison],
    answers: Sequence[Talk],
    speeds: Sequence[Latency],
    scores: Sequence[Scores],
    command: str,
) -> None:
    """Write what was measured of models as one HTML page; the first model is what the others are compared with.

    Args:
        path: the file to write.
        comparisons: one for each data set; like the others, empty where it was not measured.
        answers, speeds, scores: one for each model.
        command: the command that measured it.
    """
    sections = [
        *(_compare(comparison) for comparison in comparisons),
        *(_talk(answers) if answers else ()),
        *([_speed(speeds)] if speeds else ()),
        *([_tasks(scores)] if scores else ()),
    ]
    measured: Sequence[Any] = comparisons[0].entries if comparisons else answers or speeds or scores
    names = [one.model for one in measured]
    title = " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    write_report(path, title, conclude(comparisons, answers, speeds, scores), sections, command)


def conclude(
    comparisons: Sequence[Comparison], answers: Sequence[Talk], speeds: Sequence[Latency], scores: Sequence[Scores]
) -> str:
    """What the last model is beside the first, in one sentence."""
    parts = []
    if comparisons:
        first, last = comparisons[0].entries[0], comparisons[0].entries[-1]
        pattern = "{:.2f}" if first.quality.metric == PERPLEXITY else "{:.1%}"
        part = f"{last.quality.metric} {pattern.format(last.quality.value)}"
        if last is not first:
            parts.append(f"{last.parameters / first.parameters - 1:+.1%} parameters")
            part += f" instead of {pattern.format(first.quality.value)}"
        parts.append(part)
    if answers:
        part = f"{answers[-1].loops} of {answers[-1].prompts} answers loop"
        parts.append(part + (f" instead of {answers[0].loops}" if len(answers) > 1 else ""))
    if speeds:
        ratios = [getattr(speeds[-1], name) / getattr(speeds[0], name) for name in ("prefill", "decode")]
        alone = f"writes {speeds[0].decode:.1f} tokens per second"
        beside = f"reads x{ratios[0]:.2f} and writes x{ratios[1]:.2f} as fast"
        parts.append(beside if len(speeds) > 1 else alone)
    measured: Sequence[Any] = comparisons[0].entries if comparisons else answers or speeds or scores
    if not parts:
        parts.append(f"{len(scores[0].tasks)} task{'s' * (len(scores[0].tasks) > 1)} measured")
    beside = f", beside {measured[0].model}" if len(measured) > 1 else ""
    return f"{measured[-1].model}{beside}: {', '.join(parts)}."


def _compare(comparison: Comparison) -> Section:
    quality = comparison.entries[0].quality
    rows = [
        {
            "model": entry.model,
            "parameters": f"{entry.parameters:,}",
            "bytes": f"{entry.bytes:,}",
            quality.metric: _give(entry.quality.value, entry.quality.standard_error),
            "cross-entropy, nats": _give(entry.quality.loss, entry.quality.loss_error),
            "difference": _give_difference(entry.loss),
            "top-1 accuracy": _give(entry.quality.accuracy, entry.quality.accuracy_error),
        }
        for entry in comparison.entries
    ]
    words = f"{describe(comparison)} Differences are to the first model, with the p-value of a paired sign-flip test."
    return Section(f"{quality.metric.capitalize()} on {quality.text}", words, rows=rows)


def _give(value: float, error: float | None) -> str:
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _give_difference(difference: Difference | None) -> str | None:
    if difference is None:
        return None
    given = _give(difference.mean, difference.standard_error)
    return given + ("" if difference.p is None else f", p = {difference.p:.4f}")


def _talk(answers: Sequence[Talk]) -> Iterator[Section]:
    first = answers[0]
    how = "through the chat template" if first.template else "continued as text: there is no chat template"
    yield Section(
        "Talk",
        f"Greedy answers of up to {first.longest} tokens, prompts {how}. Early ends hide loops. KL in nats per token, "
        "along the first model's answers.",
        rows=[
            {
                "model": talk.model,
                "loops": f"{talk.loops} of {talk.prompts}",
                "ends": f"{talk.ends} of {talk.prompts}",
                "mean tokens": talk.length,
                "KL": talk.divergence,
            }
            for talk in answers
        ],
    )
    yield Section(
        "Answers",
        "What each model answers to every prompt.",
        rows=[
            {"prompt": question} | {name: talk.answers[number] for name, talk in _by_name(answers).items()}
            for number, question in enumerate(first.questions)
        ],
        prose=True,
    )


def _by_name(measured: Sequence[Measured]) -> dict[str, Measured]:
    """By the model's name, with its number where another has the same."""
    names = [one.model for one in measured]
    found = (name if names.count(name) == 1 else f"{name} ({place + 1})" for place, name in enumerate(names))
    return dict(zip(found, measured, strict=True))


def _speed(speeds: Sequence[Latency]) -> Section:
    first = speeds[0]
    rows = [
        {
            "model": speed.model,
            "prefill, tokens per second": f"{speed.prefill:.1f} (x{speed.prefill / first.prefill:.3f})",
            "decoding": f"{speed.decode:.1f} (x{speed.decode / first.decode:.3f})",
            "inverse of the parameters": f"x{first.parameters / speed.parameters:.3f}",
            "peak memory, MB": None if speed.memory is None else round(speed.memory / 1e6),
        }
        for speed in speeds
    ]
    words = f"Medians of {first.rounds} rounds, the models in turns: {first.prompt} tokens read, then {first.decoded} "
    return Section("Speed", f"{words}decoded. {first.threads} threads, {first.dtype}.", rows=rows)


def _tasks(scores: Sequence[Scores]) -> Section:
    rows = [
        {"task": task, "metric": metric} | {name: score.tasks[task][metric] for name, score in _by_name(scores).items()}
        for task, metrics in scores[0].tasks.items()
        for metric in metrics
    ]
    return Section("Tasks", "Scores of lm-evaluation-harness.", rows=rows)
