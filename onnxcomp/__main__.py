"""`onnxcomp`, and `python -m onnxcomp`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["run"]

STOPPED = 130
"""As a shell counts a process that Ctrl-C ended."""

ENDED = 143
"""As a shell counts a process that was asked to end."""

HUNG_UP = 129
"""The same where its terminal was closed."""


def run() -> None:
    """The command line; Ctrl-C ends it without a traceback also while it is being imported.

    Asked to end, it takes its temporary files with it: those of a large model are many times its size.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job has it ignored
        signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup has it ignored
        signal.signal(signal.SIGHUP, _end)
    _open_standard_files()
    try:
        from onnxcomp.cli import main

        main(prog_name="onnxcomp")
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        sys.exit(STOPPED)


def _stop(number: int, frame: FrameType | None) -> None:
    """End with a KeyboardInterrupt; further ones would end the clean-up, which takes a moment, half done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.default_int_handler(number, frame)


def _end(number: int, _: FrameType | None) -> None:
    """End without a word, once."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(ENDED if number == signal.SIGTERM else HUNG_UP)


def _open_standard_files() -> None:
    """Put the null device where standard input, output or error is closed, as some services start their commands.

    Else the next files that are opened take their numbers, and what libraries print goes into these.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one


if __name__ == "__main__":
    run()
