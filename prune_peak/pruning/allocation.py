"""How a size target is divided between kinds of site."""

import logging
import statistics
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby

import torch

from ..evaluation.quality import EvalSet, score_logits
from ..models.execution import CPU, ExecutionConfig
from ..models.loading import Model
from ..models.streaming import BlockStream
from ..options import PruningOptions
from ..sites.hooks import ablated
from ..stats.collection import SiteStats
from .budget import Widths
from .refit import output_error
from .site_pruning import plan_site

log = logging.getLogger(__name__)


def choose_allocation(
    source: Model,
    stats: Iterable[SiteStats],
    allocations: Sequence[Widths],
    options: PruningOptions,
    eval_set: EvalSet | None,
    dtype: torch.dtype,
    execution: ExecutionConfig,
) -> Widths:
    """The allocation with the smallest loss on an evaluation set; by the sites' output errors without one.

    Args:
        stats: of every site, block by block.
        eval_set: windows that are not in the calibration.
        dtype: to evaluate in.
    """
    if eval_set is None:
        losses = _sum_site_errors(source, stats, allocations, options)
    else:
        losses = _evaluate_allocations(source, stats, allocations, options, eval_set, dtype, execution)
    for kept, loss in zip(allocations, losses, strict=True):
        log.info("allocation %s: predicted loss %.4f", kept, loss)
    return allocations[min(range(len(allocations)), key=lambda number: losses[number])]


def _evaluate_allocations(
    source: Model,
    stats: Iterable[SiteStats],
    allocations: Sequence[Widths],
    options: PruningOptions,
    eval_set: EvalSet,
    dtype: torch.dtype,
    execution: ExecutionConfig,
) -> list[float]:
    """The loss of every allocation; all are evaluated together, block by block."""
    each = len(eval_set.batches)
    on_cpu = replace(execution, device=CPU)  # where the plans are
    stream = BlockStream(source, [*eval_set.batches] * len(allocations), dtype, on_cpu)
    steps = stream.steps()
    for block, group in groupby(stats, lambda each: each.site.block):
        here = list(group)
        step = next(step for step in steps if step.index == block)
        with ExitStack() as hooks:
            for number in step.run():
                if number % each == 0:
                    hooks.close()
                    kept = allocations[number // each]
                    pruned = [one for one in here if one.site.name in kept]
                    plan = {one.site.name: plan_site(source, one, kept[one.site.name], options).plan for one in pruned}
                    hooks.enter_context(ablated(stream.model, [one.site for one in pruned], plan))
        del here, pruned, plan  # before the next block is measured
    for _ in steps:
        pass
    losses = [
        score_logits(output.logits, targets).losses.mean().item()
        for output, targets in zip(stream.outputs(), [*eval_set.targets] * len(allocations), strict=True)
    ]
    return [statistics.fmean(losses[start : start + each]) for start in range(0, len(losses), each)]


def _sum_site_errors(
    source: Model, stats: Iterable[SiteStats], allocations: Sequence[Widths], options: PruningOptions
) -> list[float]:
    """The output errors of the sites on held-out tokens, relative to the hidden states that they are added to."""
    losses = [0.0] * len(allocations)
    for one in stats:
        assert one.accumulator is not None
        assert one.power is not None
        site = one.site
        weight, bias = site.read_projection(source)
        held_out = one.accumulator.second_order().held_out
        if site.folded_into is None:
            held_out = held_out.about_zero()
        errors: dict[int, float] = {site.neurons: 0.0}
        for number, kept in enumerate(allocations):
            width = kept.get(site.name, site.neurons)
            if width not in errors:
                result = plan_site(source, one, width, options)
                # refitted weights have seen the held-out tokens; the refit's own held-out error stands in for them
                error = output_error(weight, bias, result.plan.without_weights(), held_out) / one.power
                errors[width] = error if result.refit is None else error * result.refit.error
            losses[number] += errors[width]
    return losses
