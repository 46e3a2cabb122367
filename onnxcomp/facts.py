"""What is in a model: `inspect`, without running it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import helper

from onnxcomp.analysis import WeightRow, is_quantized, mac_counts, operator_counts, weight_table
from onnxcomp.data import generate
from onnxcomp.data.specs import describe
from onnxcomp.errors import DataError, ModelError
from onnxcomp.model import Model, ModelSource
from onnxcomp.shapes import Shape

__all__ = ["ModelFacts", "TensorFacts", "inspect", "model_facts"]


@dataclass(frozen=True)
class TensorFacts:
    """An input or output of a model: its name, and its type and shape in words, such as "float32 (N, 10)"."""

    name: str
    type: str


@dataclass(frozen=True)
class ModelFacts:
    """What is in a model.

    Attributes:
        path: The file, or None for a model in memory.
        producer: The exporter and its version, as the file says.
        ir_version: The version of the file format.
        opsets: Domain -> version of its operators.
        size_bytes: The file and its external data.
        inputs: What it is fed.
        outputs: What it gives.
        operators: Operator -> how many nodes.
        functions: How many model-local functions it has.
        weights: Every weight.
        macs: Node -> multiply-accumulates of one run.
        mac_shapes: The input shapes that `macs` is for.
        quantized: Whether it computes in quantized values already.
        notes: What could not be found out, and why.
    """

    path: str | None
    producer: str
    ir_version: int
    opsets: dict[str, int]
    size_bytes: int
    inputs: list[TensorFacts]
    outputs: list[TensorFacts]
    operators: dict[str, int]
    functions: int
    weights: list[WeightRow]
    macs: dict[str, int]
    mac_shapes: dict[str, Shape]
    quantized: bool
    notes: list[str] = field(default_factory=list)

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return self.opsets.get("ai.onnx", 1)

    @property
    def parameters(self) -> int:
        """Numbers in float weights or in the codes they are stored as."""
        return sum(row.elements for row in self.weights)

    @property
    def nonzeros(self) -> int:
        """How many of them are not zero."""
        return self.parameters - sum(row.zeros for row in self.weights)

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of one run."""
        return sum(self.macs.values())

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Type -> bytes of the weights that have it, the largest first."""
        total: Counter[str] = Counter()
        for row in self.weights:
            total[row.dtype] += row.bytes
        return dict(total.most_common())

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, the sums included."""
        sums = ("opset", "parameters", "nonzeros", "total_macs", "weight_bytes")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in sums}}


def inspect(source: ModelSource, *, shapes: Mapping[str, Sequence[int]] | None = None) -> ModelFacts:
    """Find out what is in a model, without running it.

    Args:
        source: A path, a ModelProto or a Model.
        shapes: Sizes of dynamic inputs, for the multiply-accumulates; by default a batch of one, and typical sizes.

    Raises:
        ModelError: The model cannot be read.
        OptionError: A shape does not fit the model.
    """
    return model_facts(Model.load(source), shapes=shapes)


def model_facts(model: Model, *, shapes: Mapping[str, Sequence[int]] | None = None) -> ModelFacts:
    """The same for a model that is loaded; it is not changed."""
    proto = model.proto()
    notes: list[str] = []
    sizes = _sizes(proto, shapes, notes)
    macs = mac_counts(model, sizes, notes)
    return ModelFacts(
        path=str(model.path) if model.path else None,
        producer=" ".join(part for part in (proto.producer_name, proto.producer_version) if part),
        ir_version=model.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        size_bytes=model.size_bytes,
        inputs=[_tensor(model_input.name, proto.graph.input) for model_input in model.graph.inputs],
        outputs=[_tensor(output.name, proto.graph.output) for output in model.graph.outputs],
        operators=operator_counts(model),
        functions=len(model.functions),
        weights=weight_table(model),
        macs=macs,
        mac_shapes=sizes,
        quantized=is_quantized(model),
        notes=notes,
    )


def _sizes(proto: onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None, notes: list[str]) -> dict[str, Shape]:
    """The shapes that the inputs would be given."""
    try:
        with generate(proto, count=1, shapes=shapes) as samples:
            batch = next(iter(samples.batches(1)))
            return {name: tuple(array.shape) for name, array in batch.inputs.items()}
    except (DataError, ModelError) as error:
        notes.append(f"typical input shapes could not be settled: {error}")
        return {name: tuple(sizes) for name, sizes in (shapes or {}).items()}


def _tensor(name: str, infos: Sequence[onnx.ValueInfoProto]) -> TensorFacts:
    info = next(info for info in infos if info.name == name)
    kind = (info.type.WhichOneof("value") or "unknown_type").removesuffix("_type")
    if kind != "tensor":
        return TensorFacts(name, kind)
    tensor = info.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type) if tensor.elem_type else None
    if dtype is None or not tensor.HasField("shape"):
        return TensorFacts(name, f"{dtype or 'tensor'} of any shape")
    dims = [dim.dim_value if dim.dim_value > 0 else dim.dim_param or None for dim in tensor.shape.dim]
    return TensorFacts(name, describe(dtype, dims))
