"""What a study calibrates on and examines by: windows of texts, or images, and never the same ones for both."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .errors import PrunePeakError
from .evaluation import Exam, has_exam, set_exam, set_image_exam
from .images import choose_images
from .source import IMAGES, Source
from .texts import SELF, Windows, choose_windows, own_windows, window_length

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Material:
    """Windows (or images) to calibrate on, and an exam on others."""

    source: str  # the name of what it is calibrated on
    calibration: Tensor  # (windows, length) int64; or (images, channels, height, width) float32
    exam: Exam

    @property
    def digests(self) -> dict[str, str]:
        """What identifies both parts."""
        asked = [part for batch in self.exam.batches for part in batch.values()]
        return {
            "calibration_digest": _digest([self.calibration]),
            "exam_digest": _digest([*asked, *self.exam.targets]),
        }


def find_material(
    source: Source, calibration: str, examined: str | None, samples: int, windows: int, length: int, seed: int
) -> Material:
    """The material of a study.

    Args:
        calibration: a text, a folder of images, a data set, or "self".
        examined: another text; or, for a model that sees images, the folder of labelled ones, `FOLDER/<label>/<image>`.
        samples, windows: how many to calibrate on, and how many to be examined by.
        length: tokens of a window.

    Raises:
        PrunePeakError: too little of either, or a model that predicts nothing.
    """
    if source.sees_images:
        if examined is None:
            raise PrunePeakError(f"{source.name} sees images: pass a folder of labelled ones with --images.")
        return _find_images(source, calibration, examined, samples, windows, seed)
    if not has_exam(source):
        raise PrunePeakError(
            f"{source.name} is a {source.model_class.__name__}: it predicts nothing that can be scored."
        )
    length = window_length(source, length)
    split = split_windows(source, calibration, samples, windows, length, seed)
    other = split if examined is None else split_windows(source, examined, samples, windows, length, seed)
    return Material(split.source, split.calibration, set_exam(source, other.held_out, other.source))


def split_windows(source: Source, name: str, measured: int, scored: int, length: int, seed: int) -> Windows:
    """Windows of a text to calibrate on, and others of it, held out, to evaluate on.

    One text, asked twice, is split the same way, so the two parts never meet.

    Raises:
        PrunePeakError: the text has no two windows.
    """
    wanted = measured + scored
    draw = own_windows if name == SELF else partial(choose_windows, name)
    windows = draw(source, wanted, length, seed)
    found = len(windows.calibration)
    if found < 2:
        raise PrunePeakError(
            f"{name} gives {found} window of {length} tokens; expected 2 at least, to calibrate on one and evaluate on "
            "another. Pass a longer text or a smaller --sequence-length."
        )
    if found < wanted:
        scored = min(scored, found // 2)
        measured = min(measured, found - scored)
        log.warning("%s gives %d windows of %d tokens; %d are for evaluation.", name, found, length, scored)
    order = torch.randperm(found, generator=torch.Generator().manual_seed(seed))
    first, second = order[:measured].sort().values, order[measured : measured + scored].sort().values
    return Windows(windows.source, windows.calibration[first], windows.calibration[second])


def _find_images(source: Source, calibration: str, folder: str, samples: int, windows: int, seed: int) -> Material:
    """Without a calibration of its own, images of the labelled folder that the exam leaves out."""
    exam = set_image_exam(source, folder)
    pixels = torch.cat([batch[IMAGES] for batch in exam.batches])
    targets = torch.cat(list(exam.targets))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    if calibration == SELF:
        samples = min(samples, len(pixels) // 2)
        name, measured, order = exam.text, pixels[order[:samples].sort().values], order[samples:]
    else:
        chosen = choose_images(calibration, source, samples, seed)
        name, measured = chosen.source, chosen.calibration
        known = {_digest([image]) for image in measured}
        order = torch.tensor([number for number in order.tolist() if _digest([pixels[number]]) not in known])
    if not len(order) or not len(measured):
        raise PrunePeakError(f"{folder} holds no image to be examined by that is not calibrated on; add some.")
    rest = order[:windows].sort().values
    return Material(name, measured, replace(exam, batches=[{IMAGES: pixels[rest]}], targets=[targets[rest]]))


def _digest(tensors: Sequence[Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()
