"""Hold each weight in the fewest bytes that ONNX Runtime decodes at load."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.errors import ModelError
from onnxcomp.model import Model, value_of
from onnxcomp.packed import PREFIX, find_packed, packed_name
from onnxcomp.passes import Changes, Context, Pass, option, register
from onnxcomp.runtime import Census
from onnxcomp.targets import host_target
from onnxcomp.weights import SparseWeight, Spool
from onnxcomp_passes._packed_form import PACKED_OPSET, Form, Writer
from onnxcomp_passes._packing import Contents, contents, layouts
from onnxcomp_passes._stored import lift_constants, redirect

__all__ = ["Pack"]

TYPES = tuple(map(np.dtype, (np.float32, np.float16, np.int8, np.uint8)))

MIN_SAVED_BYTES = 64
"""A weight that saves less is not worth nodes of its own."""

LEAST_SAVED = 0.03
"""Nor one that saves less than this share of its bytes: nodes to load and decode for next to nothing."""

NAMES_BYTES = 24
"""What protobuf takes around a dense initializer besides its data, about."""


@register
@dataclass(frozen=True, kw_only=True)
class Pack(Pass):
    """Hold each weight in the smallest of several forms that ONNX Runtime decodes when it loads the model.

    ::

        before   Y = MatMul(X, W)                   W: float32, float16, int8 or uint8, of few values or mostly zeros
        after    Y = MatMul(X, Gather(book, Cast(unpack(codes))))                              few values
        after    Y = MatMul(X, ScatterElements(zeros, CumSum(Cast(gaps)), values or codes))    mostly zeros
        after    Y = MatMul(X, Gather(values or codes, Mul(mask, CumSum(mask))))               many zeros
        after    Y = MatMul(X, ConstantOfShape(shape))                                         one value

    Weights are the same bit for bit, so results and speed are too; ONNX Runtime's constant folding runs the nodes once,
    at load, at every optimization level but "disabled". It takes weights in float32 and float16, and the codes of
    quantized ones. It writes no sparse_initializer: onnx.checker's full check refuses those as inputs of operators for
    dense tensors. Nothing else looks into packed weights: pack last, and `unpack` gives the dense model back.

    Left alone: weights that no form makes smaller, those that ONNX Runtime is seen not to fold or not to find its int8
    kernels behind, other types than float32, float16, int8 and uint8, graph outputs, weights of subgraphs.
    """

    name: ClassVar[str] = "pack"
    lossless: ClassVar[bool] = True
    seals: ClassVar[bool] = True

    min_bytes: int = option(256, "Smaller weights stay as they are.", minimum=1)
    skip: tuple[str, ...] = option((), "Names of weights that stay as they are.")

    def rewrite(self, model: Model, context: Context) -> Changes:
        """See the class."""
        changes = Changes()
        base = model.fork()
        lift_constants(base.graph)
        if not list(self._wanted(base, context, changes)) or not _raised(base, context, changes):
            return changes
        before = self._census(base, context)
        skip: set[str] = set(self.skip)
        while True:
            candidate, told = self._packed(base, context, skip)
            refused = self._refused(candidate, before, context, told)
            if not refused:
                break
            for name, why in refused.items():
                changes.leave(name, why)
            skip |= refused.keys()
        if not told or candidate.size_bytes >= model.size_bytes:
            return changes
        for name, what in told.items():
            changes.add(name, what)
        changes.notes.append("decoded at load; with ONNX Runtime's optimizations disabled, at each inference")
        model.become(candidate)
        return changes

    def _wanted(self, model: Model, context: Context, changes: Changes) -> Iterator[gs.Constant]:
        """The constants of the main graph that may be packed, judged without reading them."""
        outputs = {tensor.name for tensor in model.graph.outputs}
        for constant in model.constants():
            if getattr(constant, "owner", model.graph) is not model.graph or constant.name.startswith(PREFIX):
                continue
            if constant.dtype not in TYPES or constant.name in outputs:
                continue
            if _held_bytes(constant) < self.min_bytes or math.prod(constant.shape) >= 1 << 31:
                continue
            if constant.name in self.skip or any(context.excludes(reader) for reader in constant.outputs):
                changes.leave(constant.name, "excluded")
                continue
            yield constant

    def _packed(self, base: Model, context: Context, skip: Collection[str]) -> tuple[Model, dict[str, str]]:
        """A copy with every weight but some packed where that is smaller, and what was done, by name."""
        candidate, spool, told = base.fork(), Spool(), {}
        taken = {tensor.name for node in candidate.graph.nodes for tensor in (*node.inputs, *node.outputs)}
        writer = Writer((name for name in map(packed_name, itertools.count()) if name not in taken), spool)
        added: list[gs.Node] = []
        for constant in list(self._wanted(candidate, context, Changes())):
            if constant.name in skip:
                continue
            context.progress(f"packing {constant.name}")
            value, held = value_of(constant), _held_bytes(constant)
            found = contents(value)
            if found is None:
                continue
            form, how = _smallest(writer, str(constant.name), found, value)
            if form.nbytes + max(MIN_SAVED_BYTES, LEAST_SAVED * held) < held + len(constant.name) + NAMES_BYTES:
                redirect(constant, form.nodes[-1].outputs[0])
                added += form.nodes
                told[constant.name] = _told(value, held, form.nbytes, how)
        candidate.graph.nodes[:0] = added
        return candidate, told

    @staticmethod
    def _census(model: Model, context: Context) -> Census | None:
        """What ONNX Runtime makes of a model."""
        if context.runtime is None or context.workdir is None:
            return None
        path = context.workdir / "packed.onnx"
        model.save(path, durable=False)
        try:
            return context.runtime.census(path)
        finally:
            for file in path.parent.glob(f"{path.name}*"):
                file.unlink()

    def _refused(
        self, candidate: Model, before: Census | None, context: Context, told: Mapping[str, str]
    ) -> dict[str, str]:
        """The packed weights that ONNX Runtime does not fold, or that hide int8 kernels from it, and why."""
        if before is None or not told:
            return {}
        after = self._census(candidate, context)
        assert after is not None
        alive = {name for node in after.nodes for name in node.outputs}
        packed = find_packed(candidate)
        made = {p.tensor.name for p in packed if any(node.outputs[0].name in alive for node in p.nodes)}
        if made:
            return dict.fromkeys(made, "ONNX Runtime does not fold its decoding")
        if after.counts() == before.counts():
            return {}
        codes = {p.tensor.name for p in packed if any(_computes_on_codes(node) for node in p.tensor.outputs)}
        return dict.fromkeys(codes or told, "ONNX Runtime would use other kernels")


def _raised(base: Model, context: Context, changes: Changes) -> bool:
    """Raise the opset as far as the decoding needs; whether it has that."""
    target = context.target or host_target()
    if base.opset >= PACKED_OPSET:
        return True
    if target.max_opset < PACKED_OPSET:
        changes.leave("the model", f"needs opset {PACKED_OPSET}; {target.name} has {target.max_opset}")
        return False
    try:
        base.raise_opset(PACKED_OPSET)
    except ModelError as error:
        changes.leave("the model", str(error))
        return False
    changes.notes.append(f"the opset is {base.opset}: the first that can decode weights")
    return True


def _held_bytes(constant: gs.Constant) -> int:
    """What a constant's data take in the file now."""
    values = constant._values
    if isinstance(values, SparseWeight):
        return int(values.tensor.ByteSize())
    return int(values.nbytes)


def _smallest(writer: Writer, name: str, found: Contents, value: np.ndarray[Any, Any]) -> tuple[Form, str]:
    """The packed form of least bytes, and what it is called."""
    best = min(layouts(found), key=lambda layout: layout.nbytes)
    told = best.told if found.others.size else "one value"
    return writer.write(name, found, best, value.shape, value.dtype), told


def _told(value: np.ndarray[Any, Any], before: int, after: int, how: str) -> str:
    shape = "x".join(map(str, value.shape))
    return f"{shape} {value.dtype} as {how}: {after:,} bytes, was {before:,}"


def _computes_on_codes(reader: gs.Node) -> bool:
    """Whether a reader of a weight is, or becomes part of, an integer kernel."""
    return bool(reader.op == "DequantizeLinear" or reader.domain)
