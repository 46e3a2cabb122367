"""Comparisons that tests show, write and check."""

from __future__ import annotations

import dataclasses
from typing import Any

from onnxcomp.compared import Candidate, Comparisons
from onnxcomp.ledger import Figures
from tests.reports import layer, sample_report


def model_facts(path: str, size: int | None = 209_690) -> dict[str, Any]:
    return {"path": path, "sha256": "3" * 64, "size_bytes": size, "opset": 17, "ir_version": 8}


def candidate(path: str = "int8.onnx", verdict: str = "better", **changes: Any) -> Candidate:
    """A candidate as measured; `after` takes single figures that differ from those of the sample report."""
    figures = {"drop": 0.002, "drop_interval": (-0.001, 0.0052), **changes.pop("after", {})}
    facts: dict[str, Any] = {
        "model": model_facts(path),
        "verdict": verdict,
        "reason": "3.60 times smaller, 1.80 times as fast, drop 0.0020",
        "after": dataclasses.replace(sample_report().after, **figures),
        "speed": 1.8,
        "size": 3.6,
        "sqnr_db": {"scores": 31.2},
    }
    return Candidate(**{**facts, **changes})


def failed(path: str = "gone.onnx", reason: str = "cannot be read (No such file or directory)") -> Candidate:
    nothing = dict.fromkeys(("sha256", "size_bytes", "opset", "ir_version"))
    return Candidate({"path": path, **nothing}, "failed", reason)


def sample_comparison(*candidates: Candidate, **changes: Any) -> Comparisons:
    """A comparison of what is given, or of one candidate of each kind."""
    report = sample_report()
    found = candidates or (
        candidate(layers=[layer("conv1"), layer("conv2", error=0.05)]),
        candidate("half.onnx", "no gain", speed=0.8, size=2.0, after={"drop": 0.0, "drop_interval": (0.0, 0.0)}),
        candidate(
            "pruned.onnx",
            "over",
            speed=1.1,
            size=12.0,
            after={"drop": 0.3, "drop_interval": (0.25, 0.35)},
            layers=[layer("conv1", error=0.9)],
            warnings=["compared on the samples one by one: it refuses the batches that the others take"],
            shortfalls=["top1 is 0.61, under the limit of 0.9"],
        ),
        failed(),
    )
    facts: dict[str, Any] = {
        "model": model_facts("model.onnx", 754_883),
        "before": report.before,
        "candidates": list(found),
        "quality": "metric",
        "metric": report.metric,
        "budget": {"max_drop": 0.005, "max_error": 0.2},
        "limits": {"top1": 0.9},
        "data": {
            "description": "test.npz: 1,000 samples",
            "sha256": "2" * 64,
            "samples": 1000,
            "generated": False,
            "labels": True,
        },
        "target": "x86-vnni",
        "options": {"seed": 0, "timing": True, "layers": True, "shapes": {}},
        "environment": report.environment,
        "seconds": 5.8,
        "created": "2025-01-01T00:00:00+00:00",
        "warnings": [],
    }
    return Comparisons(**{**facts, **changes})


def unmeasured() -> Figures:
    """What is known of a model that was neither timed nor judged by a metric."""
    return Figures(size_bytes=1000, error=0.01, sqnr_db=40.0)
