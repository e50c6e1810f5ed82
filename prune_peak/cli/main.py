"""The command group: maps errors to exit codes, handles Ctrl-C and torchrun."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import click

from ..errors import (
    LostProcessError,
    PrunePeakError,
    UsageError,
    is_out_of_memory,
    one_line,
    spelled_as_options,
)
from ..version import __version__

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
# Of every command, for `--help`: the options of all of them take longer to import than click
SUMMARIES = {
    "ablate": "Measure what held neurons cost, by fill and fraction.",
    "analyze": "Measure how neurons are distributed.",
    "calibrate": "Measure a model once, for several runs of compress.",
    "compress": "Prune, fold, refit, and write a smaller checkpoint.",
    "evaluate": "Measure models side by side.",
    "export": "Write a folder as one file of another format.",
    "heal": "Let a compressed model learn back from the original.",
    "inspect": "Show what can be pruned and what it would save.",
    "push": "Verify a written folder and push it to the Hub.",
    "verify": "Check a folder that compress wrote.",
}


class Group(click.Group):
    """Maps the errors of the library to one `Error:` line and an exit code; other errors keep their traceback."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in SUMMARIES:
            return None
        from .commands import COMMANDS

        return COMMANDS[name]

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))

    def invoke(self, context: click.Context) -> Any:
        with _noting_interrupts() as interrupts, spelled_as_options():
            try:
                return self._invoke(context)
            except (Exception, KeyboardInterrupt) as error:
                if not interrupts and not isinstance(error, KeyboardInterrupt):
                    raise
                _end_bars()
                click.echo("Interrupted. Finished work is kept; the same command resumes.", err=True)
                sys.exit(130)
            finally:
                _end_bars()

    def _invoke(self, context: click.Context) -> Any:
        try:
            alone = context._protected_args == ["heal"]  # accelerate joins its processes itself
            if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not alone:
                return self._invoke_together(context)
            return super().invoke(context)
        except UsageError as error:
            name = context.invoked_subcommand
            command = self.get_command(context, name) if name else None
            of_command = click.Context(command, context, name) if command else context
            raise click.UsageError(str(error), of_command) from None
        except PrunePeakError as error:
            raise click.ClickException(str(error)) from None
        except click.ClickException as error:
            error.message = one_line(error.message)  # type: ignore[misc]  # it may quote a file name
            raise
        except (MemoryError, RuntimeError, OSError, ImportError) as error:
            if not is_out_of_memory(error):
                raise
            raise click.ClickException(
                "not enough memory. `compress --dry-run` estimates the need, and --max-memory sets a smaller budget. "
                "Finished work is kept; the same command resumes."
            ) from None
        except LostProcessError as error:
            raise click.ClickException(str(error)) from None

    def _invoke_together(self, context: click.Context) -> Any:
        """Run the command in rank 0 of torchrun's processes; the others take part in its calibration."""
        if os.environ["RANK"] != "0" or not {"-q", "--quiet"}.isdisjoint(context.args):
            from .logs import configure_logging

            configure_logging(quiet=True)  # before torch, which imports tqdm
        from ..stats.distributed import join_processes

        with join_processes() as group:
            if group.rank == 0:
                result = super().invoke(context)
                with suppress(LostProcessError):  # the command is done without the others
                    group.broadcast(None)
                return result
            from ..stats.collection import run_worker

            try:
                run_worker(group)
            except PrunePeakError as error:
                group.report(error)
            except (LostProcessError, KeyboardInterrupt):
                pass  # rank 0 reports the reason


def _end_bars() -> None:
    """Before a message, so that it begins a line."""
    from ..progress import close_bars  # imports tqdm, which reads the environment that --quiet sets

    close_bars()


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """The interrupts so far. Libraries turn them into other errors: clean-up fails, or Rust code swallows them.

    One that comes inside a finalizer is lost, because Python ignores what a finalizer raises; it comes again.
    """
    interrupts: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    def send_again() -> None:
        if signal.getsignal(signal.SIGINT) is note:
            signal.raise_signal(signal.SIGINT)  # Python handles it in the main thread

    def unraised(lost: Any) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            unraised_before(lost)
            return
        again = threading.Timer(0.02, send_again)
        again.daemon = True
        again.start()

    before, unraised_before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    signal.signal(signal.SIGINT, note)
    sys.unraisablehook = unraised
    try:
        yield interrupts
    finally:
        sys.unraisablehook = unraised_before
        signal.signal(signal.SIGINT, before)


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="prune-peak")
def main() -> None:
    """Make transformer checkpoints smaller, without training; and language models without a data set.

    \b
    Example:
      prune-peak compress facebook/opt-1.3b --ratio 0.3
    """
