"""Showing tensors to observers, in the worker, a group of tensors at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import onnx

from onnxcomp.errors import OnnxcompError, RuntimeFailure
from onnxcomp.runtime.messages import tidy
from onnxcomp.runtime.results import Array, Feed, Observer, PairObserver
from onnxcomp.runtime.sessions import Sessions, keep_needed
from onnxcomp.skeleton import load_skeleton

K = TypeVar("K", bound=Hashable)

GROUP_BYTES = 128 << 20
_BYTES_PER_ELEMENT = 4  # nearly all activations are float32, and the limit is not a sharp one


class Observation:
    """Observers of one model, on their way through the feeds.

    Args:
        sessions: Where sessions come from.
        path: The model file.
        observers: Tensor name -> observer.
        optimize: False turns all graph optimizations off.

    Raises:
        RuntimeFailure: A name is not that of a tensor of the main graph.
    """

    def __init__(self, sessions: Sessions, path: str, observers: dict[str, Observer], *, optimize: bool) -> None:
        self.observers = observers
        self._tensors = Tensors(sessions, path, list(observers), optimize=optimize)
        self._groups: list[tuple[str, ...]] | None = None
        self._present = 0

    def show(self, feed: Feed) -> None:
        """Show the values of one feed to the observers of the present group.

        Raises:
            RuntimeFailure: The feed lacks an input, or an observer failed.
        """
        if self._groups is None:
            alone = len(self.observers) == 1  # needs no measuring, which is a run of its own
            sizes = dict.fromkeys(self.observers, 0) if alone else self._tensors.measure(feed)
            self._groups = list(group_by_size(sizes, GROUP_BYTES))
        group = self._groups[self._present]
        for name, value in zip(group, self._tensors.values(group, feed), strict=True):
            with blaming(name):
                self.observers[name].update(value)

    def advance(self) -> bool:
        """Go on to the next group; tell whether there is one."""
        self._present += 1
        return self._groups is not None and self._present < len(self._groups)


class PairObservation:
    """Observers of tensors of two models that are fed the same, on their way through the feeds.

    Both models run on a feed one after the other, and a group of tensors holds what fits from both.

    Args:
        sessions: Where sessions come from.
        paths: The two model files.
        observers: The tensor's name in the one model and in the other -> observer.
        busy: Is told which of the two files is at work.
        optimize: False turns all graph optimizations off.

    Raises:
        RuntimeFailure: A name is not that of a tensor of its model's main graph.
    """

    def __init__(
        self,
        sessions: Sessions,
        paths: tuple[str, str],
        observers: dict[tuple[str, str], PairObserver],
        busy: Callable[[str], None],
        *,
        optimize: bool,
    ) -> None:
        self.observers = observers
        self._paths = paths
        self._busy = busy
        self._tensors: list[Tensors] = []
        for path, names in zip(paths, zip(*observers, strict=True), strict=True):
            busy(path)
            self._tensors.append(Tensors(sessions, path, list(dict.fromkeys(names)), optimize=optimize, kept=True))
        self._groups: list[tuple[tuple[str, str], ...]] | None = None
        self._present = 0

    def show(self, feed: Feed) -> None:
        """Show the values of one feed to the observers of the present group.

        Raises:
            RuntimeFailure: The feed lacks an input, or an observer failed.
        """
        if self._groups is None:
            sizes = dict.fromkeys(self.observers, 0) if len(self.observers) == 1 else self._measured(feed)
            self._groups = list(group_by_size(sizes, GROUP_BYTES))
        group = self._groups[self._present]
        # Each name once: two tensors of the one model may have the same partner.
        wanted = [tuple(dict.fromkeys(names)) for names in zip(*group, strict=True)]
        values = []
        for path, tensors, names in zip(self._paths, self._tensors, wanted, strict=True):
            self._busy(path)
            values.append(dict(zip(names, tensors.values(names, feed), strict=True)))
        reference, candidate = values
        for names in group:
            with blaming(names[0]):
                self.observers[names].update(reference[names[0]], candidate[names[1]])

    def _measured(self, feed: Feed) -> dict[tuple[str, str], int]:
        """The bytes of both tensors of each pair in one run."""
        measured = []
        for path, tensors in zip(self._paths, self._tensors, strict=True):
            self._busy(path)
            measured.append(tensors.measure(feed))
        return {names: measured[0][names[0]] + measured[1][names[1]] for names in self.observers}

    def advance(self) -> bool:
        """Go on to the next group; tell whether there is one."""
        self._present += 1
        return self._groups is not None and self._present < len(self._groups)


class Tensors:
    """The values of some tensors of one model, whose other values nobody asks for.

    Args:
        sessions: Where sessions come from.
        path: The model file.
        names: The tensors, each once.
        optimize: False turns all graph optimizations off.
        kept: Hold on to the present group's session: of two large models in turn, `sessions` would keep neither.

    Raises:
        RuntimeFailure: A name is not that of a tensor of the main graph.
    """

    def __init__(
        self, sessions: Sessions, path: str, names: Sequence[str], *, optimize: bool, kept: bool = False
    ) -> None:
        self._sessions = sessions
        self._path = path
        self._optimize = optimize
        self._kept = kept
        self._session: tuple[tuple[str, ...], Any] | None = None
        model = load_skeleton(path)
        made = {tensor.name for tensor in model.graph.initializer}
        made.update(tensor.values.name for tensor in model.graph.sparse_initializer)
        # An initializer that is a graph input too is a default: what the run uses is seen as an output.
        self._inputs = [info.name for info in model.graph.input if info.name in names and info.name not in made]
        made.update(name for node in model.graph.node for name in node.output)
        self._names = [name for name in names if name not in self._inputs]
        unknown = [name for name in self._names if not name or name not in made]
        if unknown:
            message = f"cannot observe {unknown[0]!r}: the main graph has no tensor of that name"
            raise RuntimeFailure(message)

    def measure(self, feed: Feed) -> dict[str, int]:
        """The bytes of each tensor in one run; none for a graph input, which is in memory anyway."""
        sizes = dict.fromkeys(self._inputs, 0)
        if self._names:
            shapes = self._make_measuring().run(None, feed)
            for name, shape in zip(self._names, shapes, strict=True):
                sizes[name] = math.prod(shape.tolist()) * _BYTES_PER_ELEMENT
        return sizes

    def values(self, names: tuple[str, ...], feed: Feed) -> list[Array]:
        """The values of some of the tensors in one run.

        Raises:
            RuntimeFailure: The feed lacks an input.
        """
        missing = [name for name in names if name in self._inputs and name not in feed]
        if missing:
            message = f"the feed has no input {missing[0]!r}; it has {sorted(feed)}"
            raise RuntimeFailure(message)
        made = tuple(name for name in names if name not in self._inputs)
        values = dict(zip(made, self._observed(made).run(list(made), feed), strict=True)) if made else {}
        return [feed[name] if name in self._inputs else values[name] for name in names]

    def _observed(self, names: tuple[str, ...]) -> Any:
        """A session that gives these tensors as outputs."""
        if self._session is None or self._session[0] != names:
            self._session = None  # the last group's is let go before the next is made
            session = self._sessions.get(self._path, optimize=self._optimize, observed=names).session
            if not self._kept:
                return session
            self._session = names, session
        return self._session[1]

    def _make_measuring(self) -> Any:
        """Make a session whose outputs are the shapes of the tensors, so that it need keep none of them."""
        model = load_skeleton(self._path)
        keep_needed(model.graph, self._names)
        taken = {name for node in model.graph.node for name in node.output}
        prefix = "shape"
        while any(name.startswith(prefix) for name in taken):
            prefix += "_"
        for index, name in enumerate(self._names):
            model.graph.node.append(onnx.helper.make_node("Shape", [name], [f"{prefix}{index}"]))
            model.graph.output.append(onnx.ValueInfoProto(name=f"{prefix}{index}"))
        if not any(opset.domain in ("", "ai.onnx") for opset in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid("", 13))
        return self._sessions.make_edited(model, self._path, self._sessions.options(optimize=self._optimize))


@contextlib.contextmanager
def blaming(name: str) -> Iterator[None]:
    """Name the tensor whose observer failed. An onnxcomp error of an observer's own passes as it is."""
    try:
        yield
    except OnnxcompError:
        raise
    except Exception as error:  # an observer is the caller's code and may raise anything
        message = f"the observer of {name!r} failed: {tidy(error)}"
        raise RuntimeFailure(message) from error


def group_by_size(sizes: Mapping[K, int], limit: int) -> Iterator[tuple[K, ...]]:
    """Cut tensors, in their order, into groups of at most `limit` bytes; one that is larger is alone.

    >>> list(group_by_size({"a": 6, "b": 3, "c": 2, "d": 20}, 10))
    [('a', 'b'), ('c',), ('d',)]
    """
    group: list[K] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield tuple(group)
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield tuple(group)
