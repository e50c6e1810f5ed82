"""What stays of every site, at which fill and with which refit; and how a target is split over the kinds of site."""

import logging
import statistics
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from .ablation import ablated
from .blocks import BlockStream
from .budget import Widths
from .calibration import Observed
from .errors import PrunePeakError, UsageError, brief
from .evaluation import Exam, grade
from .evidence import Moments
from .machine import CPU, Machine
from .narrowing import Narrowing, narrow
from .refit import ELIMINATION, Refit, eliminate, output_error, refit_best
from .selection import AUTO, FILLS, RANDOM, SCORES, Choice, choose_fill, lost_share, select
from .source import Source

log = logging.getLogger(__name__)

FEW_TOKENS_SCORE = "activation-norm"  # in place of the elimination, where there are more neurons than tokens


@dataclass(frozen=True)
class Decision:
    """What becomes of one site."""

    choice: Choice
    fill: str
    lost: float  # share of the site's weighted deviation from the fill that the cut neurons had
    refit: Refit | None = None  # None without the refit
    scores_lost: float | None = None  # where heads get narrower: share of the variance of their attention scores
    score: str = ELIMINATION  # that ranked the neurons


@dataclass(frozen=True)
class Rules:
    """How every site is decided.

    Args:
        fill: the constant that cut neurons are held at, or "auto".
        score: what ranks the neurons.
        refit: whether the kept ones are refitted.
        seed: of the random score.
    """

    fill: str = "peak"
    score: str = ELIMINATION
    refit: bool = True
    seed: int = 0

    @property
    def needs_evidence(self) -> bool:
        """Whether more must be known of the neurons than their own statistics."""
        return self.refit or self.fill == AUTO

    def check(self) -> None:
        """Refuse what is no rule.

        Raises:
            UsageError: with what was expected.
        """
        if self.fill not in (*FILLS, AUTO):
            raise UsageError(f"--fill {self.fill}: expected one of {', '.join((*FILLS, AUTO))}.")
        scores = (*SCORES, RANDOM, ELIMINATION)
        if self.score not in scores:
            raise UsageError(f"--score {self.score}: expected one of {', '.join(scores)}.")
        if self.score == ELIMINATION and not self.refit:
            raise UsageError(
                f"--score {ELIMINATION} reckons with the refit; leave out --no-refit or choose another score."
            )


def choose(source: Source, observed: Observed, kept: int, rules: Rules) -> Decision:
    """What stays of a site, at which fill, and refitted if asked for.

    Raises:
        PrunePeakError: what was seen of its neurons cannot be.
    """
    try:
        return _decide(source, observed, kept, rules)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise PrunePeakError(
            f"what is known of {observed.site.name} makes no sense ({brief(error)}). Calibrate it anew."
        ) from None


def _decide(source: Source, observed: Observed, kept: int, rules: Rules) -> Decision:
    site, summary = observed.site, observed.stats.summarize()
    weight = site.as_matrix(source.read(site.weight))
    bias = source.read(site.bias) if site.bias in source.names else None
    evidence = None if observed.gathered is None else observed.gathered.evidence()
    fill, score = rules.fill, rules.score
    if site.constants is None:  # no bias to shift: all is reckoned about zero
        fill, evidence = "zero", None if evidence is None else evidence.about_zero()
    names = FILLS if fill == AUTO else [fill]
    if score == ELIMINATION and evidence is not None and isinstance(evidence.whole, Moments):
        keep = eliminate(site, weight, evidence.whole, kept)
        choices = {name: Choice(keep, choose_fill(summary, name)) for name in names}
    else:
        score = FEW_TOKENS_SCORE if score == ELIMINATION else score
        choices = {name: select(site, summary, weight, kept, name, score, rules.seed + site.block) for name in names}
    best = fill
    if fill == AUTO:
        assert evidence is not None
        errors = {name: output_error(weight, bias, choice, evidence.held_out) for name, choice in choices.items()}
        best = min(errors, key=lambda name: errors[name])
    decision = Decision(choices[best], best, lost_share(summary, choices[best], weight), score=score)
    if rules.refit:
        assert evidence is not None
        choice, fitted = refit_best(weight, bias, decision.choice, evidence)
        decision = replace(decision, choice=choice, refit=fitted)
    if site.narrowed:
        narrowing, lost = narrow_heads(observed, kept)
        decision = replace(decision, choice=replace(decision.choice, narrowing=narrowing), scores_lost=lost)
    return decision


def narrow_heads(observed: Observed, kept: int) -> tuple[Narrowing, float]:
    """Queries and keys of as many dimensions as `kept` neurons leave every head; and the share of the scores lost."""
    heads = observed.site.groups
    queries, keys = observed.narrowed
    means = queries.mean.view(heads, -1)
    seconds = _by_head(queries.covariance, heads) + means[:, :, None] * means[:, None, :]
    return narrow(seconds, _by_head(keys.covariance, heads), kept // heads)


def _by_head(matrix: Tensor, heads: int) -> Tensor:
    """The blocks of one head each, (heads, head_dim, head_dim) float64."""
    head_dim = len(matrix) // heads
    blocks = matrix.view(heads, head_dim, heads, head_dim)
    return torch.stack([blocks[head, :, head] for head in range(heads)]).double()


def choose_split(
    source: Source,
    observed: Iterable[Observed],
    splits: Sequence[Widths],
    rules: Rules,
    exam: Exam | None,
    dtype: torch.dtype,
    machine: Machine,
) -> Widths:
    """The split of a target over the kinds of site that loses least: at an exam, or by the sites' errors without one.

    Args:
        observed: what was seen of every site, block by block.
        exam: on what was not measured.
        dtype: to compute in at the exam.
    """
    if exam is None:
        losses = _add_up_errors(source, observed, splits, rules)
    else:
        losses = _examine(source, observed, splits, rules, exam, dtype, machine)
    for kept, loss in zip(splits, losses, strict=True):
        log.info("split %s: predicted loss %.4f", kept, loss)
    return splits[min(range(len(splits)), key=lambda number: losses[number])]


def _examine(
    source: Source,
    observed: Iterable[Observed],
    splits: Sequence[Widths],
    rules: Rules,
    exam: Exam,
    dtype: torch.dtype,
    machine: Machine,
) -> list[float]:
    """The loss of every split at an exam, which all of them take at once, block by block."""
    each = len(exam.batches)
    on_processor = replace(machine, device=CPU)  # where the choices are
    stream = BlockStream(source, [*exam.batches] * len(splits), dtype, on_processor)
    steps = stream.steps()
    for block, group in groupby(observed, lambda seen: seen.site.block):
        here = list(group)
        step = next(step for step in steps if step.index == block)
        with ExitStack() as hooks:
            for number in step.run():
                if number % each == 0:
                    hooks.close()
                    kept = splits[number // each]
                    cut = [seen for seen in here if seen.site.kind in kept]
                    plan = {seen.site.name: choose(source, seen, kept[seen.site.kind], rules).choice for seen in cut}
                    hooks.enter_context(ablated(stream.model, [seen.site for seen in cut], plan))
        del here, cut, plan  # before the next block is measured
    for _ in steps:
        pass
    losses = [
        grade(output.logits, targets).losses.mean().item()
        for output, targets in zip(stream.outputs(), [*exam.targets] * len(splits), strict=True)
    ]
    return [statistics.fmean(losses[start : start + each]) for start in range(0, len(losses), each)]


def _add_up_errors(source: Source, observed: Iterable[Observed], splits: Sequence[Widths], rules: Rules) -> list[float]:
    """The errors of the sites' outputs on held-out tokens, as a share of the hidden states that they are added to."""
    losses = [0.0] * len(splits)
    for seen in observed:
        assert seen.gathered is not None
        assert seen.power is not None
        site = seen.site
        weight = site.as_matrix(source.read(site.weight))
        bias = source.read(site.bias) if site.bias in source.names else None
        held_out = seen.gathered.evidence().held_out
        if site.constants is None:
            held_out = held_out.about_zero()
        errors: dict[int, float] = {site.neurons: 0.0}
        for number, kept in enumerate(splits):
            width = kept.get(site.kind, site.neurons)
            if width not in errors:
                decision = choose(source, seen, width, rules)
                # without the refit, whose reader knows the held-out tokens; what it saves on them it tells itself
                error = output_error(weight, bias, decision.choice.without_reader(), held_out) / seen.power
                errors[width] = error if decision.refit is None else error * decision.refit.error
            losses[number] += errors[width]
    return losses
