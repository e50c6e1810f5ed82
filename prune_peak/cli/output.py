"""Results as terminal tables: one function per command."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..options import NO_FILL, name_units

if TYPE_CHECKING:
    from ..compression import CompressionResult
    from ..evaluation.comparison import Comparison, Difference
    from ..evaluation.latency import Latency
    from ..evaluation.lm_eval_tasks import Scores
    from ..evaluation.quality import EvalResult
    from ..evaluation.talk import Talk
    from ..inspection import Cost, Inspection, PrunableSites
    from ..recovery import HealResult
    from ..studies.ablation import Study
    from ..studies.analysis import Analysis


def print_compression(result: "CompressionResult") -> None:
    """Sizes and quality before and after, and how to load the result."""
    before, after = result.before, result.after
    rows: list[tuple[str, ...]] = [
        ("", "before", "after", "change"),
        *(
            (name_units(kind), f"{before.neurons[kind]:,}", f"{after.neurons[kind]:,}", f"-{share:.1%}")
            for kind, share in result.share.items()
        ),
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}", _change(before.parameters, after.parameters)),
        ("bytes", f"{before.bytes:,}", f"{after.bytes:,}", _change(before.bytes, after.bytes)),
    ]
    if before.cache != after.cache:
        cache = (f"{before.cache:,}", f"{after.cache:,}", _change(before.cache, after.cache))
        rows.append(("KV cache, bytes per token", *cache))
    first, second = result.quality_before, result.quality_after
    if first and second:
        rows.append((first.metric, *_quality_cells(first, second)))
        if first.value == first.accuracy:
            rows.append(
                ("cross-entropy", f"{first.loss:.3f}", f"{second.loss:.3f}", f"{second.loss - first.loss:+.3f}")
            )
    if result.talk:
        talks = result.talk
        rows.append(("answers that loop", *(f"{talk.loops} of {talk.prompts}" for talk in talks), ""))
        rows.append(("KL along the original's answers", *(f"{talk.divergence:.3f}" for talk in talks), ""))
    click.echo(_table(rows))
    saved = 1 - after.parameters / before.parameters
    click.echo(f"Pruned: {result.pruned}{f' = {saved:.1%} of the model' * (saved > 0)}.")
    if first:
        click.echo(f"{first.metric.capitalize()} on {first.text}: {first.protocol}.")
    if result.zero_filled:
        kinds = " and ".join(name_units(kind) for kind in result.zero_filled)
        click.echo(f"Held at zero: the pruned {kinds}, because {result.model_class} has no bias there.")
    fills = {fill: count for fill, count in sorted(result.fills.items()) if fill != NO_FILL}
    if fills and set(fills) != {"peak"}:
        click.echo("Fills: " + ", ".join(f"{fill} at {count} sites" for fill, count in fills.items()) + ".")
    if result.refits:
        left = statistics.median(refit.error for refit in result.refits.values())
        what = "images" if result.sees_images else "tokens"
        click.echo(f"Refit: {left:.0%} of the error of the constants on held-out {what} remains (median of sites).")
    if result.scores_lost:
        lost = statistics.median(result.scores_lost.values())
        click.echo(f"Narrower heads: {lost:.2%} of the variance of their attention scores is lost (median of sites).")
    if result.keep_shape:
        click.echo("Nothing is saved: pruned weights are zero, and all shapes are the original's (--keep-shape).")
    click.echo(f"\nVerified. Written to {result.output}. Load it with:\n")
    others = {"processor": "AutoImageProcessor"} if result.sees_images else {"tokenizer": "AutoTokenizer"}
    others = others if result.has_inputs else {}
    click.echo(f"  from transformers import {', '.join([*others.values(), result.model_class])}")
    for name, loader in {"model": result.model_class, **others}.items():
        click.echo(f"  {name} = {loader}.from_pretrained({str(result.output)!r})")


def print_healing(result: "HealResult") -> None:
    """The distance from the original before and after."""
    r = result
    digits = 2 if "perplexity" in r.metric else 4
    rows = [
        ("", "original", "compressed", "healed"),
        (r.distance, "0", f"{r.divergence_before:.4f}", f"{r.divergence_after:.4f}"),
        (r.metric, *(f"{score:.{digits}f}" for score in (r.score_original, r.score_before, r.score_after))),
    ]
    click.echo(_table(rows))
    click.echo(f"On a held-out part of {r.data}; {r.tokens:,} tokens learned ({r.method}).")
    click.echo(f"\nVerified. Written to {r.output}; it loads as the compressed folder does.")


def print_healing_cost(cost: Mapping[str, Any]) -> None:
    """What `heal` would take."""
    rows = [
        ("method", cost["method"]),
        ("minutes", f"{cost['minutes']:.1f}"),
        ("memory", f"{cost['memory'] / 1e9:.2f} GB at most"),
        ("disk", f"{cost['disk'] / 1e9:.2f} GB while it runs"),
    ]
    click.echo(_table(rows))


def print_talk(answers: Sequence["Talk"]) -> None:
    """Loops, ends and lengths, one column per model; and two answers side by side."""
    rows = [
        ("", *(talk.model for talk in answers)),
        ("answers that loop", *(f"{talk.loops} of {talk.prompts}" for talk in answers)),
        ("answers that end", *(f"{talk.ends} of {talk.prompts}" for talk in answers)),
        ("mean tokens of an answer", *(f"{talk.length:.1f}" for talk in answers)),
        ("KL along the first one's answers", *(f"{talk.divergence:.4f}" for talk in answers)),
    ]
    click.echo(_table(rows))
    how = "through the chat template" if answers[0].template else "continued as text: there is no chat template"
    click.echo(f"Greedy answers of up to {answers[0].longest} tokens, prompts {how}. KL in nats per token.")
    for number, question in enumerate(answers[0].questions[:2]):
        click.echo(f"\n> {question}")
        for talk in answers:
            click.echo(f"{talk.model}: {talk.answers[number]}")


def _quality_cells(before: "EvalResult", after: "EvalResult") -> tuple[str, str, str]:
    """Perplexities and their ratio; accuracies in per cent and their change in points."""
    from ..evaluation.quality import PERPLEXITY

    if before.metric == PERPLEXITY:
        return f"{before.value:.2f}", f"{after.value:.2f}", f"x{after.value / before.value:.3f}"
    return f"{before.value:.1%}", f"{after.value:.1%}", f"{100 * (after.value - before.value):+.1f} points"


def print_comparison(comparison: "Comparison") -> None:
    """Quality, one column per model."""
    from ..evaluation.comparison import describe
    from ..evaluation.quality import PERPLEXITY

    entries = comparison.entries
    metric, first = entries[0].quality.metric, entries[0].quality
    rows = [
        ("", *(entry.model for entry in entries)),
        ("parameters", *(f"{entry.parameters:,}" for entry in entries)),
        ("bytes", *(f"{entry.bytes:,}" for entry in entries)),
    ]
    if metric == PERPLEXITY:
        rows.append((metric, *(_give(e.quality.value, e.quality.standard_error, ".2f") for e in entries)))
        rows.append(("  ratio to the first", *(f"{e.quality.value / first.value:.3f}" for e in entries)))
    rows.append(("cross-entropy, nats", *(_give(e.quality.loss, e.quality.loss_error, ".4f") for e in entries)))
    rows.append(("  difference to the first", *(_give_difference(e.loss, 1, ".4f") for e in entries)))
    name = "top-1 accuracy, %" if metric == PERPLEXITY else f"{metric}, %"
    accuracies = [(100 * e.quality.accuracy, e.quality.accuracy_error) for e in entries]
    rows.append((name, *(_give(value, error and 100 * error, ".2f") for value, error in accuracies)))
    rows.append(("  difference to the first", *(_give_difference(e.accuracy, 100, ".2f") for e in entries)))
    click.echo(_table(rows))
    click.echo(describe(comparison))
    if len(entries) > 1:
        click.echo("p: two-sided p-value of a paired sign-flip test against the first.")


def _give(value: float, error: float | None, pattern: str) -> str:
    return f"{value:{pattern}}" + ("" if error is None else f" ± {error:{pattern}}")


def _give_difference(difference: "Difference | None", scale: float, pattern: str) -> str:
    if difference is None:
        return "-"
    error = difference.standard_error
    given = _give(scale * difference.mean, error and scale * error, pattern)
    return given + ("" if difference.p is None else f", p = {difference.p:.4f}")


def print_latency(speeds: Sequence["Latency"]) -> None:
    """Speed and peak memory, one column per model."""
    first = speeds[0]
    rows = [
        ("", *(speed.model for speed in speeds)),
        ("prefill, tokens per second", *(f"{speed.prefill:.1f}" for speed in speeds)),
        ("  ratio to the first", *(f"{speed.prefill / first.prefill:.3f}" for speed in speeds)),
        ("decoding, tokens per second", *(f"{speed.decode:.1f}" for speed in speeds)),
        ("  ratio to the first", *(f"{speed.decode / first.decode:.3f}" for speed in speeds)),
        ("inverse of the parameters", *(f"{first.parameters / speed.parameters:.3f}" for speed in speeds)),
        ("peak memory, MB", *("-" if speed.memory is None else f"{speed.memory / 1e6:.0f}" for speed in speeds)),
    ]
    click.echo(_table(rows))
    click.echo(
        f"Medians of {first.rounds} rounds, models interleaved: prefill of {first.prompt} tokens, then "
        f"{first.decoded} decoded with the cache; batch size 1, {first.threads} threads, {first.dtype}."
    )


def print_scores(scores: Sequence["Scores"]) -> None:
    """Scores of the tasks, one column per model."""
    rows = [("", *(score.model for score in scores))]
    for task, metrics in scores[0].tasks.items():
        for metric in metrics:
            rows.append((f"{task}, {metric}", *(f"{score.tasks[task][metric]:.4f}" for score in scores)))
    click.echo(_table(rows))


def _change(before: int, after: int) -> str:
    return f"{after / before - 1:+.1%}"


def print_study(study: "Study") -> None:
    """Areas under the curves, and the significant differences."""
    protocol = study.protocol
    for metric, unit in (("cross_entropy", "increase of cross-entropy in nats"), ("top1", "loss of top-1 accuracy")):
        areas = [row for row in study.areas if row["metric"] == metric]
        click.echo(f"Area under the curve, {unit}:")
        click.echo(_table([("site", "fill", "area", "stderr"), *map(_area_cells, areas)]) + "\n")
    click.echo("Significant differences of cross-entropy (more than three standard errors):")
    significant = [_order(row) for row in study.comparisons if row["significant"] and row["metric"] == "cross_entropy"]
    for site, better in dict.fromkeys((site, better) for site, better, _ in significant):
        click.echo(f"  {site}: {better} below {', '.join(w for s, b, w in significant if (s, b) == (site, better))}")
    if not significant:
        click.echo("  none")
    length = protocol["sequence_length"]
    windows = f"{protocol['windows']} {f'windows of {length} tokens' if length else 'images'} of {protocol['text']}"
    seeds = len(protocol["seeds"])
    click.echo(f"{windows}, {seeds} seed{'s' * (seeds > 1)}, {protocol['dtype']}. Written to {study.output}.")


def print_analysis(analysis: "Analysis") -> None:
    """Medians over sites; the tables on disk have a row per site."""
    numbers = ("peak_off_zero", "peak_from_mean", "skewness", "kurtosis", "bimodal")
    whole = [row for row in analysis.distributions if row["head"] is None]
    click.echo("Medians over blocks (peak_from_mean in deviations; peak_off_zero and bimodal are shares of neurons):")
    click.echo(_table([("text", "site", "tokens", *numbers), *_medians(whole, ("text", "site", "tokens"), numbers)]))
    if analysis.stability:
        drifts = ("peak_drift", "mean_drift")
        pairs = ("text", "other", "site")
        click.echo("\nShift of peaks and means between texts, in deviations:")
        click.echo(_table([(*pairs, *drifts), *_medians(analysis.stability, pairs, drifts)]))
    if analysis.cross:
        keys = ("calibrated", "evaluated", "site", "fill")
        share = f"{analysis.cross[0]['fraction']:.0%}"
        click.echo(
            f"\nIncrease of the loss in nats with {share} of the neurons replaced, and its difference to the mean:"
        )
        cells = [
            tuple(row[key] for key in keys)
            + tuple(
                f"{row[name]:+.4f} ± {row[name + '_stderr'] or 0:.4f}"
                for name in ("cross_entropy_gained", "more_than_mean")
            )
            for row in analysis.cross
        ]
        click.echo(_table([(*keys, "increase", "difference to mean"), *cells]))
    click.echo(f"\nWritten to {analysis.output}; open {analysis.output / 'report.html'}.")


def _medians(
    rows: Sequence[Mapping[str, Any]], keys: tuple[str, ...], numbers: tuple[str, ...]
) -> list[tuple[str, ...]]:
    """One row per value of the keys, with the median of each number."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    lines = []
    for group, members in groups.items():
        known = [[row[name] for row in members if row[name] is not None] for name in numbers]
        lines.append(group + tuple(f"{statistics.median(values):.3f}" if values else "-" for values in known))
    return lines


def _area_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    error = row["area_stderr"]
    return row["site"], row["fill"], f"{row['area']:.4f}", "-" if error is None else f"{error:.4f}"


def _order(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """The site, the better fill, and the other."""
    pair = (row["fill"], row["other"])
    better, worse = pair if row["difference"] > 0 else pair[::-1]
    return row["site"], better, worse


def print_inspection(inspection: "Inspection", cost: "Cost | None" = None) -> None:
    """A model and what a budget leaves of it; with --dry-run, also what `compress` would take."""
    rows = _inspection_rows(inspection)
    if cost is not None:
        rows += [
            ("minutes", f"{cost.minutes:.1f}"),
            ("memory", f"{cost.memory / 1e9:.2f} GB at most"),
            ("disk", f"{cost.disk / 1e9:.2f} GB"),
        ]
    click.echo(_table(rows))


def _inspection_rows(inspection: "Inspection") -> list[tuple[str, ...]]:
    i = inspection
    return [
        ("model", f"{i.model} ({i.model_class}, {i.dtype})"),
        *([("blocks", ", ".join(f"{name} {count}" for name, count in i.stacks.items()))] if len(i.stacks) > 1 else []),
        *(
            (
                site.kind,
                f"{_describe_units(site, i.blocks)}, in steps of {site.step}; "
                f"constants go {site.folded_into}"
                + ("; in place only (--keep-shape), which saves nothing" if site.in_place else ""),
            )
            for site in i.sites
        ),
        *i.lacking.items(),
        *((kind, reason) for kind, reason in i.unprunable.items() if all(site.kind != kind for site in i.sites)),
        ("written as", i.written_as + (f" ({i.reason})" if i.reason else "")),
        ("read by", _readers(i.engines)),
        (
            f"at {i.budget}",
            ", ".join(f"{site.kept} of {site.neurons} {name_units(site.kind)} kept" for site in i.sites),
        ),
        ("pruned", i.pruned + f" = {i.share:.1%} of the model" * (i.share > 0)),
        ("parameters", f"{i.parameters:,} -> {i.parameters_after:,} ({_change(i.parameters, i.parameters_after)})"),
        ("bytes", f"{i.bytes:,} -> {i.bytes_after:,}"),
    ]


def _describe_units(site: "PrunableSites", blocks: int) -> str:
    if site.kind == "blocks":
        return f"{site.neurons} blocks"
    others = {"experts": "experts in each of", "expert-mlp": "neurons in each expert of"}
    return f"{site.neurons} {others.get(site.kind, 'neurons in each of')} {_count_blocks(site.blocks, blocks)} blocks"


def _count_blocks(some: int, all_: int) -> str:
    return f"{all_}" if some == all_ else f"{some} of {all_}"


def _readers(engines: Sequence[str]) -> str:
    if not engines:
        return "transformers; no serving engine was tried"
    return ", ".join(("transformers", *engines)) + " (engines: docs/engines.md)"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns of text; all but the first right-aligned where there are more than two."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [row[1]] if len(row) == 2 else [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)
