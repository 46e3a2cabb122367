"""Turn packed weights back into dense ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from onnxcomp.model import Model
from onnxcomp.packed import Packed, find_packed
from onnxcomp.passes import Changes, Context, Pass, register
from onnxcomp.structure import spooled
from onnxcomp.weights import Spool
from onnxcomp_passes._stored import redirect

__all__ = ["Unpack"]


@register
@dataclass(frozen=True, kw_only=True)
class Unpack(Pass):
    """Turn packed weights back into dense ones, bit for bit, so that other passes and tools can work on them.

    ::

        before   Y = MatMul(X, Gather(book, Cast(unpack(codes))))
        after    Y = MatMul(X, W)

    The file grows, on purpose: `onnxcomp optimize --unpack` keeps that.

    Left alone: weights that `pack` did not pack, such as int8 codes that a Cast and a Mul decode.
    """

    name: ClassVar[str] = "unpack"
    lossless: ClassVar[bool] = True

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        changes, spool = Changes(), Spool()
        candidate = model.fork()
        gone: set[int] = set()
        for packed in find_packed(candidate):
            context.progress(f"unpacking {packed.tensor.name}")
            constant = _dense(packed, spool)
            changes.add(constant.name, f"{packed.nbytes:,} bytes become {constant._values.nbytes:,}")
            redirect(packed.tensor, constant)
            gone.update(id(node) for node in packed.nodes)
        for node in candidate.graph.nodes:
            if id(node) in gone:
                node.inputs.clear()
                node.outputs.clear()
        candidate.graph.nodes = [node for node in candidate.graph.nodes if id(node) not in gone]
        if changes.count:
            model.become(candidate)
        return changes


def _dense(packed: Packed, spool: Spool) -> gs.Constant:
    """The weight as an initializer of the same name."""
    value = packed.decode()
    onnx_type = helper.np_dtype_to_tensor_dtype(value.dtype)
    return gs.Constant(
        packed.tensor.name, spooled(np.ascontiguousarray(value).tobytes(), onnx_type, value.shape, spool)
    )
