"""The options of the studies, `ablate` and `analyze`. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from ..option_fields import option
from ..options import (
    ELIMINATION,
    FILLS,
    RANDOM,
    RANKED,
    RESAMPLE,
    SCORES,
    SELF,
    CalibrationOptions,
    ComputeOptions,
    DataOptions,
    SeedOptions,
)


@dataclass(frozen=True, kw_only=True)
class AblateOptions(CalibrationOptions):
    """The options of `ablate`."""

    output: str | Path | None = option(None, "Folder to write.", parse="folder", shown="./<name>-ablation")
    fill: tuple[str, ...] = option(
        (),
        f"What the neurons are held at; `{RESAMPLE}`: at their values for another token.",
        lambda: (*FILLS, RESAMPLE),
        shown="all",
    )
    fraction: tuple[float, ...] = option(
        tuple(step / 10 for step in range(10)),
        "Share of the neurons of every site that is held.",
        least=0,
        most=1,
        shown="0, 0.1 ... 0.9",
    )
    sites: tuple[str, ...] | None = option(
        None, "mlp or attention; one after the other.", parse="names", shown="all that the family has"
    )
    select: str = option(RANDOM, "Neurons at random, or those of the lowest score first.", lambda: (RANDOM, RANKED))
    score: str = option(
        "variance", "Score that ranks them.", lambda: [name for name in SCORES if name not in (ELIMINATION, RANDOM)]
    )
    seeds: int = option(3, "Random choices of neurons; a ranked study has one.", least=1)
    data: tuple[str, ...] | None = option(
        None,
        "Text to evaluate on; or labelled images, FOLDER/<label>/<image>, which without --calibration also calibrate.",
        parse="data",
        shown="other windows of the calibration",
    )
    samples: int = option(8, "Windows (or images) of calibration.", least=1)
    windows: int | None = option(
        None, "Windows (or images) to evaluate on, others than those of calibration.", least=1, shown="as --samples"
    )
    force: bool = option(False, "Start over where the folder holds another study.")


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions(ComputeOptions, SeedOptions, DataOptions):
    """The options of `analyze`."""

    output: str | Path | None = option(None, "Folder to write.", parse="folder", shown="./<name>-analysis")
    data: tuple[str, ...] = option(
        (SELF,), "Text (or folder of images) to measure on; several are compared with each other.", parse="data"
    )
    neuron: tuple[str, ...] = option(
        (), "KIND:BLOCK:NEURON, such as mlp:3:17: a neuron to draw beside the most extreme ones."
    )
    samples: int = option(16, "Windows of each text to measure on.", least=1)
    windows: int = option(8, "Others of each text to evaluate on, with several texts.", least=1)
    force: bool = option(False, "Write into the folder though it exists.")
