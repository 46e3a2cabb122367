"""Half the bytes: weights in float16, computed in float16 or decoded at load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.calibration import MinMax
from onnxcomp.errors import ModelError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass, option, register
from onnxcomp.weights import Spool
from onnxcomp_passes._half import HALF_MAX, harm_of, plan
from onnxcomp_passes._half_graph import store_half, write_half
from onnxcomp_passes._shapes import infer_known
from onnxcomp_passes._statistics import observe
from onnxcomp_passes._stored import lift_constants
from onnxcomp_passes._workspace import is_dense, label

__all__ = ["Float16"]

HEADROOM = 2.0
"""Values up to this many times those that were seen must fit."""

CAST_OPSET = 6
"""The first opset whose Cast names its type by number."""

DECODERS = frozenset({"Cast", "DequantizeLinear", "Mul", "QuantizeLinear", "Sub"})
"""Operators whose small constants are scales of codes."""


@register
@dataclass(frozen=True, kw_only=True)
class Float16(Pass):
    """Convert weights and computation to float16, with float32 where float16 does not hold the values.

    ::

        before   Y = Conv(X, W)
        after    Y = Cast(Conv(Cast(X), W16))      W16: float16
        after    Y = Conv(X, Cast(W16))            storage_only=true

    Computation in float16 pays on devices with such kernels; ONNX Runtime's CPU provider computes most of it in float32
    with conversions around, so it is slower there. With `storage_only` the Cast is folded at load, and speed is that of
    float32. Which inputs and outputs of an operator may be float16 is told by its schema. With data, nodes whose values
    were seen to come near 65504 stay float32; without, those that compute with what comes of larger constants, and
    operators that may overflow. Nodes that would only cost Casts stay float32 too. Casts are shared, and never stand in
    a row.

    Left alone: weights beyond 65504 or, for a part that counts, too small for float16; sums, powers, positions;
    arithmetic on what were integers (shapes, masks); nodes with subgraphs; int8 computation; excluded nodes.
    """

    name: ClassVar[str] = "float16"
    rounds: ClassVar[bool] = True

    keep_io: bool = option(True, "Inputs and outputs of the model stay float32.")
    storage_only: bool = option(False, "Weights are stored as float16 and decoded at load; computation stays float32.")
    block: tuple[str, ...] = option((), "Operators that stay float32, besides those that have to.")
    min_elements: int = option(128, "Smaller weights of float32 nodes stay float32.", minimum=1)

    def weaker(self) -> Iterator[Self]:
        """Storage alone."""
        if not self.storage_only:
            yield replace(self, storage_only=True, keep_io=True)

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        changes = Changes()
        base = model.fork()
        try:
            base.raise_opset(CAST_OPSET)
        except ModelError as error:
            changes.leave("the model", str(error))
            return changes
        lift_constants(base.graph)
        spool = Spool()
        if not self.storage_only:
            self._compute(base, context, spool, changes)
        stored = self._storable(base, context, changes)
        if stored:
            store_half(base, stored, spool)
            for constant in stored:
                shape = "x".join(map(str, constant.shape))
                changes.add(constant.name, f"{shape} float32 stored as float16")
        if changes.count:
            model.become(base)
        return changes

    # --- computation ------------------------------------------------------------------------------------------------

    def _compute(self, base: Model, context: Context, spool: Spool, changes: Changes) -> None:
        made = plan(
            base,
            context,
            blocked=frozenset(self.block),
            seen=self._seen(base, context),
            converts_io=not self.keep_io,
        )
        for node, reason in made.left:
            changes.leave(label(node), reason)
        if not made.ports:
            return
        for node in base.graph.nodes:
            if id(node) in made.ports:
                changes.add(label(node), "computes in float16")
        write_half(base, made, spool)

    def _seen(self, base: Model, context: Context) -> Mapping[str, bool] | None:
        """Whether the values of each float32 tensor were seen to fit float16, or None without data."""
        if context.data is None or context.runtime is None or context.workdir is None:
            return None
        known = infer_known(base)
        tensors = {id(t): t for node in base.graph.nodes for t in (*node.inputs, *node.outputs)}
        names = [
            tensor.name
            for key, tensor in tensors.items()
            if not isinstance(tensor, gs.Constant) and key in known and known[key][1].dtype == np.float32
        ]
        watches = observe(base, {name: MinMax() for name in names}, context)
        return {name: _fits(watch) for name, watch in watches.items()}

    # --- storage ----------------------------------------------------------------------------------------------------

    def _storable(self, base: Model, context: Context, changes: Changes) -> list[gs.Constant]:
        """The float32 weights that are left in the main graph and may be rounded."""
        outputs = {id(tensor) for tensor in base.graph.outputs}
        found: dict[int, gs.Constant] = {}
        for node in base.graph.nodes:
            for tensor in node.inputs:
                if id(tensor) not in found and self._is_storable(node, tensor, base, context):
                    found[id(tensor)] = tensor
        for key, constant in list(found.items()):
            reason = "is a graph output" if key in outputs else harm_of(constant)
            if reason is not None:
                changes.leave(constant.name, reason)
                del found[key]
        return list(found.values())

    def _is_storable(self, node: gs.Node, tensor: gs.Tensor, base: Model, context: Context) -> bool:
        if not is_dense(tensor) or tensor.dtype != np.float32 or context.excludes(node) or node.op in DECODERS:
            return False
        mine = getattr(tensor, "owner", base.graph) is base.graph
        return mine and int(np.prod(tensor.shape)) >= self.min_elements


def _fits(watch: Any) -> bool:
    return not watch.nonfinite and max(abs(watch.low), abs(watch.high)) * HEADROOM <= HALF_MAX
