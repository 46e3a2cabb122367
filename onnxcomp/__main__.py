"""`onnxcomp`, and `python -m onnxcomp`."""

from __future__ import annotations

import signal
import sys

__all__ = ["run"]

STOPPED = 130
"""As a shell counts a process that Ctrl-C ended."""

ENDED = 143
"""As a shell counts a process that was asked to end."""


def run() -> None:
    """The command line; Ctrl-C ends it without a traceback also while it is being imported.

    Asked to end, it takes its temporary files with it: those of a large model are many times its size.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED))
    try:
        from onnxcomp.cli import main

        main(prog_name="onnxcomp")
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        sys.exit(STOPPED)


if __name__ == "__main__":
    run()
