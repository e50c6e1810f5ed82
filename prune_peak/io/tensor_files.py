"""prune-peak's own safetensors files: plans, statistics, sampled text."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import PrunePeakError, brief
from .untrusted import check_file

# Supported dtypes by their safetensors names
STORED_DTYPES = {
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
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file lazily.

    Raises:
        PrunePeakError: the file is not readable.
    """
    try:
        check_file(path)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise PrunePeakError(
            f"{path} is not a readable safetensors file ({brief(error)}). Download it again; it may be truncated."
        ) from None


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor in C order, without a copy if it is contiguous."""
    array = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type]


def digest_tensor(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a small safetensors file (a plan, sampled text)."""
    file = open_safetensors(path)
    return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a mapping


class TensorFile:
    """A large safetensors file that is read in parts; no page stays mapped."""

    def __init__(self, path: Path) -> None:
        file = open_safetensors(path)
        self.path = path
        self.metadata: dict[str, str] = file.metadata() or {}
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def read(self, prefix: str) -> dict[str, Tensor]:
        """Copies of the tensors whose names start with `prefix`, keyed without it."""
        file = open_safetensors(self.path)
        names = [name for name in self.shapes if name.startswith(prefix)]
        return {name.removeprefix(prefix): file.get_tensor(name).clone() for name in names}


def stream_tensors(
    tensors: Iterable[tuple[str, Tensor]], path: Path, metadata: Mapping[str, str], header_size: int
) -> None:
    """Write a safetensors file atomically from an iterator of tensors.

    Args:
        header_size: maximum bytes of the header; it is padded with spaces.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
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
                raise ValueError(f"the header takes {len(text)} bytes; expected at most {header_size}")
            file.seek(0)
            file.write(header_size.to_bytes(8, "little") + text.ljust(header_size))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        ordered = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
        partial.touch()
        mode = partial.stat().st_mode  # as the umask gives it; safetensors makes it 0600
        save_file(ordered, partial, dict(metadata or {}))
        partial.chmod(mode)
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
