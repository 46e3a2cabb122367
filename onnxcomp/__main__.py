"""`onnxcomp`, and `python -m onnxcomp`."""

from __future__ import annotations

import os
import sys

from onnxcomp.stopping import STOPPED, end_by_signals, let_end

__all__ = ["run"]


def run() -> None:
    """The command line; Ctrl-C ends it without a traceback also while it is being imported.

    Asked to end, it takes its temporary files with it: those of a large model are many times its size.
    """
    end_by_signals()
    _open_standard_files()
    try:
        from onnxcomp.cli import main

        main(prog_name="onnxcomp")
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        sys.exit(STOPPED)
    finally:
        let_end()


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
