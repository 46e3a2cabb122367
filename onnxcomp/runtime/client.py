"""The caller's side: starts the worker, talks to it, and turns its end into an exception."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from onnxcomp import errors
from onnxcomp.errors import OptionError, RuntimeFailure, WorkerDied
from onnxcomp.runtime.census import Census
from onnxcomp.runtime.process import SilentWorker, WorkerProcess
from onnxcomp.runtime.results import Feed, Observer, PairObserver, Refusal, Request, SessionInfo, Timing
from onnxcomp.workfolder import work_folder

O = TypeVar("O", bound=Observer)  # noqa: E741 - the type of an observer
P = TypeVar("P", bound=PairObserver)

MOST_THREADS = 256
"""ONNX Runtime starts as many as it is told, which takes a second for these and minutes for 1,000."""


class Runtime:
    """Runs models on ONNX Runtime's CPU provider in a worker process.

    The worker starts with the first call. When it dies (a crash, out of memory, or silence for `timeout_s`) the call
    raises :class:`~onnxcomp.errors.WorkerDied`, and the next call starts a new one. Every session is made with the
    same options, so that what is timed, counted and compared is the same program.

    Args:
        threads: Threads that one operator may use.
        timeout_s: The longest that one load or one run may take, in seconds.
        session_config: Extra session configuration entries, such as ``{"session.qdqisint8allowed": "1"}``.
        disabled_optimizers: Names of ONNX Runtime's graph optimizers to leave out, such as ``NchwcTransformer``.
        blas_threads: Threads of numpy's matrix products in the worker, where observers use them; None: its default.

    Raises:
        OptionError: `threads` or `timeout_s` is not positive, or `threads` is more than any machine makes use of.
    """

    def __init__(
        self,
        *,
        threads: int = 1,
        timeout_s: float = 600.0,
        session_config: Mapping[str, str] | None = None,
        disabled_optimizers: Sequence[str] = (),
        blas_threads: int | None = None,
    ) -> None:
        if not 1 <= threads <= MOST_THREADS:
            message = f"threads must be from 1 to {MOST_THREADS}, got {threads}"
            raise OptionError(message)
        if not timeout_s > 0:
            message = f"timeout_s must be positive, got {timeout_s}"
            raise OptionError(message)
        self._threads = threads
        self._timeout_s = timeout_s
        self._config = dict(session_config or {})
        self._disabled = tuple(disabled_optimizers)
        self._blas_threads = blas_threads
        self._worker: WorkerProcess | None = None
        self._lock = threading.Lock()
        self._observations = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker. A later call starts a new one."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()

    @property
    def pid(self) -> int | None:
        """The worker's process id; None while there is no worker."""
        return None if self._worker is None else self._worker.process.pid

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that the present worker has had resident; 0 while there is none."""
        return 0 if self._worker is None else int(self._ask("peak_memory", "asking for memory", None))

    def check(self, path: Path, *, optimize: bool = True) -> SessionInfo:
        """Load a model.

        Args:
            path: The model file; its external data is found beside it.
            optimize: False turns all of ONNX Runtime's graph optimizations off.

        Returns:
            The model's inputs and outputs, and how long it took to load.

        Raises:
            RuntimeFailure: ONNX Runtime refuses the model; the message is its own, in one line.
            WorkerDied: ONNX Runtime crashed or did not end in time.
        """
        info = self._ask("check", "loading", path, optimize=optimize)
        assert isinstance(info, SessionInfo)
        return info

    def run(
        self, path: Path, feeds: Iterable[Feed], *, outputs: Sequence[str] | None = None, optimize: bool = True
    ) -> Iterator[list[Any]]:
        """Run a model on each feed in turn; one feed and its outputs are in memory at a time.

        Args:
            path: The model file.
            feeds: The inputs, one mapping a run.
            outputs: The outputs to return, in this order; None is all of them.
            optimize: False turns all of ONNX Runtime's graph optimizations off.

        Yields:
            One list a feed: an array for a tensor, a Python list or dict for a sequence or a map, None for an empty
            optional.

        Raises:
            RuntimeFailure: ONNX Runtime refuses the model or the feed.
            WorkerDied: ONNX Runtime crashed or did not end in time.
        """
        names = None if outputs is None else list(outputs)
        for feed in feeds:
            yield self._ask("run", "running", path, feed=dict(feed), outputs=names, optimize=optimize)

    def observe(
        self, path: Path, feeds: Callable[[], Iterable[Feed]], observers: Mapping[str, O], *, optimize: bool = True
    ) -> dict[str, O]:
        """Show observers the values of tensors, without moving those values between processes.

        The tensors are taken in groups that fit in memory together (measured on the first feed); each group is
        another pass over the feeds.

        Args:
            path: The model file.
            feeds: Gives the same inputs each time it is called.
            observers: Tensor name -> observer. Any tensor of the main graph: a graph input, a graph output, an
                initializer or an inner tensor. ``update`` runs in the worker, on a copy of the observer.
            optimize: False turns all of ONNX Runtime's graph optimizations off.

        Returns:
            The updated observers, by the same names in the same order.

        Raises:
            RuntimeFailure: ONNX Runtime refuses the model, a feed or a name, or an observer failed. An onnxcomp error
                of an observer's own keeps its class.
            WorkerDied: ONNX Runtime crashed or did not end in time.
        """
        if not observers:
            return {}
        token = self._token()
        self._ask("observe_begin", "loading", path, token=token, observers=dict(observers), optimize=optimize)
        updated: dict[str, O] = self._show(path, token, feeds)
        return updated

    def observe_pair(
        self,
        reference: Path,
        candidate: Path,
        feeds: Callable[[], Iterable[Feed]],
        observers: Mapping[tuple[str, str], P],
        *,
        optimize: bool = True,
    ) -> dict[tuple[str, str], P]:
        """Show observers the values that tensors have in two models, without moving those values between processes.

        As `observe`, with both models run on each feed and half of the memory for each.

        Args:
            reference: The one model's file.
            candidate: The other's; it takes the same inputs.
            feeds: Gives the same inputs each time it is called.
            observers: (name in the reference, name in the candidate) -> observer. ``update(reference, candidate)``
                runs in the worker, on a copy of the observer.
            optimize: False turns all of ONNX Runtime's graph optimizations off.

        Returns:
            The updated observers, by the same names in the same order.

        Raises:
            RuntimeFailure: ONNX Runtime refuses a model, a feed or a name, or an observer failed. An onnxcomp error
                of an observer's own keeps its class.
            WorkerDied: ONNX Runtime crashed or did not end in time.
        """
        if not observers:
            return {}
        token = self._token()
        other = _file(candidate)
        begin: dict[str, Any] = {"token": token, "observers": dict(observers), "optimize": optimize}
        self._ask("observe_pair_begin", "loading", reference, other=other, **begin)
        updated: dict[tuple[str, str], P] = self._show(reference, token, feeds)
        return updated

    def _token(self) -> int:
        """A number that names a new observation."""
        with self._lock:
            self._observations += 1
            return self._observations

    def _show(self, path: Path, token: int, feeds: Callable[[], Iterable[Feed]]) -> Any:
        """Run an observation that has begun to its end, one pass over the feeds for each group of tensors."""
        try:
            more = True
            while more:
                for feed in feeds():
                    self._ask("observe_feed", "observing", path, token=token, feed=dict(feed))
                more = self._ask("observe_next", "observing", path, token=token)
            return self._ask("observe_end", "observing", path, token=token)
        except BaseException:
            if self._worker is not None:
                self._ask("observe_drop", "observing", path, token=token)
            raise

    def time(
        self,
        paths: Sequence[Path],
        feed: Feed,
        *,
        min_rounds: int = 30,
        max_rounds: int = 200,
        seconds: float = 3.0,
    ) -> list[Timing]:
        """Time models side by side: each round runs every model once, so that a slow spell of the machine hits all.

        Five rounds warm up. The order within a round is shuffled with a fixed seed: no model always runs after the
        same other one. The models are in memory together.

        Args:
            paths: The model files; they take the same inputs.
            feed: The inputs of every run.
            min_rounds: Rounds that are always done.
            max_rounds: Rounds that are never exceeded.
            seconds: Time to spend a model, once `min_rounds` are done.

        Returns:
            One timing a path, in the same order.

        Raises:
            OptionError: The rounds are not 1 <= min_rounds <= max_rounds.
            RuntimeFailure: ONNX Runtime refuses a model or the feed.
            WorkerDied: ONNX Runtime crashed or did not end in time.
        """
        if not 1 <= min_rounds <= max_rounds:
            message = f"rounds must satisfy 1 <= min_rounds <= max_rounds, got {min_rounds} and {max_rounds}"
            raise OptionError(message)
        if not paths:
            return []
        timings: list[Timing] = self._ask(
            "time",
            "timing",
            None,
            paths=[_file(path) for path in paths],
            feed=dict(feed),
            min_rounds=min_rounds,
            max_rounds=max_rounds,
            seconds=seconds,
        )
        return timings

    def profile(self, path: Path, feed: Feed, runs: int = 20, *, median: bool = False) -> dict[str, float]:
        """Measure where the time goes, with ONNX Runtime's own profiler.

        Args:
            path: The model file.
            feed: The inputs of every run.
            runs: Runs to average; three more warm up.
            median: Give the median of the runs, which a slow spell of the machine does not move, instead of the mean.

        Returns:
            Node name -> milliseconds a run, slowest first. The nodes are those of the optimized graph, named
            as in the census. A loop body counts as often as it ran.

        Raises:
            OptionError: `runs` is not positive.
            RuntimeFailure: ONNX Runtime refuses the model or the feed.
            WorkerDied: ONNX Runtime crashed or did not end in time.
        """
        if runs < 1:
            message = f"runs must be at least 1, got {runs}"
            raise OptionError(message)
        with work_folder() as folder:
            asked = {"feed": dict(feed), "runs": runs, "folder": str(folder), "median": median}
            times: dict[str, float] = self._ask("profile", "profiling", path, **asked)
        return times

    def census(self, path: Path, *, optimize: bool = True) -> Census:
        """List the nodes that really run: those of ONNX Runtime's optimized graph on this machine.

        Args:
            path: The model file.
            optimize: False turns all of ONNX Runtime's graph optimizations off.

        Returns:
            The nodes of the main graph and its subgraphs, and the size of the initializers. Nodes without a name of
            their own go by their first output.

        Raises:
            RuntimeFailure: ONNX Runtime refuses the model.
            WorkerDied: ONNX Runtime crashed or did not end in time.
        """
        with work_folder() as folder:
            census = self._ask("census", "optimizing", path, optimize=optimize, folder=str(folder))
        assert isinstance(census, Census)
        return census

    def convert(self, path: Path, output: Path, *, level: Literal["all", "basic", "none"] = "all") -> None:
        """Write a model as this runtime's sessions optimize it.

        Args:
            path: The model file.
            output: The file to write: .ort is ONNX Runtime's own format, .onnx has its weights in a file beside it.
            level: Which optimizations: "basic" are those that come before execution providers choose their nodes.

        Raises:
            RuntimeFailure: ONNX Runtime refuses the model.
            WorkerDied: ONNX Runtime crashed or did not end in time.
        """
        self._ask("convert", "converting", path, output=str(output.absolute()), level=level)

    def _ask(self, operation: str, doing: str, path: Path | None, **arguments: Any) -> Any:
        """Send one request and wait for its reply; `doing` and `path` are for the error messages."""
        subject = None if path is None else str(path)
        if path is not None:
            arguments["path"] = _file(path)
        message = pickle.dumps(Request(operation, arguments), protocol=pickle.HIGHEST_PROTOCOL)
        with self._lock:
            if self._worker is None:
                self._worker = WorkerProcess(
                    self._threads, self._config, self._disabled, self._timeout_s, self._blas_threads
                )
            try:
                answer, subject = self._worker.exchange(message, subject)
            except SilentWorker as ended:
                raise self._died(doing, subject, timed_out=ended.timed_out) from None
            except BaseException:
                # Half an exchange is on the wire (Ctrl-C, say): a new worker is the only clean way on.
                self.close()
                raise
        if isinstance(answer, Refusal):
            where = answer.path or subject
            reason = f"{where}: {answer.reason}" if where else answer.reason
            raise getattr(errors, answer.error, RuntimeFailure)(reason)
        return answer.value

    def _died(self, doing: str, subject: str | None, *, timed_out: bool) -> WorkerDied:
        worker, self._worker = self._worker, None
        assert worker is not None
        where = f"{subject}: " if subject else ""
        if timed_out:
            worker.end()
            limit = f"{self._timeout_s:g} s"
            return WorkerDied(f"{where}ONNX Runtime was stopped: {doing} took longer than the limit of {limit}")
        return WorkerDied(f"{where}the ONNX Runtime process died while {doing} ({worker.cause_of_death()})")


def _file(path: Path) -> str:
    """The absolute path of a model file, for a worker whose working directory may be another."""
    if not Path(path).is_file():
        message = f"{path}: expected a model file, found {'a folder' if Path(path).is_dir() else 'nothing'}"
        raise RuntimeFailure(message)
    return str(Path(path).absolute())
