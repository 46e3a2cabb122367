"""What signals that ask a run to end do: one exception goes through all of its clean-up, and none gets lost."""

from __future__ import annotations

import signal
import sys
from types import FrameType

__all__ = ["STOPPED", "end_by_signals", "let_end"]

STOPPED = 130
"""As a shell counts a process that Ctrl-C ended."""

CODES = {signal.SIGTERM: 143, signal.SIGHUP: 129}
"""The same where it was asked to end, and where its terminal was closed."""

AGAIN_S = 1.0
"""An exception that has not begun its way out by then is raised once more: callbacks from C swallow them."""

_asked: list[int] = []
_raised: list[BaseException] = []


def end_by_signals() -> None:
    """Let Ctrl-C raise a KeyboardInterrupt, and requests to end a SystemExit; further ones do not disturb the clean-up.

    Signals that the process was started to ignore stay so: a shell's background job ignores Ctrl-C, nohup a closed
    terminal.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _end)
    signal.signal(signal.SIGALRM, _end)


def let_end() -> None:
    """Raise no more, now that the run has cleaned up."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (signal.SIGINT, *CODES):
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, _: FrameType | None) -> None:
    if number != signal.SIGALRM:
        _asked.append(number)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
    if _is_ending():
        return
    first = signal.Signals(_asked[0])
    error = KeyboardInterrupt() if first == signal.SIGINT else SystemExit(CODES[first])
    _raised.append(error)
    raise error


def _is_ending() -> bool:
    """Whether what was interrupted is the clean-up on the way of an exception that was raised here."""
    error = sys.exc_info()[1]
    while error is not None:
        if any(error is one for one in _raised):
            return True
        error = error.__context__
    return False
