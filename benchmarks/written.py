"""What every model that a benchmark writes is checked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from onnxcomp.errors import OnnxcompError
from onnxcomp.runtime import Runtime

REASON_CHARACTERS = 110


def failed_checks(small: Path, report: dict[str, Any]) -> list[str]:
    """What is wrong with a written model or its report."""
    failed = []
    try:
        onnx.checker.check_model(str(small), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        failed.append(f"checker: {one_line(str(error))}")
    with Runtime() as runtime:
        for optimize in (True, False):
            try:
                runtime.check(small, optimize=optimize)
            except OnnxcompError as error:
                failed.append(f"not loaded: {one_line(str(error))}")
    stages = report["stages"]
    if not stages or not all(stage["verdict"] and stage["reason"] for stage in stages):
        failed.append("no ledger")
    return failed


def one_line(text: str) -> str:
    """A text as one cell of a table, cut where it is long."""
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= REASON_CHARACTERS else line[: REASON_CHARACTERS - 3] + "..."
