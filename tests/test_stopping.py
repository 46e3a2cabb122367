"""A run that is asked to end does so, once, with its clean-up."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

BEGIN = """
import os, signal, sys, time
from onnxcomp.stopping import end_by_signals
end_by_signals()
def ask(number):
    os.kill(os.getpid(), number)
"""

SWALLOW = """
try:
    ask({number})
except BaseException:
    pass
time.sleep(30)
"""

IMPATIENT = """
try:
    ask({number})
finally:
    for _ in range(3):
        ask({number})
    try:
        raise OSError
    except OSError:
        ask({number})
    time.sleep(1.3)
    print("clean")
"""


def run(code: str, number: signal.Signals) -> tuple[int, str]:
    """Exit code and what was printed."""
    text = BEGIN + code.format(number=int(number))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_request_that_was_swallowed_is_made_again(number: signal.Signals, code: int) -> None:
    started = time.monotonic()
    assert run(SWALLOW, number) == (code, "")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_further_requests_do_not_disturb_the_clean_up(number: signal.Signals) -> None:
    assert run(IMPATIENT, number)[1] == "clean\n"
