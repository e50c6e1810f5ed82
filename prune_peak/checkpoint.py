"""Named tensors on disk, read lazily and written one at a time. Nothing but this file opens weight files.

A `Checkpoint` reads a folder of one or more shards; a `Writer` lays every shard out first (all shapes are known before
the first tensor is), so tensors can be written in any order and memory holds one of them.
"""

import hashlib
import json
import math
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import PrunePeakError, VerificationError, brief
from .strangers import check_file, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_SIZE = 5_000_000_000  # bytes; what the Hub and its users are used to
READ_AHEAD = 2**20  # bytes at a time

# safetensors' names of the types a checkpoint may hold
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Format:
    """How a checkpoint may lie in a folder."""

    single: str
    index: str
    open: Callable[[Path], Any]  # gives an object with keys(), get_slice(name) and get_tensor(name)


class LegacyShard:
    """A `pytorch_model.bin` behind the same three methods as a safetensors file; nothing in it is executed."""

    def __init__(self, path: Path) -> None:
        self.is_mapped, loaded = _load_legacy(path)
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
        ):
            raise PrunePeakError(f"{path} holds more than named tensors; expected a model's state dict.")
        for name, value in loaded.items():
            if value.layout is not torch.strided or value.nbytes > value.untyped_storage().nbytes():
                raise PrunePeakError(f"{path}: tensor {name!r} is larger than what is stored of it. Not read.")
        self._tensors: dict[str, Tensor] = loaded

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def get_slice(self, name: str) -> "LegacySlice":
        return LegacySlice(self._tensors[name])


@dataclass(frozen=True)
class LegacySlice:
    """The shape and type of a tensor, as safetensors tells them."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return DTYPE_NAMES.get(self.tensor.dtype, str(self.tensor.dtype))


def _load_legacy(path: Path) -> tuple[bool, Any]:
    """Whether the file is mapped, and what it holds."""
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _refuse_bomb(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch is about to refuse
            # files from before torch 1.6 are no zips, and cannot be mapped
            return is_zip, torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except PrunePeakError:
        raise
    except Exception as error:  # pickle, zip and torch raise their own kinds
        raise PrunePeakError(
            f"{path} is not a plain file of tensors, so it is not opened: a pickle can run code ({brief(error)}). "
            "Fetch it again, or convert it to safetensors with a program that you trust."
        ) from None


def _refuse_bomb(path: Path) -> None:
    """torch stores what it saves; what is packed, or claims more bytes than the file has, is there to fill memory."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if is_packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise PrunePeakError(f"{path} is a zip that unpacks to more than it holds, as torch writes none. Not opened.")


def _open_safetensors(path: Path) -> Any:
    try:
        check_file(path)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise PrunePeakError(
            f"{path} is not a readable safetensors file ({brief(error)}). Fetch it again; it may be truncated."
        ) from None


# In the order of preference
FORMATS = (
    Format(SINGLE_FILE, INDEX_FILE, _open_safetensors),
    Format("pytorch_model.bin", "pytorch_model.bin.index.json", LegacyShard),
)


class Checkpoint:
    """The tensors of a folder, by the names they have on disk.

    Tensors are views of memory-mapped files, so whoever changes one copies it first. Mapped pages count as resident
    memory until `release` is called. A file that was changed meanwhile is refused when it is opened again.
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
            if dtype not in DTYPES:
                raise PrunePeakError(
                    f"{folder}: tensor {name!r} is stored as {dtype}, which is not a plain number type. "
                    "Quantized checkpoints cannot be cut; start from the unquantized model."
                )
            self._shapes[name] = tuple(slice_.get_shape())
            self._dtypes[name] = DTYPES[dtype]

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
        """Have tensors read into the system's cache while other work goes on; returns at once.

        It takes no memory of this process. What cannot be read is left to `read`, which says so.
        """
        if self._format.open is _open_safetensors:
            shards = {name: self._shards[name] for name in names}
            Thread(target=_read_through, args=(self.folder, shards), daemon=True).start()

    def release(self) -> None:
        """Let go of every mapped file; reading opens them again. What cannot be mapped is read once, and kept."""
        self._open = {
            shard: file for shard, file in self._open.items() if isinstance(file, LegacyShard) and not file.is_mapped
        }

    def check_unchanged(self) -> None:
        """Make sure that all that was read came from the same files.

        Raises:
            VerificationError: it did not.
        """
        for shard, stamp in self._stamps.items():
            if _stamp(self.folder / shard) != stamp:
                raise VerificationError(
                    f"{self.folder / shard} was changed while it was read, so what was made of it is not kept. "
                    "Give the command again when the file is whole."
                )

    def _handle(self, name: str) -> Any:
        shard = self._shards[name]
        if shard not in self._open:
            self.check_unchanged()
            self._open[shard] = self._format.open(self.folder / shard)
        return self._open[shard]


def _read_through(folder: Path, shards: Mapping[str, str]) -> None:
    """Read the bytes of tensors, each from its file, for the system to keep; a file that has changed is left alone."""
    scratch = memoryview(bytearray(READ_AHEAD))
    with suppress(Exception):  # whoever reads it in earnest says what is wrong
        for shard in sorted(set(shards.values())):
            places = _places(folder / shard)
            with (folder / shard).open("rb", buffering=0) as file:
                for begin, end in (places[name] for name, other in shards.items() if other == shard):
                    file.seek(begin)
                    while begin < end and (count := file.readinto(scratch[: end - begin])):
                        begin += count


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Where the bytes of every tensor of a safetensors file begin and end."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    offsets = {name: tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"}
    return {name: (start + begin, start + end) for name, (begin, end) in offsets.items()}


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What tells a file from what it was, without reading it; None where it is gone."""
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_size, seen.st_mtime_ns, seen.st_ino


def _find_shards(folder: Path) -> tuple[Format, dict[str, str]]:
    """The first format that the folder holds, and the file of every tensor."""
    for format_ in FORMATS:
        if (folder / format_.index).is_file():
            return format_, _read_index(folder / format_.index, format_)
        if (folder / format_.single).is_file():
            return format_, dict.fromkeys(format_.open(folder / format_.single).keys(), format_.single)
    expected = " or ".join(format_.single for format_ in FORMATS)
    raise PrunePeakError(
        f"{folder} holds no weights: expected {expected}, or an index of shards. Save the model with `save_pretrained`."
    )


def _read_index(index: Path, format_: Format) -> dict[str, str]:
    try:
        weight_map = read_json(index)["weight_map"]
        if not all(isinstance(text, str) for pair in weight_map.items() for text in pair):
            raise TypeError("weight_map must map names to file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrunePeakError(f"{index} is not a checkpoint index ({error!r}). Fetch it again.") from None
    there = {path.name for path in index.parent.iterdir() if path.is_file()}
    held: dict[str, set[str]] = {}
    for shard in set(weight_map.values()):
        if shard != Path(shard).name or shard.startswith("."):
            raise PrunePeakError(f"{index} names the shard {shard!r}, which lies outside its folder. Not opened.")
        if shard not in there:
            raise PrunePeakError(f"{index} names the shard {shard!r}, which is not there. Fetch it again.")
        held[shard] = set(format_.open(index.parent / shard).keys())
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise PrunePeakError(f"{index} places tensor {name!r} in {shard!r}, which does not hold it.")
    return dict(weight_map)


class Writer:
    """Writes a checkpoint tensor by tensor into a folder; `finish` refuses if one of the layout is missing.

    Files of the same layout that are there already are gone on with.

    Example:
        >>> import torch, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with Writer(folder, {"weight": ((2, 3), torch.float32)}) as writer:
        ...     writer.write("weight", torch.ones(2, 3))
        ...     digests = writer.finish()
        >>> Checkpoint(folder).read("weight").sum().item()
        6.0
    """

    def __init__(
        self, folder: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], shard_size: int = SHARD_SIZE
    ) -> None:
        self._folder = folder
        self._layout = dict(layout)
        self.digests: dict[str, str] = {}
        empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in layout.items()}
        self._split = split_torch_state_dict_into_shards(empty, max_shard_size=shard_size)
        self._pool = ThreadPoolExecutor(1)  # digests while it writes
        self._files: dict[str, IO[bytes]] = {}
        self._offsets: dict[str, int] = {}
        for file_name, names in self._split.filename_to_tensors.items():
            self._files[file_name] = self._lay_out(file_name, names)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        for file in self._files.values():
            file.close()

    def _lay_out(self, file_name: str, names: list[str]) -> IO[bytes]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            shape, dtype = self._layout[name]
            size = dtype.itemsize * torch.Size(shape).numel()
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            self._offsets[name] = offset
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
        for name in names:
            self._offsets[name] += 8 + len(text)
        text = len(text).to_bytes(8, "little") + text
        path = self._folder / file_name
        if path.is_file():
            file = path.open("r+b")
            if file.read(len(text)) == text:
                file.truncate(len(text) + offset)
                return file
            file.close()
        file = path.open("w+b")
        file.write(text)
        file.truncate(len(text) + offset)
        return file

    def holds(self, digests: Mapping[str, str]) -> bool:
        """Whether an earlier writer has written tensors of these SHA-256; then they count as ours."""
        for name, digest in digests.items():
            shape, dtype = self._layout[name]
            file = self._files[self._split.tensor_to_filename[name]]
            file.seek(self._offsets[name])
            if hashlib.sha256(file.read(dtype.itemsize * torch.Size(shape).numel())).hexdigest() != digest:
                return False
        self.digests |= digests
        return True

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor of the layout; a value that is not finite is refused."""
        shape, dtype = self._layout[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}, laid out as {shape} {dtype}")
        if dtype.is_floating_point and not _is_finite(tensor):
            raise PrunePeakError(
                f"tensor {name!r} holds values that are not finite (NaN or infinity). "
                "Nothing was written; check the source checkpoint."
            )
        digest = self._pool.submit(digest_tensor, tensor)
        file = self._files[self._split.tensor_to_filename[name]]
        file.seek(self._offsets[name])
        file.write(tensor_bytes(tensor))
        self.digests[name] = digest.result()

    def finish(self) -> dict[str, str]:
        """Close the shards, write their index, and return the SHA-256 of every tensor's bytes."""
        missing = self._layout.keys() - self.digests.keys()
        if missing:
            raise ValueError(f"never written: {sorted(missing)}")
        for file in self._files.values():
            file.close()
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        return self.digests


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; a NaN is the least and the largest of any (and `isfinite` takes forty times as long)."""
    return not tensor.numel() or all(math.isfinite(bound) for bound in tensor.aminmax())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, in C order (no copy where it is contiguous)."""
    array = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type]


def digest_tensor(tensor: Tensor) -> str:
    """The SHA-256 of its bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of one safetensors file of our own (a plan, sampled text), and its metadata."""
    file = _open_safetensors(path)
    return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping


class TensorFile:
    """One large safetensors file of our own, read in parts; no page of it stays mapped."""

    def __init__(self, path: Path) -> None:
        file = _open_safetensors(path)
        self.path = path
        self.metadata: dict[str, str] = file.metadata() or {}
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def read(self, prefix: str) -> dict[str, Tensor]:
        """Copies of the tensors whose names begin with this; without it in their names."""
        file = _open_safetensors(self.path)
        names = [name for name in self.shapes if name.startswith(prefix)]
        return {name.removeprefix(prefix): file.get_tensor(name).clone() for name in names}


def stream_tensors(
    tensors: Iterable[tuple[str, Tensor]], path: Path, metadata: Mapping[str, str], header_size: int
) -> None:
    """Write one safetensors file of our own from tensors as they come, whole or not at all.

    Args:
        header_size: bytes that names, types and shapes take at most; what they leave is filled with spaces.

    Raises:
        OSError: the disk does not take it; nothing is left under the name.
    """
    partial = path.with_name(path.name + ".partial")
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    try:
        with partial.open("wb") as file:
            file.seek(8 + header_size)
            for name, tensor in tensors:
                start, end = end, end + file.write(tensor_bytes(tensor))
                shape = list(tensor.shape)
                header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
            text = json.dumps(header, separators=(",", ":")).encode()
            if len(text) > header_size:
                raise ValueError(f"the header takes {len(text)} bytes, not {header_size} at most")
            file.seek(0)
            file.write(header_size.to_bytes(8, "little") + text.ljust(header_size))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file of our own, whole or not at all.

    Raises:
        OSError: the disk does not take it; nothing is left under the name.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        ordered = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
        save_file(ordered, partial, dict(metadata or {}))
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
