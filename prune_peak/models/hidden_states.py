"""The hidden states of all batches between two blocks, in the memory of a device or in a temporary file."""

import tempfile
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..io.tensor_files import tensor_bytes
from .execution import CPU


class HiddenStates:
    """The hidden states of all batches, in the memory of the device or in a temporary file."""

    def __init__(self, device: torch.device, hidden_states_on_disk: bool = False) -> None:
        self._device = device
        self.shapes: list[torch.Size] = []
        self._held: list[Tensor] = []
        self._dtype = torch.float32
        self._file = tempfile.TemporaryFile() if hidden_states_on_disk else None  # noqa: SIM115 - as long as this lives
        if self._file is not None:
            weakref.finalize(self, self._file.close)

    def copy(self) -> "HiddenStates":
        """The same states, in another place on disk if they are there; in memory, a state is replaced, not changed."""
        copied = HiddenStates(self._device, self._file is not None)
        for number in range(len(self)):
            copied.append(self[number])
        return copied

    def append(self, hidden: Tensor) -> None:
        """Add the states of one batch, (batch, positions, hidden); all have one dtype."""
        self.shapes.append(hidden.shape)
        self._dtype = hidden.dtype
        if self._file is None:
            self._held.append(to_device(hidden, self._device))
        else:
            self[len(self.shapes) - 1] = hidden

    def __getitem__(self, number: int) -> Tensor:
        if self._file is None:
            return self._held[number]
        hidden = torch.empty(self.shapes[number], dtype=self._dtype)
        self._file.seek(self._offset(number))
        self._file.readinto(tensor_bytes(hidden))
        states: Tensor = to_device(hidden, self._device)
        return states

    def __setitem__(self, number: int, hidden: Tensor) -> None:
        if self._file is None:
            self._held[number] = hidden
        else:
            self._file.seek(self._offset(number))
            self._file.write(tensor_bytes(hidden.cpu()))

    def __len__(self) -> int:
        return len(self.shapes)

    def _offset(self, number: int) -> int:
        return self._dtype.itemsize * sum(shape.numel() for shape in self.shapes[:number])


def to_device(value: Any, device: torch.device) -> Any:
    """Move all tensors of a nested value to the device; pinned memory makes the copy to a GPU asynchronous."""

    def move(tensor: Tensor) -> Tensor:
        from_cpu = (tensor.device.type, device.type) == ("cpu", "cuda")
        return tensor.pin_memory().to(device, non_blocking=True) if from_cpu else tensor.to(device)

    return value if device == CPU else tree_map_only(Tensor, move, value)
