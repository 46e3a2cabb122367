"""Which operators NNAPI and CoreML have, by ONNX Runtime's own lists: all that can be told of them off a device."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import helper, shape_inference

from onnxcomp.errors import RuntimeFailure
from onnxcomp.runtime import Runtime
from onnxcomp.shapes import traced_nodes
from onnxcomp.verification.results import Coverage
from onnxcomp.workfolder import work_folder

__all__ = ["coverages"]


def coverages(runtime: Runtime, path: Path) -> tuple[Coverage, ...]:
    """Tell what NNAPI and CoreML have operators for.

    What counts is the graph that they get to see: constants folded, BatchNormalization in the weights.

    Args:
        runtime: Optimizes the graph that far.
        path: The model. Tensors of unknown size count as dynamic, which NNAPI does not take.

    Returns:
        One coverage a provider. The lists know operators, not their attributes or types: a node that counts as
        supported may still be refused on the device.
    """
    from onnxruntime.tools.mobile_helpers import usability_checker as checker

    with work_folder() as folder:
        seen = folder / "seen.onnx"
        try:
            runtime.convert(path, seen, level="basic")
        except RuntimeFailure as error:
            reason = f"ONNX Runtime cannot write the graph that it sees: {error}"
            return tuple(Coverage(provider, 0, 0, 0, reason=reason) for provider in ("NNAPI", "CoreML"))
        proto = _with_shapes(onnx.load(seen, load_external_data=False))
    return (
        _coverage("NNAPI", proto, lambda: checker.check_nnapi_partitions(proto, True)),
        _coverage(
            "CoreML",
            proto,
            lambda: checker.check_coreml_partitions(proto, False, "coreml_supported_mlprogram_ops.md"),
        ),
    )


def _coverage(provider: str, proto: onnx.ModelProto, check: Callable[[], Any]) -> Coverage:
    nodes = len(proto.graph.node)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = check()
    except Exception as error:  # noqa: BLE001 - the checker fails on graphs that it does not expect, in many ways
        return Coverage(provider, nodes, 0, 0, reason=f"ONNX Runtime's checker fails: {' '.join(str(error).split())}")
    supported = int(found.num_supported_nodes)
    return Coverage(provider, nodes, supported, int(found.num_partitions), tuple(sorted(found.unsupported_ops)))


def _with_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A structure with the shapes that follow from those of its inputs."""
    inputs = [info.type.tensor_type.shape.dim for info in proto.graph.input]
    if not all(dim.dim_value > 0 for dims in inputs for dim in dims):
        with contextlib.suppress(shape_inference.InferenceError, RuntimeError, ValueError):
            return shape_inference.infer_shapes(proto)
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    shapes = {
        name: shape
        for traced in traced_nodes(copy, {})
        for name, shape in zip((*traced.node.input, *traced.node.output), traced.shapes, strict=True)
        if name and shape is not None
    }
    declared = {info.name for info in (*proto.graph.input, *proto.graph.output)}
    proto.graph.ClearField("value_info")
    # The checker looks at sizes, not at types.
    proto.graph.value_info.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
        if name not in declared
    )
    return proto
