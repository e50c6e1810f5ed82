"""Calibration and evaluation data of a study; the two never overlap."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data.data_sets import check_data
from ..data.images import choose_images
from ..data.sampling import split_windows
from ..data.windows import window_length
from ..errors import PrunePeakError, spell
from ..evaluation.quality import EvalSet, build_eval_set, build_given_eval_set, is_evaluable
from ..models.loading import IMAGES, Model
from ..options import SELF
from .options import AblateOptions


@dataclass(frozen=True)
class StudyData:
    """Windows (or images) to calibrate on, and an evaluation set of others."""

    source: str  # the name of the calibration data
    calibration: Tensor  # (windows, length) int64; or (images, channels, height, width) float32
    eval_set: EvalSet

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of both parts."""
        inputs = [part for batch in self.eval_set.batches for part in batch.values()]
        return {
            "calibration_digest": _digest([self.calibration]),
            "evaluation_digest": _digest([*inputs, *self.eval_set.targets]),
        }


def load_study_data(model: Model, options: AblateOptions) -> StudyData:
    """The data of a study.

    Raises:
        PrunePeakError: too little data, or a model that cannot be evaluated on it.
    """
    windows = options.windows or options.samples
    check_data([*options.calibration, *(options.data or ())], model.sees_images, options.reading)
    if model.sees_images:
        if options.data is None:
            raise PrunePeakError(f"{model.name} takes images: pass a folder of labelled images with {spell('data')}.")
        return _load_images(model, options, options.data, windows)
    if not is_evaluable(model):
        raise PrunePeakError(
            f"{model.name} is a {model.model_class.__name__}, which predicts nothing that can be scored."
        )
    length = window_length(model, options.sequence_length)

    most = max(len(options.calibration), len(options.data or ()))
    share = (-(-options.samples // most), -(-windows // most))  # the same for both, so that a text is split once

    def split(names: Sequence[str]) -> tuple[str, Tensor, Tensor]:
        parts = [split_windows(model, name, *share, length, options.seed, options.reading) for name in names]
        measured, scored = (torch.cat([getattr(part, kind) for part in parts]) for kind in ("calibration", "held_out"))
        return " and ".join(part.source for part in parts), measured[: options.samples], scored[:windows]

    given = None if options.data is None else split(options.data)
    name, calibration, held_out = split(options.calibration)
    evaluated, _, held_out = given or (name, calibration, held_out)
    return StudyData(name, calibration, build_eval_set(model, held_out, evaluated))


def _load_images(model: Model, options: AblateOptions, folders: Sequence[str], windows: int) -> StudyData:
    """Without calibration data, images of the labelled folders that are not evaluated calibrate."""
    samples, seed = options.samples, options.seed
    eval_set = build_given_eval_set(model, folders, 0)
    pixels, targets = torch.cat([batch[IMAGES] for batch in eval_set.batches]), torch.cat(list(eval_set.targets))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    if options.calibration == (SELF,):
        samples = min(samples, len(pixels) // 2)
        name, measured, order = eval_set.text, pixels[order[:samples].sort().values], order[samples:]
    else:
        chosen = [choose_images(data, model, samples, seed, options.reading) for data in options.calibration]
        name = " and ".join(part.source for part in chosen)
        measured = torch.cat([part.calibration for part in chosen])[:samples]
        known = {_digest([image]) for image in measured}
        order = torch.tensor([number for number in order.tolist() if _digest([pixels[number]]) not in known])
    if not len(order) or not len(measured):
        raise PrunePeakError(
            f"{' and '.join(folders)} has no image left for evaluation besides the calibration; add some."
        )
    rest = order[:windows].sort().values
    return StudyData(name, measured, replace(eval_set, batches=[{IMAGES: pixels[rest]}], targets=[targets[rest]]))


def _digest(tensors: Sequence[Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()
