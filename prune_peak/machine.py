"""What a run uses of the machine: tokens at once, where hidden states lie, where blocks run.

The plan is made before the first weight is read, from shapes alone: the most that is resident at once in each phase.
Keeping to a smaller budget first puts the hidden states on disk, which changes no number, then runs fewer tokens at
once, which changes their rounding. Where there is room for more than is planned, freed memory is kept for the next
block; the system takes a while to find new pages.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .arithmetic import factor_type
from .errors import PrunePeakError, UsageError
from .sites import Site, find_blocks
from .source import Source

log = logging.getLogger(__name__)

PROCESSOR = "cpu"
CPU = torch.device(PROCESSOR)
BATCH_TOKENS = 4096  # tokens that run through a block at once
BASE_MEMORY = 600_000_000  # bytes of a process that has imported torch and transformers, and drawn a picture
MACHINE_SHARE = 0.8  # of the machine's memory is the budget where none is given
ROOMY = 3  # times what is planned: within such a budget freed memory is kept, for new pages cost time
WHOLE_SIZE = 600_000_000  # bytes of weights up to which verification holds models whole, in float32
PROBED_TOKENS = 1400  # whose logits it holds then
STREAMED_TOKENS = 600  # whose logits it holds where models are larger
PASSAGE_TOKENS = 64 * 128  # of own text that are sampled at once


@dataclass(frozen=True)
class Machine:
    """How a run keeps to its memory, and the device that blocks run on."""

    batch_tokens: int = BATCH_TOKENS
    spills: bool = False  # hidden states lie in a file
    whole_size: int = WHOLE_SIZE
    device: torch.device = CPU
    frugal: bool = False  # freed memory is given back after every block, though the next one waits for new pages
    needed: int = 0  # bytes resident at most, as planned


@dataclass(frozen=True)
class Load:
    """What a calibration puts on the machine."""

    sites: Sequence[Site]
    tokens: int  # of the calibration
    length: int  # of a window
    refit: bool
    dtype: torch.dtype
    samples_text: bool = False  # the whole model writes it
    is_measured: bool = False  # what it gave lies in a file


def physical_memory() -> int:
    """Bytes that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _find_device(name: str) -> torch.device:
    """The device of that name; the processor, with a warning, where there is none.

    Raises:
        UsageError: no device is called that.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: expected cpu or cuda.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        log.warning("There is no %s device here; blocks run on the processor.", name)
        return CPU
    return device


def plan_machine(source: Source, load: Load, max_memory: int | None = None, device: str = PROCESSOR) -> Machine:
    """The fastest way that keeps to a budget: by default most of the machine's memory.

    Raises:
        PrunePeakError: no way does; says what it takes at least, and what would take less.
    """
    found = _find_device(device)
    budget = max_memory or int(MACHINE_SHARE * physical_memory())
    other = 0  # what is resident beside the calibration, before or after it
    if load.samples_text:
        other = _own_text_memory(source)
        if other > budget:
            raise PrunePeakError(
                f"{source.name} writes its own text from the whole model, which takes {_gigabytes(other)} of memory, "
                f"and may use {_gigabytes(budget)}. Pass a text with --calibration FILE, or a larger --max-memory."
            )
    verifying = BASE_MEMORY + 4 * source.parameters + 12 * PROBED_TOKENS * getattr(source.config, "vocab_size", 0)
    whole_size = WHOLE_SIZE if verifying <= budget else 0
    if source.size <= whole_size:
        other = max(other, verifying)
    most = max(load.length, BATCH_TOKENS)
    sizes = [most >> halvings for halvings in range(most.bit_length()) if most >> halvings > load.length]
    for batch_tokens in [*sizes, load.length]:
        for spills in (False, True):
            needed = _most_resident(source, load, batch_tokens, spills)
            if needed <= budget:
                needed = max(needed, other)
                return Machine(batch_tokens, spills, whole_size, found, budget < ROOMY * needed, needed)
    least = _most_resident(source, load, load.length, True)
    raise PrunePeakError(
        f"{source.name} needs {_gigabytes(least)} of memory with these options, and may use {_gigabytes(budget)}. "
        f"{_advice(source, load, budget)}Or pass a larger --max-memory."
    )


def _advice(source: Source, load: Load, budget: int) -> str:
    """What would take less."""
    neurons = max(site.neurons for site in load.sites)
    if load.refit and load.tokens >= neurons and not load.is_measured:
        samples = (neurons - 1) // load.length
        few = replace(load, tokens=samples * load.length)
        if samples and _most_resident(source, few, load.length, True) <= budget:
            return f"With --samples {samples} there are fewer tokens than neurons, which takes less. "
    if load.refit:
        bare = replace(load, refit=False)
        if _most_resident(source, bare, load.length, True) <= budget:
            return f"--no-refit takes {_gigabytes(_most_resident(source, bare, load.length, True))}. "
    return "A shorter --sequence-length takes less. " if load.length > 128 else ""


def _most_resident(source: Source, load: Load, batch_tokens: int, spills: bool) -> int:
    """Bytes resident at most."""
    config, width = source.config, load.dtype.itemsize
    hidden, neurons = int(config.hidden_size), max(site.neurons for site in load.sites)
    stored = source.dtype.itemsize
    block = sum(parameter.numel() for parameter in find_blocks(source.blank, source.family)[0].parameters())
    ends = sum(tensor.numel() for name, tensor in source.blank.state_dict().items() if _is_outside(source, name))
    factor = factor_type(load.dtype).itemsize
    wide = factor if factor > width else 0  # copies of factors
    weights = block * factor
    states = 0 if spills or load.is_measured else load.tokens * hidden * width
    batch = batch_tokens * ((4 * neurons + 8 * hidden) * width + (neurons + hidden) * wide)
    measured = neurons * 256 * 8
    gathered = solving = 0
    if load.refit and load.tokens < neurons:
        gathered = load.tokens * neurons * width
        solving = 2 * gathered + 20 * load.tokens**2 + 12 * neurons * hidden + 12 * load.tokens * neurons
    elif load.refit:
        gathered = 8 * neurons**2
        solving = 32 * neurons**2
    vocabulary = int(getattr(config, "vocab_size", 0))
    held = states + measured + gathered
    phases: tuple[int, ...] = (
        weights + block * stored,  # while they are read
        weights + held + batch,
        held + solving,
        held + 2 * block * stored + 8 * neurons * hidden,  # while it is written
        ends * (stored + max(width, wide)) + 12 * load.length * vocabulary,  # the head, at an exam
        ends * (stored + 4) + 12 * STREAMED_TOKENS * vocabulary,  # the same in float32, at the verification
    )
    return BASE_MEMORY + max(phases)


def _own_text_memory(source: Source) -> int:
    """Bytes of the whole model, its cache, and the logits of a step."""
    cache = 2 * len(find_blocks(source.blank, source.family)) * int(source.config.hidden_size) * PASSAGE_TOKENS
    return BASE_MEMORY + 2 * source.size + cache * source.dtype.itemsize


def _is_outside(source: Source, name: str) -> bool:
    return f"{source.family.blocks}." not in name


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
