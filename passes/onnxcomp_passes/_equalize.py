"""Even out the channels of a layer's input, so that one scale serves them all; the float model computes the same.

::

    before   Y = Conv(Relu(Conv(X, W, b)), V)
    after    Y = Conv(Relu(Conv(X, W / s, b / s)), V * s)     s: one factor for each channel in between

    before   Y = MatMul(X, V)
    after    Y = MatMul(Mul(X, 1 / s), V * s)                 where nothing before X takes the factors over

The first is cross-layer equalization (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
Correction", section 4.1), the second SmoothQuant (Xiao et al. 2023, section 4); the factors are SmoothQuant's, with the
exponent that the expected noise of the layer is smallest with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.channels import ChannelMoments
from onnxcomp.graph_io import Node, Variable
from onnxcomp.model import Model, value_of
from onnxcomp_passes._placement import Layer
from onnxcomp_passes._weights import LayerWeights, per_input_channel, times_input_channel

__all__ = ["Equalized", "equalize"]

Array = np.ndarray[Any, Any]

EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""SmoothQuant's alpha, how much of the unevenness moves from the activations to the weights. Tried on each tensor."""

FOLDED_WORTH = 0.7
DIVIDED_WORTH = 0.5
"""Factors are applied where they bring the layer's expected noise (mean square) below this share of what it was: the
first where weights take them over, the second where a Mul has to run for them."""

COMMUTING = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool"})
"""Operators that give f(x / s) = f(x) / s for a positive factor a channel."""

LEVELS = 255.0
WEIGHT_LEVELS = 127.0


@dataclass(frozen=True)
class Equalized:
    """One tensor whose channels were evened out.

    Attributes:
        layers: The keys of the layers that read it.
        tensor: The tensor that they read now.
        noise: Expected noise after over before, mean square.
        spread: The largest channel over the median one, before.
    """

    layers: tuple[str, ...]
    tensor: str
    noise: float
    spread: float


def equalize(
    model: Model, layers: list[Layer], moments: Mapping[str, ChannelMoments], weights: LayerWeights
) -> list[Equalized]:
    """Even out the inputs of layers where that is expected to pay.

    Args:
        model: Its graph and weights are changed; what it computes stays the same, to float rounding.
        layers: The layers of this graph.
        moments: Name of a layer's input -> the statistics of its channels.
        weights: The layers' float weights; those that change are kept there.
    """
    readers: dict[str, list[Layer]] = {}
    tensors: dict[str, gs.Tensor] = {}
    owners = {id(layer.node): layer for layer in layers if weights.is_own(layer)}
    for layer in layers:
        if weights.is_own(layer):
            readers.setdefault(layer.node.inputs[0].name, []).append(layer)
            tensors[layer.node.inputs[0].name] = layer.node.inputs[0]
    outputs = {id(tensor) for tensor in model.graph.outputs}
    done = []
    for name, group in readers.items():
        seen = moments.get(name)
        if seen is None or seen.low is None or seen.high is None:
            continue
        source = _source(tensors[name], group, outputs)
        if source is None and any(layer.node.op == "Conv" for layer in group):
            continue
        factors, noise = _factors(seen, group, weights, DIVIDED_WORTH if source is None else FOLDED_WORTH)
        if factors is None:
            continue
        if source is not None and not _fold(model, source, owners.get(id(source)), factors, weights):
            continue
        tensor = name if source is not None else _divide(model, tensors[name], group, factors)
        for layer in group:
            weights.set(model, layer, times_input_channel(layer, weights.get(layer), factors))
        peak = seen.peak()
        spread = float(peak.max() / max(float(np.median(peak)), np.finfo(np.float32).tiny))
        done.append(Equalized(tuple(layer.key for layer in group), tensor, noise, spread))
    return done


def _factors(
    seen: ChannelMoments, group: list[Layer], weights: LayerWeights, worth: float
) -> tuple[Array | None, float]:
    """The factor of each channel, and the expected noise with them over that without; None where it does not pay."""
    peak = seen.peak()
    values = [weights.get(layer) for layer in group]
    parts = [per_input_channel(layer, value) for layer, value in zip(group, values, strict=True)]
    if any(len(part.peak) != len(peak) for part in parts):
        return None, 1.0
    weight_peak = np.max([part.peak for part in parts], axis=0)
    usable = (peak > 0) & (weight_peak > 0)
    if np.count_nonzero(usable) < 2:
        return None, 1.0

    def noise(factors: Array) -> float:
        """The noise that rounding the input and the weights puts into the layers' outputs; mean square, summed."""
        assert seen.low is not None
        assert seen.high is not None
        step = (max(0.0, np.max(seen.high / factors)) - min(0.0, np.min(seen.low / factors))) / LEVELS
        energy = float(np.sum(seen.square() / factors**2))
        total = 0.0
        for layer, value, part in zip(group, values, parts, strict=True):
            total += step**2 / 12 * float(np.sum(factors**2 * part.square))
            scaled = times_input_channel(layer, value, factors)
            others = tuple(i for i in range(scaled.ndim) if i != layer.axis)
            steps = np.max(np.abs(scaled), axis=others) / WEIGHT_LEVELS
            total += float(np.sum(steps.astype(np.float64) ** 2)) / 12 * energy * part.reuse
        return total

    best: Array | None = None
    least = before = noise(np.ones_like(peak))
    for exponent in EXPONENTS:
        factors = np.ones_like(peak)
        factors[usable] = peak[usable] ** exponent / weight_peak[usable] ** (1 - exponent)
        factors[usable] /= np.exp(np.mean(np.log(factors[usable])))
        found = noise(factors)
        if found < least:
            best, least = factors, found
    return (best, least / before) if least < worth * before else (None, 1.0)


# --- where the factors go ---------------------------------------------------------------------------------------------


def _source(tensor: gs.Tensor, group: list[Layer], outputs: set[int]) -> gs.Node | None:
    """The node before a tensor whose weights can be divided by the factors; None where something else reads on the way.

    Only layers of the group may read the tensor, and only the next node what lies between it and the source.
    """
    ours = {id(layer.node) for layer in group}
    if id(tensor) in outputs or any(id(reader) not in ours for reader in tensor.outputs):
        return None
    channel_axis = 1 if group[0].node.op == "Conv" else -1
    while len(tensor.inputs) == 1:
        node = tensor.inputs[0]
        if node.domain not in (None, "", "ai.onnx"):
            return None
        if node.op == "Conv" and channel_axis == 1:
            return node
        if node.op == "LayerNormalization" and channel_axis == -1:
            return node if node.attrs.get("axis", -1) == -1 and len(node.outputs) == 1 else None
        if node.op not in COMMUTING or (channel_axis != 1 and node.op not in {"Relu", "LeakyRelu"}):
            return None
        tensor = node.inputs[0]
        if id(tensor) in outputs or len(tensor.outputs) != 1:
            return None
    return None


def _fold(model: Model, source: gs.Node, layer: Layer | None, factors: Array, weights: LayerWeights) -> bool:
    """Divide what a node writes by the factors; False where its constants do not allow it."""
    if source.op == "LayerNormalization":
        constants = [tensor for tensor in source.inputs[1:] if tensor.name]
        if not all(_fits(tensor, factors) for tensor in constants):
            return False
        for index, tensor in enumerate(source.inputs[1:], 1):
            if tensor.name:
                source.inputs[index] = _constant(model, tensor, (value_of(tensor) / factors).astype(np.float32))
        return True
    bias = source.inputs[2] if len(source.inputs) > 2 and source.inputs[2].name else None
    if layer is None or (bias is not None and not _fits(bias, factors)):
        return False
    value = weights.get(layer)
    if value.shape[0] != len(factors):
        return False
    weights.set(model, layer, (value / factors.reshape(-1, *[1] * (value.ndim - 1))).astype(np.float32))
    if bias is not None:
        source.inputs[2] = _constant(model, bias, (value_of(bias) / factors).astype(np.float32))
    return True


def _fits(tensor: gs.Tensor, factors: Array) -> bool:
    return isinstance(tensor, gs.Constant) and tensor.dtype == np.float32 and tuple(tensor.shape) == factors.shape


def _constant(model: Model, like: gs.Tensor, value: Array) -> gs.Constant:
    """A new initializer: the old one may have other readers."""
    return gs.Constant(model.unique_name(f"{like.name}.e"), value)


def _divide(model: Model, tensor: gs.Tensor, group: list[Layer], factors: Array) -> str:
    """Let the layers read the tensor divided by the factors."""
    inverse = gs.Constant(model.unique_name("e.0"), (1.0 / factors).astype(np.float32))
    result = Variable(model.unique_name(f"{tensor.name}.e"))
    name = model.unique_name("equalize.0")
    for layer in group:
        layer.node.inputs[0] = result
    model.graph.nodes.append(Node("Mul", name, {}, [tensor, inverse], [result]))
    return str(result.name)
