"""Runs a model's process and turns its end into an exception."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxcomp.errors import RuntimeFailure, WorkerDied
from onnxcomp.runtime import Feed
from onnxcomp.verification.environments.tensor_files import write_tensors

__all__ = ["REFUSED", "run_worker", "write_feeds"]

REFUSED = 3
"""The exit code of a script whose ONNX Runtime refused the model or a feed; the message is in the file "refusal"."""

_LAST_WORDS_SHOWN = 300  # characters


def write_feeds(model: Path, feeds: Sequence[Feed], path: Path) -> None:
    """Hand the inputs of a model over to the process that runs it.

    Args:
        model: The model, which must be there.
        feeds: The inputs, one mapping a run.
        path: The file to write.

    Raises:
        RuntimeFailure: There is no such model, or an input is no tensor of numbers.
    """
    if not model.is_file():
        message = f"{model}: expected a model file, found {'a folder' if model.is_dir() else 'nothing'}"
        raise RuntimeFailure(message)
    try:
        write_tensors(path, feeds)
    except ValueError as error:
        message = f"{model}: {error}"
        raise RuntimeFailure(message) from error


def run_worker(
    command: Sequence[str],
    folder: Path,
    *,
    subject: Path,
    what: str,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a script that runs a model.

    Args:
        command: The command.
        folder: Where the process runs; what it prints goes there too.
        subject: The model, for the messages.
        what: What runs it, for the messages.
        timeout_s: The longest that it may take, in seconds.
        environment: Environment variables on top of those of this process.

    Returns:
        What it printed to its standard output.

    Raises:
        RuntimeFailure: It said that ONNX Runtime refuses something; the message is ONNX Runtime's.
        WorkerDied: It ended otherwise, or not in time.
    """
    printed, errors = folder / "printed", folder / "errors"
    with printed.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,  # so that what it starts itself can be ended with it
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            message = f"{subject}: {what} was stopped: it took longer than the limit of {timeout_s:g} s"
            raise WorkerDied(message) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    refusal = folder / "refusal"
    if code == REFUSED and refusal.is_file():
        message = f"{subject}: {' '.join(refusal.read_text(encoding='utf-8', errors='replace').split())}"
        raise RuntimeFailure(message)
    said = errors.read_text(encoding="utf-8", errors="replace")
    text = printed.read_text(encoding="utf-8", errors="replace")
    if code:
        message = f"{subject}: the process of {what} died ({_cause(code, said or text)})"
        raise WorkerDied(message)
    return text


def _cause(code: int, said: str) -> str:
    """How a process ended, with the last line that it printed."""
    cause = f"exit code {code}" if code > 0 else signal.Signals(-code).name
    if code == -signal.SIGKILL:
        cause += ", as when memory runs out"
    words = next((line.strip() for line in reversed(said.split("\n")) if line.strip()), "")
    return f"{cause}; it last printed: {words[:_LAST_WORDS_SHOWN]}" if words else cause
