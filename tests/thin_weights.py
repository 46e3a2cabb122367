"""Weights that are products of thin ones, or nearly so."""

from __future__ import annotations

import math

import numpy as np
import onnx

from onnxcomp.model import Model
from tests.models import Array, proto_of, random_weights

__all__ = ["dense_kernel", "fading", "few", "thin", "weights_of"]


def thin(*shape: int, rank: int = 3, seed: int = 0, turned: bool = False) -> Array:
    """A weight, or a stack of them, of this rank over its last two axes; the values far apart, as trained ones are."""
    *stack, rows, columns = shape
    first, second = random_weights(*stack, rows, rank, seed=seed), random_weights(*stack, rank, columns, seed=seed + 50)
    return np.asarray((first / math.sqrt(rank)) @ second, np.float32)


def few(form: str, shape: tuple[int, ...], group: int, count: int = 2) -> Array:
    """A kernel that has the form with so many components, or one."""
    blocks = []
    for seed in range(group):
        outputs, inputs, *kernel = shape[0] // group, *shape[1:]
        rng = np.random.default_rng(seed)
        if form == "svd":
            block = rng.normal(size=(outputs, count)) @ rng.normal(size=(count, inputs * math.prod(kernel)))
        elif form == "tucker":
            core = rng.normal(size=(count, count, math.prod(kernel)))
            block = np.einsum(
                "or,ci,rik->ock", rng.normal(size=(outputs, count)), rng.normal(size=(inputs, count)), core
            )
        elif form == "spatial":
            down, along = rng.normal(size=(count, inputs, kernel[0])), rng.normal(size=(count, outputs, kernel[1]))
            block = np.einsum("rch,row->ochw", down, along)
        else:
            block = np.ones(())
            for size in (outputs, inputs, *kernel):
                block = np.multiply.outer(block, rng.normal(size=size))
        blocks.append(block.reshape(outputs, inputs, *kernel))
    made = np.concatenate(blocks)
    return np.asarray(made / made.std(), np.float32)


def fading(rows: int, columns: int, power: float = 1.0, *, seed: int = 0) -> Array:
    """A weight whose singular values fall like 1, 1 / 2 ** power, 1 / 3 ** power, ..."""
    rng, side = np.random.default_rng(seed), min(rows, columns)
    left, right = (np.linalg.qr(rng.normal(size=(size, side)))[0] for size in (rows, columns))
    return np.asarray((left * np.arange(1, side + 1.0) ** -power) @ right.T * math.sqrt(side), np.float32)


def weights_of(model: Model | onnx.ModelProto) -> int:
    """How many numbers the matrices and kernels of a model have."""
    return sum(math.prod(tensor.dims) for tensor in proto_of(model).graph.initializer if len(tensor.dims) > 1)


def dense_kernel(chain: Model, shape: tuple[int, ...]) -> Array:
    """The kernel of a chain of Convs, composed one group after the other."""
    nodes, blocks = chain.fork().graph.nodes, []
    groups = int(nodes[0].attrs.get("group", 1))
    for group in range(groups):
        made = np.eye(shape[1]).reshape(shape[1], shape[1], *[1] * (len(shape) - 2))
        for node in nodes:
            part = _all_channels(chain.weight(node.inputs[1].name), int(node.attrs.get("group", 1)))
            outputs, inputs = part.shape[0] // groups, part.shape[1] // groups
            part = part[group * outputs : (group + 1) * outputs, group * inputs : (group + 1) * inputs]
            made = np.einsum("ok...,ki...->oi...", part, made)  # along each axis only one has a kernel
        blocks.append(made)
    return np.concatenate(blocks).astype(np.float32)


def _all_channels(weight: Array, groups: int) -> Array:
    """The weight of a Conv with groups as that of one without."""
    outputs, inputs = len(weight) // groups, weight.shape[1]
    made = np.zeros((len(weight), inputs * groups, *weight.shape[2:]))
    for group in range(groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        made[rows, group * inputs : (group + 1) * inputs] = weight[rows]
    return made
