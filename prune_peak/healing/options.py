"""The options of `heal`. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from ..option_fields import option
from ..options import METHODS, DataOptions, HubOptions, ResourceOptions, SeedOptions


@dataclass(frozen=True, kw_only=True)
class HealOptions(ResourceOptions, SeedOptions, HubOptions, DataOptions):
    """The options of `heal`."""

    original: str | None = option(
        None, "The original (folder or Hub id).", shown="the Hub id that the folder was compressed from"
    )
    data: str | None = option(
        None,
        "Data to learn on: self (text and chat that the original writes), a text, a folder of images, or a Hub data "
        "set.",
        parse="one",
        shown="that of the calibration",
    )
    tokens: int = option(50_000, "Tokens (of images: patches) to learn on, e.g. 50k.", least=1, parse="count")
    method: str | None = option(
        None,
        "Train all weights (full), or adapters that are merged at the end (lora, needs the extra `lora`).",
        lambda: METHODS,
        shown="full if it fits --max-memory, else lora",
    )
    output: str | Path | None = option(None, "Folder to write.", parse="folder", shown="DIR-healed")
    force: bool = option(False, "Replace the output folder if it exists, with all that is in it.")


@dataclass(frozen=True, kw_only=True)
class HealCommand(HealOptions):
    """The options of `heal` on the command line."""

    dry_run: bool = option(False, "Say what it would take, and stop.")
