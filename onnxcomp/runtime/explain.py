"""Why a quantized node does not run in int8: the rules of ONNX Runtime's CPU provider, as checks on the QDQ graph."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcomp.runtime.census import Census, graphs, node_names
from onnxcomp.runtime.results import Array

if TYPE_CHECKING:  # importing this package must not load onnx
    import onnx

_BIAS_SCALE_TOLERANCE = 0.01  # ONNX Runtime takes 1.1 % and refuses 2 %
_CLIP_TOLERANCE = 1e-3  # of one quantization step
_CLIPS = frozenset({"Relu", "Clip"})
# ONNX Runtime adds these to a node's name when it makes the kernel from it.
_KERNEL_AFFIX = re.compile(r"(_token_\d+|/MatMulAddFusion|/MatMulScaleFusion/)$|^fused ")

_UNFUSED = (
    "dynamic-unfused",
    "its MatMulInteger, Cast and Mul stay apart; one kernel wants the data scale times a weight scale that is one "
    "value, or one for each output channel",
)


@dataclass(frozen=True)
class KernelMiss:
    """A quantized node without a sound int8 kernel.

    Attributes:
        node: The node's name; its first output where it has none.
        op: Its operator.
        rule: Which rule it missed, such as ``no-output-q``.
        reason: The same in a sentence, with what is there and what is needed.
    """

    node: str
    op: str
    rule: str
    reason: str


@dataclass(frozen=True)
class KernelReport:
    """The quantized Conv, Gemm and MatMul nodes of a model: those that run in int8, and those that do not."""

    int8: tuple[str, ...]
    missed: tuple[KernelMiss, ...]


def explain(model: onnx.ModelProto, census: Census, *, wide: str | None = None) -> KernelReport:
    """Tell which quantized nodes run in int8, and why the others do not.

    A node is quantized when both its data input and its weight come straight from a DequantizeLinear, or when it is a
    MatMulInteger of the codes that a DynamicQuantizeLinear makes. The latter counts only where it became one kernel
    with the nodes that turn its result into floats. A node counts as missed as well where ONNX Runtime makes an int8
    kernel that ignores a scale: such a kernel fails at run time, or gives wrong values.

    Args:
        model: The QDQ model; external data need not be loaded.
        census: The census of the same model.
        wide: The type of 16-bit activations that the model's target has kernels for. No census shows these, so a node
            of that type with an int8 weight counts.

    Returns:
        The names of the nodes in int8, and a miss for every other one, both in the order of the graph.
    """
    names = iter(node_names(model.graph))
    quantized = [
        (name, node, view)
        for view in map(_View, graphs(model.graph))
        for name, node in zip([next(names) for _ in view.graph.node], view.graph.node, strict=True)
        if _is_static(node, view) or _is_dynamic(node, view)
    ]
    kernels = [node for node in census.int8_nodes if node.op != "MatMulInteger"]
    fused = _fused({name for name, _, _ in quantized}, (node.name for node in kernels))
    int8, missed = [], []
    for name, node, view in quantized:
        if node.op_type == "MatMulInteger":
            miss = None if name in fused else _UNFUSED
        else:
            found = _Quantized(node, view)
            miss = None if wide and found.types == (wide, "int8", wide) else _miss(found, fused=name in fused)
        if miss is None:
            int8.append(name)
        else:
            missed.append(KernelMiss(name, node.op_type, *miss))
    return KernelReport(tuple(int8), tuple(missed))


def kernel_source(kernel: str, names: Container[str]) -> str:
    """The node that a kernel is named after, if that is one of `names`; else what is left of the kernel's name.

    >>> kernel_source("fused c1_token_3", {"c1"})
    'c1'
    """
    name = kernel
    while name not in names and (shorter := _KERNEL_AFFIX.sub("", name)) != name:
        name = shorter
    return name


def _is_static(node: onnx.NodeProto, view: _View) -> bool:
    return node.op_type in ("Conv", "Gemm", "MatMul") and bool(view.dequantize(node, 0) and view.dequantize(node, 1))


def _is_dynamic(node: onnx.NodeProto, view: _View) -> bool:
    maker = view.makers.get(node.input[0]) if node.op_type == "MatMulInteger" else None
    return maker is not None and maker.op_type == "DynamicQuantizeLinear"


def _fused(names: set[str], kernels: Iterable[str]) -> set[str]:
    """The names that a kernel is named after."""
    return {kernel_source(kernel, names) for kernel in kernels} & names


def _miss(node: _Quantized, *, fused: bool) -> tuple[str, str] | None:
    for rule, check, also_when_fused in _RULES:
        if (not fused or also_when_fused) and (reason := check(node)):
            return rule, reason
    return None if fused else ("unknown", "ONNX Runtime did not fuse it, and no known rule tells why")


class _View:
    """Look-ups in one graph: who makes a tensor, who reads it, what its value is."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {info.name for info in graph.output}
        self.input_types = {info.name: info.type.tensor_type.elem_type for info in graph.input}

    def dequantize(self, node: onnx.NodeProto, index: int) -> onnx.NodeProto | None:
        """The DequantizeLinear that makes an input, if that is what makes it."""
        maker = self.makers.get(node.input[index]) if index < len(node.input) else None
        return maker if maker is not None and maker.op_type == "DequantizeLinear" else None

    def tensor(self, name: str) -> onnx.TensorProto | None:
        """An initializer or the tensor of a Constant node."""
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == "Constant":
            return next((attribute.t for attribute in maker.attribute if attribute.name == "value"), None)
        return self.initializers.get(name)

    def value(self, node: onnx.NodeProto, index: int) -> Array | None:
        """The constant value of an input; None where there is none, or where it is not in the model file."""
        import onnx

        tensor = self.tensor(node.input[index]) if index < len(node.input) else None
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return onnx.numpy_helper.to_array(tensor)

    def quantized_type(self, node: onnx.NodeProto) -> str | None:
        """The integer type on the quantized side of a QuantizeLinear or DequantizeLinear, such as ``uint8``."""
        import onnx

        kind = next((attribute.i for attribute in node.attribute if attribute.name == "output_dtype"), 0)
        if not kind and len(node.input) > 2 and (zero := self.tensor(node.input[2])) is not None:
            kind = zero.data_type
        if not kind and node.op_type == "DequantizeLinear":
            source = node.input[0]
            maker = self.makers.get(source)
            if maker is not None and maker.op_type == "QuantizeLinear":
                return self.quantized_type(maker)
            tensor = self.tensor(source)
            kind = tensor.data_type if tensor is not None else self.input_types.get(source, 0)
        if not kind and node.op_type == "QuantizeLinear":
            kind = onnx.TensorProto.UINT8  # what ONNX says it is without a zero point
        return onnx.TensorProto.DataType.Name(kind).lower() if kind else None


@dataclass
class _Quantized:
    """A quantized node with its surroundings, as the rules want them."""

    node: onnx.NodeProto
    view: _View
    data: onnx.NodeProto = field(init=False)  # the DequantizeLinear of the data input
    weight: onnx.NodeProto = field(init=False)  # and of the weight
    bias: onnx.NodeProto | None = field(init=False, default=None)  # and of the bias, if it has one
    float_bias: bool = field(init=False, default=False)
    end: onnx.NodeProto = field(init=False)  # the last float node before the QuantizeLinear
    clip: onnx.NodeProto | None = field(init=False, default=None)  # the Relu or Clip on the way
    quantize: onnx.NodeProto | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        data, weight = self.view.dequantize(self.node, 0), self.view.dequantize(self.node, 1)
        assert data is not None
        assert weight is not None
        self.data, self.weight = data, weight
        self.end = self.node
        self._find_bias()
        reader = self.only_reader()
        if reader is not None and reader.op_type in _CLIPS:
            self.end = self.clip = reader
        self.quantize = next((node for node in self.readers() if node.op_type == "QuantizeLinear"), None)

    def _find_bias(self) -> None:
        self.bias = self.view.dequantize(self.node, 2)
        self.float_bias = self.bias is None and len(self.node.input) > 2 and bool(self.node.input[2])
        add = self.only_reader()
        if self.node.op_type == "MatMul" and add is not None and add.op_type == "Add":  # ONNX Runtime makes it a Gemm
            other = 1 if add.input[0] == self.end.output[0] else 0
            bias = self.view.dequantize(add, other)
            if bias is not None and self.view.tensor(bias.input[0]) is not None:
                self.bias, self.end = bias, add
            elif self.view.tensor(add.input[other]) is not None:
                self.float_bias, self.end = True, add

    @property
    def op(self) -> str:
        return self.node.op_type

    @property
    def types(self) -> tuple[str | None, str | None, str | None]:
        """Integer types of data, weight and output."""
        output = self.view.quantized_type(self.quantize) if self.quantize is not None else None
        return self.view.quantized_type(self.data), self.view.quantized_type(self.weight), output

    def readers(self) -> list[onnx.NodeProto]:
        return self.view.readers[self.end.output[0]]

    def only_reader(self) -> onnx.NodeProto | None:
        readers = self.readers()
        return readers[0] if len(readers) == 1 and self.end.output[0] not in self.view.outputs else None

    def attribute(self, name: str, default: Any) -> Any:
        import onnx

        found = next((item for item in self.node.attribute if item.name == name), None)
        return default if found is None else onnx.helper.get_attribute_value(found)

    @property
    def ends_in_quantize(self) -> bool:
        """Whether its result is for a QuantizeLinear alone; a matrix product with none there may end in float."""
        return self.op == "Conv" or self.quantize is not None


def _not_8_bit(node: _Quantized) -> str | None:
    for what, kind in zip(("data", "weight", "output"), node.types, strict=True):
        if kind not in (None, "int8", "uint8"):
            return f"its {what} is {kind}; the int8 kernels take int8 and uint8"
    return None


def _output_is_graph_output(node: _Quantized) -> str | None:
    for end in (node.node, node.end):
        if end.output[0] in node.view.outputs and node.ends_in_quantize:
            return f"its float result {end.output[0]!r} is a graph output; only its QuantizeLinear may read it"
    return None


def _no_output_q(node: _Quantized) -> str | None:
    if node.quantize is not None or not (node.op == "Conv" or node.float_bias):
        return None
    where = ", ".join(sorted({reader.op_type for reader in node.readers()})) or "the graph's output"
    if node.op == "Conv":
        return f"its result goes to {where}; a Conv needs a QuantizeLinear there"
    return f"its bias is float and its result goes to {where}; it needs an int32 bias, or a QuantizeLinear there"


def _two_readers(node: _Quantized) -> str | None:
    for end in (node.node, node.end):
        readers = node.view.readers[end.output[0]]
        if len(readers) > 1 and node.ends_in_quantize:
            operators = ", ".join(sorted(reader.op_type for reader in readers))
            return f"its float result {end.output[0]!r} has {len(readers)} readers ({operators}) instead of one"
    kinds = node.types
    if "int8" not in (kinds[0], kinds[2]) or len({kinds[0], kinds[2] or kinds[0]}) > 1:
        return None
    for what, name in _quantized_tensors(node):
        if sum(max(1, len(node.view.readers[reader.output[0]])) for reader in node.view.readers[name]) > 1:
            return (
                f"its {what} {name!r} is int8 and has several readers, so x86 cannot make it uint8; quantize to uint8"
            )
    return None


def _quantized_tensors(node: _Quantized) -> Iterator[tuple[str, str]]:
    yield "data", node.data.input[0]
    if node.quantize is not None:
        yield "output", node.quantize.output[0]


def _clip_not_redundant(node: _Quantized) -> str | None:
    if node.clip is None or node.quantize is None:
        return None
    scale, zero = node.view.value(node.quantize, 1), node.view.value(node.quantize, 2)
    kind = node.view.quantized_type(node.quantize)
    if scale is None or scale.size != 1 or kind not in ("int8", "uint8"):
        return None
    info = np.iinfo(kind)
    step, offset = float(scale.item()), 0 if zero is None else int(zero.item())
    low, high = (info.min - offset) * step, (info.max - offset) * step
    wanted_low, wanted_high = _clip_range(node.clip, node.view)
    slack = _CLIP_TOLERANCE * step
    if wanted_low <= low + slack and wanted_high >= high - slack:
        return None
    return (
        f"its {node.clip.op_type} cuts to [{wanted_low:g}, {wanted_high:g}] and the QuantizeLinear after it spans "
        f"[{low:g}, {high:g}] (zero point {offset}); it must not reach beyond"
    )


def _clip_without_q(node: _Quantized) -> str | None:
    if node.clip is None or node.quantize is not None:
        return None
    readers = sorted({reader.op_type for reader in node.view.readers[node.clip.output[0]]})
    where = ", ".join(readers) or "nothing"
    return f"its {node.clip.op_type} goes to {where}; behind a {node.clip.op_type} it needs a QuantizeLinear there"


def _clip_range(clip: onnx.NodeProto, view: _View) -> tuple[float, float]:
    if clip.op_type == "Relu":
        return 0.0, float("inf")
    attributes = {attribute.name: attribute.f for attribute in clip.attribute}  # before opset 11
    limits = [attributes.get("min", float("-inf")), attributes.get("max", float("inf"))]
    for index in (1, 2):
        value = view.value(clip, index)
        if value is not None:
            limits[index - 1] = float(value.item())
    return limits[0], limits[1]


def _type_mismatch(node: _Quantized) -> str | None:
    data, _, output = node.types
    if data and output and data != output:
        return f"its input is {data} and its output {output}; they must be the same"
    return None


def _weight_axis(node: _Quantized) -> str | None:
    scale = node.view.value(node.weight, 1)
    weight = node.view.tensor(node.weight.input[0])
    if scale is None or scale.size == 1 or weight is None:
        return None
    rank = len(weight.dims)
    axis = next((attribute.i for attribute in node.weight.attribute if attribute.name == "axis"), 1) % rank
    wanted = 0 if node.op == "Conv" or (node.op == "Gemm" and node.attribute("transB", 0)) else rank - 1
    if axis == wanted:
        return None
    return f"its weight is quantized per channel on axis {axis}; a {node.op} wants the output channels, axis {wanted}"


def _int8_activations(node: _Quantized) -> str | None:
    data, weight, output = node.types
    if "int8" not in (data, output):
        return None
    if weight == "uint8":
        return "int8 activations need an int8 weight, and this one is uint8"
    return "int8 activations run in int8 on ARM only, and x86 could not make these uint8; quantize them to uint8"


def _bias_not_int32(node: _Quantized) -> str | None:
    if node.float_bias and node.op != "MatMul" and node.view.tensor(node.node.input[2]) is None:
        return f"its bias {node.node.input[2]!r} is computed in float; it must be a constant"
    if node.bias is None:
        return None
    kind = node.view.quantized_type(node.bias)
    return None if kind in (None, "int32") else f"its bias is {kind}; it must be int32"


def _bias_scale(node: _Quantized) -> str | None:
    if node.bias is None:
        return None
    scales = [node.view.value(part, 1) for part in (node.data, node.weight, node.bias)]
    if any(scale is None for scale in scales):
        return None
    data, weight, bias = (np.asarray(scale, np.float64).ravel() for scale in scales)
    wanted = data * weight
    if bias.size != 1 and wanted.size not in (1, bias.size):
        return f"its bias has {bias.size} scales and its weight {wanted.size}"
    wrong = np.abs(bias - wanted) > _BIAS_SCALE_TOLERANCE * np.abs(wanted)
    if not wrong.any():
        return None
    channel = int(np.argmax(wrong))
    got, want = (float(scales[channel % scales.size]) for scales in (bias, wanted))
    return f"its bias has scale {got:g} where data scale times weight scale is {want:g} (channel {channel})"


def _gemm_beta(node: _Quantized) -> str | None:
    beta = node.attribute("beta", 1.0) if node.op == "Gemm" else 1.0
    return None if beta == 1.0 else f"its beta is {beta:g}; it must be 1"


def _gemm_zero_point(node: _Quantized) -> str | None:
    if node.op != "Gemm" or len(node.weight.input) > 2:
        return None
    return "its weight's DequantizeLinear leaves the zero point out; a Gemm wants it written, even if it is 0"


# In the order in which a reader should mend them. True: checked of a fused node too, because ONNX Runtime fuses it
# without a look at the scale, and the kernel then fails or gives wrong values.
_RULES: tuple[tuple[str, Callable[[_Quantized], str | None], bool], ...] = (
    ("not-8-bit", _not_8_bit, False),
    ("weight-axis", _weight_axis, True),
    ("bias-scale", _bias_scale, True),
    ("bias-not-int32", _bias_not_int32, False),
    ("output-is-graph-output", _output_is_graph_output, False),
    ("two-readers", _two_readers, False),
    ("no-output-q", _no_output_q, False),
    ("clip-not-redundant", _clip_not_redundant, False),
    ("clip-without-q", _clip_without_q, False),
    ("type-mismatch", _type_mismatch, False),
    ("gemm-beta", _gemm_beta, False),
    ("gemm-zero-point", _gemm_zero_point, False),
    ("int8-activations", _int8_activations, False),
)
