"""Run a stock model whole: for classes whose blocks cannot run one by one (shared blocks, stages, side inputs)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..progress import phase
from .asking import is_pointwise
from .execution import ExecutionConfig
from .families import block_paths
from .forward import run
from .loading import Model
from .miniature import takes_choices, takes_one_text
from .stream import Batch, Step, Stream
from .streaming import BlockStream

BLOCKS_AT_ONCE = 12  # whose sites are measured in one pass


@dataclass
class WholeRun(Step):
    """A pass of the whole model over all batches, in which the sites of some blocks are measured."""

    source: Model
    model: PreTrainedModel
    covered: range
    _batches: Sequence[Batch]
    # rows by module, for the shapes of each batch
    _counted: dict[tuple[torch.Size, ...], Counter[str]] = field(default_factory=dict)

    def covers(self, block: int) -> bool:
        return block in self.covered

    def rows(self, name: str, masks: Sequence[Tensor | None] = ()) -> list[int]:
        counts = []
        for batch, mask in zip(self._batches, masks or [None] * len(self._batches), strict=True):
            shapes = tuple(values.shape for values in batch.values())
            if shapes not in self._counted:
                self._counted[shapes] = _count_rows(self.source, self.model, batch)
            rows = self._counted[shapes][name]
            if mask is not None and rows % mask.numel() == 0:
                rows = rows // mask.numel() * int(mask.sum())
            counts.append(rows)
        return counts

    @torch.inference_mode()
    def run(self) -> Iterator[int]:
        """Yield each batch's index, then run the model on it."""
        for number, batch in enumerate(self._batches):
            yield number
            run(self.source, _for_windows(self.model), **batch)


class WholeStream(Stream):
    """Like `BlockStream`, with all weights in memory."""

    def __init__(self, source: Model, batches: Sequence[Batch], dtype: torch.dtype, execution: ExecutionConfig) -> None:
        self.source, self.dtype = source, dtype
        self.model = source.load(dtype).to(execution.device)
        self.model.config.use_cache = False
        self._batches = [{name: each.to(execution.device) for name, each in batch.items()} for batch in batches]
        self.blocks = len(block_paths(self.model, source.family))
        self._groups = [
            range(first, first + BLOCKS_AT_ONCE) for first in range(0, self.blocks + 1, BLOCKS_AT_ONCE)
        ]  # one block more, for what follows the blocks
        self.passes = len(self._groups)
        self.blocks_at_once = self.blocks  # that one step runs

    def steps(self) -> Iterator[WholeRun]:
        """Yield a pass for every few blocks; nothing runs unless the caller runs it."""
        for covered in self._groups:
            yield WholeRun(self.source, self.model, covered, self._batches)

    def follows(self, block: int) -> bool:
        return False

    @torch.inference_mode()
    def outputs(self) -> Iterator[Any]:
        for batch in self._batches:
            yield run(self.source, self.model, **batch)


def open_stream(
    source: Model,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - frozen
) -> Stream:
    """Run a model over batches, block by block where its class allows it."""
    kind = BlockStream if source.family.streamable else WholeStream
    with phase("build the model"):
        return kind(source, batches, dtype, execution)


def _for_windows(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that takes a batch of windows: without a head that wants another form."""
    alone: PreTrainedModel = model.base_model
    return alone if takes_choices(type(model)) or takes_one_text(type(model), model.config) else model


@torch.inference_mode()
def _count_rows(source: Model, model: PreTrainedModel, batch: Batch) -> Counter[str]:
    """The rows that every matrix reads, by the path of its module."""
    rows: Counter[str] = Counter()
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D) or is_pointwise(module):

                def count(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                    rows[name] += args[0].numel() // args[0].shape[1 if is_pointwise(module) else -1]

                hooks.callback(module.register_forward_pre_hook(count).remove)
        run(source, _for_windows(model), **batch)
    return rows
