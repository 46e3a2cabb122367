"""A model's process: what it is given, how long it may take, and its end turned into outputs or an exception.

The process runs in a folder of its own. It finds the inputs in the file "feeds", and writes the outputs to "results"
and the profile to a file "profile*.json". Exit code 3: ONNX Runtime refused the model or a feed, and the file
"refusal" has its message.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxcomp.errors import RuntimeFailure, WorkerDied
from onnxcomp.runtime import Array, Feed
from onnxcomp.runtime.messages import tidy
from onnxcomp.verification.environments.base import executed_nodes
from onnxcomp.verification.environments.tensor_files import read_tensors, write_tensors
from onnxcomp.workfolder import work_folder

__all__ = ["SETTINGS", "Job", "prepared"]

_REFUSED = 3

SETTINGS = {
    "OMP_NUM_THREADS": "1",  # so that sums are made in one order
    "OPENBLAS_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",  # it would write into the user's cache folder, also from an emulated system
}
"""Environment variables of every process that runs a model."""

_LAST_WORDS_SHOWN = 300  # characters


@dataclass(frozen=True)
class Job:
    """A model to be run, as `Environment.run` is asked for it.

    Attributes:
        folder: Where its process runs.
        model: The model, as the caller called it.
        outputs: The outputs to give; None: all.
        plain: Only the CPU provider.
        config: Session configuration entries.
        timeout_s: The longest that it may take, in seconds.
    """

    folder: Path
    model: Path
    outputs: Sequence[str] | None
    plain: bool
    config: Mapping[str, str]
    timeout_s: float

    def write(self, **more: Any) -> None:
        """Write what the process must know to the file "job.json"."""
        outputs = None if self.outputs is None else list(self.outputs)
        job = {"model": str(self.model.absolute()), "outputs": outputs, "config": dict(self.config), **more}
        (self.folder / "job.json").write_text(json.dumps(job), encoding="utf-8")

    def run(self, command: Sequence[str], what: str, variables: Mapping[str, str] | None = None) -> str:
        """Run the process to its end and give what it printed to its standard output.

        Args:
            command: The command.
            what: What runs the model, for the messages.
            variables: Its environment variables, beside `SETTINGS`; None: those of this process.

        Raises:
            RuntimeFailure: It said that ONNX Runtime refuses something; the message is ONNX Runtime's.
            WorkerDied: It ended otherwise, or not in time.
        """
        code = self._wait(command, what, {**(os.environ if variables is None else variables), **SETTINGS})
        refusal = self.folder / "refusal"
        if code == _REFUSED and refusal.is_file():
            message = f"{self.model}: {what}: {tidy(RuntimeError(_text(refusal)))}"
            raise RuntimeFailure(message)
        printed = _text(self.folder / "printed")
        if code or not (self.folder / "results").is_file():
            cause = _cause_of_death(code, _text(self.folder / "errors").strip() or printed)
            message = f"{self.model}: the process of {what} died ({cause})"
            raise WorkerDied(message)
        return printed

    def _wait(self, command: Sequence[str], what: str, variables: Mapping[str, str]) -> int:
        """The exit code. What the process has started itself ends with it."""
        with (self.folder / "printed").open("wb") as out, (self.folder / "errors").open("wb") as err:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=self.folder,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            except OSError as error:
                reason = f"{error.strerror}: {command[0]}"
                message = f"{self.model}: {what} cannot be started ({reason}); programs must be allowed to run there"
                raise WorkerDied(message) from error
            try:
                return process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                limit = f"the limit of {self.timeout_s:g} s"
                message = f"{self.model}: {what} was stopped: it took longer than {limit}; run fewer samples"
                raise WorkerDied(message) from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def results(self) -> list[dict[str, Array]]:
        """The outputs, once it has run."""
        return read_tensors(self.folder / "results")

    def nodes(self) -> dict[str, dict[str, int]]:
        """The nodes that were executed, as in `Execution.nodes`; none where it wrote no profile."""
        return next((executed_nodes(profile) for profile in self.folder.glob("profile*.json")), {})


@contextlib.contextmanager
def prepared(
    model: Path,
    feeds: Sequence[Feed],
    *,
    outputs: Sequence[str] | None = None,
    plain: bool = False,
    config: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
) -> Iterator[Job]:
    """Make a folder in which a process can run a model; it is gone after the block.

    Args:
        model: An .onnx or .ort file.
        feeds: The inputs, one mapping a run.
        outputs: As in `Job`, and so the others.
        plain: See there.
        config: See there.
        timeout_s: See there.

    Raises:
        RuntimeFailure: There is no such model, or an input is no tensor of numbers.
    """
    if not model.is_file():
        message = f"{model}: expected a model file, found {'a folder' if model.is_dir() else 'nothing'}"
        raise RuntimeFailure(message)
    with work_folder() as folder:
        try:
            write_tensors(folder / "feeds", feeds)
        except ValueError as error:
            message = f"{model}: {error}"
            raise RuntimeFailure(message) from error
        yield Job(Path(folder), model, outputs, plain, config or {}, timeout_s)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _cause_of_death(code: int, said: str) -> str:
    """How a process ended, with the last line that it printed."""
    cause = f"exit code {code}" if code >= 0 else _signal_name(-code)
    if code == -signal.SIGKILL:
        cause += ", as when memory runs out"
    words = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
    return f"{cause}; it last printed: {words[:_LAST_WORDS_SHOWN]}" if words else cause


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
