"""Verification: what a model does on other processors, other builds of ONNX Runtime and other execution providers."""

from __future__ import annotations

from onnxcomp.verification.results import Coverage, Difference, LayerResult, NodeDifference, Verification
from onnxcomp.verification.verifying import ALWAYS, LAYERS, verify

__all__ = [
    "ALWAYS",
    "LAYERS",
    "Coverage",
    "Difference",
    "LayerResult",
    "NodeDifference",
    "Verification",
    "verify",
]
