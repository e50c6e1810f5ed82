"""Read the tensors of a checkpoint (one or more shards, safetensors or `pytorch_model.bin`) lazily."""

import json
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from ..errors import PrunePeakError, VerificationError, brief
from .tensor_files import DTYPE_NAMES, STORED_DTYPES, open_safetensors
from .untrusted import read_json
from .writer import INDEX_FILE, SINGLE_FILE

READ_AHEAD = 2**20  # bytes at a time


@dataclass(frozen=True)
class Format:
    """File names and reader of a checkpoint format."""

    single: str
    index: str
    open: Callable[[Path], Any]  # returns an object with keys(), get_slice(name) and get_tensor(name)


class LegacyShard:
    """A `pytorch_model.bin` with the interface of a safetensors file; never executes code of the file."""

    def __init__(self, path: Path) -> None:
        self.is_mapped, loaded = _load_legacy(path)
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
        ):
            raise PrunePeakError(
                f"{path} contains more than named tensors; expected the state dict of a model. Save only that."
            )
        for name, value in loaded.items():
            if value.layout is not torch.strided or value.nbytes > value.untyped_storage().nbytes():
                raise PrunePeakError(
                    f"{path}: tensor {name!r} is larger than its stored data; expected dense, complete tensors. Save "
                    "the model again with `save_pretrained`."
                )
        self._tensors: dict[str, Tensor] = loaded

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def get_slice(self, name: str) -> "LegacySlice":
        return LegacySlice(self._tensors[name])


@dataclass(frozen=True)
class LegacySlice:
    """Shape and dtype of a tensor in the format of safetensors."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return DTYPE_NAMES.get(self.tensor.dtype, str(self.tensor.dtype))


def _load_legacy(path: Path) -> tuple[bool, Any]:
    """Load a `.bin` file: (whether it is memory-mapped, content)."""
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_zip_size(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch raises an error after each of them
            # files of torch before 1.6 are not zips and cannot be mapped
            return is_zip, torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except PrunePeakError:
        raise
    except Exception as error:  # pickle, zip and torch raise many types
        raise PrunePeakError(
            f"{path} is not a plain file of tensors and was not opened: a pickle can run code ({brief(error)}). "
            "Download it again, or convert it to safetensors with a program that you trust."
        ) from None


def _check_zip_size(path: Path) -> None:
    """Refuse zip bombs: torch never compresses, so entries cannot be larger than the file."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if is_packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise PrunePeakError(
            f"{path} is a zip that unpacks to more than its size, which torch never writes. Expected an "
            "uncompressed archive; download it again."
        )


# In order of preference
FORMATS = (
    Format(SINGLE_FILE, INDEX_FILE, open_safetensors),
    Format("pytorch_model.bin", "pytorch_model.bin.index.json", LegacyShard),
)


def has_weights(folder: Path) -> bool:
    """Whether a folder has weight files of any format."""
    return any((folder / name).is_file() for format_ in FORMATS for name in (format_.single, format_.index))


class Checkpoint:
    """The tensors of a folder, by their names on disk.

    Tensors are views of memory-mapped files: copy a tensor before changing it. Mapped pages count as resident memory
    until `release` is called. Raises VerificationError when a changed file is opened again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._format, self._shards = _find_shards(folder)
        self._stamps = {shard: _stamp(folder / shard) for shard in self._shards.values()}
        self._open: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for name in self._shards:
            slice_ = self._handle(name).get_slice(name)
            dtype = slice_.get_dtype()
            if dtype not in STORED_DTYPES:
                raise PrunePeakError(
                    f"{folder}: tensor {name!r} is stored as {dtype}; expected a plain number type. "
                    "Quantized checkpoints cannot be pruned; start from the unquantized model."
                )
            self._shapes[name] = tuple(slice_.get_shape())
            self._dtypes[name] = STORED_DTYPES[dtype]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._handle(name).get_tensor(name)
        return tensor

    def read_ahead(self, names: Collection[str]) -> None:
        """Read tensors into the system's cache in a background thread; `read` reports errors."""
        if self._format.open is open_safetensors:
            shards = {name: self._shards[name] for name in names}
            Thread(target=_read_through, args=(self.folder, shards), daemon=True).start()

    def release(self) -> None:
        """Close all mapped files (reading opens them again); files that cannot be mapped stay in memory."""
        self._open = {
            shard: file for shard, file in self._open.items() if isinstance(file, LegacyShard) and not file.is_mapped
        }

    def check_unchanged(self) -> None:
        """Check that no file was changed since this checkpoint was opened.

        Raises:
            VerificationError: a file was changed or deleted.
        """
        for shard, stamp in self._stamps.items():
            if _stamp(self.folder / shard) != stamp:
                raise VerificationError(
                    f"{self.folder / shard} was changed while it was read; expected the same file throughout. "
                    "Run the command again when the file is complete."
                )

    def _handle(self, name: str) -> Any:
        shard = self._shards[name]
        if shard not in self._open:
            self.check_unchanged()
            self._open[shard] = self._format.open(self.folder / shard)
        return self._open[shard]


def _read_through(folder: Path, shards: Mapping[str, str]) -> None:
    """Read the bytes of tensors (name -> shard) and discard them; ignores all errors."""
    scratch = memoryview(bytearray(READ_AHEAD))
    with suppress(Exception):  # `Checkpoint.read` reports the error
        for shard in sorted(set(shards.values())):
            places = _places(folder / shard)
            with (folder / shard).open("rb", buffering=0) as file:
                for begin, end in (places[name] for name, other in shards.items() if other == shard):
                    file.seek(begin)
                    while begin < end and (count := file.readinto(scratch[: end - begin])):
                        begin += count


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """The first and last byte offset of every tensor in a safetensors file."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    offsets = {name: tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"}
    return {name: (start + begin, start + end) for name, (begin, end) in offsets.items()}


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Size, time and inode of a file, to detect changes; None if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _find_shards(folder: Path) -> tuple[Format, dict[str, str]]:
    """The first format found in the folder, and the file of every tensor; like transformers, the single file first."""
    for format_ in FORMATS:
        if (folder / format_.single).is_file():
            return format_, dict.fromkeys(format_.open(folder / format_.single).keys(), format_.single)
        if (folder / format_.index).is_file():
            return format_, _read_index(folder / format_.index, format_)
    expected = " or ".join(format_.single for format_ in FORMATS)
    raise PrunePeakError(
        f"{folder} contains no weights; expected {expected}, or a shard index. Save the model with `save_pretrained`."
    )


def _read_index(index: Path, format_: Format) -> dict[str, str]:
    try:
        weight_map = read_json(index)["weight_map"]
        if not all(isinstance(text, str) for pair in weight_map.items() for text in pair):
            raise TypeError("weight_map must map names to file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrunePeakError(f"{index} is not a checkpoint index ({error!r}). Download it again.") from None
    files = {path.name for path in index.parent.iterdir() if path.is_file()}
    contents: dict[str, set[str]] = {}
    for shard in set(weight_map.values()):
        if shard != Path(shard).name or shard.startswith("."):
            raise PrunePeakError(
                f"{index} names the shard {shard!r}, which is outside its folder. Expected a plain file name."
            )
        if shard not in files:
            raise PrunePeakError(f"{index} names the shard {shard!r}, which does not exist. Download it again.")
        contents[shard] = set(format_.open(index.parent / shard).keys())
    for name, shard in weight_map.items():
        if name not in contents[shard]:
            raise PrunePeakError(
                f"{index} places tensor {name!r} in {shard!r}, which does not contain it. Download both again."
            )
    return dict(weight_map)
