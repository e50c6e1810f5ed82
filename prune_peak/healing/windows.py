"""The rows of tokens, or images, that `heal` trains on, and others that are held out."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..data.chat import generate_chats
from ..data.images import choose_images
from ..data.sampling import sample_windows
from ..data.self_generated import generate_tokens
from ..data.texts import read_windows
from ..data.windows import Windows, name_data, window_length
from ..errors import PrunePeakError, spell
from ..io.tensor_files import load_tensors, save_tensors
from ..models.execution import PASSAGE
from ..models.loading import Model, count_patches
from ..options import FIRST_PART, SELF, DataOptions
from .objectives import Row, find_objective, next_token_row

HELD_OUT_FILE = "prune_peak_held_out.safetensors"  # rows of own text, for `verify`
HELD_OUT = 4096  # tokens
CHAT_SHARE = 0.5  # of the model's own text, where it has a chat template


@dataclass(frozen=True)
class HealingData:
    """Rows of one kind of data."""

    source: str  # the name of the data
    train: Sequence[Row]
    held_out: Sequence[Row]
    patches: int = 0  # of an image

    @property
    def tokens(self) -> int:
        """Tokens, or patches, of one pass over the rows to train on."""
        return sum(self.patches or len(row["input_ids"]) for row in self.train)

    @property
    def held_out_tokens(self) -> int:
        """The same of the rows that are held out."""
        return HealingData(self.source, self.held_out, [], self.patches).tokens

    @property
    def digest(self) -> str:
        """SHA-256 of all rows."""
        total = hashlib.sha256()
        for row in [*self.train, *self.held_out]:
            total.update(b"".join(values.numpy().tobytes() for values in row.values()))
        return total.hexdigest()

    def save(self, path: Path) -> None:
        """Keep the rows in a file; `load_data` reads it."""
        rows = [*self.train, *self.held_out]
        tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        tensors["lengths"] = torch.tensor([len(next(iter(row.values()))) for row in rows])
        patches = {"patches": str(self.patches)} if self.patches else {}
        save_tensors(tensors, path, {"source": self.source, "train": str(len(self.train)), **patches})


def load_data(path: Path) -> HealingData:
    """Rows that `HealingData.save` kept.

    Raises:
        PrunePeakError: the file is missing or damaged.
    """
    tensors, metadata = load_tensors(path)
    try:
        lengths = tensors.pop("lengths").tolist()
        parts = {name: tensors[name].split(lengths) for name in sorted(tensors)}
        rows = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
        count = int(metadata["train"])
        return HealingData(metadata["source"], rows[:count], rows[count:], int(metadata.get("patches", 0)))
    except (KeyError, ValueError, TypeError, RuntimeError):
        raise PrunePeakError(f"{path} has no rows of tokens. Heal the compressed folder again.") from None


def choose_data(
    original: Model,
    recipe: Mapping[str, Any],
    data: str,
    tokens: int,
    seed: int,
    reading: DataOptions = FIRST_PART,
) -> HealingData:
    """Rows of a text or of images, or of what the original writes itself; none was in the calibration.

    Raises:
        PrunePeakError: the data cannot be read, or is too short.
    """
    if data == SELF:
        return _own_data(original, recipe, tokens, seed)
    length, images = row_length(original, recipe), original.sees_images
    most, wanted = max(1, HELD_OUT // length), -(-tokens // length)  # rows that are held out, and learned on
    if images:
        drawn = most + wanted + recipe["options"]["samples"]
        windows = choose_images(data, original, drawn, seed, reading).calibration
    else:
        windows = read_windows(data, original, length, reading)
    used = _calibration_of(original, recipe, data)
    if used is not None:
        seen = {window.numpy().tobytes() for window in torch.cat([used.calibration, used.held_out])}
        windows = windows[torch.tensor([window.numpy().tobytes() not in seen for window in windows])]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    held = max(1, min(most, len(windows) // 8))
    train = order[held : held + wanted]
    objective = find_objective(original)
    if not len(train):
        what = "images" if images else f"windows of {length} tokens"
        other = f", or {spell('data', SELF)}" if original.meta_model.can_generate() else ""
        raise PrunePeakError(
            f"{data} has {len(windows)} {what} besides those of the calibration; expected at least 2, one to train on "
            f"and one to measure on. Pass {'more images' if images else 'a longer text'} with {spell('data')}{other}."
        )
    rows = objective.rows(windows)
    patches = length if images else 0
    return HealingData(name_data(data), [rows[n] for n in train], [rows[n] for n in order[:held]], patches)


def row_length(model: Model, recipe: Mapping[str, Any]) -> int:
    """The tokens of a window of the calibration, or the patches of an image."""
    if model.sees_images:
        return count_patches(model)
    return window_length(model, recipe["options"]["sequence_length"])


def recorded_reading(record: Mapping[str, Any]) -> DataOptions:
    """What was read of the data, by a recipe."""
    return DataOptions(**{item.name: record.get(item.name) for item in fields(DataOptions)})


def _calibration_of(original: Model, recipe: Mapping[str, Any], data: str) -> Windows | None:
    """The windows of the calibration, if it was on this text."""
    options = recipe["options"]
    if options["calibration"] != [name_data(data)]:
        return None
    windows = sample_windows(
        original, [data], options["samples"], options["sequence_length"], options["seed"], recorded_reading(options)
    )
    return windows if windows.digest == recipe["calibration_digest"] else None


def _own_data(original: Model, recipe: Mapping[str, Any], tokens: int, seed: int) -> HealingData:
    """Free text, and chat where the model has a template; the seed is another than that of the calibration."""
    seed = seed + recipe["options"]["seed"] + 1
    wanted = tokens + HELD_OUT
    longest = min(PASSAGE * 2, original.positions or PASSAGE * 2)
    chats = generate_chats(original, int(wanted * CHAT_SHARE), longest, seed)
    rest = wanted - sum(len(ids) for ids, _ in chats)
    size = min(PASSAGE, longest)
    free = [next_token_row(passage) for passage in generate_tokens(original, -(-rest // size), size, seed)]
    talk = [{"input_ids": ids, "labels": labels} for ids, labels in chats]
    train, held_out = [], []
    for part in (free, talk):
        first = -(-len(part) * HELD_OUT // wanted)
        train += part[first:]
        held_out += part[:first]
    return HealingData("the original's own text" + " and chat" * bool(talk), train, held_out)
