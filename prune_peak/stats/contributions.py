"""What consecutive blocks add to the hidden state, beside what the output projection before them reads.

The change of the projection's output that makes the same change of the hidden state is the target of the refit. Where
the block adds the output as it is, or scaled, the target is the contribution, divided by the scale. Where the block
ends in a LayerNorm (BERT), it is the change before this norm, with the standard deviation that the norm divides by.

A few tokens have giant activations, which blocks write and later ones remove. They would decide a fit alone, so they
are left out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import PrunePeakError
from ..models.hidden_states import HiddenStates
from ..models.streaming import BlockRun, BlockStream
from ..sites.blocks import BlocksSite

GIANT = 8  # times the median norm of a batch; contributions beyond it are left out
EVEN = 0.1  # share by which the effects of an output on the tokens may differ
LEAST_SCALE = 1e-3  # of the largest one, below which a component of the hidden state is not adjusted


@dataclass(frozen=True)
class Adjuster:
    """How the output of a projection comes to that of its block."""

    scale: Tensor  # (hidden,): what the block multiplies it by; of a LayerNorm at its end, the weight
    norm: nn.Module | None = None  # the LayerNorm at the end of the block

    def target(self, change: Tensor, read: "Read") -> Tensor:
        """The change of the projection's output, (tokens, hidden), that changes the block's output so."""
        least = LEAST_SCALE * self.scale.abs().max()
        usable = self.scale.abs() > least
        change = torch.where(usable, change / torch.where(usable, self.scale, 1), 0)
        if self.norm is not None:
            normed = read.normed[self.norm][0].flatten(0, -2).float()
            change = change * normed.std(-1, correction=0, keepdim=True)
        return change


class Read:
    """What was seen in one run of a block: the projection's input, and what its LayerNorms read and gave."""

    def __init__(self) -> None:
        self.neurons = torch.empty(0)
        self.normed: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def watching(self, block: nn.Module, projection: nn.Module, shift: float = 0.0) -> Iterator[None]:
        """Within the context, keep what is read; and add `shift` to the projection's output."""

        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self.neurons = args[0]
            return output + shift if shift else output

        def keep_norm(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.normed[norm] = args[0], output

        with ExitStack() as hooks:
            hooks.callback(projection.register_forward_hook(keep).remove)
            for module in block.modules():
                if isinstance(module, nn.LayerNorm):
                    hooks.callback(module.register_forward_hook(keep_norm).remove)
            yield


def is_usual(changes: Tensor) -> Tensor:
    """Which rows are not giant, (tokens,) bool."""
    norms: Tensor = changes.norm(dim=1)
    return norms <= GIANT * norms.median()


def find_adjuster(run: Callable[[], Tensor], block: nn.Module, projection: nn.Module) -> Adjuster:
    """How a projection's output comes to that of its block, from a run of the block.

    Raises:
        PrunePeakError: in another way than by a sum or a LayerNorm at the end.
    """
    read = Read()
    with read.watching(block, projection):
        output = run().flatten(0, -2)
    for norm, (_, normed) in read.normed.items():
        if torch.equal(normed.flatten(0, -2), output) and isinstance(norm.weight, Tensor):
            return Adjuster(norm.weight.detach().float(), norm)
    shift = output.float().square().mean().sqrt().item() or 1.0
    with read.watching(block, projection, shift):
        effects = (run().flatten(0, -2).float() - output.float()) / shift
    scale = effects.mean(0)
    if (effects - scale).abs().mean() > EVEN * scale.abs().mean():
        raise PrunePeakError(
            f"{type(block).__name__} does not add what its MLP gives to the hidden state (it is normalized first), so "
            "the MLP cannot take over what other blocks do."
        )
    return Adjuster(torch.ones_like(scale) if (scale - 1).abs().max() < EVEN else scale)


def measure_contributions(
    stream: BlockStream, sites: Sequence[BlocksSite], masks: Sequence[Tensor | None]
) -> Iterator[tuple[BlockRun, list[tuple[BlocksSite, Iterator[Tensor]]]]]:
    """Run block by block; at the last block of a site, what its projection reads and what it must add, for each batch.

    The rows are (tokens, neurons + hidden), without padding and without tokens of giant contributions. They must be
    used up before the next block.
    """
    before: dict[int, HiddenStates] = {}
    for step in stream.steps():
        if any(site.block == step.index for site in sites):
            before[step.index] = stream.states.copy()
        for _ in step.run():
            pass
        ended = [site for site in sites if site.removed[-1] == step.index]
        yield step, [(site, _rows(stream, site, before[site.block], masks)) for site in ended]
        before = {block: states for block, states in before.items() if _is_needed(block, step.index, sites)}
        if step.index == max(site.removed[-1] for site in sites):
            return


def _is_needed(block: int, done: int, sites: Sequence[BlocksSite]) -> bool:
    return any(site.block == block and site.removed[-1] > done for site in sites)


def _rows(
    stream: BlockStream, site: BlocksSite, before: HiddenStates, masks: Sequence[Tensor | None]
) -> Iterator[Tensor]:
    projection = stream.model.get_submodule(site.name)
    adjuster = None
    with stream.again(site.block) as run:
        for number, mask in enumerate(masks):
            hidden = before[number]
            adjuster = adjuster or find_adjuster(lambda: run.apply(0, before[0]), run.block, projection)
            read = Read()
            with read.watching(run.block, projection):
                output = run.apply(number, hidden).flatten(0, -2).float()
            change = adjuster.target(stream.states[number].flatten(0, -2).float() - output, read)
            neurons = read.neurons.flatten(0, -2)
            counted = (
                change.new_ones(len(change), dtype=torch.bool)
                if mask is None
                else mask.to(change.device).bool().view(-1)
            )
            counted[counted.clone()] = is_usual(change[counted])
            yield torch.cat([neurons[counted].float(), change[counted]], dim=1)
