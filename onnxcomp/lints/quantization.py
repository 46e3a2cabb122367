"""Traps in how a model is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.lints.finding import Seen, Subject, lint
from onnxcomp.qdq import (
    QuantizedLayer,
    codes_dtype,
    codes_of,
    decoder,
    has_zero_point,
    quantized_layers,
    scale_axis,
    scale_of,
    zero_point_of,
)

__all__ = [
    "CHANNEL_OPSET",
    "COARSEST",
    "INT8_KERNELS",
    "REDUCED",
    "SOFTMAX_STEP",
    "UNLIKE",
    "largest_code",
    "made_by",
    "step_before_softmax",
    "unlike_scales",
]

SOFTMAX_STEP = 1 / 256
CHANNEL_OPSET = 13
"""From here on QuantizeLinear and DequantizeLinear have an axis."""

REDUCED = 64
"""Two products of uint8 activations and weights up to this fit 16 bits: 2 * 255 * 64 < 32768."""

INT8_KERNELS = frozenset({"Conv", "Gemm", "MatMul"})
"""Operators that x86 has int8 kernels of products for; a ConvTranspose runs in float."""

UNLIKE = 32.0
"""From this ratio of scales on, the finer part of a Concat keeps 3 of its 8 bits."""

COARSEST = 1.0
"""A Softmax whose input has this step cannot tell values apart whose results differ by e."""


def _layers(subject: Subject) -> Iterator[QuantizedLayer]:
    """Of all graphs: a kernel saturates in the body of an If, too."""
    for graph in subject.model.graphs() if subject.model is not None else ():
        yield from quantized_layers(graph)


def _own_layers(subject: Subject) -> Iterator[QuantizedLayer]:
    """Those that the target has 8-bit kernels for; others run on the CPU provider."""
    rules = subject.target.rules
    return (layer for layer in _layers(subject) if rules is None or rules.supports(layer.node.op))


def _nodes(subject: Subject, op: str) -> Iterator[gs.Node]:
    for graph in subject.model.graphs() if subject.model is not None else ():
        yield from (node for node in graph.nodes if node.op == op)


def _name(node: gs.Node) -> str:
    return str(node.name or node.outputs[0].name)


def made_by(quantizer: gs.Node, op: str) -> bool:
    """Whether what a QuantizeLinear reads is made by an operator, with nothing between them but reshaping."""
    tensor = quantizer.inputs[0]
    while tensor.inputs and tensor.inputs[0].op in {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"}:
        tensor = tensor.inputs[0].inputs[0]
    return bool(tensor.inputs) and tensor.inputs[0].op == op


@lint(
    "softmax-scale",
    "error",
    on=("xnnpack",),
    why="XNNPACK has no other uint8 Softmax, and then refuses the whole session (xnn_create_softmax_nc_qu8 failed); "
    "no run on a CPU shows it",
    fix="give the output of the Softmax the scale 1/256 and the zero point 0",
    mended_by="fit-target",
)
def softmax_scale(subject: Subject) -> Seen:
    """A uint8 Softmax with another scale than 1/256."""
    for node in _nodes(subject, "QuantizeLinear"):
        scale, zero = scale_of(node), zero_point_of(node)
        if codes_dtype(node) != "uint8" or scale is None or not made_by(node, "Softmax"):
            continue
        step, point = float(scale.ravel()[0]), 0 if zero is None else int(zero.ravel()[0])
        if not np.isclose(step, SOFTMAX_STEP, rtol=1e-6) or point:
            yield (
                _name(node.inputs[0].inputs[0]),
                f"its uint8 result has the scale {step:.6g} and the zero point {point}",
            )


@lint(
    "softmax-range",
    "warning",
    why="larger probabilities are cut off: the range was taken from few samples, though it is known",
    fix="give the output of the Softmax the scale 1/256",
    mended_by="fit-target",
)
def softmax_range(subject: Subject) -> Seen:
    """A Softmax whose codes do not reach 1."""
    for node in _nodes(subject, "QuantizeLinear"):
        scale, zero, dtype = scale_of(node), zero_point_of(node), codes_dtype(node)
        if scale is None or dtype not in {"uint8", "int8"} or not made_by(node, "Softmax"):
            continue
        largest = float(scale.ravel()[0]) * (np.iinfo(dtype).max - (0 if zero is None else int(zero.ravel()[0])))
        if largest < 1 - 1.5 * SOFTMAX_STEP:
            yield _name(node.inputs[0].inputs[0]), f"its codes end at {largest:.3g}"


@lint(
    "uint8-int8",
    "error",
    on=("xnnpack",),
    why="XNNPACK takes int8 activations with int8 weights, or uint8 with uint8; of others no node runs on it",
    fix="make the activations int8: the same scales, zero points less 128",
    mended_by="fit-target",
)
def uint8_int8(subject: Subject) -> Seen:
    """Activations and weights of unlike types."""
    for layer in _own_layers(subject):
        data, weight = codes_dtype(layer.data), codes_dtype(layer.weight)
        if data != weight and {data, weight} <= {"uint8", "int8"}:
            yield layer.name, f"its input is {data} and its weight {weight}"


@lint(
    "activation-type",
    "error",
    on=("nnapi", "qnn"),
    why="the provider has no kernel for it, so the node falls back to the CPU, or the model is refused",
    fix="make the activations uint8: the same scales, zero points plus 128",
    mended_by="fit-target",
)
def activation_type(subject: Subject) -> Seen:
    """Activations of a type that the target does not take."""
    rules = subject.target.rules
    if rules is None:
        return
    for layer in _own_layers(subject):
        dtype = codes_dtype(layer.data)
        if dtype not in {rules.activations, rules.wide}:
            wide = f" or {rules.wide}" if rules.wide else ""
            yield layer.name, f"its input is {dtype}; {subject.target.name} takes {rules.activations}{wide}"


@lint(
    "weight-zero-point",
    "error",
    on=("xnnpack",),
    why="XNNPACK looks for the zero point and refuses the model without one",
    fix="write the zero point 0 out",
    mended_by="fit-target",
)
def weight_zero_point(subject: Subject) -> Seen:
    """A weight whose zero point is left out."""
    for layer in _own_layers(subject):
        if not has_zero_point(layer.weight):
            yield layer.name, "its weight's zero point is left out"


@lint(
    "weight-offset",
    "error",
    on=("xnnpack", "qnn"),
    why="the kernels want symmetric int8 weights",
    fix="round the weight anew with the zero point 0",
    mended_by="fit-target",
)
def weight_offset(subject: Subject) -> Seen:
    """An int8 weight whose zero point is not 0."""
    for layer in _layers(subject):
        zero = zero_point_of(layer.weight)
        if codes_dtype(layer.weight) == "int8" and zero is not None and np.any(zero):
            yield layer.name, f"its int8 weight has the zero point {int(zero.ravel()[np.argmax(zero.ravel() != 0)])}"


@lint(
    "per-channel-matmul",
    "error",
    on=("qnn", "nnapi"),
    why="the provider has one scale for the weight of a matrix product, and refuses or mistakes more; of Qualcomm's, "
    "onnxruntime-qnn 2.7.0 takes them in its simulator, what came before refuses them",
    fix="round the weight anew with one scale",
    mended_by="fit-target",
)
def per_channel_matmul(subject: Subject) -> Seen:
    """A matrix product with a scale for each channel."""
    rules = subject.target.rules
    for layer in _layers(subject):
        scale = scale_of(layer.weight)
        if rules is not None and scale is not None and scale.size > 1 and not rules.channel_scales(layer.node.op):
            yield layer.name, f"the weight of this {layer.node.op} has {scale.size} scales"


@lint(
    "saturation",
    "error",
    on=("x86",),
    why="without VNNI the kernel adds pairs of products in 16 bits, which overflow: outputs are wrong, and only there",
    fix="round the weights anew to 7 bits (reduce_range)",
    mended_by="fit-target",
)
def saturation(subject: Subject) -> Seen:
    """Weights of 8 bits beside 8-bit activations, which x86 makes uint8 where they are int8."""
    for layer in _layers(subject):
        if layer.place == 1 and layer.node.op in INT8_KERNELS and codes_dtype(layer.data) in {"uint8", "int8"}:
            codes = codes_of(layer.weight.inputs[0]) if codes_dtype(layer.weight) == "int8" else None
            if codes is not None and (largest := largest_code(codes)) > REDUCED:
                yield layer.name, f"its codes reach {largest}; up to {REDUCED} nothing overflows"


def largest_code(codes: np.ndarray[Any, Any]) -> int:
    """The largest absolute value of int8 codes."""
    return max(int(codes.max()), -int(codes.min())) if codes.size else 0


@lint(
    "weight-axis",
    "error",
    why="kernels have a scale for each output channel: with these along another axis, ONNX Runtime leaves the layer in "
    "float or computes something else, and Qualcomm's provider computes something else without a word",
    fix="round the weight anew, with a scale for each output channel or one for all",
    mended_by="fit-target",
)
def weight_axis(subject: Subject) -> Seen:
    """An 8-bit weight whose scales lie along another axis than its output channels."""
    for layer in _layers(subject):
        axis = scale_axis(layer.weight, len(layer.weight_shape))
        if axis is not None and axis != layer.channel_axis and codes_dtype(layer.weight) in {"int8", "uint8"}:
            channels = (
                "it has no axis of output channels"
                if layer.channel_axis is None
                else f"its output channels lie on axis {layer.channel_axis}"
            )
            yield layer.name, f"its weight has scales along axis {axis}; {channels}"


@lint(
    "qdq-unsupported",
    "error",
    on=("coreml",),
    why="CoreML has no QuantizeLinear and DequantizeLinear: each is a way out of it and back",
    fix="take the pairs out, and keep weights small in a form that is decoded at load",
    mended_by="fit-target",
)
def qdq_unsupported(subject: Subject) -> Seen:
    """Quantized nodes for a target that has none."""
    for op in ("QuantizeLinear", "DequantizeLinear"):
        count = sum(1 for _ in _nodes(subject, op))
        if count:
            yield "the model", f"it has {count} {op}"


@lint(
    "per-channel-opset",
    "error",
    why="DequantizeLinear has an axis from opset 13 on: the model does not load",
    fix="raise the opset to 13",
    mended_by="fit-target",
)
def per_channel_opset(subject: Subject) -> Seen:
    """A scale for each channel below opset 13."""
    if subject.model is None or subject.model.opset >= CHANNEL_OPSET:
        return
    for layer in _layers(subject):
        scale = scale_of(layer.weight)
        if scale is not None and scale.size > 1:
            yield layer.name, f"its weight has {scale.size} scales at opset {subject.model.opset}"


def unlike_scales(quantizer: gs.Node) -> float:
    """The ratio of the coarsest to the finest scale that a quantized Concat joins; 1 where there is nothing to say."""
    maker = next(iter(quantizer.inputs[0].inputs), None)
    if maker is None or maker.op != "Concat":
        return 1.0
    parts = [decoder(tensor) for tensor in maker.inputs]
    scales = [scale_of(part) for part in parts if part is not None]
    known = [float(scale.ravel()[0]) for scale in scales if scale is not None and scale.size == 1]
    own = scale_of(quantizer)
    if len(known) < 2 or own is None or own.size != 1 or min(known) <= 0:
        return 1.0
    return max(*known, float(own.ravel()[0])) / min(known)


@lint(
    "concat-scales",
    "warning",
    why="one scale for unlike parts leaves the finer ones next to no steps: scores beside boxes are lost",
    fix="leave the result of the Concat in float",
    mended_by="fit-target",
)
def concat_scales(subject: Subject) -> Seen:
    """A Concat of parts with unlike scales, and one scale behind it."""
    for node in _nodes(subject, "QuantizeLinear"):
        ratio = unlike_scales(node)
        if ratio >= UNLIKE:
            yield _name(node.inputs[0].inputs[0]), f"the scales that it joins differ by a factor of {ratio:.0f}"


def step_before_softmax(quantizer: gs.Node) -> float:
    """The scale of codes that a Softmax reads, straight or behind an Add or Where; 0 where none does."""
    scale = scale_of(quantizer)
    if scale is None or scale.size != 1:
        return 0.0
    for reader in quantizer.outputs[0].outputs:
        for user in reader.outputs[0].outputs if reader.op == "DequantizeLinear" else ():
            if user.op == "Softmax":
                return float(scale.ravel()[0])
            behind = user.outputs[0].outputs if user.op in {"Add", "Where"} else ()
            if any(next_.op in {"Softmax", "QuantizeLinear"} and _softmax_follows(next_) for next_ in behind):
                return float(scale.ravel()[0])
    return 0.0


def _softmax_follows(node: gs.Node) -> bool:
    if node.op == "Softmax":
        return True
    decoders = [reader for reader in node.outputs[0].outputs if reader.op == "DequantizeLinear"]
    return any(user.op == "Softmax" for reader in decoders for user in reader.outputs[0].outputs)


@lint(
    "mask-scale",
    "warning",
    why="a mask of -1e4 or -inf takes the whole range, and the logits beside it become one code: attention is lost",
    fix="leave what the Softmax reads in float",
    mended_by="fit-target",
)
def mask_scale(subject: Subject) -> Seen:
    """Codes in front of a Softmax with a step that is too coarse for it."""
    for node in _nodes(subject, "QuantizeLinear"):
        step = step_before_softmax(node)
        if step >= COARSEST or not np.isfinite(step):
            yield _name(node), f"a Softmax reads it in steps of {step:.3g}"


@lint(
    "depthwise-per-tensor",
    "warning",
    why="channels of unlike size share one scale: MobileNets and EfficientNets lose up to 8 points",
    fix="quantize the float model anew with a scale for each channel: `onnxcomp optimize FLOAT.onnx --target ...`",
)
def depthwise_per_tensor(subject: Subject) -> Seen:
    """A depthwise convolution with one scale for all channels, where the target would take more."""
    rules = subject.target.rules
    if rules is None or not rules.channel_scales("Conv"):
        return
    for layer in _layers(subject):
        group, scale = int(layer.node.attrs.get("group", 1)), scale_of(layer.weight)
        if layer.node.op == "Conv" and group > 1 and scale is not None and scale.size == 1:
            shape = layer.weight_shape
            if shape and shape[1] == 1:
                yield layer.name, f"its {group} channels share one scale"
