"""One function per command: parse, call, print. Results go to stdout, progress and warnings to stderr."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError, one_line
from ..evaluation.options import EvaluateCommand
from ..healing.options import HealCommand, HealOptions
from ..option_fields import spell_command
from ..options import (
    CalibrateOptions,
    CompressCommand,
    DataOptions,
    ExportOptions,
    InspectOptions,
    PushOptions,
    VerifyOptions,
)
from .output import (
    print_comparison,
    print_compression,
    print_healing,
    print_healing_cost,
    print_inspection,
    print_latency,
    print_scores,
    print_talk,
)
from .parameters import echo_json, model_argument, models_argument, options_of, output_options
from .study_commands import ablate, analyze

if TYPE_CHECKING:
    from ..compression import CompressionResult
    from ..recovery import HealResult

FOLDER = click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))


@click.command()
@model_argument
@options_of(CompressCommand)
@output_options
def compress(
    model: str, as_json: bool, dry_run: bool, push_to_hub: str | None, private: bool, heal: bool, **options: Any
) -> None:
    """Prune neurons, fold their peaks, refit the rest, and write a smaller checkpoint for stock transformers.

    DATA is `self` (text that the model generates), a file (plain text, .jsonl, .json,
    .csv or .parquet with a column `text` or `messages`; .gz of these), a folder of images, or a Hub data set.

    \b
    Examples:
      prune-peak compress HuggingFaceTB/SmolLM2-135M --ratio 0.3
      prune-peak compress ./my-model --ratio 0.2 --calibration notes.txt --output smaller
      prune-peak compress ./my-model --ratio 0.3 --calibration notes.txt --heal
      prune-peak compress ./my-model --ratio mlp=0.2,attention=0.33
      prune-peak compress ./my-model --target-params 0.8 --sites mlp,attention
    """
    if dry_run:
        from ..inspection import estimate

        inspection, cost = estimate(model, **options)
        echo_json(inspection.to_json() | cost.to_json()) if as_json else print_inspection(inspection, cost)
        return
    if private and push_to_hub is None:
        raise UsageError("--private applies to a push; add --push-to-hub REPO_ID.")
    from ..compression import compress as run
    from ..hub import check_login, push

    if push_to_hub is not None:
        check_login(push_to_hub)
    result = run(model, **options)
    if not as_json:
        print_compression(result)
    healed = _heal_result(model, result, options) if heal else None
    if healed is not None and not as_json:
        click.echo()
        print_healing(healed)
    output = result.output if healed is None else healed.output
    address = None if push_to_hub is None else push(output, push_to_hub, private=private)
    if as_json:
        parts = {} if healed is None else {"healed": healed.to_json()}
        echo_json(result.to_json() | parts | ({} if address is None else {"url": address}))
    elif address is not None:
        click.echo(f"\nPushed to {address}")
    for warning in result.warnings:
        click.secho(f"WARNING: {warning}", fg="red", bold=True, err=True)


def _heal_result(model: str, result: "CompressionResult", options: Mapping[str, Any]) -> "HealResult | None":
    from ..data.data_sets import reading_of
    from ..recovery import heal as run

    names = ("revision", "seed", "max_memory", "device", "force")
    data = options["calibration"][0]
    given = DataOptions(**{item.name: options[item.name] for item in fields(DataOptions)})
    reading = asdict(reading_of(data, given))
    return run(result.output, original=model, data=data, **reading, **{name: options[name] for name in names})


@click.command()
@model_argument
@options_of(CalibrateOptions)
@output_options
def calibrate(model: str, as_json: bool, **options: Any) -> None:
    """Measure a model once; `compress --stats` then prunes it at any ratio without measuring again.

    \b
    Example:
      prune-peak calibrate ./my-model --output my-model.stats --calibration notes.txt --covariances
      prune-peak compress ./my-model --ratio 0.2 --stats my-model.stats
    """
    from ..stats.calibration import calibrate as run

    statistics = run(model, **options)
    windows = statistics.windows
    images = windows.calibration.is_floating_point()
    unit, amount = ("images", len(windows.calibration)) if images else ("tokens", windows.calibration.numel())
    result = {"output": str(options["output"]), "sites": statistics.sites, unit: amount}
    if as_json:
        echo_json(result | {"options": dict(statistics.options)})
    else:
        click.echo(f"{statistics.sites} sites measured on {amount:,} {unit} of {windows.source}.")
        click.echo(f"Written to {result['output']}.")


@click.command()
@FOLDER
@options_of(HealCommand)
@output_options
def heal(folder: Path, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Train a folder that `compress` wrote to predict what the original predicts, and write another folder.

    The class and the shapes stay. Without --data, it learns on the data of the calibration; a model that was calibrated
    on its own text learns on text and chat that the original writes. An encoder without a head learns the original's
    hidden states. The best state on held-out data is kept; where nothing gets better, nothing is written. A run that
    was stopped resumes.

    \b
    Examples:
      prune-peak heal SmolLM2-135M-peak-0.3
      prune-peak heal ./smaller --original ./my-model --data notes.txt --tokens 200k
      accelerate launch -m prune_peak heal ./smaller --original ./my-model
    """
    from ..healing.job import prepare_heal
    from ..recovery import heal as run

    if dry_run:
        job = prepare_heal(folder, HealOptions(**options))
        cost = {"method": job.method, "minutes": round(job.minutes, 1), "memory": job.memory, "disk": job.disk}
        echo_json(cost) if as_json else print_healing_cost(cost)
        return
    result = run(folder, **options)
    if result is not None:
        echo_json(result.to_json()) if as_json else print_healing(result)


@click.command()
@model_argument
@options_of(InspectOptions)
@output_options
def inspect(model: str, as_json: bool, **options: Any) -> None:
    """Show what can be pruned from a model and what it would save (at --ratio 0.3 by default), from its config only.

    \b
    Example:
      prune-peak inspect facebook/opt-1.3b --ratio 0.2
    """
    from ..inspection import inspect as run

    inspection = run(model, **options)
    echo_json(inspection.to_json()) if as_json else print_inspection(inspection)


@click.command()
@FOLDER
@options_of(VerifyOptions)
@output_options
def verify(folder: Path, original: str | None, revision: str | None, data: str | None, as_json: bool) -> None:
    """Check that a folder is what `compress` wrote, and that it computes what the original with held neurons computes.

    Refitted weights are taken from the folder; an evaluation shows how good they are. Of a folder that `heal` wrote, it
    measures the divergence from the original again.

    Exits with 0 if every check passes, with 3 if one fails.

    \b
    Example:
      prune-peak verify opt-1.3b-peak-0.3 --original facebook/opt-1.3b
    """
    from ..models.loading import open_model
    from ..verification import verify as run

    result = run(folder, None if original is None else open_model(original, revision), data=data)
    if as_json:
        echo_json({"passed": result.passed, "checks": result.checks})
    else:
        for check in result.checks:
            click.echo(one_line(f"{'ok' if check['passed'] else 'FAILED':>6}  {check['check']}: {check['seen']}"))
        failed = sum(not check["passed"] for check in result.checks)
        click.echo(f"failed: {failed} of {len(result.checks)} checks" if failed else "passed")
        if original is None:
            click.echo("Outputs were not compared; pass --original MODEL for that.", err=True)
    if not result.passed:
        sys.exit(3)


@click.command()
@models_argument
@options_of(EvaluateCommand)
@output_options
def evaluate(
    models: tuple[str, ...],
    as_json: bool,
    latency: bool,
    talk: bool,
    prompts: Path | None,
    tasks: tuple[str, ...] | None,
    report: Path | None,
    **options: Any,
) -> None:
    """Measure models side by side; the others are compared with the first.

    \b
    Examples:
      prune-peak evaluate SmolLM2-135M SmolLM2-135M-peak-0.3 --data test.txt
      prune-peak evaluate SmolLM2-135M SmolLM2-135M-peak-0.3 --talk --report talk.html
      prune-peak evaluate SmolLM2-135M SmolLM2-135M-peak-0.5 --latency
      prune-peak evaluate SmolLM2-135M-peak-0.3 --tasks arc_easy,hellaswag
    """
    given = EvaluateCommand(latency=latency, talk=talk, prompts=prompts, tasks=tasks, report=report, **options)
    from ..evaluation.comparison import evaluate as run
    from ..evaluation.latency import measure_latency
    from ..evaluation.lm_eval_tasks import run_tasks
    from ..evaluation.page import write_page
    from ..evaluation.talk import evaluate_talk
    from ..progress import next_stage, stages

    common = {name: options[name] for name in ("dtype", "revision")}
    with stages(sum((bool(options["data"]), latency, talk or bool(prompts), tasks is not None))):
        comparisons: list[Any] = run(models, **options) if options["data"] else []
        next_stage(bool(comparisons))
        speeds = measure_latency(models, **common) if latency else []
        next_stage(latency)
        answers = evaluate_talk(models, prompts, options["revision"]) if talk or prompts else []
        next_stage(bool(answers))
        scores = run_tasks(models, tasks, **common) if tasks is not None else []
    if report is not None:
        command = f"prune-peak evaluate {shlex.join(models)} {spell_command(given)}"
        write_page(report, comparisons, answers, speeds, scores, command)
    if as_json:
        parts: dict[str, list[Any]] = {"comparisons": comparisons, "talk": answers, "latency": speeds, "tasks": scores}
        echo_json({name: [part.to_json() for part in each] for name, each in parts.items() if each})
        return
    for comparison in comparisons:
        print_comparison(comparison)
    if answers:
        print_talk(answers)
    if speeds:
        print_latency(speeds)
    if scores:
        print_scores(scores)
    if report is not None:
        click.echo(f"Written to {report}.")


@click.command()
@FOLDER
@click.argument("repo_id")
@options_of(PushOptions)
@output_options
def push(folder: Path, repo_id: str, as_json: bool, **options: Any) -> None:
    """Verify a folder that `compress` wrote, push it to the Hub, and print its address.

    The account is that of `hf auth login` or HF_TOKEN. After a failure the same command resumes.

    \b
    Example:
      prune-peak push SmolLM2-135M-peak-0.3 me/SmolLM2-135M-peak-0.3 --private
    """
    from ..hub import push as run

    address = run(folder, repo_id, **options)
    echo_json({"url": address}) if as_json else click.echo(address)


@click.command()
@FOLDER
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@options_of(ExportOptions)
@output_options
def export(folder: Path, file: Path, as_json: bool, **options: Any) -> None:
    """Write a folder as one file of another format, such as GGUF for llama.cpp (needs the extra `gguf`).

    GGUF files are written of Llama, Granite, SmolLM3, Mistral and Qwen2 models with a byte-level BPE tokenizer,
    compressed or not.

    \b
    Example:
      prune-peak export SmolLM2-135M-peak-0.3 small.gguf --format gguf
    """
    from ..export.formats import export_model

    path = export_model(folder, file, **options)
    size = path.stat().st_size
    echo_json({"output": str(path), "bytes": size}) if as_json else click.echo(f"Written to {path} ({size:,} bytes).")


COMMANDS = {
    command.name: command
    for command in (compress, heal, calibrate, inspect, verify, evaluate, analyze, ablate, push, export)
}
