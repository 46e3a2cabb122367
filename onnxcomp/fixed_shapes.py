"""Fixing the dynamic axes of a model, for targets that compile a graph for one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxcomp.data import InputSpec, apply_shapes, input_specs
from onnxcomp.model import Model
from onnxcomp.shapes import Shape, traced_nodes
from onnxcomp.targets import Target

__all__ = ["dynamic_inputs", "fix_shapes", "made_static"]


def fix_shapes(model: Model, shapes: Mapping[str, Sequence[int]]) -> Model:
    """A copy of a model with fixed inputs; outputs and inner tensors get the shapes that follow.

    Args:
        model: The model; it is not changed.
        shapes: Sizes of all axes of an input, by its name. An axis of the same name is fixed in every input.

    Raises:
        OptionError: A shape does not fit the model.

    Example:
        >>> from onnx import parser
        >>> graph = "g (float[N, 4, H] x) => (float[N, H, 4] y) { y = Transpose<perm = [0, 2, 1]>(x) }"
        >>> model = Model.load(parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}'))
        >>> fixed = fix_shapes(model, {"x": (1, 4, 9)})
        >>> fixed.graph.inputs[0].shape, fixed.graph.outputs[0].shape
        ([1, 4, 9], [1, 9, 4])
    """
    fork = model.fork()
    specs = input_specs(fork.proto())
    fixed = {spec.name: spec for spec in apply_shapes(specs, shapes)}
    sizes = {
        dim: size
        for spec in specs
        for dim, size in zip(spec.shape, fixed[spec.name].shape, strict=False)
        if isinstance(dim, str) and isinstance(size, int)
    }
    for tensor in fork.graph.inputs:
        if tensor.name in fixed and fixed[tensor.name].kind == "tensor":
            tensor.shape = list(fixed[tensor.name].shape)
    follows = dict(_following(fork, {name: spec.shape for name, spec in fixed.items()}))
    for tensor in (*fork.graph.outputs, *(tensor for node in fork.graph.nodes for tensor in node.outputs)):
        if tensor.shape is None or any(not isinstance(dim, int) or dim < 0 for dim in tensor.shape):
            bound = None if tensor.shape is None else [sizes.get(dim, dim) for dim in tensor.shape]
            tensor.shape = list(follows[tensor.name]) if tensor.name in follows else bound
    return fork


def _following(model: Model, inputs: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, Shape]]:
    """The shapes of the main graph's tensors that follow from those of the inputs, where all of these are fixed."""
    static = {name: shape for name, shape in inputs.items() if all(isinstance(size, int) for size in shape)}
    if len(static) < len(inputs):
        return
    main = {tensor.name for node in model.graph.nodes for tensor in node.outputs}
    for traced in traced_nodes(model.proto(), static):
        shapes = traced.shapes[len(traced.node.input) :]
        yield from ((n, shape) for n, shape in zip(traced.node.output, shapes, strict=True) if n in main and shape)


def dynamic_inputs(model: Model, target: Target) -> list[InputSpec]:
    """The inputs whose dynamic axes the target does not take.

    Example:
        >>> from onnx import parser
        >>> from onnxcomp.targets import find_target
        >>> graph = "g (float[N, 3, H, 8] x) => (float[N, 3, H, 8] y) { y = Relu(x) }"
        >>> model = Model.load(parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}'))
        >>> [str(spec) for spec in dynamic_inputs(model, find_target("xnnpack"))]
        ['float32 (N, 3, H, 8)']
        >>> dynamic_inputs(model, find_target("arm64"))
        []
    """
    if not target.static_shapes:
        return []
    first = 1 if target.dynamic_batch else 0
    return [
        spec
        for spec in input_specs(model.proto())
        if spec.kind == "unranked"
        or (spec.kind == "tensor" and any(not isinstance(dim, int) for dim in spec.shape[first:]))
    ]


def made_static(
    model: Model,
    target: Target,
    shapes: Mapping[str, Sequence[int]],
    one_sample: Callable[[Model], Mapping[str, Any] | None],
) -> Model:
    """A model as a target wants it that takes no dynamic axes; the model itself where there is nothing to fix.

    Args:
        model: The model; it is not changed.
        target: The target.
        shapes: Sizes of inputs that the user gave.
        one_sample: Gives one sample to take open sizes from, for a model that is in part fixed; None where there is
            none. Without it a first axis is 1, and inputs with other dynamic axes stay as they are.
    """
    if not target.static_shapes:
        return model
    fixed = fix_shapes(model, shapes) if shapes else model
    if dynamic_inputs(fixed, target):
        sample = one_sample(fixed)
        specs = [spec for spec in input_specs(fixed.proto()) if spec.rank]
        sizes = (
            {spec.name: (1, *spec.shape[1:]) for spec in specs}
            if sample is None
            else {name: np.shape(value) for name, value in sample.items()}
        )
        known = {name: shape for name, shape in sizes.items() if all(isinstance(dim, int) for dim in shape)}
        fixed = fix_shapes(fixed, known)  # type: ignore[arg-type]  # all of them are whole numbers
    return model if fixed.digest == model.digest else fixed
