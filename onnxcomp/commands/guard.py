"""What every command shares: errors in one line, exit codes, and where output goes."""

from __future__ import annotations

import errno
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

import click

from onnxcomp.errors import OnnxcompError, OptionError
from onnxcomp.report.text import duration_text, printable
from onnxcomp.stopping import STOPPED

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "BUDGET_NOT_MET",
    "FAILURE",
    "GIVEN",
    "GuardedCommand",
    "check_results",
    "emit_json",
    "parsed",
    "progress_to",
    "stdout_console",
]

FAILURE = 1
BUDGET_NOT_MET = 3
GIVEN = "onnxcomp.given"
"""Where a command's context holds the words that it was given."""

Value = TypeVar("Value")


class GuardedCommand(click.Command):
    """A command whose failures are one line on stderr, and no traceback unless `-v` asks for one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note what was given, in `ctx.meta`, and parse it."""
        ctx.meta[GIVEN] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            ClickException: It failed; click prints the message and exits with its code.
        """
        verbose = bool(ctx.params.get("verbose"))
        try:
            with _warnings_in_a_line(quiet=bool(ctx.params.get("quiet")), verbose=verbose):
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("Stopped.", err=True)
            ctx.exit(STOPPED)
        except OnnxcompError as error:
            raise (_Usage if isinstance(error, OptionError) else _Failure)(error) from error
        except MemoryError as error:
            raise _Failure(_NO_MEMORY) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone; click knows what to do
                raise
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
            raise _Failure(message) from error
        except Exception as error:  # a bug of ours: one line for the user, the traceback with -v
            if verbose:
                raise
            message = f"internal error ({type(error).__name__}: {error}); {_REPORT_IT}"
            raise _Failure(message) from error


@contextmanager
def _warnings_in_a_line(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Show warnings as one line on stderr, with the traceback of their cause if there is one and `verbose` asks."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if not quiet:
            click.echo(f"Warning: {printable(message)}", err=True)
        if verbose and isinstance(message, Warning) and message.__cause__ is not None:
            traceback.print_exception(message.__cause__)

    with warnings.catch_warnings():
        warnings.showwarning = show  # where in the code it arose is of no use here
        yield


_NO_MEMORY = "there is not enough memory; close other programs, or use a machine with more"
_REPORT_IT = "run with -v for the traceback, and please report it"


class _Failure(click.ClickException):
    """A failure in one line, exit code 1."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class _Usage(_Failure):
    """A request that makes no sense: exit code 2, as click's own."""

    exit_code = 2


def parsed(parse: Callable[[str], Value]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """An option's callback that reads its text, or its several texts, and tells which option was wrong."""

    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            if isinstance(value, tuple):
                return tuple(parse(item) for item in value)
            return None if value is None else parse(value)
        except OnnxcompError as error:
            raise click.BadParameter(printable(error), ctx, param) from error

    return callback


class _Ascii:
    """A text file that takes ASCII alone: what else is written is escaped."""

    encoding = "ascii"

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        return self._file.write(text.encode("ascii", "backslashreplace").decode("ascii"))

    def flush(self) -> None:
        self._file.flush()


def stdout_console(*, plain: bool = False) -> Console:
    """Where results are printed; `plain`: as if it were no terminal, and in ASCII, whatever the environment says."""
    from rich.console import Console

    if plain:
        return Console(file=cast("TextIO", _Ascii(sys.stdout)), highlight=False, force_terminal=False, no_color=True)
    return Console(file=sys.stdout, highlight=False)


@contextmanager
def progress_to(*, verbose: bool, quiet: bool, plain: bool = False) -> Iterator[Callable[[str], None] | None]:
    """Show what is going on, on stderr: with `verbose` line by line, else in one moving line unless it is for a log."""
    import time

    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    started = time.monotonic()
    if quiet or not (verbose or (console.is_terminal and not plain)):
        yield None
    elif verbose:

        def tell(text: str) -> None:
            click.echo(f"[{duration_text(time.monotonic() - started)}] {printable(text)}", err=True)

        yield tell
    else:
        with console.status(Text("reading the model")) as status:
            yield lambda text: status.update(Text(printable(text)))


def check_results(results: Mapping[str, str | Path | None], models: Iterable[Path], data: str | None = None) -> None:
    """Refuse results that cannot be written, or would overwrite what is read, before any work starts.

    Args:
        results: Option -> where it writes to; None and "-": no file.
        models: The models that are read, with the files of their weights.
        data: What --data names.

    Raises:
        OutputError: One of them cannot be written, or is read.
        OptionError: Two of them are one file.
    """
    from onnxcomp.files import check_outputs
    from onnxcomp.structure import model_files

    inputs = [Path(data)] if data else []
    for model in models:
        inputs.append(model)
        with suppress(OnnxcompError):  # what cannot be read is told once it is its turn
            inputs += model_files(model)
    paths = {option: None if path in {None, "-"} else Path(str(path)) for option, path in results.items()}
    check_outputs(paths, inputs=tuple(inputs))


def emit_json(text: str, path: str | None) -> bool:
    """Write JSON where `--json` asked for it; whether that was stdout, so that nothing else belongs there."""
    if path is None:
        return False
    if path == "-":
        click.echo(text, nl=False)
        return True
    from onnxcomp.report.document import write_text

    write_text(text, Path(path))
    return False
