"""The options of `evaluate`. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..option_fields import option
from ..options import ComputeOptions, DataOptions

EVALUATED = 24  # windows of an evaluation text, from its start


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ComputeOptions, DataOptions):
    """The options of `evaluate`."""

    data: tuple[str, ...] = option(
        (),
        "Text for the perplexity (masked LM: accuracy at masked tokens), or a folder of labelled images, "
        "FOLDER/<label>/<image>.",
        parse="data",
    )
    windows: int = option(EVALUATED, "Most windows of a text, from its start.", least=1)


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(EvaluateOptions):
    """The options of `evaluate` on the command line."""

    latency: bool = option(False, "Time prefill and cached decoding, the models in turns.")
    talk: bool = option(
        False, "Compare answers to 40 prompts: loops, ends, length, and the divergence from the first model."
    )
    prompts: str | Path | None = option(None, "File of other prompts, one a line; implies --talk.", parse="file")
    tasks: tuple[str, ...] | None = option(
        None, "Tasks of lm-evaluation-harness, or YAML files that define some.", parse="names"
    )
    report: str | Path | None = option(
        None, "HTML page to write: the tables, and the answers of --talk side by side.", parse="file"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.data or self.latency or self.talk or self.prompts or self.tasks):
            raise UsageError("nothing to measure; pass --data DATA, --talk, --latency or --tasks NAME,....")
        if self.report is not None and (Path(self.report).exists() or not Path(self.report).parent.is_dir()):
            raise UsageError(f"--report {self.report}: expected a file that does not exist, in a folder that does.")
