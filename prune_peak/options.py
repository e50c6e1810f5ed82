"""Every option once: name, default, allowed values, help and check. Imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import UsageError, spell
from .option_fields import Options, check_shares, option

SELF = "self"  # the data that the model generates itself
AUTO, OWN = "auto", "own"
HEAD, GROUP, NEURON = UNITS = ("head", "group", "neuron")  # what leaves an attention together
PROCESSOR = "cpu"
DEVICES = ("auto", PROCESSOR, "cuda", "xpu", "mps")
FLOATS = ("float32", "bfloat16", "float16")
ELIMINATION, DEVIATION = "elimination", "deviation"  # the default scores, with the refit and without it
REAP, FREQUENCY = "reap", "frequency"  # scores of whole experts
RANDOM, RANKED = "random", "ranked"
RESAMPLE = "resample"
METHODS = FULL, LORA = ("full", "lora")  # what `heal` trains
INSPECTED_RATIO = 0.3  # what `inspect` assumes where neither a ratio nor a target is given

# name: function of a `stats.histogram.Summary` that gives the constant of every neuron, (neurons,)
FILLS: dict[str, Callable[[Any], Any]] = {
    "peak": lambda summary: summary.peak,
    "mean": lambda summary: summary.mean,
    "median": lambda summary: summary.median,
    "zero": lambda summary: summary.mean.new_zeros(summary.mean.shape),
}
# name: the function that chooses the neurons to keep; pruning/scores.py fills it, and imports no torch either
SCORES: dict[str, Callable[..., Any]] = {}
NO_FILL = "none"  # of whole experts
# name: the module whose `export(folder, file)` writes the format
FORMATS = {"gguf": "prune_peak.export.gguf"}

# what a kind of site prunes, in prose; of others it is neurons
UNIT_NAMES = {"mlp": "MLP neurons", "expert-mlp": "neurons of the experts", "experts": "experts", "blocks": "blocks"}


def name_units(kind: str) -> str:
    """What a kind of site prunes, in prose.

    Example:
        >>> name_units("experts"), name_units("attention")
        ('experts', 'attention neurons')
    """
    return UNIT_NAMES.get(kind, f"{kind} neurons")


Ratio = float | Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class HubOptions(Options):
    """Where a model of the Hub is read from."""

    revision: str | None = option(None, "Branch, tag or commit of a Hub model.")


@dataclass(frozen=True, kw_only=True)
class SeedOptions(Options):
    """What is drawn at random."""

    seed: int = option(0, "Seed of everything that is drawn at random.", parse="seed")


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(HubOptions):
    """How a model is run."""

    sequence_length: int = option(512, "Tokens per window, special tokens included.", least=2)
    dtype: str | None = option(
        None,
        "Type to compute in; files keep the model's own.",
        lambda: FLOATS,
        shown="the model's; float32 for float16",
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """What is read of data that has several parts."""

    dataset_config: str | None = option(None, "Configuration of a Hub data set, such as wikitext-2-raw-v1.")
    dataset_split: str | None = option(None, "Split of a Hub data set.", shown="train")
    text_column: str | None = option(
        None, "Column that holds the text, in a Hub data set or a file of records.", shown="text or messages"
    )

    @property
    def reading(self) -> "DataOptions":
        """These options alone."""
        return DataOptions(**{item.name: getattr(self, item.name) for item in fields(DataOptions)})


FIRST_PART = DataOptions()  # the first configuration, the split `train`, the usual columns


@dataclass(frozen=True, kw_only=True)
class OutputClassOptions(Options):
    """Which class is written."""

    output_class: str = option(
        AUTO,
        "transformers class to write: the best that holds the smaller shapes and the constants (auto); the model's "
        "own, with zeros where it has no bias (own); or a name such as granite or llama.",
    )


@dataclass(frozen=True, kw_only=True)
class Budget(Options):
    """How much to prune; exactly one of ratio and the two targets."""

    ratio: Ratio | None = option(None, "Share to prune at every site: 0.3, or mlp=0.2,attention=0.33.", parse="ratio")
    target_params: float | None = option(None, "Instead: share of all parameters that may stay, e.g. 0.8.")
    target_bytes: int | None = option(None, "Instead: size that the weights may have, e.g. 2GB.", parse="size")
    sites: tuple[str, ...] | None = option(
        None,
        "Kinds of site to prune: mlp, attention, expert-mlp (narrower experts), experts (whole ones), or several; or "
        "blocks (whole ones), alone.",
        parse="names",
        shown="mlp",
    )
    stack: tuple[str, ...] | None = option(
        None, "Lists of blocks to prune, where `inspect` names several: encoder, decoder.", parse="names", shown="all"
    )
    unit: str = option(
        HEAD,
        "What leaves an attention together: heads, as many of every KV group; whole KV groups, which shrinks the cache;"
        " or single neurons, of vision transformers (narrower heads) or with --keep-shape.",
        lambda: UNITS,
    )
    keep_shape: bool = option(
        False, "Set pruned weights to zero instead of deleting them: saves nothing, but works for every attention."
    )
    multiple_of: int | None = option(
        None, "Kept MLP widths are a multiple of this.", least=1, shown="32; 8 below width 512"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(value is not None for value in (self.ratio, self.target_params, self.target_bytes)) != 1:
            raise UsageError(
                f"pass one of {spell('ratio')}, {spell('target_params')} and {spell('target_bytes')}: how much to "
                "prune."
            )
        if self.ratio is not None:
            check_shares(self.ratio.values() if isinstance(self.ratio, Mapping) else [self.ratio])
        if self.keep_shape and self.ratio is None:
            raise UsageError(
                f"{spell('keep_shape', True)} saves nothing, so it cannot reach a target; pass {spell('ratio')}."
            )
        if self.target_params is not None and not 0 < self.target_params < 1:
            raise UsageError(
                f"{spell('target_params', self.target_params)}: expected a share between 0 and 1, e.g. 0.8."
            )
        if self.sites and isinstance(self.ratio, Mapping) and set(self.sites) != set(self.ratio):
            raise UsageError(
                f"{spell('ratio')} names {', '.join(self.ratio)}, but {spell('sites')} names {', '.join(self.sites)}."
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of site to prune: those asked for, those that the ratio names, or the MLP."""
        named = tuple(self.ratio) if isinstance(self.ratio, Mapping) else None
        return self.sites or named or ("mlp",)

    @property
    def label(self) -> str:
        """The budget in the name of a folder."""
        if isinstance(self.ratio, Mapping):
            return "-".join(f"{kind}{share}" for kind, share in self.ratio.items())
        if self.ratio is not None:
            return str(self.ratio)
        return f"params{self.target_params}" if self.target_bytes is None else f"bytes{self.target_bytes}"


@dataclass(frozen=True, kw_only=True)
class PruningOptions(SeedOptions):
    """Which neurons stay, at which constants the others are held, and the refit."""

    fill: str = option(
        "peak",
        "Constant that a pruned neuron is held at; `auto`: per site, the best on held-out tokens.",
        lambda: (*FILLS, AUTO),
    )
    score: str | None = option(
        None,
        "Score that ranks the neurons, e.g. by the error left after the refit (elimination) or after the fill "
        "(deviation).",
        lambda: SCORES,
        shown=f"{ELIMINATION}; {DEVIATION} with --no-refit",
    )
    refit: bool = option(
        True, "Fit the kept weights by least squares, so that they take over what the pruned neurons did."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score is None:
            object.__setattr__(self, "score", ELIMINATION if self.refit else DEVIATION)
        if self.score == ELIMINATION and not self.refit:
            raise UsageError(
                f"{spell('score', ELIMINATION)} requires the refit. Remove {spell('refit', False)}, or choose another "
                f"{spell('score')}."
            )

    @property
    def needs_covariances(self) -> bool:
        """Whether the statistics of single neurons are not enough."""
        return self.refit or self.fill == AUTO


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(ComputeOptions, SeedOptions, DataOptions):
    """What the neurons are measured on."""

    calibration: tuple[str, ...] = option(
        (SELF,), "Data to measure the neurons on: self, a text, a folder of images or a Hub data set.", parse="data"
    )
    samples: int = option(48, "Windows (or images) of calibration.", least=1)


@dataclass(frozen=True, kw_only=True)
class ResourceOptions(Options):
    """What a run may use of the machine."""

    max_memory: int | None = option(
        None, "Memory to stay within, e.g. 4GB.", parse="size", shown="most of the machine's"
    )
    device: str = option(AUTO, "Device to compute on; `auto`: an accelerator if there is one.", lambda: DEVICES)


@dataclass(frozen=True, kw_only=True)
class CompressOptions(OutputClassOptions, ResourceOptions, CalibrationOptions, PruningOptions, Budget):
    """The options of `compress`."""

    output: str | Path | None = option(None, "Folder to write.", parse="folder", shown="./<name>-peak-<ratio>")
    stats: str | Path | None = option(
        None,
        "File that `calibrate` wrote, instead of a calibration; the refit needs --covariances in it.",
        parse="file",
    )
    evaluate: tuple[str, ...] | None = option(
        None,
        "Text for the perplexity (masked LM: accuracy) before and after, its first 24 windows; or a folder of images, "
        "FOLDER/<label>/<image>.",
        parse="data",
        shown="held-out windows of the calibration; no images",
    )
    force: bool = option(False, "Replace the output folder if it exists, with all that is in it.")

    def __post_init__(self) -> None:
        Budget.__post_init__(self)
        PruningOptions.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class CompressCommand(CompressOptions):
    """The options of `compress` on the command line."""

    push_to_hub: str | None = option(None, "Push the result to this repository, made if it does not exist.")
    private: bool = option(False, "Make that repository a private one.")
    heal: bool = option(False, "Heal the result as `prune-peak heal` does by default, into <output>-healed.")
    dry_run: bool = option(False, "Describe what would happen and what it would take, and stop.")


@dataclass(frozen=True, kw_only=True)
class InspectOptions(HubOptions, OutputClassOptions, Budget):
    """The options of `inspect`; without ratio and target, a ratio of 0.3."""

    def __post_init__(self) -> None:
        if self.ratio is None and self.target_params is None and self.target_bytes is None:
            object.__setattr__(self, "ratio", INSPECTED_RATIO)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(ResourceOptions, CalibrationOptions):
    """The options of `calibrate`."""

    output: str | Path = option(MISSING, "File to write.", parse="file")
    covariances: bool = option(
        False,
        "Also store covariances. Required for the refit, --fill auto, --unit neuron, and size targets over several "
        "kinds of site.",
    )
    force: bool = option(False, "Replace the file if it exists.")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(HubOptions):
    """The options of `verify`."""

    original: str | None = option(None, "The original (folder or Hub id), to compare tensors and outputs with.")
    data: str | None = option(
        None, "What a healed folder learned on, to measure what was held out of it again.", parse="one"
    )


@dataclass(frozen=True, kw_only=True)
class PushOptions(Options):
    """The options of `push`."""

    private: bool = option(False, "Make the repository a private one.")
    revision: str | None = option(None, "Branch to push to, made if it does not exist.", shown="main")
    commit_message: str | None = option(None, "First line of the commit.")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """The options of `export`."""

    format: str = option(MISSING, "Format to write.", lambda: FORMATS)
    force: bool = option(False, "Replace the file if it exists.")
