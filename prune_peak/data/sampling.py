"""Choose and split calibration and held-out windows."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import PrunePeakError, UsageError, spell
from ..models.execution import ExecutionConfig
from ..models.loading import Model
from ..options import FIRST_PART, SELF, DataOptions
from .images import choose_images
from .pairs import answer, read_pairs
from .self_generated import generate_windows
from .texts import read_windows
from .windows import Windows, held_out_count, join, name_data, split_samples, window_length

log = logging.getLogger(__name__)


def sample_windows(
    model: Model,
    data: Sequence[str],
    samples: int,
    sequence_length: int,
    seed: int,
    reading: DataOptions = FIRST_PART,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - frozen
) -> Windows:
    """Windows (or images) to calibrate on, as many of each data set.

    Raises:
        PrunePeakError: data that cannot be read, or that the model does not take.
    """
    shares = split_samples(samples, len(data))
    if 0 in shares:
        raise UsageError(f"{spell('samples', samples)}: expected at least one for each of the {len(data)} data sets.")
    parts: dict[int, Windows] = {}
    for number in sorted(range(len(data)), key=lambda number: data[number] == SELF):  # reading fails sooner
        windows = _sample_one(model, data[number], shares[number], sequence_length, seed, reading, execution)
        _check_enough(data[number], windows.calibration, shares[number], len(data) > 1)
        parts[number] = windows
    return Windows(
        " and ".join(parts[number].source for number in range(len(data))),
        join([parts[number].calibration for number in range(len(data))]),
        join([parts[number].held_out for number in range(len(data))]),
    )


def _sample_one(
    model: Model,
    name: str,
    samples: int,
    sequence_length: int,
    seed: int,
    reading: DataOptions,
    execution: ExecutionConfig,
) -> Windows:
    if model.sees_images:
        return choose_images(name, model, samples, seed, reading)
    return draw_windows(model, name, samples, window_length(model, sequence_length), seed, reading, execution)


def _check_enough(name: str, windows: Tensor, samples: int, strict: bool) -> None:
    what = "images" if windows.is_floating_point() else f"windows of {windows.shape[-1]} tokens"
    found = len(windows)
    if found < samples and strict:
        raise PrunePeakError(
            f"{name} has {found} {what}; expected {samples}, as of each data set. Pass a smaller {spell('samples')}."
        )
    if found < samples:
        log.warning("%s has %d %s, fewer than %s; all are used.", name, found, what, spell("samples", samples))


def draw_windows(
    model: Model,
    name: str,
    samples: int,
    length: int,
    seed: int,
    reading: DataOptions = FIRST_PART,
    execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008 - frozen
) -> Windows:
    """Windows of a text, drawn at random, some of them held out; or of text that the model generates."""
    if name == SELF:
        return generate_windows(model, samples, length, seed, execution)
    windows = (read_pairs if model.reads_pairs else read_windows)(name, model, length, reading)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    held = min(held_out_count(samples), len(windows) // 4)
    samples = min(samples, len(windows) - held)
    parts = [windows[order[:samples].sort().values], windows[order[samples : samples + held].sort().values]]
    return Windows(name_data(name), *(answer(model, *parts) if model.reads_pairs else parts))


def split_windows(
    model: Model,
    name: str,
    measured: int,
    scored: int,
    length: int,
    seed: int,
    reading: DataOptions = FIRST_PART,
) -> Windows:
    """Windows of a text to calibrate on, and others of it, held out, to evaluate on.

    A text that is split twice is split the same way, so the two parts never overlap.

    Raises:
        PrunePeakError: the text has fewer than two windows.
    """
    wanted = measured + scored
    windows = draw_windows(model, name, wanted, length, seed, reading)
    found = len(windows.calibration)
    if found < 2:
        raise PrunePeakError(
            f"{name} has {found} window of {length} tokens; expected at least 2, one to calibrate and one to evaluate. "
            f"Pass a longer text or a smaller {spell('sequence_length')}."
        )
    if found < wanted:
        scored = min(scored, found // 2)
        measured = min(measured, found - scored)
        log.warning("%s has %d windows of %d tokens; %d are used for evaluation.", name, found, length, scored)
    order = torch.randperm(found, generator=torch.Generator().manual_seed(seed))
    first, second = order[:measured].sort().values, order[measured : measured + scored].sort().values
    return Windows(windows.source, windows.calibration[first], windows.calibration[second])
