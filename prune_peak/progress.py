"""Progress bars: one for each phase, with its name and the stage of the command; they move at least once a second."""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

BEAT = 1.0  # seconds


@dataclass
class Stage:
    """Where a command is."""

    number: int
    count: int
    is_inner: bool = False  # of a function that another one with stages called


_stage: ContextVar[Stage | None] = ContextVar("stage", default=None)


@contextmanager
def stages(count: int) -> Iterator[None]:
    """Number the bars within the context, `stage 1 of count`; also a decorator.

    The stages of a function that another one with stages calls do not count.

    Example:
        >>> with stages(2):
        ...     next_stage()
        ...     describe_stage("verify")
        'verify, stage 2 of 2'
    """
    outer = _stage.get()
    token = _stage.set(Stage(1, count) if outer is None else replace(outer, is_inner=True))
    try:
        yield
    finally:
        _stage.reset(token)


def next_stage(had_one: bool = True) -> None:
    """Start the next stage of the function that has stages, where there was one before."""
    stage = _stage.get()
    if had_one and stage is not None and not stage.is_inner:
        stage.number += 1


def describe_stage(name: str) -> str:
    """The name of a phase, with the stage that it is in."""
    stage = _stage.get()
    return name if stage is None else f"{name}, stage {stage.number} of {stage.count}"


_open: "set[Bar]" = set()


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar whose clock goes on while one step takes long."""

    def __init__(self, iterable: Iterable[Any] | None, name: str, **options: Any) -> None:
        self._closed = threading.Event()
        super().__init__(iterable, desc=describe_stage(name), **options)
        if not self.disable:
            _open.add(self)
            threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            self.last_print_t = time.time()
            self.refresh()

    def close(self) -> None:
        if not hasattr(self, "disable"):  # interrupted while it was made
            return
        self._closed.set()
        _open.discard(self)
        super().close()


def close_bars() -> None:
    """End the line of every bar that an error left open."""
    for bar in list(_open):
        bar.close()


def track(iterable: Iterable[Item], name: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """Show the progress through something.

    Args:
        name: of the phase.
        unit: what one step is.
        total: the number of steps, where the iterable has no length.
    """
    return Bar(iterable, name, total=total, unit=unit)


def open_bar(name: str, unit: str, total: int, done: int = 0) -> Bar:
    """A bar to update by hand; `done` steps are from an earlier run."""
    return Bar(None, name, total=total, initial=done, unit=unit)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Show that something without countable steps goes on; nothing where it takes less than a second."""
    with Bar(None, name, total=None, delay=BEAT / 2, bar_format="{desc}: {elapsed}", leave=False):
        yield
