"""Windows of tokens (or images), and their batches."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..models.execution import BATCH_TOKENS
from ..models.loading import IMAGES, Model
from ..models.streaming import Batch

BATCH_IMAGES = 16  # of about 200 patches each


@dataclass(frozen=True)
class Windows:
    """Token windows to calibrate on, and others of the same data, held out for evaluation; or images."""

    source: str  # the name of the data
    calibration: Tensor  # (windows, length) int64; or (images, channels, height, width) float32
    held_out: Tensor  # (windows, length); no images

    @property
    def digest(self) -> str:
        """SHA-256 of the calibration windows."""
        return hashlib.sha256(self.calibration.numpy().tobytes()).hexdigest()


def held_out_count(samples: int) -> int:
    """Number of windows to hold out for the quality before and after: a twelfth, one to eight."""
    return max(1, min(8, samples // 12))


def window_length(model: Model, sequence_length: int) -> int:
    """The sequence length, capped at the learned positions of the model."""
    return min(sequence_length, model.positions or sequence_length)


def name_data(data: str | Path) -> str:
    """The public name of data: the last part of a path, not the folder it is in; the id of a Hub data set."""
    return Path(data).name if os.path.exists(data) else str(data)


def into_batches(windows: Tensor, tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Windows of equal length as inputs of a forward pass, about `tokens` at a time; or images, 16 at a time."""
    if windows.is_floating_point():
        return [{IMAGES: part} for part in windows.split(BATCH_IMAGES)]
    return [{"input_ids": part} for part in windows.split(max(1, tokens // windows.shape[1]))]
