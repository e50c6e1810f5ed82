"""Which blocks leave: by what the removal of each costs the outputs, measured in one pass over held-out windows.

In the pass, what 1 to n blocks add is regressed on the neurons of the block before them, over some tokens, which gives
an error for every run of blocks. The hidden states without one block, and with what replaces it, go on through all
blocks that follow, to the outputs; so the cost of one block is measured. The cost of a longer run is its error in terms
of that of its last block alone. The runs with the smallest sum of costs leave.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..data.windows import Windows, into_batches
from ..evaluation.divergence import divergence
from ..models.execution import ExecutionConfig
from ..models.loading import Model
from ..models.streaming import BlockRun, BlockStream
from ..options import PruningOptions
from ..progress import open_bar
from ..sites.blocks import CHOICE_TOKENS, LONGEST_RUN, BlocksSite
from ..sites.hooks import observed
from ..stats.calibration import Calibration
from ..stats.contributions import is_usual
from .budget import Widths
from .refit import USUAL_RIDGE

log = logging.getLogger(__name__)

SCORED_TOKENS, SCORED_IMAGES = 1024, 64

Costs = Mapping[tuple[int, int], float]  # of the run of so many blocks after a block


class Predictor:
    """Ridge regression on the neurons of one block, for any target.

    Args:
        neurons: on the tokens to fit on, (tokens, neurons).
        others: on the tokens to predict, likewise.
        options: the refit, the mean alone, or nothing (a fill of zero).
    """

    def __init__(self, neurons: Tensor, others: Tensor, options: PruningOptions) -> None:
        typical = neurons.square().sum(1).median()
        self._neurons, self._others = (  # with an intercept
            torch.cat([each, typical.sqrt().expand(len(each), 1)], dim=1) for each in (neurons, others)
        )
        self._ridge = float(USUAL_RIDGE * typical / neurons.shape[1]) or 1.0
        self._options, self._factor, self._usual = options, torch.empty(0), torch.empty(0)

    def predict(self, target: Tensor) -> Tensor:
        """The prediction of a target, (tokens, hidden), for the other tokens; giant targets are not fitted."""
        usual = is_usual(target)
        if not self._options.refit:
            mean = target[usual].mean(0) * (self._options.fill != "zero")
            return mean.expand(len(self._others), -1)
        read = self._neurons[usual]
        has_few_tokens = len(read) < read.shape[1]
        if not torch.equal(usual, self._usual):
            ridged = read @ read.T if has_few_tokens else read.T @ read
            ridged.diagonal().add_(self._ridge * len(read))
            self._factor, self._usual = torch.linalg.cholesky(ridged), usual
        if has_few_tokens:
            return self._others @ (read.T @ torch.cholesky_solve(target[usual], self._factor))
        return self._others @ torch.cholesky_solve(read.T @ target[usual], self._factor)


@dataclass(frozen=True)
class _Kept:
    """A block that may take over what follows it."""

    block: int
    predictor: Predictor
    fitted: Tensor  # the hidden states after it, (tokens, hidden)
    scored: Tensor


def choose_blocks(
    source: Model,
    sites: Sequence[BlocksSite],
    count: int,
    calibration: Calibration,
    options: PruningOptions,
    execution: ExecutionConfig,
) -> Widths:
    """The widths of the sites of the `count` blocks whose removal costs least.

    Args:
        sites: those of all blocks.
        options: whether the blocks that stay are refitted; otherwise constants replace those that leave.
    """
    able = [site for site in sites if site.removed]
    costs = BlockSearch(source, able, count, calibration, options, execution).measure()
    for (block, length), cost in sorted(costs.items(), key=lambda item: item[1]):
        log.info("without the %d blocks after block %d: predicted cost %.4f", length, block, cost)
    removed = {after + 1 + each for after, length in cheapest_runs(costs, count) for each in range(length)}
    return {site.name: site.always_kept for site in able if site.removed[0] in removed}


class BlockSearch:
    """The pass of `choose_blocks`: what the outputs lose without runs of blocks, where `count` blocks are to leave."""

    def __init__(
        self,
        source: Model,
        sites: Sequence[BlocksSite],
        count: int,
        calibration: Calibration,
        options: PruningOptions,
        execution: ExecutionConfig,
    ) -> None:
        fitted, scored = _split(calibration.windows)
        self.sites, self.options = {site.block: site for site in sites}, options
        self.longest = min(count, max(LONGEST_RUN, -(-count // (sites[0].blocks - count))))
        batches = into_batches(fitted, execution.batch_tokens)
        self.scored = range(len(batches), len(batches) + len(others := into_batches(scored, execution.batch_tokens)))
        self.stream = BlockStream(source, [*batches, *others], calibration.dtype, execution)
        self.errors: dict[tuple[int, int], float] = {}
        self.without: dict[int, list[Tensor]] = {}  # the scored hidden states without the block after this one

    def measure(self) -> Costs:
        """The costs of all runs of blocks."""
        recent: list[_Kept] = []
        with open_bar("choose blocks", "block", self.stream.blocks) as bar:
            for step in self.stream.steps():
                for after, states in self.without.items():
                    given = zip(self.scored, states, strict=True)
                    self.without[after] = [step.apply(number, hidden) for number, hidden in given]
                recent = [*recent, *self._run(step, recent)][-self.longest :]
                bar.update()
        found = self._score()
        return {
            (after, length): error * found[after + length - 1] / max(self.errors[after + length - 1, 1], 1e-30)
            for (after, length), error in self.errors.items()
            if after + length - 1 in found
        }

    def _run(self, step: BlockRun, recent: Sequence[_Kept]) -> Iterator[_Kept]:
        """Run a block; give it as one that may take over what follows it, if it can."""
        site, neurons = self.sites.get(step.index), []
        if site is None:
            for _ in step.run():
                pass
        else:
            projection = self.stream.model.get_submodule(site.name)
            with observed(projection, lambda read: neurons.append(read.flatten(0, -2).float())):
                for _ in step.run():
                    pass
        states = [self.stream.states[number] for number in range(self.scored.stop)]
        fitted, scored = (_join(states[part]) for part in (slice(self.scored.start), slice(self.scored.start, None)))
        for kept in recent:
            self._replace(kept, step.index - kept.block, fitted, scored, states[self.scored.start :])
        if site is not None:
            parts = torch.cat(neurons[: self.scored.start]), torch.cat(neurons[self.scored.start :])
            yield _Kept(step.index, Predictor(*parts, self.options), fitted, scored)

    def _replace(self, kept: _Kept, length: int, fitted: Tensor, scored: Tensor, like: Sequence[Tensor]) -> None:
        """Replace the blocks after one of the last by the prediction of what they add."""
        predicted = kept.predictor.predict(fitted - kept.fitted)
        added = scored - kept.scored
        error = (added - predicted)[is_usual(added)].square().sum(1).mean()
        self.errors[kept.block, length] = float(error)
        if length == 1:
            parts = (kept.scored + predicted).split([each.shape[:-1].numel() for each in like])
            self.without[kept.block] = [part.view_as(each).to(each) for part, each in zip(parts, like, strict=True)]

    def _score(self) -> dict[int, float]:
        """How far the outputs without each block are from the original's."""
        numbers = list(self.scored)
        with open_bar("score blocks", "block", len(self.without)) as bar:
            original = list(self.stream.head((number, self.stream.states[number]) for number in numbers))
            found = {}
            for after, states in self.without.items():
                outputs = self.stream.head(zip(numbers, states, strict=True))
                found[after] = fmean(map(_distance, original, outputs))
                bar.update()
        return found


def _distance(original: Any, output: Any) -> float:
    """The divergence of the predictions; without a head, the share of the hidden states that is lost."""
    if hasattr(original, "logits"):
        expected, found = (each.logits.flatten(0, -2) for each in (original, output))
        return float(divergence(expected, found).mean())
    expected, found = (each[0].float() for each in (original, output))
    return float((found - expected).square().mean() / expected.square().mean().clamp_min(1e-30))


def _split(windows: Windows) -> tuple[Tensor, Tensor]:
    """Windows (or images) to fit on, and others to score on: held-out ones where there are some."""
    every, held_out = windows.calibration, windows.held_out
    if every.is_floating_point():
        scored = min(SCORED_IMAGES, len(every) // 2)
        return every[scored:][:SCORED_IMAGES], every[:scored]
    enough = max(1, SCORED_TOKENS // every.shape[1])
    if not len(held_out):
        held_out, every = every[:enough], every[enough:]
    return every[: max(1, CHOICE_TOKENS // every.shape[1])], held_out[:enough]


def _join(states: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.flatten(0, -2).float() for each in states])


def cheapest_runs(costs: Costs, count: int) -> list[tuple[int, int]]:
    """The runs of `count` blocks in all with the smallest sum of costs; a block stays before each.

    Example:
        >>> cheapest_runs({(0, 1): 1.0, (1, 1): 2.0, (2, 1): 1.0, (0, 2): 5.0}, 2)
        [(0, 1), (2, 1)]
    """
    end = max(after + length for after, length in costs) + 1

    @cache
    def best(start: int, left: int) -> tuple[float, tuple[tuple[int, int], ...]]:
        if left == 0:
            return 0.0, ()
        if start >= end:
            return float("inf"), ()
        found = best(start + 1, left)
        for length in range(1, left + 1):
            if (start, length) in costs:
                rest, runs = best(start + length + 1, left - length)
                found = min(found, (costs[start, length] + rest, ((start, length), *runs)))
        return found

    return list(best(0, count)[1])
