"""Traps in files of ONNX Runtime's own format."""

from __future__ import annotations

from onnxcomp.lints.finding import Seen, Subject, lint

__all__: list[str] = []

REMAKE = "make the file anew: `onnxcomp deploy MODEL.onnx --target ...`"


@lint(
    "ort-runtime-style",
    "error",
    why="a file in the 'Runtime' style leaves the int8 fusions to the device, which replays them only on request; for "
    "quantized models that is broken",
    fix=f"use the 'Fixed' style; {REMAKE}",
    mended_by="deploy",
)
def ort_runtime_style(subject: Subject) -> Seen:
    """Optimizations that are saved to be replayed."""
    if subject.ort is not None and subject.ort.saved_optimizations:
        yield "the model", f"{subject.ort.saved_optimizations} kinds of optimizations are saved in it"


@lint(
    "ort-unfused",
    "warning",
    why="layers run in float with conversions on top: the file was not made for ARM, which allows int8 activations",
    fix=f"optimize for the platform 'arm'; {REMAKE}",
    mended_by="deploy",
)
def ort_unfused(subject: Subject) -> Seen:
    """Float layers between DequantizeLinear and QuantizeLinear."""
    if subject.ort is None:
        return
    counts = subject.ort.operators
    layers = sum(counts.get(op, 0) for op in ("Conv", "Gemm", "MatMul", "com.microsoft:FusedConv"))
    if layers and counts.get("DequantizeLinear", 0) >= 2 and counts.get("QuantizeLinear", 0) >= 2:
        yield "the model", f"{layers} float layers beside {counts['DequantizeLinear']} DequantizeLinear"


@lint(
    "ort-for-provider",
    "error",
    on=("xnnpack", "nnapi", "coreml", "qnn"),
    why="its nodes are fused for the CPU provider already: no quantized node of it goes to another provider",
    fix=f"ship the .onnx file; {REMAKE}",
    mended_by="deploy",
)
def ort_for_provider(subject: Subject) -> Seen:
    """The ORT format for a target that wants ONNX."""
    if subject.ort is not None:
        yield "the model", f"it is in the ORT format; {subject.target.name} wants .onnx"
