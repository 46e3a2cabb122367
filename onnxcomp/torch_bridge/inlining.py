"""Functions as nodes: those of a model, and those by which ONNX defines operators that are not there."""

from __future__ import annotations

import onnx
from onnx import inliner

from onnxcomp.model import Model
from onnxcomp.torch_bridge.plan import missing_operators

__all__ = ["inlined_model", "opsets_of"]


def inlined_model(model: Model) -> Model:
    """The model with its functions as nodes of the graph, and so ONNX's own where an operator is not there."""
    found = Model.load(inliner.inline_local_functions(model.to_proto())) if model.functions else model
    before: list[tuple[str, str]] = []
    while (composed := _composed_operators(found)) and composed != before:
        before = composed
        try:
            proto = inliner.inline_selected_functions(_typed(found), composed, inline_schema_functions=True)
        except (RuntimeError, TypeError):  # a type that is not known; an onnx that cannot do it yet
            break
        found = Model.load(proto)
    return found


def _typed(model: Model) -> onnx.ModelProto:
    """The model with the types of its inner values, which ONNX's inliner asks for, those of initializers included."""
    proto = onnx.shape_inference.infer_shapes(model.to_proto())
    proto.graph.value_info.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in proto.graph.initializer
    )
    return proto


def _composed_operators(model: Model) -> list[tuple[str, str]]:
    """Domain and name of the operators that are missing but that ONNX defines by others."""
    missing = [("" if node.domain is None else node.domain, node.op) for node in missing_operators(model.graphs())]
    opsets = opsets_of(model)
    return [each for each in missing if _is_composed(*each, opsets.get(each[0], 1))]


def _is_composed(domain: str, op: str, opset: int) -> bool:
    """Whether ONNX defines an operator by others."""
    try:
        schema = onnx.defs.get_schema(op, opset, domain)
    except onnx.defs.SchemaError:
        return False
    return any(getattr(schema, key) for key in ("has_function", "has_context_dependent_function"))


def opsets_of(model: Model) -> dict[str, int]:
    """Domain -> version."""
    return {("" if entry.domain == "ai.onnx" else entry.domain): entry.version for entry in model.proto().opset_import}
