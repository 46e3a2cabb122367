"""The worker process as its caller sees it: started, spoken to, ended, and asked how it died."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import weakref
from multiprocessing.connection import Connection
from typing import IO, Any

from onnxcomp.runtime.results import Alive

_LAST_WORDS_BYTES = 2000
_LAST_WORDS_SHOWN = 300  # characters
_EXIT_WAIT_S = 5.0  # a worker that has closed its connection ends well within this


def _environment() -> dict[str, str]:
    """The worker's: the same modules, and no telemetry, which some builds of ONNX Runtime write at import."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return {**os.environ, "PYTHONPATH": path, "ORT_DISABLE_TELEMETRY": "1"}


class SilentWorker(Exception):  # noqa: N818 - never leaves this package
    """The worker closed its connection, or said nothing for too long."""

    def __init__(self, *, timed_out: bool) -> None:
        super().__init__()
        self.timed_out = timed_out


class WorkerProcess:
    """The worker process and the connection to it."""

    def __init__(
        self,
        threads: int,
        config: dict[str, str],
        disabled: tuple[str, ...],
        timeout_s: float,
        blas_threads: int | None = None,
    ) -> None:
        self.timeout_s = timeout_s
        ours, theirs = socket.socketpair()
        with ours, theirs:
            # A worker that has stopped reading must not block us for ever either.
            limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6) or 1)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self.stderr = tempfile.TemporaryFile(prefix="onnxcomp-")  # noqa: SIM115 - lives as long as the worker
            arguments = [str(theirs.fileno()), str(threads), str(blas_threads or ""), ",".join(disabled)]
            arguments += [f"{key}={value}" for key, value in config.items()]
            self.process = subprocess.Popen(
                # -P: a file in the working directory must not pass for a module.
                [sys.executable, "-P", "-m", "onnxcomp.runtime.worker", *arguments],
                env=_environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.stderr,
                stderr=self.stderr,
            )
            self.connection = Connection(ours.detach())
        self.end = weakref.finalize(self, _end, os.getpid(), self.process, self.connection, self.stderr)

    def exchange(self, message: bytes, subject: str | None) -> tuple[Any, str | None]:
        """Send a pickled request; return the reply, and the model that the worker last said it was busy with."""
        try:
            self.connection.send_bytes(message)
            while True:
                if not self.connection.poll(self.timeout_s):
                    raise SilentWorker(timed_out=True)
                answer = self.connection.recv()
                if not isinstance(answer, Alive):
                    return answer, subject
                subject = answer.path or subject
        except BlockingIOError:
            raise SilentWorker(timed_out=True) from None
        except (EOFError, ConnectionError):
            raise SilentWorker(timed_out=False) from None

    def cause_of_death(self) -> str:
        """Say how the process ended, in one line, with the end of what it printed."""
        try:
            code = self.process.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            cause = "it closed its connection"
        else:
            cause = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            if code == -signal.SIGKILL:
                cause += ", as when memory runs out"
        size = os.fstat(self.stderr.fileno()).st_size
        # pread: the file position is shared with the worker.
        tail = os.pread(self.stderr.fileno(), _LAST_WORDS_BYTES, max(0, size - _LAST_WORDS_BYTES))
        lines = tail.decode(errors="replace").split("\n")
        words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        self.end()
        return f"{cause}; it last printed: {words[:_LAST_WORDS_SHOWN]}" if words else cause


def _end(owner: int, process: subprocess.Popen[bytes], connection: Connection, stderr: IO[bytes]) -> None:
    """Kill the worker, which has nothing to lose: files that it writes belong to the caller."""
    if os.getpid() != owner:  # in a fork, the worker is not ours
        return
    connection.close()
    process.kill()
    process.wait()
    stderr.close()
