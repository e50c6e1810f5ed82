"""Options stand once: command line, Python, recipe, card and statistics file take them from options.py."""

import inspect
import json
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from conftest import EXAMPLES

import prune_peak
from prune_peak import options
from prune_peak.cli import commands
from prune_peak.cli.main import SUMMARIES, main
from prune_peak.conversion.classes import OUTPUT_CLASSES, register
from prune_peak.errors import PrunePeakError, UsageError
from prune_peak.evaluation.options import EvaluateCommand, EvaluateOptions
from prune_peak.export.card import reproduce
from prune_peak.healing.options import HealCommand, HealOptions
from prune_peak.models.families import FAMILIES, Family
from prune_peak.option_fields import Options, flag, spell_command
from prune_peak.options import (
    FILLS,
    FORMATS,
    SCORES,
    CalibrationOptions,
    CompressOptions,
    VerifyOptions,
)
from prune_peak.pruning import scores
from prune_peak.pruning.scores import Candidates
from prune_peak.studies.options import AblateOptions, AnalyzeOptions

MODEL = EXAMPLES / "llama-mini"
FEW = {"samples": 4, "sequence_length": 64}
DOCS = EXAMPLES.parent / "docs" / "cli.md"
# command: the options of the function behind it
COMMANDS: dict[str, type[Options]] = {
    "ablate": AblateOptions,
    "analyze": AnalyzeOptions,
    "calibrate": options.CalibrateOptions,
    "compress": options.CompressCommand,
    "evaluate": EvaluateCommand,
    "export": options.ExportOptions,
    "heal": HealCommand,
    "inspect": options.InspectOptions,
    "push": options.PushOptions,
    "verify": options.VerifyOptions,
}
FUNCTIONS = {
    "ablate": AblateOptions,
    "analyze": AnalyzeOptions,
    "calibrate": options.CalibrateOptions,
    "compress": options.CompressOptions,
    "evaluate": EvaluateOptions,
    "export_model": options.ExportOptions,
    "heal": HealOptions,
    "inspect": options.InspectOptions,
    "push": options.PushOptions,
}


def run(*words: object) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def describe_commands() -> str:
    """Every command with its help."""
    parts = ["# Commands\n\nMade from `prune-peak COMMAND --help` by `make docs-generated`.\n"]
    for name in ("", *SUMMARIES):
        result = CliRunner().invoke(main, [*name.split(), "--help"], prog_name="prune-peak", terminal_width=100)
        assert result.exit_code == 0
        parts.append(f"## prune-peak {name}".rstrip() + f"\n\n```\n{result.output.rstrip()}\n```\n")
    return "\n".join(parts)


def test_command_reference(request: pytest.FixtureRequest) -> None:
    """`make docs-generated` writes it."""
    if request.config.getoption("--write-docs"):
        DOCS.write_text(describe_commands())
    assert DOCS.read_text() == describe_commands(), "run `make docs-generated`"


def describe_function(name: str) -> str:
    """The signature without types, and the docstring with its sections as headings and lists."""
    function = getattr(prune_peak, name)
    signature = inspect.signature(function)
    shown = [part for part in signature.parameters.values() if part.name != "execution"]  # for the package itself
    parts = [part.replace(annotation=inspect.Parameter.empty) for part in shown]
    short = signature.replace(parameters=parts, return_annotation=inspect.Signature.empty)
    lines = []
    for line in (inspect.getdoc(function) or "").splitlines():
        if match := re.fullmatch(r"(Args|Returns|Raises|Example):", line):
            lines += [f"**{match[1]}**", ""]
        elif lines and (match := re.fullmatch(r"    ([\w, ]+): (.*)", line)):
            lines.append(f"- `{match[1]}`: {match[2]}".replace("<", "&lt;"))
        else:
            lines.append(re.sub(r" +# doctest.*", "", line))
    call = textwrap.fill(f"prune_peak.{name}{short}", 90, subsequent_indent="    ", break_on_hyphens=False)
    return f"## {name}\n\n```\n{call}\n```\n\n" + "\n".join(lines) + "\n"


def describe_python() -> str:
    """The functions of the package; their options are those of the commands."""
    head = "# Python\n\nMade from the docstrings of `prune_peak` by `make docs-generated`. The options of a function\n"
    head += "are those of the command of its name, in [the reference of the command line](cli.md).\n"
    return "\n".join([head, *(describe_function(name) for name in sorted(FUNCTIONS | {"verify": VerifyOptions}))])


def test_python_reference(request: pytest.FixtureRequest) -> None:
    """`make docs-generated` writes it."""
    path = DOCS.with_name("python.md")
    if request.config.getoption("--write-docs"):
        path.write_text(describe_python())
    assert path.read_text() == describe_python(), "run `make docs-generated`"


def test_every_command_has_its_options() -> None:
    assert SUMMARIES.keys() == commands.COMMANDS.keys() == COMMANDS.keys()
    for name, kind in COMMANDS.items():
        parameters = {part.name for part in commands.COMMANDS[name].params}
        assert {item.name for item in fields(kind)} <= parameters, name
        assert len(SUMMARIES[name]) < 70


@pytest.mark.parametrize("name", FUNCTIONS)
def test_python_has_the_same_options(name: str) -> None:
    function = getattr(prune_peak, name)
    parameters = inspect.signature(function).parameters
    for item in fields(FUNCTIONS[name]):
        assert item.name in parameters
        if item.default is not MISSING and parameters[item.name].kind is inspect.Parameter.KEYWORD_ONLY:
            assert parameters[item.name].default == item.default
        assert f"{item.name}: {item.metadata['help']}" in function.__doc__


def test_recipe_card_and_statistics_take_the_names_of_the_options(tmp_path: Path, text: Path) -> None:
    prune_peak.compress(MODEL, 0.3, tmp_path / "pruned", calibration=str(text), **FEW)
    recipe = json.loads((tmp_path / "pruned" / "prune_peak.json").read_text())
    names = {item.name for item in fields(CompressOptions)}
    assert recipe["options"].keys() == names - {"output", "stats", "revision", "force"}
    known = {name for part in commands.COMMANDS["compress"].params for name in (*part.opts, *part.secondary_opts)}
    words = reproduce(recipe).replace("\\\n", " ").split()
    assert words[:3] == ["prune-peak", "compress", "./llama-mini"]
    assert {word for word in words if word.startswith("--")} <= known
    assert "--ratio" in words
    statistics = prune_peak.calibrate(MODEL, tmp_path / "model.stats", calibration=str(text), **FEW)
    assert statistics.options.keys() == {item.name for item in fields(CalibrationOptions)} - {"revision"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--samples", 0], "--samples 0: expected at least 1"),
        (["--sequence-length", 1], "--sequence-length 1: expected at least 2"),
        (["--multiple-of", 0], "--multiple-of 0: expected at least 1"),
        (["--no-refit", "--score", "elimination"], "requires the refit"),
        (["--output", MODEL], "contains the model itself"),
        (["--no-refit", "--stats", "PLAIN", "--sites", "mlp,attention", "--target-params", 0.8], "no covariances"),
        (["--stats", "PLAIN"], "no covariances"),
        (["--evaluate", "none.txt"], "none.txt does not exist"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value[:2])),
)
def test_dry_run_refuses_what_compress_refuses(
    words: list[object], expected: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "PLAIN" in words:
        assert run("calibrate", MODEL, "--output", "PLAIN", "--calibration", text, "--samples", 4).exit_code == 0
    common = ["compress", MODEL, "--calibration", text, *words]
    common += [] if "--target-params" in words else ["--ratio", 0.3]
    results = [run(*common, *more) for more in ([], ["--dry-run"])]
    assert results[0].exit_code == results[1].exit_code in (1, 2)
    assert all(expected in result.stderr for result in results)


def test_model_is_an_argument_or_an_option() -> None:
    by_place, by_name = run("inspect", MODEL), run("inspect", "--model", MODEL)
    assert by_place.exit_code == by_name.exit_code == 0
    assert by_place.stdout == by_name.stdout
    for words in (["inspect"], ["inspect", MODEL, "--model", MODEL], ["evaluate", "--data", "text.txt"]):
        refused = run(*words)
        assert refused.exit_code == 2
        assert "expected" in refused.stderr


def test_registered_score(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "SCORES", SCORES)  # restored with what is registered below
    monkeypatch.setitem(SCORES, "last", None)

    @scores.register("last")
    def last(neurons: Candidates) -> Any:
        return -neurons.summary.mean.new_ones(neurons.site.neurons).cumsum(0)

    assert "last" in run("compress", "--help").output
    words = ("--score", "last", "--no-refit", "--calibration", text, "--samples", 4, "-q", "--json")
    result = run("compress", MODEL, "--ratio", 0.3, "--output", tmp_path / "pruned", *words)
    assert result.exit_code == 0, result.output
    recipe = json.loads((tmp_path / "pruned" / "prune_peak.json").read_text())
    assert {site["score"] for site in recipe["sites"].values()} == {"last"}
    plan = prune_peak.verification.read_plan(tmp_path / "pruned")
    assert all(site_plan.keep.tolist() == list(range(len(site_plan.keep))) for site_plan in plan.values())


def test_registered_fill(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILLS, "upper", lambda summary: summary.mean + summary.variance.sqrt())
    assert "upper" in run("compress", "--help").output
    result = prune_peak.compress(
        MODEL, 0.3, tmp_path / "pruned", fill="upper", refit=False, calibration=str(text), **FEW
    )
    assert result.verification.passed
    assert result.fills == {"upper": 3}


def test_registered_output_class(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2 has no bias on its MLP; Cohere's place in the table is taken by a class that a test registers."""
    monkeypatch.setitem(OUTPUT_CLASSES, "starcoder2", None)
    monkeypatch.setitem(FAMILIES, "llama", Family(**vars(FAMILIES["llama"]) | {"output_classes": ("starcoder2",)}))
    asked = []

    @register("starcoder2")
    def settings(config: dict[str, Any]) -> dict[str, Any]:
        asked.append(config["num_hidden_layers"])
        return {}

    refused = run("compress", MODEL, "--ratio", 0.3, "--output-class", "starcoder2", "--calibration", text, "--dry-run")
    assert asked
    assert "starcoder2 does not support" in refused.stderr


def test_registered_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "listing.py").write_text(
        "def export(folder, file):\n    file.write_text(str(len(list(folder.iterdir()))))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(FORMATS, "listing", "listing")
    assert "listing" in run("export", "--help").output
    result = run("export", MODEL, tmp_path / "files.txt", "--format", "listing")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "files.txt").read_text() == str(len(list(MODEL.iterdir())))
    assert run("export", MODEL, tmp_path / "files.txt", "--format", "listing").exit_code == 1
    assert "'none' is not one of 'gguf'" in run("export", MODEL, tmp_path / "other", "--format", "none").stderr


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (AblateOptions, {"fraction": float("nan")}, "fraction=nan"),
        (CompressOptions, {"ratio": 0.3, "calibration": []}, "calibration: expected at least one data set"),
        (AnalyzeOptions, {"data": []}, "data: expected at least one data set"),
    ],
)
def test_invalid_values(kind: type[Options], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kind(**values)


@pytest.mark.parametrize(
    ("words", "options", "told"),
    [
        (["--samples", "0"], {"samples": 0}, ("--samples 0: expected", "samples=0: expected")),
        (
            ["--no-refit", "--score", "elimination"],
            {"refit": False, "score": "elimination"},
            ("--no-refit", "refit=False"),
        ),
        (
            ["--keep-shape", "--target-params", "0.5"],
            {"keep_shape": True, "target_params": 0.5},
            ("--keep-shape", "keep_shape=True"),
        ),
        (["--output-class", "mamba"], {"output_class": "mamba"}, ("--output-class mamba:", "output_class='mamba':")),
        (["--output", "there"], {"output": "there"}, ("pass --force to", "pass force=True to")),
    ],
)
def test_advice_is_for_who_asked(
    words: list[str], options: dict[str, Any], told: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option in a command, an argument in Python; the usage is that of the command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("precious")
    budget = {} if "target_params" in options else {"ratio": 0.3}
    result = run("compress", MODEL, *[f"--{name}={value}" for name, value in budget.items()], *words)
    assert told[0] in result.stderr
    assert "Traceback" not in result.stderr
    if result.exit_code == 2:
        assert "Usage: main compress [OPTIONS] MODEL\n" in result.stderr
    with pytest.raises(PrunePeakError) as error:
        prune_peak.compress(str(MODEL), **budget, **options)
    assert told[1] in str(error.value)
    assert "--" not in str(error.value)


def test_one_value_for_several() -> None:
    assert AblateOptions(fraction=0.3).fraction == (0.3,)  # type: ignore[arg-type]
    assert AblateOptions(calibration="a.txt").calibration == ("a.txt",)  # type: ignore[arg-type]


def test_options_are_spelled_as_they_were_given() -> None:
    given = AblateOptions(
        fill=("peak", "mean"), sites=("mlp",), fraction=(0.3,), data=("my text.txt",), seeds=1, force=True
    )
    context = commands.COMMANDS["ablate"].make_context("ablate", ["MODEL", *shlex.split(spell_command(given))])
    values = {item.name: context.params[item.name] for item in fields(AblateOptions)}
    assert AblateOptions(**values) == given


def test_several_data_sets_need_their_samples(tmp_path: Path, text: Path) -> None:
    (tmp_path / "short.txt").write_text(text.read_text()[:1000])
    words = ["compress", str(EXAMPLES / "llama-mini"), "--ratio", "0.3", "--output", str(tmp_path / "cut"), "-q"]
    words += ["--calibration", str(text), "--calibration", str(tmp_path / "short.txt"), "--sequence-length", "32"]
    few = CliRunner().invoke(main, [*words, "--samples", "1"])
    assert "expected at least one for each of the 2 data sets" in few.stderr
    short = CliRunner().invoke(main, [*words, "--samples", "400"])
    assert "expected 200, as of each data set. Pass a smaller --samples" in short.stderr
    assert not (tmp_path / "cut").exists()


def test_flags_are_spelled_as_options() -> None:
    for name, kind in COMMANDS.items():
        flags = {
            word for part in commands.COMMANDS[name].params if isinstance(part, click.Option) for word in part.opts
        }
        assert {flag(item.name) for item in fields(kind)} <= flags


def modules_after(*words: str) -> tuple[str, set[str]]:
    """The error of a command in a process of its own, and the modules that it imported beyond those of click."""
    code = (
        "import sys, atexit, click\n"
        "before = set(sys.modules)\n"
        "atexit.register(lambda: print('MODULES', *(sys.modules.keys() - before)))\n"
        "from prune_peak.cli.main import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    return done.stderr, set(done.stdout.rpartition("MODULES")[2].split())


def test_help_imports_little_more_than_click() -> None:
    _, modules = modules_after("--help")
    assert "prune_peak.cli.main" in modules
    assert "prune_peak.options" not in modules
    assert len(modules) < 40  # older releases of click import some more


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compress", MODEL, "--ratio", "30"], "Did you mean 0.3?"),
        (["compress", MODEL, "--ratio", "0.3", "--fill", "nose"], "'nose' is not one of"),
        (["compress", MODEL], "how much to prune"),
        (["compress", f"{MODEL}/none", "--ratio", "0.3"], "neither a folder nor a Hub id"),
        (["compress", MODEL, "--ratio", "0.3", "--calibration", "none.txt"], "none.txt does not exist"),
        (["verify", "none"], "'none' does not exist"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[-1],
)
def test_what_is_refused_at_once(words: list[str], expected: str) -> None:
    error, modules = modules_after(*map(str, words))
    assert expected in error
    assert "prune_peak.options" in modules
    assert modules.isdisjoint({"torch", "transformers"})


def test_per_cent_is_understood() -> None:
    assert "Did you mean 0.3?" in run("compress", MODEL, "--ratio", "30%").stderr


def test_a_dry_run_reads_tables(tmp_path: Path) -> None:
    table = tmp_path / "notes.csv"
    table.write_text("id,body\n1,some text\n")
    told = run("compress", MODEL, "--ratio", 0.3, "--calibration", table, "--dry-run")
    assert told.exit_code == 1
    assert "has the columns id, body" in told.stderr
