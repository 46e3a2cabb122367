"""X^T X of layers' inputs, gathered from calibration data a few layers at a time, so that memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp_passes._encoding import Weight
from onnxcomp_passes._gptq import InputProducts

__all__ = ["layer_inputs", "observed"]

Array = np.ndarray[Any, Any]
Batch = tuple[list[Weight], dict[str, Array]]

BATCH_BYTES = 256 << 20
"""Of matrices that one pass over the data gathers; a larger one is gathered alone."""


def layer_inputs(model: Model, weights: list[Weight]) -> dict[str, list[str]]:
    """The tensors that each weight is multiplied with in the main graph, where that is all that is done with it there.

    Only weights of shape (inputs, outputs), or (outputs, inputs) in a Gemm that says so: a Conv's products would be
    those of its windows.
    """
    main = {id(node) for node in model.graph.nodes}
    return {weight.name: found for weight in weights if (found := _inputs(weight, main))}


def _inputs(weight: Weight, main: set[int]) -> list[str]:
    found = []
    for reader in weight.constant.outputs:
        if id(reader) not in main:  # in a subgraph, whose tensors cannot be observed
            continue
        if reader.op not in {"MatMul", "Gemm"} or reader.domain or len(weight.shape) != 2 or reader.attrs.get("transA"):
            return []
        if reader.inputs[1] is not weight.constant or isinstance(reader.inputs[0], gs.Constant):
            return []
        if bool(reader.attrs.get("transB", 0)) != bool(weight.node.attrs.get("transB", 0)):
            return []
        found.append(str(reader.inputs[0].name))
    return found


def observed(base: Model, weights: list[Weight], inputs: Mapping[str, list[str]], context: Context) -> Iterator[Batch]:
    """Weights in batches, with the products of those that have inputs: each batch is one pass over the data."""
    if not inputs:
        yield weights, {}
        return
    assert context.workdir is not None
    path = context.workdir / "products.onnx"
    base.save(path, durable=False)
    batch: list[Weight] = []
    names: set[str] = set()
    total = 0
    for weight in weights:
        fresh = set(inputs.get(weight.name, ())) - names
        size = 8 * max(weight.shape, default=0) ** 2 if fresh else 0
        if batch and total + size > BATCH_BYTES:
            yield batch, _gather(path, batch, inputs, context)
            batch, names, total = [], set(), 0
        batch.append(weight)
        names.update(inputs.get(weight.name, ()))
        total += size
    yield batch, _gather(path, batch, inputs, context)
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


def _gather(path: Path, batch: list[Weight], inputs: Mapping[str, list[str]], context: Context) -> dict[str, Array]:
    """The products for each weight of a batch, summed over its readers."""
    names = {name for weight in batch for name in inputs.get(weight.name, ())}
    if not names:
        return {}
    assert context.data is not None
    assert context.runtime is not None
    context.progress(f"gathering the products of {len(names)} inputs")
    watches = context.runtime.observe(path, context.data.feeds, {name: InputProducts() for name in sorted(names)})
    found: dict[str, Array] = {}
    for weight in batch:
        totals = [watches[name].total for name in inputs.get(weight.name, ())]
        if totals and all(np.any(total) for total in totals):
            found[weight.name] = np.sum(totals, axis=0) if len(totals) > 1 else totals[0]
    return found
