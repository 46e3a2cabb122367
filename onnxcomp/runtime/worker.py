"""The worker's side: ``python -m onnxcomp.runtime.worker FD THREADS BLAS DISABLED [KEY=VALUE ...]``.

Answers pickled requests on the socket FD, one at a time, until the other end closes or the parent is gone.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
from threadpoolctl import threadpool_limits

from onnxcomp.errors import OnnxcompError
from onnxcomp.runtime import profiling
from onnxcomp.runtime.census import Census, read_census
from onnxcomp.runtime.messages import tidy
from onnxcomp.runtime.observing import Observation, PairObservation
from onnxcomp.runtime.results import (
    Alive,
    Feed,
    Observer,
    PairObserver,
    Refusal,
    Reply,
    SessionInfo,
    TensorInfo,
    Timing,
)
from onnxcomp.runtime.sessions import Sessions

_WARM_UP_ROUNDS = 5
_ALIVE_EVERY_S = 1.0
_PARENT_CHECK_S = 1.0
_MOST_MEMORY = 0.95


class Worker:
    """Carries out requests: each public method is one operation, named as in the request."""

    def __init__(self, sessions: Sessions, alive: Callable[[str | None], None]) -> None:
        self._sessions = sessions
        self._alive = alive
        self._observations: dict[int, Observation | PairObservation] = {}

    def check(self, path: str, optimize: bool) -> SessionInfo:
        """Load a model."""
        loaded = self._sessions.get(path, optimize=optimize)
        inputs, outputs = (
            tuple(TensorInfo(info.name, info.type, tuple(info.shape)) for info in infos)
            for infos in (loaded.session.get_inputs(), loaded.session.get_outputs())
        )
        return SessionInfo(inputs, outputs, loaded.load_ms)

    def run(self, path: str, feed: Feed, outputs: list[str] | None, optimize: bool) -> list[Any]:
        """Run a model once."""
        values: list[Any] = self._sessions.get(path, optimize=optimize).session.run(outputs, feed)
        return values

    def observe_begin(self, path: str, token: int, observers: dict[str, Observer], optimize: bool) -> None:
        """Prepare to observe; `token` names the observation in the requests that follow."""
        self._observations[token] = Observation(self._sessions, path, observers, optimize=optimize)

    def observe_pair_begin(
        self, path: str, other: str, token: int, observers: dict[tuple[str, str], PairObserver], optimize: bool
    ) -> None:
        """Prepare to observe two models side by side."""
        paths = (path, other)
        self._observations[token] = PairObservation(self._sessions, paths, observers, self._alive, optimize=optimize)

    def observe_feed(self, path: str, token: int, feed: Feed) -> None:
        """Show one feed's values to the present group of observers."""
        self._observations[token].show(feed)

    def observe_next(self, path: str, token: int) -> bool:
        """Go on to the next group; tell whether there is one."""
        return self._observations[token].advance()

    def observe_end(self, path: str, token: int) -> dict[Any, Any]:
        """Give the observers back."""
        return self._observations.pop(token).observers

    def observe_drop(self, path: str, token: int) -> None:
        """Forget an observation that did not come to its end."""
        self._observations.pop(token, None)

    def time(self, paths: list[str], feed: Feed, min_rounds: int, max_rounds: int, seconds: float) -> list[Timing]:
        """Time models in turn, round by round."""
        sessions = []
        for path in paths:
            self._alive(path)
            sessions.append(self._sessions.get(path).session)
            sessions[-1].run(None, feed)
        order = list(range(len(sessions)))
        shuffle = random.Random(0).shuffle
        samples: list[list[float]] = [[] for _ in sessions]
        begun = said = time.perf_counter()
        for done in range(-_WARM_UP_ROUNDS, max_rounds):
            if done == 0:
                begun = time.perf_counter()
            shuffle(order)
            for index in order:
                start = time.perf_counter()
                sessions[index].run(None, feed)
                now = time.perf_counter()
                if done >= 0:
                    samples[index].append((now - start) * 1e3)
                if now - said > _ALIVE_EVERY_S:
                    said = now
                    self._alive(None)
            if done + 1 >= min_rounds and time.perf_counter() - begun > seconds * len(sessions):
                break
        return [_timing(times) for times in samples]

    def profile(self, path: str, feed: Feed, runs: int, folder: str, median: bool) -> dict[str, float]:
        """Measure each node with ONNX Runtime's profiler, which writes into `folder`."""
        return profiling.profile(self._sessions, path, feed, runs, Path(folder), median=median)

    def census(self, path: str, optimize: bool, folder: str) -> Census:
        """Read the optimized graph, which ONNX Runtime writes into `folder`."""
        optimized = Path(folder) / "optimized.onnx"
        self._sessions.write(path, optimized, self._sessions.options(optimize=optimize))
        return read_census(optimized)

    def convert(self, path: str, output: str, level: str) -> None:
        """Write the optimized graph, in ONNX Runtime's own format or as ONNX, as the file's suffix says."""
        options = self._sessions.options(optimize=level != "none")
        if level == "basic":
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        self._sessions.write(path, Path(output), options)

    def peak_memory(self) -> int:
        """The most memory that this process has had resident, in bytes."""
        status = Path("/proc/self/status")
        if status.exists():
            line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _timing(times: list[float]) -> Timing:
    p10, median, p90 = np.percentile(times, [10, 50, 90])
    return Timing(median_ms=float(median), p10_ms=float(p10), p90_ms=float(p90), runs=len(times))


def _refusal(error: Exception) -> Refusal:
    if isinstance(error, OnnxcompError):
        return Refusal(str(error), type(error).__name__)
    return Refusal(tidy(error))


def _answer(worker: Worker, connection: Connection) -> None:
    """Take one request and send its reply."""
    try:
        request = connection.recv()
        reply: Reply | Refusal = Reply(getattr(worker, request.operation)(**request.arguments))
    except (EOFError, ConnectionError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever went wrong is the caller's to hear; this process lives on
        reply = _refusal(error)
    try:
        connection.send(reply)
    except (BrokenPipeError, ConnectionError):
        raise
    except Exception as error:  # noqa: BLE001 - the value cannot be pickled: nothing of it has been sent
        connection.send(_refusal(error))


def _end_with_parent(parent: int) -> None:
    """End this process, even in the middle of a run, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(0)


def _limit_memory() -> None:
    """Take no more memory than the machine has: a model that asks for more is refused, and nothing else is killed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    most = int(psutil.virtual_memory().total * _MOST_MEMORY)
    resource.setrlimit(resource.RLIMIT_DATA, (min(most, *limits) if limits else most, hard))


def main(arguments: list[str]) -> None:
    """Serve until the connection closes."""
    _limit_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    descriptor, threads, blas_threads, disabled, *config = arguments
    onnxruntime.set_default_logger_severity(3)
    connection = Connection(int(descriptor))
    entries: Mapping[str, str] = dict(entry.split("=", 1) for entry in config)
    sessions = Sessions(int(threads), entries, disabled.split(",") if disabled else ())
    worker = Worker(sessions, lambda path: connection.send(Alive(path)))
    try:
        with threadpool_limits(int(blas_threads) if blas_threads else None, user_api="blas"):
            while True:
                _answer(worker, connection)
    except (EOFError, ConnectionError):
        os._exit(0)  # at once: there is nothing to flush, and ONNX Runtime takes its time to unwind


if __name__ == "__main__":
    main(sys.argv[1:])
