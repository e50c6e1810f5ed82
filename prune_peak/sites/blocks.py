"""Blocks: whole blocks leave, and the MLP before them takes over what they added to the hidden state.

What consecutive blocks add together is pruned like neurons: the output projection before them reads, besides its own
neurons, one more for each component of their contribution, with the identity as its weight. These are held at constants
or refitted on the projection's own neurons, which all stay; so its weight keeps its shape.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import PrunePeakError, spell
from ..models.families import Family
from .folding import cut_mask
from .hooks import held
from .plan import SitePlan
from .site import Site, SiteKind, has_module, measure_projection

CHOICE_TOKENS = 4096  # of the calibration, on which blocks are compared
LONGEST_RUN = 8  # of blocks that leave, if no longer one must


@dataclass(frozen=True)
class BlocksSite(Site):
    """The blocks that leave after a block, at the output projection of its MLP."""

    removed: tuple[int, ...] = ()  # their numbers: the next one, or several; none after the last block
    blocks: int = 0  # of the model

    @property
    def path(self) -> str:
        """The path of the block that takes over what the others do."""
        return f"{self.name.partition(f'.{self.block}.')[0]}.{self.block}"

    def covers(self, block: int) -> bool:
        return block == self.block or block in self.removed

    def widen(self, weight: Tensor) -> Tensor:
        return torch.cat([weight, torch.eye(self.hidden, dtype=weight.dtype)], dim=1)


class Blocks(SiteKind):
    """The blocks of a model."""

    label: ClassVar[str] = "blocks"
    is_alone: ClassVar[bool] = True

    def check(self, model: PreTrainedModel, family: Family) -> None:
        if not family.streamable:
            raise PrunePeakError(
                f"the blocks of this {family.model_type} do not run one after another, so none leaves."
            )
        if family.mlp is None:
            raise PrunePeakError(
                f"every MLP of this {family.model_type} is an expert, and none can take over what a block does. Remove "
                f"whole experts ({spell('sites', 'experts')})."
            )

    def find(self, model: PreTrainedModel, family: Family, block: str, index: int, unit: str) -> list[Site]:
        blocks = len(list(model.get_submodule(block.rpartition(".")[0]).children()))
        for mlp in family.mlps:
            name = f"{block}.{mlp.output_projection}"
            if has_module(model, name):
                neurons, hidden, transposed, _ = measure_projection(model, name)
                return [
                    BlocksSite(
                        self,
                        index,
                        name,
                        neurons + hidden,
                        hidden,
                        transposed,
                        {},
                        f"{block}.{mlp.bias_module or mlp.output_projection}.bias",
                        mlp.bias_key,
                        always_kept=neurons,
                        removed=(index + 1,) if index + 1 < blocks else (),
                        blocks=blocks,
                    )
                ]
        return []

    def step(self, site: Site, multiple_of: int | None) -> int:
        return 1

    def fits(self, site: Site, plan: SitePlan) -> bool:
        return super().fits(site, plan) and torch.equal(plan.keep, torch.arange(site.always_kept))

    def reduce(self, weight: Tensor, keep: Tensor) -> Tensor:
        return weight[:, : len(keep)]

    def hold(self, model: nn.Module, site: Site, plan: SitePlan) -> AbstractContextManager[Any]:
        """Within the context, the blocks return what they are given, and the projection adds what replaces them."""
        assert isinstance(site, BlocksSite)
        return _held(model, site, plan)


@contextmanager
def _held(model: nn.Module, site: BlocksSite, plan: SitePlan) -> Iterator[None]:
    projection = model.get_submodule(site.name)
    path, _, _ = site.path.rpartition(".")
    constant = plan.fill[cut_mask(site.neurons, plan.keep)]

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as hooks:
        if plan.weight is not None:
            hooks.enter_context(held(projection, plan))
        else:
            hook = projection.register_forward_hook(lambda _, args, output: output + constant.to(output.dtype))
            hooks.callback(hook.remove)
        for block in site.removed:
            hook = model.get_submodule(f"{path}.{block}").register_forward_hook(skip, with_kwargs=True)
            hooks.callback(hook.remove)
        yield


def join_runs(sites: Sequence[Site]) -> list[Site]:
    """The sites with those of consecutive blocks that leave as one, at the block before the first; others unchanged."""
    joined: list[Site] = []
    for site in sites:
        last = joined[-1] if joined else None
        if isinstance(site, BlocksSite) and isinstance(last, BlocksSite) and last.removed[-1] == site.block:
            joined[-1] = replace(last, removed=(*last.removed, *site.removed))
        else:
            joined.append(site)
    return joined


def removed_blocks(sites: Sequence[Site]) -> list[int]:
    """The numbers of all blocks that leave."""
    return [block for site in sites if isinstance(site, BlocksSite) for block in site.removed]
