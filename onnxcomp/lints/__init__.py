"""Lints: traps that models fall into on their way to a device, each with what comes of it and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from onnxcomp.lints import biases, ort_files, qoperators, quantization, structure  # noqa: F401 - they register their lints
from onnxcomp.lints.finding import LINTS, Finding, Lint, Subject
from onnxcomp.model import Model
from onnxcomp.ort_format import read_ort
from onnxcomp.runtime import Census
from onnxcomp.targets import Target

__all__ = ["LINTS", "Finding", "Lint", "Subject", "lint_file", "lint_model", "mended_by"]


def lint_model(model: Model, target: Target, census: Census | None = None) -> tuple[Finding, ...]:
    """Look for traps in a model.

    Args:
        model: The model.
        target: What it is for.
        census: Its kernels on this host, for the lints that look at them.

    Returns:
        What was found, errors first.

    Example:
        >>> from onnx import parser
        >>> from onnxcomp.targets import find_target
        >>> graph = "g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"
        >>> model = Model.load(parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}'))
        >>> [(found.id, found.where) for found in lint_model(model, find_target("nnapi"))]
        [('dynamic-shape', 'x')]
    """
    return tuple(_found(Subject(target, model=model, census=census)))


def lint_file(path: Path, target: Target) -> tuple[Finding, ...]:
    """Look for traps in a file of ONNX Runtime's own format.

    Raises:
        ModelError: The file is broken.
    """
    return tuple(_found(Subject(target, ort=read_ort(path))))


def _found(subject: Subject) -> Iterator[Finding]:
    lints = [lint for lint in LINTS.values() if not lint.on or subject.target.name in lint.on]
    for lint in sorted(lints, key=lambda lint: lint.severity):
        fix = lint.fix
        if lint.mended_by in {"fit-target", "shapes"}:
            fix += f"; `onnxcomp optimize --target {subject.target.name}` does, and says what it has to leave"
        for where, what in lint.look(subject):
            yield Finding(lint.id, lint.severity, where, what, lint.why, fix)


def mended_by(step: str) -> frozenset[str]:
    """The identifiers of the lints whose traps a pass or a step takes out."""
    return frozenset(lint.id for lint in LINTS.values() if lint.mended_by == step)
