"""Device, dtypes and batch size of a run."""

from dataclasses import dataclass

import torch

from ..errors import UsageError, spell
from ..options import AUTO, DEVICES, PROCESSOR
from .loading import Model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_dtype(source: Model) -> str:
    """The dtype to compute in: that of the weights, but float32 for float16, which activations overflow."""
    return "bfloat16" if source.dtype is torch.bfloat16 else "float32"


CPU = torch.device(PROCESSOR)
BATCH_TOKENS = 4096  # tokens per forward pass of a block
PASSAGE = 128  # tokens of self-generated text in one sequence; short ones are more diverse, and faster
PASSAGES = 64  # generated at once, where memory for more is not known of
WHOLE_SIZE = 600_000_000  # bytes; verification loads smaller models whole, in float32


@dataclass(frozen=True)
class ExecutionConfig:
    """How a run stays within its memory budget, and the device to compute on."""

    batch_tokens: int = BATCH_TOKENS
    hidden_states_on_disk: bool = False
    whole_size: int = WHOLE_SIZE
    passages: int = PASSAGES  # of self-generated text at once
    talks: bool = False  # whether the answers of original and result are compared, both loaded whole
    device: torch.device = CPU
    release_memory: bool = False  # return freed memory to the system after every block; slower
    needed: int = 0  # estimated peak of resident bytes


def find_device(name: str) -> torch.device:
    """The named device; for `auto` the accelerator of this machine, or the processor.

    Raises:
        UsageError: the name is not a device, or this machine has none of it.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == AUTO:
        return accelerator or CPU
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{spell('device', name)}: expected {', '.join(DEVICES)}. Choose one of them.") from None
    if device.type in DEVICES and device.type not in (PROCESSOR, accelerator and accelerator.type):
        raise UsageError(
            f"{spell('device', name)}: torch {torch.__version__} finds no such device here. Use "
            f"{spell('device', PROCESSOR)}."
        )
    return device
