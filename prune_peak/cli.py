"""The command line: parse, call one function, print what it answers. stdout is the answer, stderr the talk.

torch and transformers are imported inside the commands, so that `--help` does not wait for them.
"""

import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, TypeVar

import click

from . import __version__
from .errors import LostProcessError, PrunePeakError, UsageError, one_line
from .printing import (
    print_analysis,
    print_comparison,
    print_compression,
    print_inspection,
    print_latency,
    print_scores,
    print_study,
)

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
NO_MEMORY = ("allocate memory", "failed to map segment")
Command = TypeVar("Command", bound=Callable[..., Any])


class Group(click.Group):
    """Turns the library's errors into one `Error:` line and an exit code; anything else keeps its traceback."""

    def invoke(self, context: click.Context) -> Any:
        with _noting_interrupts() as interrupts:
            try:
                return self._invoke(context)
            except (Exception, KeyboardInterrupt) as error:
                if not interrupts and not isinstance(error, KeyboardInterrupt):
                    raise
                click.echo("Interrupted. Whatever was finished is kept: the same command goes on from there.", err=True)
                sys.exit(130)

    def _invoke(self, context: click.Context) -> Any:
        try:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                return self._invoke_together(context)
            return super().invoke(context)
        except UsageError as error:
            raise click.UsageError(str(error), context) from None
        except PrunePeakError as error:
            raise click.ClickException(str(error)) from None
        except click.ClickException as error:
            error.message = one_line(error.message)  # type: ignore[misc]  # a word of the command line may be a file's
            raise
        except (MemoryError, RuntimeError, OSError, ImportError) as error:
            # torch and the loader of libraries have no kind of their own for it
            if not isinstance(error, MemoryError) and not any(words in str(error) for words in NO_MEMORY):
                raise
            raise click.ClickException(
                "not enough memory. `compress --dry-run` tells how much is needed, and --max-memory makes do with "
                "less; whatever was finished is kept: the same command goes on from there."
            ) from None
        except LostProcessError as error:
            raise click.ClickException(str(error)) from None

    def _invoke_together(self, context: click.Context) -> Any:
        """Where torchrun has started several processes: the first one runs the command, the others assist."""
        if os.environ["RANK"] != "0" or not {"-q", "--quiet"}.isdisjoint(context.args):
            _settle(quiet=True)  # before torch is imported, for that imports tqdm
        from .ranks import joined

        with joined() as ranks:
            if ranks.is_first:
                answer = super().invoke(context)
                with suppress(LostProcessError):  # who is gone by now has no share in anything
                    ranks.tell(None)
                return answer
            from .calibration import assist

            try:
                assist(ranks)
            except PrunePeakError as error:
                ranks.refuse(error)
            except (LostProcessError, KeyboardInterrupt):
                pass  # the first process has told why it left


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """The Ctrl-C so far. Libraries make other errors of it on the way: clean-up fails, or Rust swallows what it was."""
    interrupts: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


class OneLine(logging.Formatter):
    """What is told of a stranger's file does not speak to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


class Ratio(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.4
    """`0.3`, or `mlp=0.2,attention=0.33`."""

    name = "ratio"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> float | dict[str, float]:
        try:
            if "=" not in str(value):
                return float(value)
            pairs = [part.split("=") for part in str(value).split(",")]
            return {kind: float(number) for kind, number in pairs}
        except ValueError:
            self.fail(f"{value}: expected a number, or mlp=NUMBER,attention=NUMBER.", parameter, context)


class Kinds(click.ParamType):  # type: ignore[type-arg]
    """`mlp`, `attention`, or both with a comma between."""

    name = "sites"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[str, ...]:
        return tuple(str(value).split(","))


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """`2GB`, `500MB`, `1.5GiB`, or a plain number."""

    name = "size"
    units: ClassVar = {
        f"{prefix}{suffix}": base**power
        for suffix, base in (("B", 1000), ("iB", 1024))
        for power, prefix in enumerate(("", "K", "M", "G", "T"))
    }

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        number = str(value).rstrip("BKMGTi")
        try:
            size = float(number) * self.units[str(value)[len(number) :].strip() or "B"]
        except (ValueError, KeyError):
            size = math.nan
        if not 0 < size < math.inf:
            self.fail(f"{value}: expected a size such as 2GB, 500MB or 1.5GiB.", parameter, context)
        return int(size)


def all_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Options that travel together, in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


talk_options = all_options(
    click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON."),
    click.option("-q", "--quiet", is_flag=True, help="No progress bars and no talk."),
)
revision_option = click.option("--revision", help="Branch, tag or commit of a Hub model.")
budget_options = all_options(
    click.option("--ratio", type=Ratio(), help="Share to cut at every site: 0.3, or mlp=0.2,attention=0.33."),
    click.option("--target-params", type=float, help="Instead: share of all parameters that may stay, e.g. 0.8."),
    click.option("--target-bytes", type=Bytes(), help="Instead: size that the weights may have, e.g. 2GB."),
    click.option("--sites", type=Kinds(), help="What to cut: mlp, attention, or mlp,attention.  [default: mlp]"),
    click.option(
        "--unit",
        type=click.Choice(["head", "group", "neuron"]),
        default="head",
        show_default=True,
        help="What leaves an attention: heads, as many of every KV group; whole KV groups, which shrinks the cache; "
        "or single neurons, of vision transformers (narrower heads) or with --keep-shape.",
    ),
    click.option(
        "--keep-shape",
        is_flag=True,
        help="Zero what is cut, in place of deleting it: saves nothing, but cuts what no class holds narrower.",
    ),
    click.option(
        "--multiple-of", type=int, help="Kept MLP widths are a multiple of this.  [default: 32; 8 below width 512]"
    ),
)
host_option = click.option(
    "--host",
    default="auto",
    show_default=True,
    metavar="auto|own|NAME",
    help="Class to write: the best that holds shapes and constants; the model's own (constants that it cannot hold "
    "are zero); or granite, llama, phi, smollm3, hy_v3.",
)
calibration_option = click.option(
    "--calibration",
    default="self",
    show_default=True,
    metavar="self|FILE.txt|FILE.jsonl|IMAGES|DATASET",
    help="Text (or folder of images) to measure the neurons on; `self` lets the model write it.",
)
computing_options = all_options(
    click.option("--sequence-length", default=512, show_default=True, help="Tokens per window."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Type to compute in; files keep the source's.  [default: the source's; float32 for float16]",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**32 - 1),
        default=0,
        show_default=True,
        help="Seed of all that is drawn at random.",
    ),
)
calibration_options = all_options(
    calibration_option,
    click.option("--samples", default=48, show_default=True, help="Windows (or images) of calibration."),
    computing_options,
    click.option("--max-memory", type=Bytes(), help="Memory to keep to, e.g. 4GB.  [default: most of the machine's]"),
    click.option(
        "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where blocks run."
    ),
)


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="prune-peak")
def main() -> None:
    """Make transformer checkpoints smaller, without training; and language models without a data set.

    \b
    Example:
      prune-peak compress --model facebook/opt-1.3b --ratio 0.3
    """


@main.command()
@click.option("--model", required=True, help="A model's folder or Hub id.")
@budget_options
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write.  [default: ./<name>-peak-<ratio>]")
@click.option(
    "--fill",
    type=click.Choice(["peak", "mean", "median", "zero", "auto"]),
    default="peak",
    show_default=True,
    help="The constant that a cut neuron is held at; `auto`: per site, the best on held-out tokens.",
)
@click.option(
    "--score",
    type=click.Choice(["elimination", "deviation", "activation-norm", "variance", "weight-norm", "random"]),
    help="What ranks the neurons: the error left after the refit (elimination), or after the fill (deviation), ...  "
    "[default: elimination; deviation with --no-refit]",
)
@click.option(
    "--refit/--no-refit",
    default=True,
    show_default=True,
    help="Let the kept weights take over, by least squares, what the cut neurons did; or fold the constant only.",
)
@calibration_options
@click.option(
    "--stats",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What `calibrate` wrote, in place of a calibration; with `calibrate --gram` also for the refit.",
)
@host_option
@revision_option
@click.option(
    "--evaluate",
    metavar="FILE|FOLDER",
    help="Text for the perplexity (masked LM: accuracy) before and after, its first 24 windows; or a folder of images, "
    "FOLDER/<label>/<image>.  [default: held-out calibration windows; no images]",
)
@click.option("--push-to-hub", metavar="REPO_ID", help="Push the result to this repository, made if it is not there.")
@click.option("--private", is_flag=True, help="Make that repository a private one.")
@click.option("--dry-run", is_flag=True, help="Say what would happen, what it would take, and stop.")
@click.option("--force", is_flag=True, help="Replace the output folder if it exists.")
@talk_options
def compress(as_json: bool, quiet: bool, dry_run: bool, push_to_hub: str | None, private: bool, **options: Any) -> None:
    """Cut neurons, fold their peaks, refit the rest, and write a smaller checkpoint for stock transformers.

    \b
    Examples:
      prune-peak compress --model HuggingFaceTB/SmolLM2-135M --ratio 0.3
      prune-peak compress --model ./my-model --ratio 0.2 --calibration notes.txt --output smaller
      prune-peak compress --model ./my-model --ratio mlp=0.2,attention=0.33
      prune-peak compress --model ./my-model --target-params 0.8 --sites mlp,attention
    """
    _settle(quiet)
    if dry_run:
        _estimate(options, as_json)
        return
    if private and push_to_hub is None:
        raise UsageError("--private says how to push; add --push-to-hub REPO_ID.")
    from .compression import compress as run
    from .hub import check_login, push

    if push_to_hub is not None:
        check_login(push_to_hub)
    result = run(**options)
    if not as_json:
        print_compression(result)
    address = None if push_to_hub is None else push(result.output, push_to_hub, private=private)
    if as_json:
        click.echo(json.dumps(result.to_json() | ({} if address is None else {"url": address}), indent=2))
    elif address is not None:
        click.echo(f"\nPushed to {address}")
    for warning in result.warnings:
        click.secho(f"WARNING: {warning}", fg="red", bold=True, err=True)


@main.command()
@click.option("--model", required=True, help="A model's folder or Hub id.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option(
    "--gram",
    is_flag=True,
    help="Keep the products of neurons too, which the refit, --fill auto, --unit neuron and a target over two kinds of "
    "site need.",
)
@calibration_options
@revision_option
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@talk_options
def calibrate(as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure a model once; `compress --stats` then cuts it at any ratio without measuring again.

    \b
    Example:
      prune-peak calibrate --model ./my-model --output my-model.stats --calibration notes.txt --gram
      prune-peak compress --model ./my-model --ratio 0.2 --stats my-model.stats
    """
    _settle(quiet)
    from .compression import save_statistics

    statistics = save_statistics(**options)
    windows = statistics.windows
    images = windows.calibration.is_floating_point()
    unit, amount = ("images", len(windows.calibration)) if images else ("tokens", windows.calibration.numel())
    answer = {"output": str(options["output"]), "sites": statistics.sites, unit: amount}
    if as_json:
        click.echo(json.dumps(answer | {"options": dict(statistics.options)}, indent=2))
    else:
        click.echo(f"{answer['sites']} sites measured on {amount:,} {unit} of {windows.source}.")
        click.echo(f"Written to {answer['output']}.")


@main.command()
@click.argument("model")
@budget_options
@host_option
@revision_option
@talk_options
def inspect(model: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Say what can be cut from a model and what it would save (at --ratio 0.3 by default), from its config alone.

    \b
    Example:
      prune-peak inspect facebook/opt-1.3b --ratio 0.2
    """
    _settle(quiet)
    from .inspection import inspect as run

    inspection = run(model, **options)
    if as_json:
        click.echo(json.dumps(inspection.to_json(), indent=2))
    else:
        print_inspection(inspection)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", help="The original (folder or Hub id), to compare tensors and outputs with.")
@revision_option
@talk_options
def verify(folder: Path, model: str | None, revision: str | None, as_json: bool, quiet: bool) -> None:
    """Check that a folder is what `compress` wrote, and answers as the original does with its neurons held.

    Refitted weights are taken from the folder for that: how good they are only an evaluation tells.

    Exits with 0 if every check holds, with 3 if one does not.

    \b
    Example:
      prune-peak verify opt-1.3b-peak-0.3 --model facebook/opt-1.3b
    """
    _settle(quiet)
    from .source import open_source
    from .verification import verify as run

    result = run(folder, None if model is None else open_source(model, revision))
    if as_json:
        click.echo(json.dumps({"passed": result.passed, "checks": result.checks}, indent=2))
    else:
        for check in result.checks:
            click.echo(one_line(f"{'ok' if check['passed'] else 'FAILED':>6}  {check['check']}: {check['seen']}"))
        if model is None:
            click.echo("Outputs were not compared; pass --model ORIGINAL for that.", err=True)
    if not result.passed:
        sys.exit(3)


@main.command()
@click.option("--model", required=True, help="A model's folder or Hub id.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write.  [default: ./<name>-ablation]")
@click.option(
    "--fill",
    "fills",
    multiple=True,
    type=click.Choice(["zero", "mean", "median", "peak", "resample"]),
    help="What the neurons are held at; `resample`: at their values for another token. Repeatable.  [default: all]",
)
@click.option(
    "--fraction",
    "fractions",
    multiple=True,
    type=click.FloatRange(0, 1),
    help="Share of the neurons of every site that is held. Repeatable.  [default: 0, 0.1 ... 0.9]",
)
@click.option(
    "--sites", type=Kinds(), help="mlp or attention; one after the other.  [default: all that the family has]"
)
@click.option(
    "--select",
    type=click.Choice(["random", "ranked"]),
    default="random",
    show_default=True,
    help="Neurons at random, or those of the lowest --score first.",
)
@click.option(
    "--score",
    type=click.Choice(["variance", "deviation", "activation-norm", "weight-norm"]),
    default="variance",
    show_default=True,
    help="What ranks them.",
)
@click.option("--seeds", default=3, show_default=True, help="Random choices of neurons; a ranked study has one.")
@calibration_option
@click.option("--text", metavar="FILE", help="Text to evaluate on.  [default: other windows of the calibration]")
@click.option(
    "--images",
    metavar="FOLDER",
    help="Labelled images to evaluate on, FOLDER/<label>/<image>; without --calibration, others of them calibrate.",
)
@click.option("--samples", default=8, show_default=True, help="Windows (or images) of calibration.")
@click.option(
    "--windows",
    type=int,
    help="Windows (or images) to evaluate on, others than those of calibration.  [default: as --samples]",
)
@computing_options
@revision_option
@click.option("--force", is_flag=True, help="Begin anew where the folder holds another study.")
@talk_options
def ablate(as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure what held neurons cost: cross-entropy and top-1, over fills, fractions and kinds of site.

    Writes tables (CSV and JSON) and a picture, and nothing else; the model stays as it is. A neuron of attention is one
    input of its output projection. By default the model runs some 270 times; the second example is a first look.
    A study that was stopped goes on where it was.

    \b
    Examples:
      prune-peak ablate --model HuggingFaceTB/SmolLM2-135M --calibration notes.txt
      prune-peak ablate --model ./my-model --fill peak --fill mean --fraction 0.3 --seeds 1
    """
    _settle(quiet)
    from .study import ablate as run

    try:
        study = run(**{name: value for name, value in options.items() if value not in ((), None)})
    except KeyboardInterrupt:
        click.echo("Interrupted. The cells so far are kept; the same command goes on from there.", err=True)
        sys.exit(130)
    if as_json:
        click.echo(json.dumps(study.to_json(), indent=2))
    else:
        print_study(study)


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--text", metavar="FILE", help="Text to measure perplexity on (masked LM: accuracy at masked tokens).")
@click.option("--images", metavar="FOLDER", help="Images to measure accuracy on, by label: FOLDER/LABEL/IMAGE.")
@click.option("--windows", default=24, show_default=True, help="At most so many windows, from the start of the text.")
@click.option("--sequence-length", default=512, show_default=True, help="Tokens per window.")
@click.option("--latency", is_flag=True, help="Time prefill and cached decoding, the models in turns.")
@click.option("--tasks", metavar="NAME,...", help="Tasks of lm-evaluation-harness, or YAML files that define some.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type to compute in.  [default: that of each model's files; float32 for float16]",
)
@revision_option
@talk_options
def evaluate(
    models: tuple[str, ...],
    text: str | None,
    images: str | None,
    windows: int,
    sequence_length: int,
    latency: bool,
    tasks: str | None,
    as_json: bool,
    quiet: bool,
    **common: Any,
) -> None:
    """Measure models side by side: the first is what the others are compared with.

    \b
    Examples:
      prune-peak evaluate SmolLM2-135M SmolLM2-135M-peak-0.3 --text test.txt
      prune-peak evaluate SmolLM2-135M SmolLM2-135M-peak-0.5 --latency
      prune-peak evaluate SmolLM2-135M-peak-0.3 --tasks arc_easy,hellaswag
    """
    _settle(quiet)
    exam = {"text": text, "images": images}
    if not any(exam.values()) and not latency and tasks is None:
        raise UsageError("nothing to measure; pass --text FILE, --images FOLDER, --latency or --tasks NAME,....")
    from .comparison import evaluate as run
    from .latency import measure_latency
    from .tasks import run_tasks

    comparison = None
    if any(exam.values()):
        comparison = run(models, **exam, windows=windows, sequence_length=sequence_length, **common)
    speeds = measure_latency(models, **common) if latency else []
    scores = run_tasks(models, tasks.split(","), **common) if tasks is not None else []
    if as_json:
        answer: dict[str, Any] = {} if comparison is None else {"comparison": comparison.to_json()}
        answer |= {"latency": [speed.to_json() for speed in speeds]} if speeds else {}
        answer |= {"tasks": [score.to_json() for score in scores]} if scores else {}
        click.echo(json.dumps(answer, indent=2))
        return
    if comparison is not None:
        print_comparison(comparison)
    if speeds:
        print_latency(speeds)
    if scores:
        print_scores(scores)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Make the repository a private one.")
@click.option("--revision", help="Branch to push to, made if it is not there.  [default: main]")
@click.option("--commit-message", help="First line of the commit.")
@talk_options
def push(folder: Path, repo_id: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Verify a folder that `compress` wrote, push it to the Hub, and print its address.

    Who pushes is who `hf auth login` or HF_TOKEN says. After a failure the same command goes on where it stopped.

    \b
    Example:
      prune-peak push SmolLM2-135M-peak-0.3 me/SmolLM2-135M-peak-0.3 --private
    """
    _settle(quiet)
    from .hub import push as run

    address = run(folder, repo_id, **options)
    click.echo(json.dumps({"url": address}, indent=2) if as_json else address)


@main.command()
@click.option("--model", required=True, help="A model's folder or Hub id.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write.  [default: ./<name>-analysis]")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="self|FILE.txt|FILE.jsonl|IMAGES|DATASET",
    help="Text (or folder of images) to measure on; several are compared with each other. Repeatable.  "
    "[default: self, the model's own text]",
)
@click.option(
    "--neuron",
    "neurons",
    multiple=True,
    metavar="KIND:BLOCK:NEURON",
    help="A neuron to draw beside the most striking ones, such as mlp:3:17. Repeatable.",
)
@click.option("--samples", default=16, show_default=True, help="Windows of each text to measure on.")
@click.option("--windows", default=8, show_default=True, help="Others of each text to evaluate on, with several texts.")
@computing_options
@revision_option
@click.option("--force", is_flag=True, help="Write into the folder though it exists.")
@talk_options
def analyze(as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure how neurons are distributed, by site, head and block; with several texts, whether peaks and means hold.

    Writes tables (CSV and JSON), pictures and a report that any browser opens offline.

    \b
    Examples:
      prune-peak analyze --model HuggingFaceTB/SmolLM2-135M --text notes.txt
      prune-peak analyze --model ./my-model --text news.txt --text code.txt
    """
    _settle(quiet)
    from .analysis import analyze as run

    analysis = run(**{name: value for name, value in options.items() if value not in ((), None)})
    if as_json:
        click.echo(json.dumps(analysis.to_json(), indent=2))
    else:
        print_analysis(analysis)


@main.command("export-gguf")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@talk_options
def export_gguf(folder: Path, file: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Write a folder as one GGUF file, for llama.cpp and what is built on it (needs the extra `gguf`).

    Of Llama, Granite, SmolLM3, Mistral and Qwen2 with a byte-level BPE tokenizer, compressed or not.

    \b
    Example:
      prune-peak export-gguf SmolLM2-135M-peak-0.3 small.gguf
    """
    _settle(quiet)
    from .gguf_file import export_gguf as run

    path = run(folder, file, force=force)
    size = path.stat().st_size
    if as_json:
        click.echo(json.dumps({"output": str(path), "bytes": size}, indent=2))
    else:
        click.echo(f"Written to {path} ({size:,} bytes), arch llama.")


def _settle(quiet: bool) -> None:
    """Silence the libraries' chatter, and our own if asked to."""
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"
    talk = logging.StreamHandler()
    talk.setFormatter(OneLine("%(message)s"))
    logging.basicConfig(handlers=[talk], level=logging.ERROR)
    logging.getLogger("prune_peak").setLevel(logging.ERROR if quiet else logging.WARNING)
    # what torchao does as transformers imports it, where it is installed, is no concern of the user's
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _estimate(options: dict[str, Any], as_json: bool) -> None:
    from .inspection import estimate

    unused = ("output", "score", "evaluate", "force")
    inspection, cost = estimate(**{name: value for name, value in options.items() if name not in unused})
    if as_json:
        click.echo(json.dumps(inspection.to_json() | cost.to_json(), indent=2))
    else:
        print_inspection(inspection, cost)
