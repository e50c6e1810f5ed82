"""What an option is: a dataclass field with its help and its check. The options themselves are in options.py."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

from .errors import UsageError, spell

Function = TypeVar("Function", bound=Callable[..., Any])


def option(
    default: Any,
    text: str,
    choices: Callable[[], Iterable[str]] | None = None,
    least: int | None = None,
    most: int | None = None,
    parse: str | None = None,
    shown: str | None = None,
) -> Any:
    """A dataclass field with all that the command line, the checks and the docstrings need of an option.

    Args:
        default: its value where the option is not given.
        text: its help.
        choices: the allowed values; several for a tuple.
        least, most: the smallest and the largest allowed number.
        parse: how the command line reads it: ratio, size, count, names, data, one (data set), file, folder or seed;
            by its type otherwise.
        shown: how the help shows the default, where its value does not say it.
    """
    return field(
        default=default,
        metadata={"help": text, "choices": choices, "least": least, "most": most, "parse": parse, "shown": shown},
    )


def flag(name: str) -> str:
    """The option of the command line by the name of its field."""
    return f"--{name.replace('_', '-')}"


def spell_command(options: "Options") -> str:
    """The options of a command line that differ from their defaults, quoted for a shell.

    Example:
        >>> from prune_peak.evaluation.options import EvaluateOptions
        >>> spell_command(EvaluateOptions(data=("my notes.txt",), windows=8))
        "--data 'my notes.txt' --windows 8"
    """
    words = []
    for item in fields(options):
        value = getattr(options, item.name)
        if value == item.default or value is None:
            continue
        if isinstance(value, bool):
            words.append(flag(item.name) if value else flag(f"no_{item.name}"))
        elif isinstance(value, tuple) and item.metadata["parse"] == "names":
            words.append(f"{flag(item.name)} {','.join(value)}")
        else:
            words += [f"{flag(item.name)} {quote(str(v))}" for v in (value if isinstance(value, tuple) else (value,))]
    return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all options: checks every field, and gives sequences one type."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(item.default, tuple) or item.metadata["parse"] in ("data", "names"):
                value = (value,) if isinstance(value, str | Path | int | float) else value
                value = None if value is None else tuple(str(v) if isinstance(v, Path) else v for v in value)
                object.__setattr__(self, item.name, value)
                if value == () != item.default and item.metadata["parse"] == "data":
                    raise UsageError(f"{spell(item.name)}: expected at least one data set.")
            _check(item, value)


def _check(item: "Field[Any]", value: Any) -> None:
    choices, least, most = (item.metadata[name] for name in ("choices", "least", "most"))
    for part in value if isinstance(value, tuple) else (value,):
        if part is None:
            continue
        if choices is not None and part not in choices():
            raise UsageError(f"{spell(item.name, part)}: expected one of {', '.join(choices())}.")
        if least is not None and not part >= least:  # NaN is refused
            raise UsageError(f"{spell(item.name, part)}: expected at least {least}.")
        if most is not None and not part <= most:
            raise UsageError(f"{spell(item.name, part)}: expected at most {most}.")


def check_shares(ratios: Iterable[float]) -> None:
    """Refuse a ratio that is not between 0 and 1.

    Example:
        >>> check_shares([0.3])
        >>> check_shares([30])
        Traceback (most recent call last):
        prune_peak.errors.UsageError: ratio 30 is the share to prune; it must be between 0 and 1. Did you mean 0.3?
    """
    for ratio in ratios:
        if not 0 < ratio < 1:
            meant = f" Did you mean {ratio / 100:g}?" if 1 < ratio < 100 else ""
            raise UsageError(f"ratio {ratio} is the share to prune; it must be between 0 and 1.{meant}")


def takes(kind: type[Options]) -> Callable[[Function], Function]:
    """Give a function that ends in `**options` the signature and the `Args:` of the options it takes."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [part for part in signature.parameters.values() if part.kind is not inspect.Parameter.VAR_KEYWORD]
        known = {part.name for part in own}
        more = [
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if item.default is MISSING else item.default,
                annotation=item.type,
            )
            for item in fields(kind)
            if item.name not in known
        ]
        function.__signature__ = signature.replace(parameters=own + more)  # type: ignore[attr-defined]
        lines = [f"{item.name}: {item.metadata['help']}" for item in fields(kind)]
        function.__doc__ = (function.__doc__ or "").replace("{options}", "\n        ".join(lines))
        return function

    return decorate
