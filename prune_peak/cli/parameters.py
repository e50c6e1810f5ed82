"""Parameter types, and the options of a command, made from their dataclass in options.py."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import click

from ..errors import UsageError
from ..option_fields import Options, flag
from ..pruning import scores  # noqa: F401 - registers the scores
from .logs import configure_logging, import_libraries

Command = TypeVar("Command", bound=Callable[..., Any])


PER_CENT = re.compile(r"([0-9.]+) *%")


class Ratio(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.4
    """`0.3`, or `mlp=0.2,attention=0.33`."""

    name = "ratio"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> float | Mapping[str, float]:
        if isinstance(value, Mapping):
            return value
        try:
            if "=" not in str(value):
                return float(value)
            pairs = [part.split("=") for part in str(value).split(",")]
            return {kind: float(number) for kind, number in pairs}
        except ValueError:
            found = PER_CENT.fullmatch(str(value))
            meant = f" Did you mean {float(found[1]) / 100:g}?" if found else ""
            self.fail(f"{value}: expected a number, or mlp=NUMBER,attention=NUMBER.{meant}", parameter, context)


class Names(click.ParamType):  # type: ignore[type-arg]
    """Names with commas between them."""

    name = "name,..."

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


class Count(click.ParamType):  # type: ignore[type-arg]
    """`50000`, `50k` or `1.5M`."""

    name = "count"
    units: ClassVar = {"": 1, "k": 1000, "K": 1000, "M": 1_000_000}

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        number = str(value).rstrip("kKM")
        try:
            return int(float(number) * self.units[str(value)[len(number) :]])
        except (ValueError, KeyError, OverflowError):
            self.fail(f"{value}: expected a number such as 50000, 50k or 1M.", parameter, context)


class Registered(click.ParamType):  # type: ignore[type-arg]
    """A name of a registry, which is read when the command runs or shows its help."""

    name = "choice"

    def __init__(self, choices: Callable[[], Any]) -> None:
        self.choices = choices

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        return click.Choice(list(self.choices())).convert(value, parameter, context)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(self.choices())}]"


PARSERS: dict[str, Any] = {
    "ratio": Ratio(),
    "size": Bytes(),
    "count": Count(),
    "names": Names(),
    "file": click.Path(path_type=Path),
    "folder": click.Path(path_type=Path),
    "seed": click.IntRange(0, 2**32 - 1),
}
METAVARS = {"data": "DATA", "one": "DATA", "file": "FILE", "folder": "DIR", "names": "NAME,..."}


def options_of(kind: type[Options]) -> Callable[[Command], Command]:
    """The options of a dataclass as click options, in its order; refused before the command imports torch."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def checked(**given: Any) -> Any:
            kind(**{item.name: given[item.name] for item in fields(kind)})  # raises
            return command(**given)

        for item in reversed(fields(kind)):
            checked = _click_option(item)(checked)
        return checked  # type: ignore[return-value]

    return decorate


def _click_option(item: "Field[Any]") -> Callable[[Command], Command]:
    data, text = item.metadata, item.metadata["help"]
    name = flag(item.name)
    if isinstance(item.default, bool):
        if item.default:
            return click.option(f"{name}/--no-{name[2:]}", default=True, help=f"{text}  [default: {name[2:]}]")
        return click.option(name, is_flag=True, help=text)
    several = isinstance(item.default, tuple) or data["parse"] == "data"
    required = item.default is MISSING
    shown = data["shown"] or (", ".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default)
    text += " Repeatable." * several + ("" if required or shown in (None, "") else f"  [default: {shown}]")
    if data["choices"] is not None:
        parser: Any = Registered(data["choices"])
    else:
        plain = [part for part in (*get_args(item.type), item.type) if part in (int, float)]
        parser = PARSERS.get(data["parse"], plain[0] if plain else str)
    return click.option(
        name,
        type=parser,
        required=required,
        multiple=several,
        default=() if several else None if required else item.default,
        callback=(lambda context, parameter, value: value or item.default) if several else None,
        metavar=METAVARS.get(data["parse"]),
        help=text,
    )


def model_argument(command: Command) -> Command:
    """MODEL by position, or --model MODEL."""

    @wraps(command)
    def resolved(given: str | None, named: str | None, **options: Any) -> Any:
        if (given is None) == (named is None):
            raise UsageError("expected the model once: MODEL, or --model MODEL.")
        return command(model=named if given is None else given, **options)

    option = click.option("--model", "named", metavar="MODEL", help="The model, in place of the argument MODEL.")
    return click.argument("given", required=False, metavar="MODEL")(option(resolved))  # type: ignore[return-value]


def models_argument(command: Command) -> Command:
    """MODEL... by position, or --model MODEL, repeated."""

    @wraps(command)
    def resolved(given: tuple[str, ...], named: tuple[str, ...], **options: Any) -> Any:
        if bool(given) == bool(named):
            raise UsageError("expected models: MODEL..., or --model MODEL for each.")
        return command(models=given or named, **options)

    text = "A model, in place of the arguments MODEL.... Repeatable."
    option = click.option("--model", "named", multiple=True, metavar="MODEL", help=text)
    return click.argument("given", nargs=-1, metavar="MODEL...")(option(resolved))  # type: ignore[return-value]


def output_options(command: Command) -> Command:
    """--json and --quiet; the command gets `as_json`."""

    @wraps(command)
    def resolved(as_json: bool, quiet: bool, **options: Any) -> Any:
        configure_logging(quiet)
        _find_inputs(**options)
        import_libraries()
        return command(as_json=as_json, **options)

    quiet = click.option("-q", "--quiet", is_flag=True, help="No progress bars and no warnings.")
    as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    return as_json(quiet(resolved))  # type: ignore[return-value]


def _find_inputs(
    model: str | None = None,
    models: Sequence[str] = (),
    original: str | None = None,
    revision: str | None = None,
    calibration: Sequence[str] = (),
    data: str | Sequence[str] | None = None,
    evaluate: Sequence[str] | None = None,
    **options: Any,
) -> None:
    """Refuse models and data that are not there, before torch and transformers are imported."""
    from ..data.data_sets import check_exists
    from ..io.locating import locate, strip_slash

    for name in (model, *models, original):
        if name is not None:
            locate(strip_slash(name), revision, ["config.json"])
    check_exists([*calibration, *((data,) if isinstance(data, str) else data or ()), *(evaluate or ())])


def echo_json(value: Any) -> None:
    """Print a result as JSON."""
    click.echo(json.dumps(value, indent=2))
