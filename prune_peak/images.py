"""Images to calibrate and evaluate on: folders and data sets, through the model's own image processor.

Whatever lies in a folder of images is taken for one, hidden files apart; what cannot be read is refused by its name.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from .errors import PrunePeakError, brief
from .source import IMAGES, Source
from .texts import SELF, Windows, name_text

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # of those that pillow reads, none that starts a program
MOST_ASPECT = 50  # longer side over the shorter; a processor that resizes the shorter one would fill the memory
LONGEST_SIDE = 4096  # pixels that a processor may ask for; models see some hundred
FEWEST = 2  # images: some are held out to choose the ridge
MOST_EVALUATED = 1000  # images of a labelled folder, evenly spread over it
SHUFFLED = 1000  # rows of a data set that are drawn from at a time: many are sorted by label


def choose_images(name: str, source: Source, samples: int, seed: int) -> Windows:
    """Images of a folder (with all below it) or of a Hub data set, chosen at random by the seed.

    Returns:
        Windows whose calibration is (images, channels, height, width) float32, as the model takes them.

    Raises:
        PrunePeakError: no such images, one that cannot be read, or none that the model takes.
    """
    if name == SELF:
        raise PrunePeakError(
            f"{source.name} sees images, and cannot make its own: pass a folder of images, or a Hub data set, with "
            "--calibration."
        )
    folder = Path(name)
    if os.path.isdir(name):
        paths = _list_images(folder)
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))[:samples]
        pixels = _to_pixels(source, (_load(paths[number]) for number in order.sort().values.tolist()))
    else:
        pixels = _to_pixels(source, read_data_set(name, samples, seed))
    if len(pixels) < FEWEST:
        raise PrunePeakError(f"{name} gives {len(pixels)} image; expected at least {FEWEST} (--samples).")
    return Windows(source=name_text(name), calibration=pixels, held_out=pixels[:0])


def read_labelled(name: str, source: Source) -> tuple[Tensor, Tensor]:
    """The images of a folder `NAME/<label>/<image>`, and the labels as the model's config numbers them.

    Returns:
        (images, channels, height, width) float32, and (images,) int64.

    Raises:
        PrunePeakError: no such folder, a label that the model does not know, or an image that cannot be read.
    """
    folder, numbers, classes = Path(name), source.config.label2id, source.config.num_labels
    if not os.path.isdir(name):
        raise PrunePeakError(f"{name} is not a folder; expected images as {name}/<label>/<image>.")
    paths = _list_images(folder)
    for path in paths:
        label = path.relative_to(folder).parts[0]
        if label not in numbers:
            known = ", ".join(list(numbers)[:3])
            raise PrunePeakError(
                f"{path}: {label!r} is no label of {source.name} ({known}, ...); expected {name}/<label>/<image>."
            )
        if not isinstance(numbers[label], int) or not 0 <= numbers[label] < classes:
            raise PrunePeakError(
                f"the config of {source.name} gives the label {label!r} the number {numbers[label]!r}, but there are "
                f"{classes} of them."
            )
    if len(paths) > MOST_EVALUATED:
        log.warning("%s holds %d images; every %.1fth is evaluated.", name, len(paths), len(paths) / MOST_EVALUATED)
        paths = [paths[number * len(paths) // MOST_EVALUATED] for number in range(MOST_EVALUATED)]
    labels = [numbers[path.relative_to(folder).parts[0]] for path in paths]
    return _to_pixels(source, map(_load, paths)), torch.tensor(labels)


def _list_images(folder: Path) -> list[Path]:
    """All files below a folder, in a fixed order; hidden ones (.DS_Store) are left out."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise PrunePeakError(f"{folder} holds no image.")
    return paths


def _load(path: Path) -> "Image":
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
        with image:
            _check_aspect(image, path)
            return image.copy()
    except PrunePeakError:
        raise
    except Exception as error:  # pillow's decoders raise their own kinds
        raise PrunePeakError(
            f"{path} is not an image that can be read ({brief(error)}); fetch it again, or take it out of the folder."
        ) from None


def _check_aspect(image: "Image", name: object) -> None:
    if max(image.size) > MOST_ASPECT * min(image.size):
        width, height = image.size
        raise PrunePeakError(f"{name} is {width} x {height}; expected sides that differ at most {MOST_ASPECT} times.")


def read_data_set(name: str, samples: int, seed: int) -> Iterator["Image"]:
    """Images from the first column that holds any, of a Hub data set's split `train`."""
    try:
        import datasets
    except ImportError:
        raise PrunePeakError(
            f"{name} is not a folder; to read it as a Hub data set: pip install 'prune-peak[datasets,vision]'."
        ) from None
    from PIL.Image import Image

    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        for number, row in enumerate(rows.shuffle(seed=seed, buffer_size=SHUFFLED).take(samples)):
            image = next(value for value in row.values() if isinstance(value, Image))
            _check_aspect(image, f"{name}, row {number}")
            yield image
    except PrunePeakError:
        raise
    except Exception as error:  # datasets, pyarrow and the Hub raise their own kinds
        reason = "no column of images" if isinstance(error, StopIteration) else brief(error)
        raise PrunePeakError(
            f"{name} is neither a folder nor a data set with a split `train` and a column of images ({reason})."
        ) from None


def _to_pixels(source: Source, images: Iterable["Image"]) -> Tensor:
    """What the model's image processor makes of images in RGB, turned as their cameras say; one at a time."""
    processor = _load_processor(source)
    from PIL import ImageOps

    pixels: list[Tensor] = []
    for image in images:
        try:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            pixels.append(processor(images=upright, return_tensors="pt")[IMAGES])
        except Exception as error:  # of pillow, numpy, and every processor class
            raise PrunePeakError(f"the image processor of {source.name} fails: {brief(error)}.") from None
        if pixels[-1].shape != pixels[0].shape:
            raise PrunePeakError(
                f"the image processor of {source.name} gives images of different sizes, {_size(pixels[0])} and "
                f"{_size(pixels[-1])}; expected one that crops or resizes them to one size."
            )
    if not pixels:
        return torch.empty(0)
    try:
        source.blank(**{IMAGES: pixels[0].to("meta")})
    except (ValueError, RuntimeError) as error:
        raise PrunePeakError(
            f"{source.name} does not take what its image processor makes, {_size(pixels[0])} ({brief(error)}). The "
            "two do not belong together."
        ) from None
    return torch.cat(pixels)


def _size(pixels: Tensor) -> str:
    return " x ".join(str(side) for side in pixels.shape[1:])


def _load_processor(source: Source) -> Any:
    """The image processor that lies beside the weights, run by pillow: the same pixels whatever else is installed."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise PrunePeakError("images are read with pillow: pip install 'prune-peak[vision]'.") from None
    try:
        processor = AutoImageProcessor.from_pretrained(source.folder, backend="pil", trust_remote_code=False)
        asked = {name: getattr(processor, name, None) or {} for name in ("size", "crop_size", "pad_size")}
        sides = [side for size in asked.values() for side in dict(size).values() if side is not None]
        if not all(0 < side <= LONGEST_SIDE for side in sides):
            raise ValueError(f"sides of {sides} pixels; expected 1 to {LONGEST_SIDE}")
        return processor
    except Exception as error:  # every processor class raises its own kinds
        raise PrunePeakError(
            f"{source.folder} holds no image processor that transformers can load ({brief(error)})."
        ) from None
