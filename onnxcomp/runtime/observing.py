"""Showing tensors to observers, in the worker, a group of tensors at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import onnx

from onnxcomp.errors import OnnxcompError, RuntimeFailure
from onnxcomp.runtime.results import Array, Feed, Observer
from onnxcomp.runtime.sessions import Sessions, tidy
from onnxcomp.skeleton import load_skeleton

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
        self._sessions = sessions
        self._path = path
        self._optimize = optimize
        self.observers = observers
        model = load_skeleton(path)
        made = {tensor.name for tensor in model.graph.initializer}
        made.update(tensor.values.name for tensor in model.graph.sparse_initializer)
        # An initializer that is a graph input too is a default: what the run uses is seen as an output.
        self._inputs = [info.name for info in model.graph.input if info.name in observers and info.name not in made]
        made.update(name for node in model.graph.node for name in node.output)
        self._names = [name for name in observers if name not in self._inputs]
        unknown = [name for name in self._names if not name or name not in made]
        if unknown:
            message = f"cannot observe {unknown[0]!r}: the main graph has no tensor of that name"
            raise RuntimeFailure(message)
        self._measuring: Any = self._make_measuring(model) if self._names else None
        self._groups: list[tuple[str, ...]] | None = None if self._names else []
        self._present = 0

    def show(self, feed: Feed) -> None:
        """Show the values of one feed to the observers of the present group.

        Raises:
            RuntimeFailure: The feed lacks an input, or an observer failed.
        """
        if self._groups is None:
            shapes = self._measuring.run(None, feed)[-len(self._names) :]
            sizes = {
                name: math.prod(shape.tolist()) * _BYTES_PER_ELEMENT
                for name, shape in zip(self._names, shapes, strict=True)
            }
            self._groups = list(group_by_size(sizes, GROUP_BYTES))
            self._measuring = None
        if self._present == 0:
            self._show_inputs(feed)
        if self._groups:
            group = self._groups[self._present]
            session = self._sessions.get(self._path, optimize=self._optimize, observed=group).session
            for name, value in zip(group, session.run(list(group), feed), strict=True):
                self._update(name, value)

    def advance(self) -> bool:
        """Go on to the next group; tell whether there is one."""
        self._present += 1
        return self._groups is not None and self._present < len(self._groups)

    def _show_inputs(self, feed: Feed) -> None:
        for name in self._inputs:
            if name not in feed:
                message = f"the feed has no input {name!r}; it has {sorted(feed)}"
                raise RuntimeFailure(message)
            self._update(name, feed[name])

    def _update(self, name: str, value: Array) -> None:
        try:
            self.observers[name].update(value)
        except OnnxcompError:
            raise
        except Exception as error:  # an observer is the caller's code and may raise anything
            message = f"the observer of {name!r} failed: {tidy(error)}"
            raise RuntimeFailure(message) from error

    def _make_measuring(self, model: onnx.ModelProto) -> Any:
        """Make a session whose last outputs are the shapes of the tensors, so that it need keep none of them."""
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


def group_by_size(sizes: Mapping[str, int], limit: int) -> Iterator[tuple[str, ...]]:
    """Cut tensors, in their order, into groups of at most `limit` bytes; one that is larger is alone.

    >>> list(group_by_size({"a": 6, "b": 3, "c": 2, "d": 20}, 10))
    [('a', 'b'), ('c',), ('d',)]
    """
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield tuple(group)
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield tuple(group)
