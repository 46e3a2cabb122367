"""Factors in a graph that stand for one weight: which they are, and the weight that they make.

::

    Y = MatMul(MatMul(X, A), B)          Y = MatMul(X, W)              W = A B
    Y = MatMul(B', MatMul(A', X))        Y = MatMul(W, X)              W = B' A'
    Y = Gemm(Gemm(X, A), B, b)           Y = Gemm(X, W, b)
    Y = MatMul(Gather(A, rows), B)       Y = Gather(W, rows)
    Y = Conv(Conv(X, A), B, b)           Y = Conv(X, W, b)             in each of `FORMS`
    T = MatMul(X, A)    Q, K, V = MatMul(T, Bq), ..                    Q, K, V = MatMul(X, A Bq), ..

They are told by what they compute, whoever made them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper

from onnxcomp.model import Model, value_of
from onnxcomp.passes import Context
from onnxcomp.structure import spooled
from onnxcomp.weights import Spool
from onnxcomp_passes._conv_factors import FORMS, ConvFactors, factor_shapes, has_form
from onnxcomp_passes._thin import THIN, Thin

__all__ = ["FACTOR", "WEIGHT_AT", "Merged", "is_factor", "merge_factors"]

Array = np.ndarray[Any, Any]

WEIGHT_AT = {"MatMul": (0, 1), "Gemm": (1,), "Conv": (1,), "Gather": (0,)}
"""Operator -> the inputs whose weight may become factors."""

FACTOR = "is one of several factors already"
NO_FORM = f"{FACTOR}, which do not make one weight"
READ_ELSEWHERE = f"{FACTOR}, and what they are or have between them is read elsewhere too"

PAIRS = {("MatMul", "MatMul"), ("Gemm", "Gemm"), ("Gather", "MatMul")}


@dataclass(frozen=True)
class Merged:
    """What a weight was merged from.

    Attributes:
        thin: The form and rank of its factors.
        shared: The name of the first factor where other weights have it too, else "".
    """

    thin: Thin
    shared: str


def is_factor(node: gs.Node) -> bool:
    """Whether a node multiplies what another has just multiplied, or another what it has, with nothing in between."""
    return _before(node) is not None or _is_inner(node)


def merge_factors(
    model: Model, context: Context, spool: Spool, only: Collection[str] | None = None
) -> tuple[dict[str, Merged], dict[str, str]]:
    """Put the weight that they make in the place of all factors that make one (in place).

    Args:
        model: Its constants are lifted.
        context: For what the user excludes.
        spool: Where the weights go.
        only: Names of merged weights; other factors stay. None: all are merged.

    Returns:
        The merged weights by their names, and why other factors could not be merged by the names of these.
    """
    if only is not None and not only:
        return {}, {}
    chains, reasons = _chains(model, context)
    names: dict[tuple[int, ...], str] = {}
    for chain in chains:
        if chain.key not in names:  # of all, so that names do not depend on which are merged
            names[chain.key] = model.unique_name(chain.name)
    kept = _apart([chain for chain in chains if only is None or names[chain.key] in only], model)
    for chain in chains:
        if chain not in kept:
            why = READ_ELSEWHERE if only is None else FACTOR
            reasons |= {str(weight.name): why for weight in chain.weights}
    seconds: dict[int, set[int]] = {}
    for first, *_, last in (chain.key for chain in kept):
        seconds.setdefault(first, set()).add(last)
    merged: dict[str, Merged] = {}
    made: dict[str, gs.Constant] = {}
    for chain in kept:
        name, first = names[chain.key], chain.weights[0]
        if name not in made:
            made[name] = _constant(name, chain, spool)
            merged[name] = Merged(chain.thin, str(first.name) if len(seconds[id(first)]) > 1 else "")
        chain.put(made[name])
    inner = {id(node): node for chain in kept for node in chain.nodes[:-1]}
    model.graph.nodes = [node for node in model.graph.nodes if id(node) not in inner]
    for node in inner.values():
        node.inputs.clear()
        node.outputs.clear()
    return merged, reasons


@dataclass(frozen=True, eq=False)
class _Chain:
    """Consecutive nodes whose weights make one.

    Attributes:
        nodes: First to last.
        thin: What the one weight has become.
        weights: Of the nodes.
        attrs: Of the last node, where it has the one weight.
        group: Of Convs that of the one.
    """

    nodes: tuple[gs.Node, ...]
    thin: Thin
    weights: tuple[gs.Constant, ...]
    attrs: Mapping[str, Any]
    group: int = 1

    @property
    def key(self) -> tuple[int, ...]:
        """Equal for nodes that read the same weights."""
        return tuple(map(id, self.weights))

    @property
    def name(self) -> str:
        """What the one weight was called, where `low-rank` has split it."""
        names = [str(weight.name) for weight in self.weights]
        whole, thin, number = names[-1].rpartition(THIN)
        is_ours = thin and (not number or number[1:].isdigit())
        return whole if is_ours else "*".join(names)

    def dense(self) -> Array:
        """The one weight, as the last node reads it."""
        start, end = self.nodes[0], self.nodes[-1]
        if start.op == "Conv":
            values = tuple(value_of(weight).astype(np.float32) for weight in self.weights)
            return ConvFactors(self.thin.form, self.group, values).dense()
        first, second = (value_of(weight).astype(np.float64) for weight in self.weights)
        if start.op == "Gemm":
            turned = bool(end.attrs.get("transB", 0))
            one = (first.T if start.attrs.get("transB", 0) else first) @ (second.T if turned else second)
            return np.asarray(one.T if turned else one)
        return np.asarray(second @ first if start.op == "MatMul" and _weight_at(start) == 0 else first @ second)

    def put(self, weight: gs.Constant) -> None:
        """Let the last node compute what all do."""
        start, end = self.nodes[0], self.nodes[-1]
        place = _weight_at(start)
        data = start.inputs[1 - place]
        end.op, end.attrs = start.op, dict(self.attrs)
        end.inputs[place], end.inputs[1 - place] = weight, data


def _constant(name: str, chain: _Chain, spool: Spool) -> gs.Constant:
    dtype = np.dtype(chain.weights[0].dtype)
    held = np.ascontiguousarray(chain.dense(), dtype)
    return gs.Constant(name, spooled(held.tobytes(), helper.np_dtype_to_tensor_dtype(dtype), held.shape, spool))


# --- which they are ---------------------------------------------------------------------------------------------------


def _chains(model: Model, context: Context) -> tuple[list[_Chain], dict[str, str]]:
    """Factors that make one weight, in the order of the graph; and why others do not, by their names."""
    chains: list[_Chain] = []
    reasons: dict[str, str] = {}
    for last in model.graph.nodes:
        if not _multiplies(last) or _is_inner(last) or _before(last) is None:
            continue
        nodes = [last]
        while (before := _before(nodes[0])) is not None:
            nodes.insert(0, before)
        weights = tuple(node.inputs[_weight_at(node)] for node in nodes)
        if any(context.excludes(node) for node in nodes):
            continue
        is_float = {np.dtype(weight.dtype) for weight in weights} in ({np.dtype("f4")}, {np.dtype("f2")})
        find = _convs if last.op == "Conv" else _pair
        is_empty = any(0 in weight.shape for weight in weights)  # a rank of 0 cannot fall
        chain = find(tuple(nodes), weights) if is_float and not is_empty else None
        if chain is None:
            reasons |= {str(weight.name): NO_FORM for weight in weights}
        else:
            chains.append(chain)
    return chains, reasons


def _apart(chains: Sequence[_Chain], model: Model) -> list[_Chain]:
    """The chains whose factors, and what is between these, nothing but such chains read."""
    outputs = {str(tensor.name) for tensor in model.graph.outputs}
    kept = list(chains)
    while True:
        inside = {id(node) for chain in kept for node in chain.nodes}
        users: dict[int, list[_Chain]] = {}
        for chain in kept:
            for weight in chain.weights:
                users.setdefault(id(weight), []).append(chain)
        good = [chain for chain in kept if _is_apart(chain, inside, users, outputs)]
        if len(good) == len(kept):
            return kept
        kept = good


def _is_apart(
    chain: _Chain, inside: Collection[int], users: Mapping[int, Sequence[_Chain]], outputs: Collection[str]
) -> bool:
    if len(set(chain.key)) < len(chain.key):
        return False
    between = [node.outputs[0] for node in chain.nodes[:-1]]
    tensors = [*between, *chain.weights]
    if any(id(reader) not in inside for tensor in tensors for reader in tensor.outputs):
        return False
    if any(str(tensor.name) in outputs for tensor in tensors):
        return False
    others = [other for weight in chain.weights for other in users[id(weight)] if other.key != chain.key]
    return all(_has_in_common(chain, other) for other in others)


def _has_in_common(chain: _Chain, other: _Chain) -> bool:
    """Whether two chains are projections of one input with one first factor, as `low-rank` makes them."""
    start = chain.nodes[0]
    is_projection = start.op in {"MatMul", "Gemm"} and _weight_at(start) == 1 and len(chain.weights[0].shape) == 2
    return is_projection and start is other.nodes[0] and chain.weights[-1] is not other.weights[-1]


def _pair(nodes: tuple[gs.Node, ...], weights: tuple[gs.Constant, ...]) -> _Chain | None:
    """Two products; None where they are not those of one matrix, or stack of them."""
    if len(nodes) != 2 or (nodes[0].op, nodes[1].op) not in PAIRS:
        return None
    start, end = nodes
    shapes = [tuple(weight.shape) for weight in weights]
    if min(map(len, shapes)) < 2 or shapes[0][:-2] != shapes[1][:-2]:
        return None
    attrs: dict[str, Any] = {}
    inner = shapes[0][-1]
    if start.op == "Gather":
        if len(shapes[0]) != 2 or int(start.attrs.get("axis", 0)) not in {0, -2} or _weight_at(end) != 1:
            return None
        attrs = dict(start.attrs)
    elif start.op == "Gemm":
        if start.attrs.get("alpha", 1.0) != 1.0 or end.attrs.get("transA", 0):
            return None
        attrs = {name: value for name, value in end.attrs.items() if name != "transA"}
        attrs |= {name: value for name, value in start.attrs.items() if name == "transA"}
        inner = shapes[0][0 if start.attrs.get("transB", 0) else 1]
    else:
        if _weight_at(start) != _weight_at(end):
            return None
        inner = shapes[0][-1 if _weight_at(start) else -2]
    return _Chain(nodes, Thin("svd", (int(inner),)), weights, attrs)


def _convs(nodes: tuple[gs.Node, ...], weights: tuple[gs.Constant, ...]) -> _Chain | None:
    """A chain of Convs in one of `FORMS`; None where it has none."""
    shapes = [tuple(map(int, weight.shape)) for weight in weights]
    if len({node.op for node in nodes}) > 1 or len(set(map(len, shapes))) > 1:
        return None
    kernel = tuple(map(max, zip(*(shape[2:] for shape in shapes), strict=True)))
    shape, group = (shapes[-1][0], shapes[0][1], *kernel), int(nodes[0].attrs.get("group", 1))
    attrs = _one_conv(nodes, kernel, group)
    for form in FORMS if attrs is not None else ():
        ranks = (shapes[0][0] // group, shapes[-1][1]) if form == "tucker" else (shapes[0][0] // group,)
        if not has_form(form, shape, group) or factor_shapes(form, shape, group, ranks) != shapes:
            continue
        found = ConvFactors(form, group, tuple(np.empty(each, np.float32) for each in shapes))
        made = found.attributes(attrs or {})
        if all(_told(node.attrs, kernel) == _told(each, kernel) for node, each in zip(nodes, made, strict=True)):
            return _Chain(nodes, Thin(form, ranks), weights, attrs or {}, group)
    return None


def _one_conv(nodes: Sequence[gs.Node], kernel: Sequence[int], group: int) -> dict[str, Any] | None:
    """The attributes of the Conv that a chain stands for, if it stands for one."""
    each = [_told(node.attrs, kernel) for node in nodes]
    modes = {told["auto_pad"] for told in each}
    if len(modes) > 1:
        return None
    attrs: dict[str, Any] = {"group": group, "kernel_shape": list(kernel)}
    for name in ("strides", "dilations"):
        attrs[name] = [math.prod(sizes) for sizes in zip(*(told[name] for told in each), strict=True)]
    if modes == {"NOTSET"}:
        attrs["pads"] = [sum(pads) for pads in zip(*(told["pads"] for told in each), strict=True)]
    else:
        attrs["auto_pad"] = modes.pop()
    return attrs


def _told(attrs: Mapping[str, Any], kernel: Sequence[int]) -> dict[str, Any]:
    """The attributes of a Conv, those that it leaves out too."""
    axes, mode = len(kernel), attrs.get("auto_pad", "NOTSET")
    told: dict[str, Any] = {"group": int(attrs.get("group", 1)), "auto_pad": mode}
    for name in ("strides", "dilations"):
        told[name] = [int(value) for value in attrs.get(name, [1] * axes)]
    told["pads"] = [int(pad) for pad in attrs.get("pads", [0] * 2 * axes)] if mode == "NOTSET" else []
    return told


# --- neighbours -------------------------------------------------------------------------------------------------------


def _before(node: gs.Node) -> gs.Node | None:
    """The node that has just multiplied what this one multiplies, if there is one and it adds nothing."""
    data = node.inputs[1 - _weight_at(node)]
    before = data.inputs[0] if len(data.inputs) == 1 else None
    return before if before is not None and _multiplies(before) and not _has_bias(before) else None


def _is_inner(node: gs.Node) -> bool:
    """Whether others multiply what a node gives, all that read it, and it adds nothing."""
    after = node.outputs[0].outputs
    reads_it = (_multiplies(each) and each.inputs[1 - _weight_at(each)] is node.outputs[0] for each in after)
    return bool(after) and not _has_bias(node) and all(reads_it)


def _multiplies(node: gs.Node) -> bool:
    places = WEIGHT_AT.get(node.op, ()) if not node.domain else ()
    return any(isinstance(node.inputs[place], gs.Constant) for place in places)


def _weight_at(node: gs.Node) -> int:
    return next(place for place in WEIGHT_AT[node.op] if isinstance(node.inputs[place], gs.Constant))


def _has_bias(node: gs.Node) -> bool:
    """Whether something is added; zeros are what a Gemm without a bias had before opset 11."""
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return False
    return not isinstance(node.inputs[2], gs.Constant) or bool(value_of(node.inputs[2]).any())
