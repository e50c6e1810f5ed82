"""Images: folders and Hub data sets, through the model's own image processor.

Every file below a folder of images must be an image; hidden files are skipped.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from ..errors import PrunePeakError, brief, spell
from ..models.loading import IMAGES, Model
from ..options import FIRST_PART, SELF, DataOptions
from .data_sets import check_data, read_rows
from .windows import Windows, name_data

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # pillow decodes these without starting another program
MOST_ASPECT = 50  # longer side over the shorter one; resizing the shorter one of more would fill the memory
LONGEST_SIDE = 4096  # pixels that a processor may ask for; models use a few hundred
FEWEST = 2  # images: one part is held out to choose the ridge
MOST_EVALUATED = 1000  # images of a labelled folder that are evaluated, evenly spread over it
SHUFFLED = 1000  # rows that are shuffled at a time, because many data sets are sorted by label


def choose_images(name: str, source: Model, samples: int, seed: int, reading: DataOptions = FIRST_PART) -> Windows:
    """Images of a folder (and its subfolders) or of a Hub data set, drawn at random.

    Returns:
        Windows whose calibration is (images, channels, height, width) float32.

    Raises:
        PrunePeakError: images that do not exist, cannot be read, or do not fit the model.
    """
    if name == SELF:
        raise PrunePeakError(
            f"{source.name} takes images, which it cannot generate: pass a folder of images, or a Hub data set, with "
            f"{spell('calibration')}."
        )
    check_data([name], takes_images=True)
    folder = Path(name)
    if os.path.isdir(name):
        paths = _list_images(folder)
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))[:samples]
        pixels = _to_pixels(source, (_load(paths[number]) for number in order.sort().values.tolist()))
    else:
        pixels = _to_pixels(source, read_data_set(name, samples, seed, reading))
    if len(pixels) < FEWEST:
        raise PrunePeakError(f"{name} has {len(pixels)} image; expected at least {FEWEST} ({spell('samples')}).")
    return Windows(source=name_data(name), calibration=pixels, held_out=pixels[:0])


def read_labelled(name: str, source: Model) -> tuple[Tensor, Tensor]:
    """The images of a folder `NAME/<label>/<image>`, and their class indices by the model's config.

    Returns:
        (images, channels, height, width) float32, and (images,) int64.

    Raises:
        PrunePeakError: the folder does not exist, a label is not in the config, or an image cannot be read.
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
                f"{path}: {label!r} is not a label of {source.name} ({known}, ...); expected {name}/<label>/<image>."
            )
        if not isinstance(numbers[label], int) or not 0 <= numbers[label] < classes:
            raise PrunePeakError(
                f"the config of {source.name} maps the label {label!r} to {numbers[label]!r}; expected a class index "
                f"below {classes}."
            )
    if len(paths) > MOST_EVALUATED:
        log.warning("%s has %d images; every %.1fth is evaluated.", name, len(paths), len(paths) / MOST_EVALUATED)
        paths = [paths[number * len(paths) // MOST_EVALUATED] for number in range(MOST_EVALUATED)]
    labels = [numbers[path.relative_to(folder).parts[0]] for path in paths]
    return _to_pixels(source, map(_load, paths)), torch.tensor(labels)


def _list_images(folder: Path) -> list[Path]:
    """All files below a folder, sorted; hidden ones (.DS_Store) are skipped."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise PrunePeakError(f"{folder} has no image; expected image files in it or in its subfolders.")
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
            f"{path} is not a readable image ({brief(error)}); download it again, or remove it from the folder."
        ) from None


def _check_aspect(image: "Image", name: object) -> None:
    if max(image.size) > MOST_ASPECT * min(image.size):
        width, height = image.size
        raise PrunePeakError(f"{name} is {width} x {height}; expected a ratio of the sides of at most {MOST_ASPECT}.")


def read_data_set(name: str, samples: int, seed: int, reading: DataOptions = FIRST_PART) -> Iterator["Image"]:
    """Images of a Hub data set: the first column with images of its split."""
    from PIL.Image import Image

    rows = read_rows(name, reading, "datasets,vision", seed, SHUFFLED)
    for number, row in enumerate(islice(rows, samples)):
        image = next((value for value in row.values() if isinstance(value, Image)), None)
        if image is None:
            raise PrunePeakError(
                f"{name} has no column of images, only {', '.join(row)}. Pass a folder or a data set of images."
            )
        _check_aspect(image, f"{name}, row {number}")
        yield image


def _to_pixels(source: Model, images: Iterable["Image"]) -> Tensor:
    """The model's image processor, applied to RGB images in their EXIF orientation, one at a time."""
    processor = _load_processor(source)
    from PIL import ImageOps

    pixels: list[Tensor] = []
    for image in images:
        try:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            pixels.append(processor(images=upright, return_tensors="pt")[IMAGES])
        except Exception as error:  # pillow, numpy and every processor class raise their own kinds
            raise PrunePeakError(f"the image processor of {source.name} failed: {brief(error)}.") from None
        if pixels[-1].shape != pixels[0].shape:
            raise PrunePeakError(
                f"the image processor of {source.name} produces images of different sizes, {_size(pixels[0])} and "
                f"{_size(pixels[-1])}; expected one that crops or resizes all to one size."
            )
    if not pixels:
        return torch.empty(0)
    try:
        source.meta_model(**{IMAGES: pixels[0].to("meta")})
    except (ValueError, RuntimeError) as error:
        raise PrunePeakError(
            f"{source.name} does not accept the output of its image processor, {_size(pixels[0])} ({brief(error)}). "
            "Use the processor that belongs to the model."
        ) from None
    return torch.cat(pixels)


def _size(pixels: Tensor) -> str:
    return " x ".join(str(side) for side in pixels.shape[1:])


def _load_processor(source: Model) -> Any:
    """The image processor in the model's folder, run by pillow, so that the pixels do not depend on other packages."""
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
            f"{source.folder} has no image processor that transformers can load ({brief(error)})."
        ) from None
