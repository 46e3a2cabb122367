"""`onnxcomp`, and `python -m onnxcomp`."""

from __future__ import annotations

import sys

__all__ = ["run"]

STOPPED = 130
"""As a shell counts a process that Ctrl-C ended."""


def run() -> None:
    """The command line; Ctrl-C ends it without a traceback also while it is being imported."""
    try:
        from onnxcomp.cli import main

        main(prog_name="onnxcomp")
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        sys.exit(STOPPED)


if __name__ == "__main__":
    run()
