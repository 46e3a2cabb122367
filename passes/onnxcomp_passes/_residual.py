"""Whole residual blocks, and sums one of whose sides is nothing.

::

    before   y = Add(x, f(x))
    after    y = x
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.judge import Judge
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp_passes._constant_channels import ConstantChannels
from onnxcomp_passes._shapes import infer_known
from onnxcomp_passes._workspace import Workspace, is_standard, label

__all__ = ["Block", "choose_blocks", "empty_blocks", "removable_blocks", "remove_blocks"]

Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class Block:
    """A branch that is added to what it reads, or to what has the shape of its result.

    Attributes:
        name: The Add, as reports call it.
        output: The name of the sum.
        kept: The name of what is left of the sum without the branch.
        nodes: The names of the nodes of the branch, which nothing else reads.
    """

    name: str
    output: str
    kept: str
    nodes: frozenset[str]


def removable_blocks(model: Model) -> list[Block]:
    """The residual blocks of the main graph, in its order: y = x + f(x), all of equal shape as far as is known.

    The branch f is what only this sum reads; it has to read x, or what x is made from within the branch's reach.
    A sum of two branches that are both computed from an earlier tensor, as where a network changes its width, is none.

    Example:
        >>> from onnx import parser
        >>> text = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 2] a) => (float[N, 2] y) '
        >>> model = Model.load(parser.parse_model(text + "{ x = Relu(a) f = Tanh(x) y = Add(f, x) }"))
        >>> [(block.output, block.kept) for block in removable_blocks(model)]
        [('y', 'x')]
    """
    return [
        Block(label(node), node.outputs[0].name, kept.name, frozenset(label(inner) for inner in branch))
        for node, kept, branch in _sums(model, _may_be_equal)
        if any(tensor is kept for inner in branch for tensor in inner.inputs)
    ]


def empty_blocks(model: Model, constants: ConstantChannels) -> list[Block]:
    """The sums of the main graph one of whose sides is always zero, and of the shape of the sum."""
    return [
        Block(label(node), node.outputs[0].name, kept.name, frozenset(label(inner) for inner in branch))
        for node, kept, branch in _sums(model, operator.eq)
        if _is_zero(constants.of(node.inputs[1 if node.inputs[0] is kept else 0]))
    ]


def _is_zero(value: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None) -> bool:
    return value is not None and not np.any(value != 0)  # NaN, what is not known, is not 0


def _may_be_equal(one: Dims, other: Dims) -> bool:
    """Whether nothing is known to be broadcast.

    An attention mask that is another input leaves the batch of what it masks unknown: it might be larger than that of
    the tokens, though no one means it.
    """
    return len(one) == len(other) and all(
        left == right or (isinstance(left, str) and isinstance(right, str))
        for left, right in zip(one, other, strict=True)
    )


def _sums(model: Model, alike: Callable[[Dims, Dims], bool]) -> list[tuple[gs.Node, gs.Tensor, list[gs.Node]]]:
    """Each Add, the side that has its shape, and what only the other side is made by; at most one way for each Add."""
    known = infer_known(model)
    outputs = {id(tensor) for tensor in model.graph.outputs}
    main = {id(node) for node in model.graph.nodes}

    def dims(tensor: gs.Tensor) -> Dims | None:
        return known[id(tensor)][1].dims if id(tensor) in known else None

    found = []
    for node in model.graph.nodes:
        if not is_standard(node, "Add") or node.inputs[0] is node.inputs[1]:
            continue
        for kept, other in (node.inputs, node.inputs[::-1]):
            shape, left, right = (dims(tensor) for tensor in (node.outputs[0], kept, other))
            if shape is None or left is None or right is None or not alike(left, shape) or not alike(right, shape):
                continue
            branch = _only_for(other, node, {*outputs, id(kept)}, main)
            if branch:
                found.append((node, kept, branch))
    return found


def _only_for(tensor: gs.Tensor, reader: gs.Node, stays: Collection[int], main: Collection[int]) -> list[gs.Node]:
    """The nodes of the main graph whose results nothing but one input of a node needs, and none of which stays."""
    inside: dict[int, gs.Node] = {}
    allowed = {id(reader)}
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        for maker in current.inputs:
            results = [result for result in maker.outputs if result.name]
            readers = [node for result in results for node in result.outputs]
            if id(maker) in inside or any(id(result) in stays for result in results):
                continue
            if id(maker) in main and all(id(node) in allowed for node in readers):
                inside[id(maker)] = maker
                allowed.add(id(maker))
                waiting.extend(maker.inputs)
    return list(inside.values())


def remove_blocks(model: Model, blocks: Collection[Block]) -> None:
    """Take branches out of a model (in place): what read their sums reads the other side.

    Args:
        model: The model, or a fork of the one that the blocks were found in.
        blocks: Which.
    """
    work = Workspace(model, Context(), Changes(), slack=0)
    work.refresh()
    wanted = {block.output: block.kept for block in blocks}
    places = [
        (node, [tensor.name for tensor in node.inputs].index(wanted[node.outputs[0].name]))
        for node in model.graph.nodes
        if is_standard(node, "Add") and node.outputs[0].name in wanted
    ]
    for node, index in places:  # by the place: what is kept has another name once the block before it is gone
        if not work.bypass(node, node.inputs[index]):
            node.op = "Identity"
            node.inputs = [node.inputs[index]]
    work.sweep()


def choose_blocks(model: Model, context: Context) -> list[Block]:
    """The residual blocks that a model can do without, by measurement: the least harmful for their work first.

    Each block is taken out alone and the error of the whole model measured; then blocks are taken out together, in the
    order of error for each multiply-accumulate saved, as long as the budget holds.

    Args:
        model: The model; it is not changed.
        context: Its judge measures; it must have one. Blocks with a node that it excludes stay.
    """
    judge = context.judge
    assert judge is not None
    excluded = {label(node) for node in model.graph.nodes if context.excludes(node)}
    blocks = [block for block in removable_blocks(model) if not block.nodes & excluded]
    macs = judge.layer_macs(model)
    worth: dict[str, float] = {}
    for block in blocks:
        saved = sum(macs.get(name, 0) for name in block.nodes)
        if saved and not context.out_of_time():
            worth[block.output] = _error(judge, _without(model, [block])) / saved
    chosen: list[Block] = []
    for block in sorted((b for b in blocks if b.output in worth), key=lambda b: worth[b.output]):
        candidate = _without(model, [*chosen, block])
        holds = judge.allows(judge.quality(candidate), context.share)
        judge.forget(candidate)
        if not holds or context.out_of_time():
            break
        chosen.append(block)
    return chosen


def _without(model: Model, blocks: Collection[Block]) -> Model:
    candidate = model.fork()
    remove_blocks(candidate, blocks)
    return candidate


def _error(judge: Judge, candidate: Model) -> float:
    error = judge.rough_error(candidate)
    judge.forget(candidate)
    return error
