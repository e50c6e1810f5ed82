"""Run a stock model one block at a time, with weights read as they are needed.

A dry pass, in which a recorder stands in for every block, tells what the model hands to each of them (masks and
positions differ by block in some families). Then each block in turn gets its weights, runs over all batches, and gives
its memory back. The numbers are those of the whole forward, bit for bit.

Where the hidden states of all batches are too many for the memory, they lie in a file.
"""

import ctypes
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from .arithmetic import factor_type, fast_products
from .checkpoint import tensor_bytes
from .errors import PrunePeakError
from .machine import CPU, Machine
from .sites import blocks_path, find_blocks
from .source import Source

FACTORS = (nn.Linear, Conv1D)  # modules (not their subclasses) whose weight is a factor of a product and nothing else
FEW_TOKENS = 4  # the last of a window, for padding is on the left

Batch = dict[
    str, Tensor
]  # the keyword arguments of the model's forward: input_ids, perhaps attention_mask; or pixel_values


@dataclass
class Call:
    """What the model handed to one block, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Twins:
    """Keeps one of tensors that are alike: rotary tables and masks are the same for every batch of one shape."""

    def __init__(self) -> None:
        self._known: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def share(self, call: Call) -> Call:
        """The call, with tensors that are there already in place of its own."""
        return Call(*tree_map_only(Tensor, self._first, (call.args, call.kwargs)))

    def _first(self, tensor: Tensor) -> Tensor:
        known = self._known.setdefault((tensor.shape, tensor.dtype), [])
        for other in known:
            if other is tensor or torch.equal(other, tensor):
                return other
        known.append(tensor)
        return tensor


class Seen(Exception):  # noqa: N818 - it tells no mistake
    """A recorder that was to stop has been called."""


class Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with and answers with the hidden states it got, or was given."""

    def __init__(self, block: nn.Module, in_tuple: bool | None) -> None:
        super().__init__()
        # what a model asks its blocks about themselves, such as ModernBERT whether their attention is windowed
        vars(self).update({name: value for name, value in vars(block).items() if not name.startswith("_")})
        self.in_tuple = in_tuple  # whether the block answers with a tuple, hidden states first; None to stop instead
        self.hidden: Tensor | None = None
        self.call: Call | None = None
        self.answer: Tensor | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.call = hidden, Call(args, kwargs)
        if self.in_tuple is None:
            raise Seen
        answer = hidden if self.answer is None else self.answer
        return (answer, None) if self.in_tuple else answer


class States:
    """The hidden states of every batch: in memory, or in a file that goes with them."""

    def __init__(self, spills: bool = False) -> None:
        self.shapes: list[torch.Size] = []
        self._held: list[Tensor] = []
        self._dtype = torch.float32
        self._file = tempfile.TemporaryFile() if spills else None  # noqa: SIM115 - as long as this lives
        if self._file is not None:
            weakref.finalize(self, self._file.close)

    def append(self, hidden: Tensor) -> None:
        """Keep those of one more batch; all are of one type."""
        self.shapes.append(hidden.shape)
        self._dtype = hidden.dtype
        if self._file is None:
            self._held.append(hidden)
        else:
            self._file.seek(self._offset(len(self.shapes) - 1))
            self._file.write(tensor_bytes(hidden))

    def __getitem__(self, number: int) -> Tensor:
        if self._file is None:
            return self._held[number]
        hidden = torch.empty(self.shapes[number], dtype=self._dtype)
        self._file.seek(self._offset(number))
        self._file.readinto(tensor_bytes(hidden))
        return hidden

    def __setitem__(self, number: int, hidden: Tensor) -> None:
        if self._file is None:
            self._held[number] = hidden
        else:
            self._file.seek(self._offset(number))
            self._file.write(tensor_bytes(hidden))

    def __len__(self) -> int:
        return len(self.shapes)

    def _offset(self, number: int) -> int:
        return self._dtype.itemsize * sum(shape.numel() for shape in self.shapes[:number])


class Step:
    """One block with its weights in place, and the hidden states before it.

    Args:
        release: called once the block has run, to give its weights back.
    """

    def __init__(
        self,
        index: int,
        block: nn.Module,
        states: States,
        calls: Sequence[Call],
        device: torch.device,
        release: Callable[[], None],
    ) -> None:
        self.index = index
        self.block = block
        self._states = states
        self._calls = calls
        self._device = device
        self._release = release
        self.ran = False

    @property
    def tokens(self) -> list[int]:
        """The tokens (or patches) of each batch."""
        return [shape[:-1].numel() for shape in self._states.shapes]

    @torch.inference_mode()
    def run(self) -> Iterator[int]:
        """Give each batch's number, then run the block over it; the hidden states move on, the weights leave."""
        assert not self.ran
        self.ran = True
        for number in range(len(self._calls)):
            yield number
            self._states[number] = self.answer(number).cpu()
        self._release()

    @torch.inference_mode()
    def answer(self, number: int) -> Tensor:
        """The hidden states after the block, of one batch, on the device that the block is on."""
        call, hidden = self._calls[number], self._states[number]
        if self._device.type != "cpu":
            call = Call(_to_device(call.args, self._device), _to_device(call.kwargs, self._device))
            hidden = _to_device(hidden, self._device)
        with fast_products():
            answer = self.block(hidden, *call.args, **call.kwargs)
        after: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return after

    @torch.inference_mode()
    def powers(self) -> Tensor:
        """The squared norm of every token's hidden state, as it is now."""
        norms = [self._states[number].float().square().sum(-1).flatten() for number in range(len(self._states))]
        return torch.cat(norms)


class BlockStream:
    """A source's stock model over a few batches, block by block, then through the head.

    Args:
        dtype: to compute in.
        machine: where hidden states and the block at hand are; what lies outside the blocks stays on the processor.

    Example:
        >>> stream = BlockStream(source, batches, torch.float32)    # doctest: +SKIP
        >>> for step in stream.steps():                             # doctest: +SKIP
        ...     for number in step.run(): ...
        >>> for logits in stream.outputs(): ...                     # doctest: +SKIP
    """

    def __init__(
        self,
        source: Source,
        batches: Sequence[Batch],
        dtype: torch.dtype,
        machine: Machine = Machine(),  # noqa: B008 - frozen
    ) -> None:
        self.source = source
        self.model = source.shell(dtype)
        self.dtype = dtype
        self._batches = batches
        self._blocks = list(find_blocks(self.model, source.family))
        self._path = blocks_path(self.model, source.family)
        self._states = States(machine.spills)
        self._device = machine.device
        self._frugal = machine.frugal
        self._in_tuple: bool | None = None  # not known yet

    @property
    def blocks(self) -> int:
        """How many."""
        return len(self._blocks)

    @torch.inference_mode()
    def steps(self) -> Iterator[Step]:
        """Every block in order; what the caller does not run of it is run when the next one is asked for."""
        body = self.model.base_model
        calls: list[list[Call]] = [[] for _ in self._blocks]
        twins = Twins()
        self._in_tuple = self._ask_for_tuple()
        with self._recording() as recorders, self._outer_weights(body):
            for batch in self._batches:
                with fast_products():
                    body(**batch)
                assert recorders[0].hidden is not None
                self._states.append(recorders[0].hidden)
                if any(recorder.hidden is not recorders[0].hidden for recorder in recorders):
                    raise PrunePeakError(
                        f"{self.source.name} changes the hidden states between its blocks (as DeBERTa's convolution "
                        "does), so it cannot be run block by block."
                    )
                for recorder, list_ in zip(recorders, calls, strict=True):
                    assert recorder.call is not None
                    list_.append(twins.share(recorder.call))
        for index, block in enumerate(self._blocks):
            with ExitStack() as weights:
                weights.enter_context(self._weights(f"{self._path}.{index}", block, self._device))
                if index + 1 < self.blocks:
                    following = _parameters(self._blocks[index + 1], f"{self._path}.{index + 1}")
                    self.source.read_ahead([name for name, *_ in following])
                step = Step(index, block, self._states, calls[index], self._device, weights.close)
                yield step
                if not step.ran:
                    for _ in step.run():
                        pass

    def _ask_for_tuple(self) -> bool:
        """Whether blocks answer with a tuple, as the first one does when it runs on a few tokens, or one image."""
        body = self.model.base_model
        with self._recording() as recorders, self._outer_weights(body), fast_products(), suppress(Seen):
            body(**{name: _begin(values) for name, values in self._batches[0].items()})
        hidden, call = recorders[0].hidden, recorders[0].call
        assert hidden is not None
        assert call is not None
        with self._weights(f"{self._path}.0", self._blocks[0]), fast_products():
            return isinstance(self._blocks[0](hidden, *call.args, **call.kwargs), tuple)

    @torch.inference_mode()
    def outputs(self) -> Iterator[Any]:
        """The model's own output for each batch, once all steps are done: the hidden states through the head."""
        with self._recording() as recorders, self._outer_weights(self.model):
            for number, batch in enumerate(self._batches):
                recorders[-1].answer = self._states[number]
                with fast_products():
                    output = self.model(**batch)
                yield output

    @contextmanager
    def _recording(self) -> Iterator[list[Recorder]]:
        recorders = [Recorder(block, self._in_tuple) for block in self._blocks]
        modules = find_blocks(self.model, self.source.family)
        for index, recorder in enumerate(recorders):
            modules[index] = recorder
        try:
            yield recorders
        finally:
            for index, block in enumerate(self._blocks):
                modules[index] = block

    @contextmanager
    def _outer_weights(self, module: nn.Module) -> Iterator[None]:
        """Weights for all of a module but its blocks (recorders have none)."""
        prefix = next(name for name, other in self.model.named_modules() if other is module)
        with self._weights(prefix, module):
            yield

    @contextmanager
    def _weights(self, prefix: str, module: nn.Module, device: torch.device = CPU) -> Iterator[None]:
        """The module's parameters, read on entry and back on `meta` on exit; its buffers on the device meanwhile."""
        blank = _parameters(module, prefix)
        for name, owner, leaf, _ in blank:
            read = self.source.read(name)
            dtype = self.dtype if read.is_floating_point() else read.dtype
            is_factor = type(owner) in FACTORS and leaf == "weight" and device == CPU
            tensor = read.to(dtype)
            # always a copy, for its alignment: kernels round differently on memory that is mapped at an odd offset
            tensor = tensor.to(factor_type(dtype) if is_factor else dtype, copy=tensor is read)
            owner._parameters[leaf] = nn.Parameter(_to_device(tensor, device), requires_grad=False)
        self.source.checkpoint.release()
        _move_buffers(module, device)
        try:
            yield
        finally:
            for _, owner, leaf, value in blank:
                owner._parameters[leaf] = value
            _move_buffers(module, CPU)
            if self._frugal:
                _return_memory()


def _begin(values: Tensor) -> Tensor:
    """A few tokens of the first sequence, or the first image."""
    return values[:1] if values.is_floating_point() else values[:1, -FEW_TOKENS:]


def _to_device(value: Any, device: torch.device) -> Any:
    """All tensors of it on the device; pinned on the way to one that the processor need not wait for."""

    def move(tensor: Tensor) -> Tensor:
        pinned = tensor.pin_memory() if device.type == "cuda" else tensor
        return pinned.to(device, non_blocking=True)

    return value if device == CPU else tree_map_only(Tensor, move, value)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.device != device:
                owner._buffers[name] = buffer.to(device)


def _return_memory() -> None:
    """Give freed memory back to the system; glibc keeps what lies between tensors that live, gigabytes in the end."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent where libc is another
        if trim is not None:
            trim(0)


def _parameters(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every parameter of a module, with its name in the whole model, and where it is."""
    return [
        (".".join(part for part in (prefix, path, leaf) if part), owner, leaf, value)
        for path, owner in module.named_modules()
        for leaf, value in owner._parameters.items()
        if value is not None
    ]
