"""Fusions: what follows (or precedes) a convolution with constants goes into its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.model import value_of
from onnxcomp_passes._workspace import Array, Workspace, is_dense, is_standard, label

__all__ = ["fuse_affine", "fuse_pad"]

FUSED_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
"""Types whose rounding is float rounding; a 16-bit weight would be rounded again."""

ARITHMETIC = ("Add", "Mul", "Sub", "Div")
CONVOLUTIONS = ["Conv", "ConvTranspose"]

NODE_BYTES = 256
"""What a fusion may add to the file, for the node and the names that it saves."""


@dataclass(frozen=True)
class Affine:
    """y = factor * x + offset, with one factor and one offset a channel (or one for all); None changes nothing."""

    factor: Array | None
    offset: Array | None
    constants: tuple[gs.Constant, ...]


# --- BatchNormalization and arithmetic after a convolution ------------------------------------------------------------


def fuse_affine(work: Workspace, node: gs.Node) -> bool:
    """Fold a BatchNormalization, or an Add, Mul, Sub or Div by constants, into the Conv (or Gemm) before it."""
    if is_standard(node, "BatchNormalization"):
        index, layers = 0, [*CONVOLUTIONS, "Gemm"]
    elif is_standard(node, *ARITHMETIC) and work.opset >= 7 and len(node.inputs) == 2:
        index, layers = (1 if isinstance(node.inputs[0], gs.Constant) else 0), CONVOLUTIONS
    else:
        return False
    layer = work.producer(node, index, *layers)
    if layer is None or (node.op in ARITHMETIC and not is_dense(node.inputs[1 - index])):
        return False
    reason = _refusal(work, layer, node, node.inputs[index])
    if reason:
        work.leave(node, f"not folded into {label(layer)}: {reason}")
        return False
    channels, rank = _channels(layer)
    with np.errstate(all="ignore"):  # results that are not finite are not used
        batch_norm = node.op == "BatchNormalization"
        affine = _batch_norm(work, node) if batch_norm else _arithmetic(node, index, channels, rank)
        return affine is not None and _fits(affine, channels) and _fold_into(work, layer, node, affine, channels)


def _refusal(work: Workspace, layer: gs.Node, node: gs.Node, middle: gs.Tensor) -> str:
    """Why a layer's weights cannot take in what follows it, or an empty string."""
    if not work.reads_alone(node, middle):
        return "its output is used elsewhere"
    weights = [tensor for tensor in layer.inputs[1:] if not tensor.is_empty()]
    if not all(is_dense(tensor) for tensor in weights):
        return "its weights are not constant"
    if any(tensor.dtype not in FUSED_DTYPES for tensor in weights):
        return "its weights are not 32- or 64-bit floats"
    return ""


def _channels(layer: gs.Node) -> tuple[int, int]:
    """The number of output channels, and the rank of the output."""
    shape = layer.inputs[1].shape
    if layer.op == "Gemm":
        return int(shape[0] if layer.attrs.get("transB", 0) else shape[1]), 2
    if layer.op == "ConvTranspose":
        return int(shape[1]) * int(layer.attrs.get("group", 1)), len(shape)
    return int(shape[0]), len(shape)


def _batch_norm(work: Workspace, node: gs.Node) -> Affine | None:
    """Inference only: y = (x - mean) * scale / sqrt(variance + epsilon) + bias."""
    training = node.attrs.get("training_mode", 0) or (work.opset < 7 and not node.attrs.get("is_test", 0))
    if training or not node.attrs.get("spatial", 1) or any(tensor.name for tensor in node.outputs[1:]):
        return None
    parameters = node.inputs[1:5]
    if len(parameters) != 4 or not all(is_dense(tensor) and len(tensor.shape) == 1 for tensor in parameters):
        return None
    scale, bias, mean, variance = (value_of(tensor).astype(np.float64) for tensor in parameters)
    if not (scale.shape == bias.shape == mean.shape == variance.shape):
        return None
    factor = scale / np.sqrt(variance + float(np.float32(node.attrs.get("epsilon", 1e-5))))
    return Affine(factor, bias - mean * factor, tuple(parameters))


def _arithmetic(node: gs.Node, index: int, channels: int, rank: int) -> Affine | None:
    """Add, Mul, Sub, Div where the other operand is one constant, or one a channel."""
    operand = node.inputs[1 - index]
    if not is_dense(operand) or (node.op == "Div" and index == 1):
        return None
    shape = [1] * (rank - len(operand.shape)) + [int(dim) for dim in operand.shape]
    if len(shape) > rank or shape[1] not in (1, channels) or any(d != 1 for axis, d in enumerate(shape) if axis != 1):
        return None
    value = value_of(operand).astype(np.float64).reshape(-1)
    if node.op == "Add":
        return Affine(None, value, (operand,))
    if node.op == "Mul":
        return Affine(value, None, (operand,))
    if node.op == "Div":
        return Affine(1 / value, None, (operand,))
    return Affine(None, -value, (operand,)) if index == 0 else Affine(-np.ones(1), value, (operand,))


def _fits(affine: Affine, channels: int) -> bool:
    numbers = [part for part in (affine.factor, affine.offset) if part is not None]
    return all(part.size in (1, channels) and np.isfinite(part).all() for part in numbers)


def _fold_into(work: Workspace, layer: gs.Node, node: gs.Node, affine: Affine, channels: int) -> bool:
    weight = layer.inputs[1]
    bias = layer.inputs[2] if len(layer.inputs) > 2 and not layer.inputs[2].is_empty() else None
    old_bias = _bias(layer, bias, channels)
    if old_bias is None:
        work.leave(node, f"not folded into {label(layer)}: its bias is not one number a channel")
        return False
    dtype = np.dtype(weight.dtype)
    new_bias = old_bias * (1 if affine.factor is None else affine.factor)
    new_bias = new_bias + (0 if affine.offset is None else affine.offset)
    needs_bias = bias is not None or affine.offset is not None
    users = {id(layer), id(node)}
    copies_weight = affine.factor is not None and not work.belongs_to(weight, users)
    copies_bias = needs_bias and (bias is None or not _reusable(work, bias, users, new_bias.shape))
    added = copies_weight * weight._values.nbytes + copies_bias * channels * dtype.itemsize
    released = (*affine.constants, bias) if copies_bias and bias is not None else affine.constants
    if added > work.freed_bytes(released, [layer, node]) + min(work.slack, NODE_BYTES):
        work.leave(node, f"not folded into {label(layer)}: its weight is shared, and a second one would cost more")
        return False
    new_weight = None if affine.factor is None else _scaled(layer, value_of(weight), affine.factor, channels)
    results = [part.astype(dtype) for part in (new_weight, new_bias) if part is not None]
    if not all(np.isfinite(part).all() for part in results):
        work.leave(node, f"not folded into {label(layer)}: the folded weights would overflow")
        return False
    if new_weight is not None:
        _set(work, layer, 1, results[0], copy=copies_weight, name=weight.name)
    if needs_bias:
        stem = weight.name.removesuffix("weight") + "bias" if weight.name.endswith("weight") else f"{weight.name}.bias"
        _set(work, layer, 2, results[-1], copy=copies_bias, name=stem)
    if layer.op == "Gemm":
        layer.attrs.pop("beta", None)
    where, what = label(node), f"{node.op} folded into {layer.op} {label(layer)}"
    result, middle = node.outputs[0], layer.outputs[0]
    work.kill(node)
    work.take_over(layer, middle, result)
    work.changes.add(where, what)
    return True


def _bias(layer: gs.Node, bias: gs.Constant | None, channels: int) -> Array | None:
    """The bias that a layer adds, one number a channel, as float64; None if it is not of that form."""
    if bias is None:
        return np.zeros(channels)
    value = value_of(bias).astype(np.float64)
    if layer.op == "Gemm":
        value = value * float(layer.attrs.get("beta", 1.0))
    if value.size not in (1, channels) or (value.ndim > 0 and value.shape[-1] != value.size):
        return None
    return np.broadcast_to(value.reshape(-1), (channels,))


def _reusable(work: Workspace, bias: gs.Constant, users: set[int], shape: tuple[int, ...]) -> bool:
    return work.belongs_to(bias, users) and tuple(bias.shape) == shape


def _scaled(layer: gs.Node, weight: Array, factor: Array, channels: int) -> Array:
    """The weight with each output channel multiplied by its factor, in float64."""
    each = np.broadcast_to(factor, (channels,))
    wide = weight.astype(np.float64)
    if layer.op == "Gemm":
        return np.asarray(wide * (each[:, None] if layer.attrs.get("transB", 0) else each))
    if layer.op == "Conv":
        return np.asarray(wide * each.reshape(-1, *(1,) * (wide.ndim - 1)))
    group = int(layer.attrs.get("group", 1))  # ConvTranspose: (C, M / group, ...), C runs over the groups
    grouped = wide.reshape(group, wide.shape[0] // group, *wide.shape[1:])
    return np.asarray((grouped * each.reshape(group, 1, -1, *(1,) * (wide.ndim - 2))).reshape(wide.shape))


def _set(work: Workspace, layer: gs.Node, index: int, value: Array, *, copy: bool, name: str) -> None:
    """Replace a constant input: in place where it is the layer's own, else by a new one."""
    if not copy:
        layer.inputs[index].values = value
        return
    fresh: Any = work.constant(work.model.unique_name(name), value, work.graph_of(layer))
    if index < len(layer.inputs):
        layer.inputs[index] = fresh
    else:
        layer.inputs.append(fresh)


# --- Pad before a convolution -----------------------------------------------------------------------------------------


def fuse_pad(work: Workspace, node: gs.Node) -> bool:
    """Let a Conv pad by itself what a Pad with zeros padded for it."""
    if not is_standard(node, "Conv") or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    pad = work.producer(node, 0, "Pad")
    if pad is None or not work.reads_alone(node, node.inputs[0]) or len(node.inputs[1].shape or ()) < 3:
        return False
    rank = len(node.inputs[1].shape)
    pads = _zero_pads(work, pad, rank)
    if pads is None or min(pads) < 0 or any(pads[axis] for axis in (0, 1, rank, rank + 1)):
        return False
    own = node.attrs.get("pads") or [0] * (2 * (rank - 2))
    if node.attrs.get("auto_pad") == "VALID":
        own = [0] * (2 * (rank - 2))
    if not isinstance(own, list) or min(own) < 0:
        return False
    spatial = [*pads[2:rank], *pads[rank + 2 :]]
    node.attrs.pop("auto_pad", None)
    node.attrs["pads"] = [one + other for one, other in zip(own, spatial, strict=True)]
    where, source = label(pad), pad.inputs[0]
    node.inputs[0] = source
    work.changes.add(where, f"Pad folded into Conv {label(node)}")
    return True


def _zero_pads(work: Workspace, pad: gs.Node, rank: int) -> list[int] | None:
    """The pads of a Pad with constant zeros, for all axes: begins, then ends; None if it is another kind."""
    if pad.attrs.get("mode", "constant") != "constant" or pad.attrs.get("value", 0) != 0:
        return None
    if len(pad.inputs) > 2 and not pad.inputs[2].is_empty():
        value = work.value(pad.inputs[2])
        if value is None or value.any():
            return None
    pads = work.ints(pad, "pads", 1)
    axes = list(range(rank))
    if len(pad.inputs) > 3 and not pad.inputs[3].is_empty():
        given = work.ints(pad, "axes", 3)
        if given is None:
            return None
        axes = [axis % rank for axis in given]
    if pads is None or len(pads) != 2 * len(axes):
        return None
    full = [0] * (2 * rank)
    for place, axis in enumerate(axes):
        full[axis], full[axis + rank] = pads[place], pads[place + len(axes)]
    return full
