"""The teacher: the original model in ONNX Runtime, its outputs kept where they fit in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.errors import ModelError, RuntimeFailure
from onnxcomp.model import Model
from onnxcomp.runtime import Runtime

__all__ = ["Teacher", "real_rows"]

Array = np.ndarray[Any, Any]
Outputs = dict[str, Any]


class Teacher:
    """Runs the original, with inner tensors as further outputs.

    Attributes:
        outputs: Names of its own outputs.
        names: The same and what is watched.

    Args:
        model: The original; not changed.
        watch: Names of the inner tensors.
        runtime: ONNX Runtime.
        workdir: Where the model with further outputs is written.
        cache_bytes: What outputs may take in memory; beyond, they are computed each time.

    Raises:
        ModelError: The original has no such tensor.
    """

    def __init__(self, model: Model, watch: Sequence[str], runtime: Runtime, workdir: Path, cache_bytes: float) -> None:
        shown = model.fork()
        self.outputs = tuple(output.name for output in shown.graph.outputs)
        self.names = [*self.outputs]
        _show(shown, [name for name in watch if name not in self.names])
        self.names += [name for name in watch if name not in self.names]
        starts = [next(iter(each.shape or (None,))) for each in shown.graph.inputs]
        ends = [next(iter(each.shape or (None,))) for each in shown.graph.outputs]
        self._by_sample = None if None in ends or not set(starts).issuperset(ends) else True
        self._path = workdir / "teacher.onnx"
        shown.save(self._path)
        self._runtime = runtime
        self._left = cache_bytes
        self._known: dict[bytes, Outputs] = {}

    def run(self, inputs: Mapping[str, Array]) -> Outputs:
        """The outputs and what is watched, by name; sequences are lists."""
        try:
            found = next(iter(self._runtime.run(self._path, [inputs])))
        except RuntimeFailure as error:
            message = f"the teacher cannot be run: {str(error).removeprefix(f'{self._path}: ')}"
            raise RuntimeFailure(message) from error
        return dict(
            zip(self.names, (each if isinstance(each, list) else np.asarray(each) for each in found), strict=True)
        )

    def recall(self, indices: Array, inputs: Mapping[str, Array], count: int) -> Outputs:
        """The same for samples that were perhaps run before.

        Args:
            indices: Of the samples, one each.
            inputs: A batch of them.
            count: How many of the batch's rows are samples.
        """
        keys = [int(index).to_bytes(8, "little") for index in indices]
        if all(key in self._known for key in keys):
            rows = [self._known[key] for key in keys]
            return {name: np.stack([row[name] for row in rows]) for name in self.names}
        found = real_rows(self.run(inputs), inputs, count)
        if len(keys) == count and _have_rows(found, count) and self._is_by_sample(inputs, count):
            self._remember(keys, found)
        return found

    def _is_by_sample(self, inputs: Mapping[str, Array], count: int) -> bool:
        """Whether the rows of all outputs are those of the inputs; where shapes do not tell, fewer samples do.

        There may be as many steps of time, say, as a batch has samples.
        """
        fewer = count // 2
        if self._by_sample is None and fewer:
            try:
                self._by_sample = _have_rows(self.run({name: each[:fewer] for name, each in inputs.items()}), fewer)
            except RuntimeFailure:  # of a fixed batch
                self._by_sample = False
        return bool(self._by_sample)

    def _remember(self, keys: Sequence[bytes], found: Outputs) -> None:
        for index, key in enumerate(keys):
            if key in self._known:
                continue
            row = {name: np.array(each[index]) for name, each in found.items()}
            self._left -= sum(each.nbytes for each in row.values())
            if self._left < 0:
                return
            self._known[key] = row


def real_rows(values: Mapping[str, Any], inputs: Mapping[str, Array], count: int) -> dict[str, Any]:
    """Without the rows that only fill up a fixed batch.

    Args:
        values: Arrays or tensors.
        inputs: What they were computed from.
        count: How many rows are samples.
    """
    rows = max((len(each) for each in inputs.values() if each.ndim), default=0)
    if rows <= count:
        return dict(values)
    return {name: each[:count] if _counts(each, rows) else each for name, each in values.items()}


def _have_rows(values: Outputs, count: int) -> bool:
    return all(_counts(each, count) for each in values.values())


def _counts(value: Any, count: int) -> bool:
    return bool(getattr(value, "ndim", 0)) and len(value) == count


def _show(model: Model, names: Sequence[str]) -> None:
    """Make outputs of inner tensors."""
    if not names:
        return
    model.infer_shapes()
    tensors: dict[str, gs.Tensor] = {tensor.name: tensor for node in model.graph.nodes for tensor in node.outputs}
    for name in names:
        if name not in tensors:
            message = f"the original has no tensor {name!r} to learn from"
            raise ModelError(message)
        tensor = tensors[name]
        tensor.dtype = tensor.dtype or np.float32
        model.graph.outputs.append(tensor)
