"""Other machines, builds and providers of ONNX Runtime that can be run on this one; each is a layer of `verify`."""

from __future__ import annotations

import importlib

from onnxcomp.verification.environments.base import Environment, Execution

__all__ = ["ENVIRONMENTS", "Environment", "Execution", "find_environment"]

ENVIRONMENTS = {
    "arm64": "onnxcomp.verification.environments.arm64:Arm64",
    "x86": "onnxcomp.verification.environments.x86:X86",
    "android": "onnxcomp.verification.environments.android:Android",
    "qnn": "onnxcomp.verification.environments.qnn:Qnn",
    "web": "onnxcomp.verification.environments.web:Web",
}
"""Name of a layer -> where its environment is: what is not asked for is not imported."""


def find_environment(name: str) -> Environment:
    """The environment of a layer."""
    module, _, attribute = ENVIRONMENTS[name].partition(":")
    environment: Environment = getattr(importlib.import_module(module), attribute)()
    return environment
