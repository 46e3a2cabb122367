"""Traps in the rest of a model: shapes, versions, operators, weights, files."""

from __future__ import annotations

from onnxcomp.fixed_shapes import dynamic_inputs
from onnxcomp.lints.finding import Seen, Subject, lint
from onnxcomp.runtime import explain

__all__: list[str] = []


@lint(
    "dynamic-shape",
    "error",
    on=("xnnpack", "nnapi", "coreml", "qnn"),
    why="the provider compiles for one shape: nodes of unknown shape fall back to the CPU, or the model is refused",
    fix="fix the axes: `--shape NAME=1,3,224,224`",
    mended_by="shapes",
)
def dynamic_shape(subject: Subject) -> Seen:
    """Inputs with axes of unknown size."""
    if subject.model is not None:
        for spec in dynamic_inputs(subject.model, subject.target):
            axes = " with any number of axes" if spec.kind == "unranked" else ""
            yield spec.name, f"the input is {spec.dtype.name}{axes}" if axes else f"the input is {spec}"


@lint(
    "control-flow",
    "error",
    on=("qnn",),
    why="the provider has no If, Loop or Scan",
    fix="export the model without them, or leave their bodies to the CPU",
)
def control_flow(subject: Subject) -> Seen:
    """Operators with bodies."""
    for node in subject.model.graph.nodes if subject.model is not None else ():
        if node.op in {"If", "Loop", "Scan"}:
            yield str(node.name or node.outputs[0].name), f"{node.op} has bodies"


@lint(
    "runtime-floor",
    "warning",
    why="the oldest ONNX Runtime that the target is made for does not read it",
    fix="export the model with an older opset, or ship a newer ONNX Runtime",
)
def runtime_floor(subject: Subject) -> Seen:
    """A newer opset or IR version than the target's oldest runtime has."""
    model, target = subject.model, subject.target
    if model is None:
        return
    if model.opset > target.max_opset:
        yield "the model", f"opset {model.opset}; ONNX Runtime {target.min_runtime} has {target.max_opset}"
    if model.ir_version > target.max_ir_version:
        yield (
            "the model",
            f"IR version {model.ir_version}; ONNX Runtime {target.min_runtime} has {target.max_ir_version}",
        )


@lint(
    "no-int8-kernel",
    "warning",
    on=("x86-vnni", "x86", "arm64", "web"),
    why="the layer runs in float with conversions on top, which is slower than plain float",
    fix="mend what the rule says, or quantize the float model anew: `onnxcomp optimize FLOAT.onnx --target ...`",
)
def no_int8_kernel(subject: Subject) -> Seen:
    """Quantized layers that ONNX Runtime does not run in int8."""
    if subject.model is None or subject.census is None:
        return
    for miss in explain(subject.model.proto(), subject.census).missed:
        yield miss.node, f"{miss.reason} ({miss.rule})"


@lint(
    "external-data",
    "warning",
    on=("web", "arm64"),
    why="a browser or an app that loads the model from memory does not find the file with its weights",
    fix="keep the weights in the model file, or hand the other file over with the session's external-data options",
)
def external_data(subject: Subject) -> Seen:
    """Weights in another file."""
    if subject.model is not None and subject.model.path is not None:
        from onnxcomp.structure import model_files

        others = [path.name for path in model_files(subject.model.path)[1:]]
        if others:
            yield "the model", f"weights lie in {', '.join(others)}"
