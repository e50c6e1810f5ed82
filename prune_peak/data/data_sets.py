"""What DATA names: a file, a folder, or a Hub data set; the rows of a data set."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import PrunePeakError, UsageError, brief, spell
from ..options import FIRST_PART, SELF, DataOptions
from .text_files import READERS, REFUSED, read_records

PLAIN_TEXT = (".txt", ".text", ".md", ".rst", ".log", ".tex", ".py", ".gz")
FILE_SUFFIXES = {*PLAIN_TEXT, *READERS, *REFUSED, ".parquet"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FILES_ASKED = 1000  # of a folder, for its kind
HUB_SECONDS = 10.0  # to wait for an answer


def is_data_set(name: str) -> bool:
    """Whether DATA that is read for text names a data set: a folder of data files, or an id of the Hub."""
    return Path(name).suffix.lower() not in FILE_SUFFIXES and (os.path.isdir(name) or not os.path.exists(name))


def check_data(data: Sequence[str], takes_images: bool, reading: DataOptions = FIRST_PART) -> None:
    """Refuse DATA that is not there or of another kind, before any of it is read.

    Raises:
        UsageError: options of a data set or of a table without one.
        PrunePeakError: a path that does not exist, images for a model of text, text for a model of images, or a file
            with columns that cannot be read.
    """
    names = [name for name in data if name != SELF]
    for name in names:
        _check_one(name, takes_images)
    for name in names:
        if os.path.isfile(name) and (_is_table(name) or Path(name).suffix.lower() in REFUSED):
            read_records(Path(name), reading.text_column)  # raises
    sets = [name for name in names if is_data_set(name) and not (takes_images and os.path.isdir(name))]
    if (reading.dataset_config or reading.dataset_split) and not sets:
        option = "dataset_config" if reading.dataset_config else "dataset_split"
        raise UsageError(f"{spell(option)} is for a Hub data set, and {_all(data)} is none. Remove it.")
    if reading.text_column and (takes_images or not (sets or any(map(_is_table, names)))):
        raise UsageError(f"{spell('text_column')} is for data with columns, and {_all(data)} has none. Remove it.")


def check_exists(data: Sequence[str]) -> None:
    """Refuse DATA that is neither a file or folder nor may be a data set of the Hub; takes no torch.

    Raises:
        PrunePeakError: a path that does not exist.
    """
    for name in data:
        if name != SELF and not os.path.exists(name) and not (is_data_set(name) and is_repo_id(name)):
            raise PrunePeakError(f"{name} does not exist, and is no id of a Hub data set. Check the path.")


def reading_of(name: str, reading: DataOptions) -> DataOptions:
    """The options that apply to one of several DATA."""
    if is_data_set(name):
        return reading
    return DataOptions(text_column=reading.text_column if _is_table(name) else None)


def _check_one(name: str, takes_images: bool) -> None:
    if takes_images and os.path.isfile(name):
        raise PrunePeakError(f"{name} is a file, and the model takes images. Pass a folder of images.")
    if not takes_images and is_data_set(name) and os.path.isdir(name):
        files = islice(Path(name).rglob("*"), FILES_ASKED)
        if any(path.suffix.lower() in IMAGE_SUFFIXES for path in files):
            raise PrunePeakError(f"{name} is a folder of images, and the model reads text. Pass a file of text.")
    check_exists([name])


def _is_table(name: str) -> bool:
    return not {suffix.lower() for suffix in Path(name).suffixes[-2:]}.isdisjoint({*READERS, ".parquet"})


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of an id of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _all(data: Sequence[str]) -> str:
    return " or ".join(data)


def read_rows(name: str, reading: DataOptions, extra: str, order: int | None = None, buffer: int = 0) -> Iterator[Any]:
    """The rows of a data set, one by one.

    Args:
        extra: what to install for it.
        order: the seed to shuffle by; None keeps the order.
        buffer: rows that are shuffled at a time.

    Raises:
        PrunePeakError: the data set cannot be read; the message says why.
    """
    try:
        import datasets
    except ImportError:
        raise PrunePeakError(
            f"{name} is neither a file nor, without the package datasets, a Hub data set. Check the name, or "
            f"pip install 'prune-peak[{extra}]'."
        ) from None
    if not os.path.isdir(name):
        _check_hub(name)
    try:
        split = reading.dataset_split or "train"
        rows = datasets.load_dataset(name, reading.dataset_config, split=split, streaming=True)
        yield from rows if order is None else rows.shuffle(seed=order, buffer_size=buffer)
    except Exception as error:  # datasets, pyarrow and the Hub raise their own kinds
        raise PrunePeakError(
            f"{name} is neither a file nor a data set that can be read ({brief(error)}). Check the name, "
            f"{spell('dataset_config')} and {spell('dataset_split')}."
        ) from None


def _check_hub(name: str) -> None:
    """Ask the Hub for a data set once, because datasets asks again for half a minute where no answer comes."""
    try:
        HfApi().dataset_info(name, timeout=HUB_SECONDS)
    except OfflineModeIsEnabled:
        pass  # datasets looks into its cache
    except HfHubHTTPError as error:
        raise PrunePeakError(f"{name} is neither a file nor a data set of the Hub: {brief(error)}") from None
    except Exception as error:  # every HTTP client raises its own kinds
        raise PrunePeakError(
            f"{name} is no file, and the Hub, where it may be a data set, cannot be reached ({brief(error)}). Check "
            "the connection, pass a file, or set HF_HUB_OFFLINE=1 to read what is cached."
        ) from None
