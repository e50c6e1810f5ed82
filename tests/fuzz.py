"""Damage valid files in ways that are drawn, read them, and see that nothing but our own errors comes of it.

    python tests/fuzz.py --minutes 10                     # every parser in turn
    python tests/fuzz.py checkpoint recipe --minutes 1

hypothesis draws the damage; where atheris is installed, it steers what is drawn by the code that is reached. What is
found is printed once for every place it comes from, and kept in --found with the damaged file; a find belongs into the
table of `hostile.py`. Exits with 1 if there was one.
"""

import itertools
import json
import logging
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":  # pytest imports it for its doctests
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

try:
    import atheris
except ImportError:
    atheris = None

if atheris is not None:
    with atheris.instrument_imports(include=["prune_peak"]):
        pass
import click
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from transformers.utils import logging as transformers_logging
from valid import BUDGET, make_all

from prune_peak.cli.parameters import Bytes, Names, Ratio
from prune_peak.compression import compress
from prune_peak.data.images import choose_images
from prune_peak.data.texts import read_windows
from prune_peak.errors import PrunePeakError
from prune_peak.export.recipe import read_plan, read_recipe
from prune_peak.inspection import inspect
from prune_peak.models.loading import Model, open_model
from prune_peak.options import AUTO, Budget, PruningOptions
from prune_peak.pruning.budget import find_allocations
from prune_peak.pruning.site_pruning import plan_site
from prune_peak.sites.finding import find_sites
from prune_peak.stats.stats_file import load_statistics
from prune_peak.studies.analysis import _find_neuron
from prune_peak.studies.trials import TrialLog
from prune_peak.verification import verify

SECONDS = 60  # that one input may take
MEMORY = 6 * 2**30  # bytes of address space, of which the imports take one

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 10**9, 2**63, 10**40, 0.5, -1e308, math.nan, math.inf, "", "wide",
    "\x1b]0;x\x07\n", "../../secret", "/dev/zero", "9" * 5000, "\ud800", [], {}, [[]], [0], {"": {}}, {"a": None},
)  # fmt: skip


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A file with bits flipped, parts cut out, repeated, inserted, moved, or the end gone."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.sampled_from((1, 2, 4, 8, 64, 1024)))
        part = data[at : at + size]
        match draw(st.sampled_from(("flip", "flip", "cut", "repeat", "insert", "splice", "truncate"))):
            case "flip":
                data = data[:at] + bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in part[:4]) + data[at + 4 :]
            case "cut":
                data = data[:at] + data[at + size :]
            case "repeat":
                data = data[:at] + part * draw(st.sampled_from((2, 100))) + data[at:]
            case "insert":
                data = data[:at] + draw(st.binary(max_size=size)) + data[at:]
            case "splice":
                other = draw(st.integers(0, len(data)))
                data = data[:at] + data[other : other + size] + data[at + size :]
            case "truncate":
                data = data[:at]
    return data


@st.composite
def damaged_value(draw: st.DrawFn, value: Any) -> Any:
    """What JSON holds, with one place of it changed: an odd value, a key gone or new, a copy of another, a nest."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)) > 1:
        key = draw(st.sampled_from(sorted(value)))
        match draw(st.sampled_from(("deeper", "deeper", "deeper", "drop", "rename", "copy"))):
            case "deeper":
                return value | {key: draw(damaged_value(value[key]))}
            case "drop":
                return {name: other for name, other in value.items() if name != key}
            case "rename":
                name = draw(st.sampled_from(("", "x\n\x1b[2J", *sorted(value))))
                return {(name if other == key else other): held for other, held in value.items()}
            case "copy":
                return value | {key: value[draw(st.sampled_from(sorted(value)))]}
    if isinstance(value, list) and value and draw(st.integers(0, 9)) > 1:
        at = draw(st.integers(0, len(value) - 1))
        middle = draw(st.sampled_from(([], [value[at], value[at]], [draw(damaged_value(value[at]))])))
        return [*value[:at], *middle, *value[at + 1 :]]
    if isinstance(value, int | float) and draw(st.booleans()):
        return draw(st.integers() | st.floats() | st.integers(-2, 2).map(lambda step: value + step))
    if isinstance(value, str) and draw(st.booleans()):
        return draw(st.text(max_size=20) | st.just(value * 2) | st.just(value[:-1]))
    return draw(st.sampled_from((*ODD, [value], {"x": value})))


@st.composite
def damaged_json(draw: st.DrawFn, data: bytes) -> bytes:
    value = json.loads(data)
    for _ in range(draw(st.integers(1, 3))):
        value = draw(damaged_value(value))
    if draw(st.integers(0, 30)) == 30:
        return b"[" * 100_000 + data
    return json.dumps(value).encode()


@st.composite
def damaged_tensors(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file whose header says something else; mostly with the length that this has."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    # of our own files, the metadata hold JSON in a string
    metadata = header.get("__metadata__", {})
    key = draw(st.sampled_from(sorted(metadata))) if metadata else ""
    if metadata.get(key, "").startswith("{") and draw(st.booleans()):
        text = draw(damaged_json(metadata[key].encode())).decode()
        header["__metadata__"] = metadata | {key: text}
    else:
        header = draw(damaged_value(header))
    changed = json.dumps(header).encode()
    size = draw(st.sampled_from((len(changed),) * 20 + (0, 2**60, 2**64 - 1, len(changed) + 1)))
    return size.to_bytes(8, "little") + changed + data[8 + length :]


def damaged(path: Path) -> st.SearchStrategy[bytes]:
    """What may become of a file."""
    data = path.read_bytes()
    own = {".json": damaged_json, ".safetensors": damaged_tensors, ".stats": damaged_tensors}.get(path.suffix)
    raw = damaged_bytes(data) | st.binary(max_size=200)
    return raw if own is None else own(data) | own(data) | raw


@dataclass
class Parser:
    """What is read, and the files that are damaged for it."""

    read: Callable[[Path], None]  # of the folder of valid things, one of which is damaged
    files: tuple[str, ...]  # patterns


def read_checkpoint(folder: Path) -> None:
    for name in ("model", "sharded", "legacy", "vit"):
        source = open_model(str(folder / name))
        for tensor in source.names:
            source.read(tensor)
        find_sites(source.meta_model, source.family, ("mlp",))
    inspect(str(folder / "model"))


def read_statistics(folder: Path) -> None:
    source = _opened(folder, "model")
    sites = find_sites(source.meta_model, source.family, ("mlp",))
    for name in ("model", "gram", "tape"):
        statistics = load_statistics(folder / f"{name}.stats", source, sites)
        for site in sites:
            observed = statistics.read_site(site)
            observed.stats.summarize()
            if observed.accumulator is not None:
                plan_site(source, observed, site.neurons // 2, PruningOptions())


def read_written(folder: Path) -> None:
    read_recipe(folder / "cut")
    read_plan(folder / "cut")
    verify(folder / "cut", _opened(folder, "model"))


def read_progress(folder: Path) -> None:
    partial = folder / "stopped.partial"
    kept = folder / "kept"
    shutil.copytree(partial, kept)
    try:
        compress(str(folder / "model"), output=folder / "stopped", calibration=str(folder / "text.txt"), **BUDGET)
    finally:
        shutil.rmtree(folder / "stopped", ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        kept.rename(partial)


def read_text(folder: Path) -> None:
    for name in ("text.txt", "text.jsonl"):
        read_windows(str(folder / name), _opened(folder, "model"), 32)


def read_tokenizer(folder: Path) -> None:
    read_windows(str(folder / "text.txt"), _opened(folder, "model"), 32)


def read_images(folder: Path) -> None:
    choose_images(str(folder / "images"), _opened(folder, "vit"), 6, 0)


def read_cells(folder: Path) -> None:
    path = folder / "trials.jsonl"
    kept = path.read_bytes()
    try:
        with TrialLog(path, {"model": "x", "seed": 0}):
            pass
    finally:
        path.write_bytes(kept)


def read_options(folder: Path) -> None:
    text = (folder / "options").read_text(encoding="utf-8", errors="surrogateescape")  # as the shell gives words
    ratio, size, kinds, neuron = ([*text.split("|"), "", "", ""])[:4]
    source = _opened(folder, "model")
    asked = (
        lambda: _find_neuron(find_sites(source.meta_model, source.family, ("mlp", "attention")), neuron),
        lambda: find_sites(source.meta_model, source.family, Names().convert(kinds, None, None)),
        lambda: Budget(target_bytes=Bytes().convert(size, None, None)),
        lambda: Budget(ratio=Ratio().convert(ratio, None, None)),
    )
    for ask in asked:
        try:
            found = ask()
            if isinstance(found, Budget):
                find_allocations(source, find_sites(source.meta_model, source.family, found.kinds), found, AUTO)
        except (PrunePeakError, click.UsageError):
            if ask is asked[-1]:
                raise


PARSERS = {
    "checkpoint": Parser(read_checkpoint, ("model/*", "sharded/*", "legacy/*", "vit/*")),
    "statistics": Parser(read_statistics, ("model.stats", "gram.stats", "tape.stats")),
    "recipe": Parser(read_written, ("cut/prune_peak*", "cut/config.json")),
    "progress": Parser(read_progress, ("stopped.partial/*.json", "stopped.partial/*.safetensors")),
    "text": Parser(read_text, ("text.*",)),
    "images": Parser(read_images, ("images/*", "vit/preprocessor_config.json")),
    "options": Parser(read_options, ("options",)),
    "tokenizer": Parser(read_tokenizer, ("model/tokenizer*.json",)),
    "cells": Parser(read_cells, ("trials.jsonl",)),
}
SOURCES: dict[Path, Model] = {}


def _opened(folder: Path, name: str) -> Model:
    """A model that is not damaged in this parser."""
    path = folder / name
    if path not in SOURCES:
        SOURCES[path] = open_model(str(path))
    return SOURCES[path]


class TooLong(BaseException):
    """An input took more than its time."""


def _stop(signal_number: int, frame: object) -> None:
    raise TooLong


@dataclass
class Finds:
    """What came of the inputs."""

    folder: Path
    inputs: int = 0
    refused: int = 0
    places: dict[str, int] = field(default_factory=dict)

    def note(self, error: BaseException, path: Path) -> None:
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/prune_peak/" in frame.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "elsewhere"
        place = f"{type(error).__name__} at {where}"
        self.places[place] = self.places.get(place, 0) + 1
        if self.places[place] > 1:
            return
        kept = self.folder / f"{len(self.places)}-{path.name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, kept)
        told = "".join(traceback.format_exception(error))
        kept.with_name(kept.name + ".traceback").write_text(told, errors="backslashreplace")
        click.echo(f"FOUND {place}: {str(error)[:200]!r} (kept in {kept})")


def fuzz(name: str, folder: Path, minutes: float, found: Path) -> NoReturn:
    """One parser, for so long; then the process ends."""
    parser, finds = PARSERS[name], Finds(found / name)
    files = sorted(path for pattern in parser.files for path in folder.glob(pattern))

    @settings(
        max_examples=500, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def example(data: st.DataObject) -> None:
        end_in_time()
        path = data.draw(st.sampled_from(files))
        whole = path.read_bytes()
        path.write_bytes(data.draw(damaged(path)))
        signal.alarm(SECONDS)
        try:
            finds.inputs += 1
            parser.read(folder)
        except click.UsageError:
            finds.refused += 1
        except PrunePeakError as error:
            finds.refused += 1
            if not str(error).isprintable():
                finds.note(error, path)
        except (Exception, TooLong) as error:
            finds.note(error, path)
        except BaseException as error:  # a library's panic
            if "Panic" not in type(error).__name__:
                raise
            finds.note(error, path)
        finally:
            signal.alarm(0)
            path.write_bytes(whole)

    end = time.monotonic() + 60 * minutes
    signal.signal(signal.SIGALRM, _stop)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def end_in_time() -> None:
        if time.monotonic() > end:
            shutil.rmtree(folder)
            engine = "hypothesis" if atheris is None else "atheris and hypothesis"
            click.echo(
                f"{name}: {finds.inputs} inputs in {minutes:g} minutes by {engine}, {finds.refused} refused, "
                f"{len(finds.places)} finds {finds.places or ''}"
            )
            sys.stdout.flush()
            os._exit(1 if finds.places else 0)  # past atheris, which takes any other end for a crash

    def steered(data: bytes) -> None:
        end_in_time()
        example.hypothesis.fuzz_one_input(data)

    if atheris is not None:
        atheris.Setup([sys.argv[0], "-len_control=0", "-max_len=8192", "-rss_limit_mb=0", "-verbosity=0"], steered)
        atheris.Fuzz()
    for number in itertools.count():
        end_in_time()
        seed(number)(example)()


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(list(PARSERS)))
@click.option("--minutes", default=10.0, show_default=True, help="For each parser.")
@click.option("--found", type=click.Path(path_type=Path), default="fuzz-found", show_default=True)
def main(names: tuple[str, ...], minutes: float, found: Path) -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    folder = make_all(Path(tempfile.mkdtemp(prefix="fuzz-")))
    (folder / "trials.jsonl").write_text(
        '{"model": "x", "seed": 0}\n'
        '{"site": "mlp", "fill": "peak", "fraction": 0.1, "seed": 0, "losses": [1.0, 2.0], "hits": [0.5, 0.5]}\n'
    )
    (folder / "options").write_text("mlp=0.3,attention=0.5|0.1MB|mlp,attention|mlp:1:17")
    codes = []
    for name in names or PARSERS:  # each in a process of its own: what one takes of the memory is given back
        child = os.fork()
        if child == 0:
            fuzz(name, Path(shutil.copytree(folder, folder / f"for-{name}")), minutes, found)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    shutil.rmtree(folder)
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
