"""Windows of tokens (or images), and their batches."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import PrunePeakError
from ..models.execution import BATCH_TOKENS
from ..models.loading import DECODER_IDS, IMAGES, Model
from ..models.stream import MASKS, Batch
from ..options import SELF

IGNORED = -100  # target that cross-entropy leaves out
PADDING = IGNORED  # after the tokens of a pair of windows
BATCH_IMAGES = 16  # of about 200 patches each


@dataclass(frozen=True)
class Windows:
    """Token windows to calibrate on, and others of the same data, held out for evaluation; or images."""

    source: str  # the name of the data
    # (windows, length) int64; of an encoder-decoder (pairs, 2, length), padded with `PADDING`; or images, float32
    calibration: Tensor
    held_out: Tensor  # the same of others; no images

    @property
    def digest(self) -> str:
        """SHA-256 of the calibration windows."""
        return hashlib.sha256(self.calibration.numpy().tobytes()).hexdigest()


def held_out_count(samples: int) -> int:
    """Number of windows to hold out for the quality before and after: a twelfth, one to eight."""
    return max(1, min(8, samples // 12))


def split_samples(samples: int, count: int) -> list[int]:
    """The samples of each of `count` data sets; they differ by one at most."""
    return [samples * (number + 1) // count - samples * number // count for number in range(count)]


def own_samples(samples: int, data: Sequence[str]) -> int:
    """The samples of the model's own text among several data sets; 0 without it."""
    shares = dict(zip(data, split_samples(samples, len(data)), strict=True))
    return shares.get(SELF, 0)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Windows or images of several data sets as one tensor.

    Raises:
        PrunePeakError: images of different sizes.
    """
    shapes = {tuple(part.shape[1:]) for part in parts if len(part)}
    if len(shapes) > 1:
        raise PrunePeakError(f"the images of the data sets have the sizes {sorted(shapes)}; expected one size.")
    return torch.cat([part for part in parts if len(part)] or list(parts[:1]))


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
    parts = windows.split(max(1, tokens // windows.shape[-1]))
    return [{"input_ids": part} if part.dim() == 2 else _pair_batch(part) for part in parts]


def _pair_batch(pairs: Tensor) -> Batch:
    """Pairs, (pairs, 2, length), as inputs of an encoder and its decoder, each as long as its longest window."""
    batch: Batch = {}
    for name, mask_name, windows in zip(("input_ids", DECODER_IDS), MASKS, pairs.unbind(1), strict=True):
        windows = windows[:, : int((windows != PADDING).sum(1).max())]
        mask = windows != PADDING
        batch[name] = windows.masked_fill(~mask, 0)
        if not bool(mask.all()):
            batch[mask_name] = mask.long()
    return batch
