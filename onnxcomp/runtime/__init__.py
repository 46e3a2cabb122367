"""ONNX Runtime in a process of its own, so that a crash fails one model and not the whole run.

Importing this package imports neither onnx nor onnxruntime.
"""

from __future__ import annotations

from onnxcomp.errors import RuntimeFailure, WorkerDied
from onnxcomp.runtime.census import INT8_OPERATORS, Census, KernelNode
from onnxcomp.runtime.client import Runtime
from onnxcomp.runtime.explain import KernelMiss, KernelReport, explain
from onnxcomp.runtime.results import Array, Feed, Observer, PairObserver, SessionInfo, TensorInfo, Timing

__all__ = [
    "INT8_OPERATORS",
    "Array",
    "Census",
    "Feed",
    "KernelMiss",
    "KernelNode",
    "KernelReport",
    "Observer",
    "PairObserver",
    "Runtime",
    "RuntimeFailure",
    "SessionInfo",
    "TensorInfo",
    "Timing",
    "WorkerDied",
    "explain",
]
