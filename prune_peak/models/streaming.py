"""Run a stock model block by block and read weights when they are needed.

A dry pass with recorders in place of the blocks captures the inputs of each block (in some families, masks and
positions differ by block). Then each block loads its weights, runs over all batches and frees its memory. The results
equal those of the whole forward pass, bit for bit. Hidden states can be stored in a file.
"""

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from ..errors import PrunePeakError
from .bfloat16 import factor_type
from .execution import CPU, ExecutionConfig
from .families import blocks_path, find_blocks
from .forward import run
from .hidden_states import HiddenStates, to_device
from .loading import Model
from .recording import BlockInputs, InputRecorder, StopForward
from .stream import Batch, Step, Stream

FACTORS = (nn.Linear, Conv1D)  # modules (not subclasses) whose weight is only a factor of a product
FEW_TOKENS = 4  # the last of a window, because padding is on the left


class SharedTensors:
    """Deduplicates tensors: rotary tables and masks are equal for all batches of one shape; each is moved once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._unique: dict[tuple[torch.Size, torch.dtype], list[tuple[Tensor, Tensor]]] = {}

    def share(self, call: BlockInputs) -> BlockInputs:
        """The same inputs, with equal tensors replaced by the ones stored first."""
        return BlockInputs(*tree_map_only(Tensor, self._first, (call.args, call.kwargs)))

    def _first(self, tensor: Tensor) -> Tensor:
        unique = self._unique.setdefault((tensor.shape, tensor.dtype), [])
        for other, moved in unique:
            if other is tensor or torch.equal(other, tensor):
                return moved
        unique.append((tensor, to_device(tensor, self._device)))
        return unique[-1][1]


@dataclass
class BlockRun(Step):
    """One block with its weights loaded, and the hidden states before it."""

    index: int
    block: nn.Module
    _source: Model
    _states: HiddenStates
    _calls: Sequence[BlockInputs]
    _release: Callable[[], None]  # frees the weights after the block has run
    ran: bool = False

    def covers(self, block: int) -> bool:
        return block == self.index

    def rows(self, name: str, masks: Sequence[Tensor | None] = ()) -> list[int]:
        shapes = self._states.shapes
        tokens = zip(shapes, masks or [None] * len(shapes), strict=True)
        return [shape[:-1].numel() if mask is None else int(mask.sum()) for shape, mask in tokens]

    @torch.inference_mode()
    def run(self) -> Iterator[int]:
        """Yield each batch's index, then run the block on it; free the weights at the end."""
        assert not self.ran
        self.ran = True
        for number in range(len(self._calls)):
            yield number
            self._states[number] = self.output(number)
        self._release()

    @torch.inference_mode()
    def output(self, number: int) -> Tensor:
        """The block's output for one batch, on the block's device."""
        return self.apply(number, self._states[number])

    @torch.inference_mode()
    def apply(self, number: int, hidden: Tensor) -> Tensor:
        """The block's output for other hidden states in the place of those of a batch, on the block's device."""
        call = self._calls[number]
        output = run(self._source, self.block, hidden, *call.args, **call.kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    @torch.inference_mode()
    def powers(self) -> Tensor:
        """The squared norm of the current hidden state of every token, (tokens,)."""
        norms = [self._states[number].float().square().sum(-1).flatten() for number in range(len(self._states))]
        return torch.cat(norms)


class BlockStream(Stream):
    """Runs a stock model over batches, block by block, then through the head.

    Args:
        dtype: to compute in.
        execution: the device of blocks and head, and the place of the hidden states. What precedes the blocks runs on
            the CPU.

    Example:
        >>> stream = BlockStream(source, batches, torch.float32)    # doctest: +SKIP
        >>> for step in stream.steps():                             # doctest: +SKIP
        ...     for number in step.run(): ...
        >>> for logits in stream.outputs(): ...                     # doctest: +SKIP
    """

    def __init__(
        self,
        source: Model,
        batches: Sequence[Batch],
        dtype: torch.dtype,
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - frozen
    ) -> None:
        self.source = source
        if not source.family.streamable:
            raise PrunePeakError(f"the blocks of {source.name} cannot run one by one, which is needed here.")
        self.model = source.empty_model(dtype)
        self.dtype = dtype
        self._batches = batches
        self._blocks = list(find_blocks(self.model, source.family))
        self.blocks = self.passes = len(self._blocks)
        self.blocks_at_once = 1
        self._path = blocks_path(self.model, source.family)
        self._states = HiddenStates(execution.device, execution.hidden_states_on_disk)
        self._device = execution.device
        self._release_memory = execution.release_memory
        self._calls: list[list[BlockInputs]] = []
        self._in_tuple: bool | None = None  # unknown before the probe in `steps`

    def follows(self, block: int) -> bool:
        return block == self.blocks

    @torch.inference_mode()
    def steps(self) -> Iterator[BlockRun]:
        """Yield every block in order; a block that the caller did not run runs before the next one is loaded."""
        body = self.model.base_model
        self._calls = [[] for _ in self._blocks]
        shared = SharedTensors(self._device)
        self._in_tuple = self._returns_tuple()
        with self._recording() as recorders, self._outer_weights(body):
            for batch in self._batches:
                run(self.source, body, **{name: _as_rows(values) for name, values in batch.items()})
                assert recorders[0].hidden is not None
                self._states.append(recorders[0].hidden)
                if any(recorder.hidden is not recorders[0].hidden for recorder in recorders):
                    raise PrunePeakError(
                        f"{self.source.name} changes the hidden states between its blocks (as DeBERTa's convolution); "
                        "expected consecutive blocks. This model cannot be pruned."
                    )
                for recorder, inputs in zip(recorders, self._calls, strict=True):
                    assert recorder.call is not None
                    inputs.append(shared.share(recorder.call))
        for index, block in enumerate(self._blocks):
            with ExitStack() as weights:
                weights.enter_context(self._weights(f"{self._path}.{index}", block, self._device))
                if index + 1 < self.blocks:
                    following = _parameters(self._blocks[index + 1], f"{self._path}.{index + 1}")
                    self.source.read_ahead([name for name, *_ in following])
                step = BlockRun(index, block, self.source, self._states, self._calls[index], weights.close)
                yield step
                if not step.ran:
                    deque(step.run(), maxlen=0)

    @contextmanager
    def again(self, index: int) -> Iterator[BlockRun]:
        """A block once more, within the context, to call on other hidden states; call it after its step."""
        block = self._blocks[index]
        with self._weights(f"{self._path}.{index}", block, self._device):
            yield BlockRun(index, block, self.source, self._states, self._calls[index], _keep)

    def _returns_tuple(self) -> bool:
        """Whether blocks return tuples; runs the first one on a few tokens or one image."""
        body = self.model.base_model
        with self._recording() as recorders, self._outer_weights(body), suppress(StopForward):
            run(self.source, body, **{name: _shorten(values) for name, values in self._batches[0].items()})
        hidden, call = recorders[0].hidden, recorders[0].call
        assert hidden is not None
        assert call is not None
        with self._weights(f"{self._path}.0", self._blocks[0]):
            return isinstance(run(self.source, self._blocks[0], hidden, *call.args, **call.kwargs), tuple)

    @torch.inference_mode()
    def outputs(self) -> Iterator[Any]:
        """Yield the model's output for each batch; call it after all steps."""
        yield from self.head((number, self._states[number]) for number in range(len(self._batches)))

    @torch.inference_mode()
    def head(self, states: Iterable[tuple[int, Tensor]]) -> Iterator[Any]:
        """Yield the model's output for hidden states after the last block, each with the number of its batch."""
        with self._recording() as recorders, self._outer_weights(self.model, self._device):
            for number, hidden in states:
                recorders[-1].output = hidden
                yield run(self.source, self.model, **to_device(self._batches[number], self._device))

    @property
    def states(self) -> HiddenStates:
        """The current hidden states of all batches."""
        return self._states

    @contextmanager
    def _recording(self) -> Iterator[list[InputRecorder]]:
        recorders = [InputRecorder(block, self._in_tuple) for block in self._blocks]
        modules = find_blocks(self.model, self.source.family)
        for index, recorder in enumerate(recorders):
            modules[index] = recorder
        try:
            yield recorders
        finally:
            for index, block in enumerate(self._blocks):
                modules[index] = block

    def _outer_weights(self, module: nn.Module, device: torch.device = CPU) -> AbstractContextManager[None]:
        """Load all weights of a module except those of its blocks (recorders have none)."""
        prefix = next(name for name, other in self.model.named_modules() if other is module)
        return self._weights(prefix, module, device)

    @contextmanager
    def _weights(self, prefix: str, module: nn.Module, device: torch.device = CPU) -> Iterator[None]:
        """Load the parameters of a module; on exit, put back what was there."""
        parameters = _parameters(module, prefix)
        for name, owner, leaf, _ in parameters:
            read = self.source.read(name)
            dtype = self.dtype if read.is_floating_point() else read.dtype
            is_factor = type(owner) in FACTORS and leaf == "weight" and device == CPU
            tensor = read.to(dtype)
            # always copy: kernels round differently on memory that is mapped at an odd offset
            tensor = tensor.to(factor_type(dtype) if is_factor else dtype, copy=tensor is read)
            owner._parameters[leaf] = nn.Parameter(to_device(tensor, device), requires_grad=False)
        self.source.checkpoint.release()
        buffers = [] if device == CPU else [owner._buffers for owner in module.modules()]
        before = [dict(each) for each in buffers]
        for each in buffers:
            each.update(to_device(dict(each), device))
        try:
            yield
        finally:
            for _, owner, leaf, value in parameters:
                owner._parameters[leaf] = value
            for each, held in zip(buffers, before, strict=True):
                each.update(held)
            if self._release_memory:
                _return_memory()


def _keep() -> None:
    """Frees nothing: the context of the weights does."""


def _as_rows(values: Tensor) -> Tensor:
    """The inputs of the body: every choice of a multiple-choice head is a sequence."""
    return values if values.is_floating_point() else values.flatten(0, -2)


def _shorten(values: Tensor) -> Tensor:
    """The last tokens of the first sequence, or the first image."""
    return values[:1] if values.is_floating_point() else _as_rows(values)[:1, -FEW_TOKENS:]


def _return_memory() -> None:
    """Return freed memory to the system; glibc keeps gigabytes of gaps between live tensors."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def _parameters(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    """The parameters of a module: (name in the whole model, owner module, attribute, parameter)."""
    return [
        (".".join(part for part in (prefix, path, leaf) if part), owner, leaf, value)
        for path, owner in module.named_modules()
        for leaf, value in owner._parameters.items()
        if value is not None
    ]
