"""One run of `heal`: what it learns, from which data, how, and what it takes, decided before any training."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.data_sets import check_data, reading_of
from ..data.windows import name_data
from ..errors import PrunePeakError, UsageError, spell
from ..export.recipe import VERSIONS, read_recipe
from ..memory import MACHINE_SHARE, estimate_healing, gigabytes, physical_memory
from ..models.execution import find_device
from ..models.loading import Model, open_model
from ..options import FULL, LORA, METHODS, PROCESSOR, SELF, DataOptions
from ..version import __version__
from .objectives import Objective, find_objective
from .options import HealOptions
from .training import STEP_TOKENS
from .windows import HELD_OUT, recorded_reading, row_length

KEPT_CHECKPOINTS = 3  # the best, the newest, and one that is being written
SPEED_PROBE = 1024  # rows and columns of the matrices that are multiplied to measure the speed
HELD_OUT_PASSES = 5  # through both models
OVERHEAD = 1.6  # time of a run, evaluations included, over that of its products


@dataclass(frozen=True)
class HealJob:
    """One run of `heal`, decided before any training."""

    options: HealOptions
    folder: Path  # the compressed one
    recipe: Mapping[str, Any]
    original: Model
    model: Model  # compressed
    objective: Objective
    data: str
    reading: DataOptions  # of the data
    method: str
    output: Path
    device: torch.device
    memory: int  # bytes that it takes at most
    tokens_at_once: int  # in one pass

    @property
    def record(self) -> dict[str, Any]:
        """What decides the result."""
        return {
            "data": self.data if self.data == SELF else name_data(self.data),
            "tokens": self.options.tokens,
            "method": self.method,
            "seed": self.options.seed,
            "device": self.device.type,
            **asdict(self.reading),
        }

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that an unfinished run must share with this one to be resumed."""
        shared = {"parent": self.recipe["tensors"], "versions": VERSIONS, "prune_peak": __version__}
        return self.record | shared | {"tokens_at_once": self.tokens_at_once}

    @property
    def minutes(self) -> float:
        """An estimate, from the speed of a product of matrices."""
        pair = torch.ones(2, SPEED_PROBE, SPEED_PROBE, device=self.device)
        seconds = math.inf
        for _ in range(3):
            start = time.perf_counter()
            (pair[0] @ pair[1]).sum().item()
            seconds = min(seconds, time.perf_counter() - start)
        speed = 2 * SPEED_PROBE**3 / seconds
        work = self.options.tokens * (2 * self.original.parameters + 6 * self.model.parameters)
        measured = HELD_OUT_PASSES * HELD_OUT * 2 * (self.original.parameters + self.model.parameters)
        return (OVERHEAD * work + measured) / speed / 60

    @property
    def disk(self) -> int:
        """Bytes of checkpoints while it runs, and of the result."""
        trained = self.model.parameters if self.method == FULL else self.model.parameters // 20
        return 12 * trained * KEPT_CHECKPOINTS + self.model.size


def prepare_heal(folder: Path, options: HealOptions) -> HealJob:
    """Open both models and decide what a run does.

    Raises:
        UsageError, PrunePeakError: as `heal`.
    """
    device = find_device(options.device)
    recipe = read_recipe(folder)
    if "healing" in recipe:
        raise UsageError(
            f"{folder} is healed already. Heal the folder that compress wrote, with more {spell('tokens')}."
        )
    model = open_model(str(folder))
    find_objective(model)  # raises
    original = _open_original(folder, recipe, options)
    data = options.data or _data_of(folder, model, recipe)
    if data == SELF and not model.meta_model.can_generate():
        what = "a folder of images" if model.sees_images else "a text"
        raise PrunePeakError(
            f"{folder} is a {model.model_class.__name__}, which generates no data; pass {what} with {spell('data')}."
        )
    reading = reading_of(data, recorded_reading(recipe["options"])) if options.data is None else options.reading
    check_data([data], original.sees_images, reading)
    output = Path(options.output or f"{folder.resolve().parent / folder.resolve().name}-healed")
    if folder.resolve().is_relative_to(output.resolve()) or original.folder.resolve().is_relative_to(output.resolve()):
        raise UsageError(f"{spell('output', output)} contains the model itself; choose another.")
    budget = options.max_memory or int(MACHINE_SHARE * physical_memory())
    length = row_length(original, recipe)
    needs = {
        (method, tokens): estimate_healing(original, model, tokens, method)
        for method in ([options.method] if options.method else METHODS)
        for tokens in (max(length, STEP_TOKENS), max(length, STEP_TOKENS // 2))
    }
    fitting = [choice for choice, need in needs.items() if need <= budget or device.type != PROCESSOR]
    if not fitting:
        lora = spell("method", LORA)
        method, tokens = min(needs, key=lambda choice: needs[choice])
        raise PrunePeakError(
            f"to heal {folder} by {method} needs {gigabytes(needs[method, tokens])} of memory; the budget is "
            f"{gigabytes(budget)}. Pass a larger {spell('max_memory')}{'' if method == LORA else f', or {lora}'}."
        )
    method, tokens = fitting[0]
    memory = needs[method, tokens]
    objective = find_objective(original)
    return HealJob(
        options, folder, recipe, original, model, objective, data, reading, method, output, device, memory, tokens
    )


def _open_original(folder: Path, recipe: Mapping[str, Any], options: HealOptions) -> Model:
    source = recipe["source"]
    name = options.original or (source["model"] if source["revision"] else None)
    if name is None:
        raise UsageError(
            f"{folder} was compressed from a local folder, {source['model']}; pass {spell('original', 'DIR')}."
        )
    original = open_model(name, options.revision or (None if options.original else source["revision"]))
    if original.digest != source["digest"]:
        raise PrunePeakError(
            f"{name} is not the model that {folder} was compressed from. Pass that with {spell('original')}."
        )
    return original


def _data_of(folder: Path, model: Model, recipe: Mapping[str, Any]) -> str:
    names: list[str] = recipe["options"]["calibration"]
    if names == [SELF] or Path(names[0]).exists() or "/" in names[0]:
        return names[0]
    other = f", or {spell('data', SELF)}" if model.meta_model.can_generate() else ""
    what = "DIR" if model.sees_images else "FILE"
    raise UsageError(f"{folder} was calibrated on {names[0]}, which is not here; pass {spell('data', what)}{other}.")
