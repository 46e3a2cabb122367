"""The exceptions that onnxcomp raises.

::

    OnnxcompError
    ├── ModelError (ValueError)           a model file is missing, broken, unsupported or unsafe
    ├── DataError (ValueError)            calibration or evaluation data do not fit the model
    ├── OptionError (ValueError)          an option, a pass name, a recipe or a budget is not valid
    ├── RequirementError (RuntimeError)   a pass needs data, labels or a package that is not there
    ├── OutputError (OSError)             a result cannot be written
    └── RuntimeFailure (RuntimeError)     ONNX Runtime refused or failed to run a model
        └── WorkerDied                    the process that ran ONNX Runtime ended by itself or ran out of time

Every message says where, what was expected and what came, in one line.
"""

from __future__ import annotations

__all__ = [
    "DataError",
    "ModelError",
    "OnnxcompError",
    "OptionError",
    "OutputError",
    "RequirementError",
    "RuntimeFailure",
    "WorkerDied",
]


class OnnxcompError(Exception):
    """The base of every error that onnxcomp raises on purpose."""


class ModelError(OnnxcompError, ValueError):
    """A model file is missing, broken, unsupported or unsafe to read."""


class DataError(OnnxcompError, ValueError):
    """Calibration or evaluation data do not fit the model, or cannot be read."""


class OptionError(OnnxcompError, ValueError):
    """An option is unknown or out of range, or a recipe is not valid."""


class RequirementError(OnnxcompError, RuntimeError):
    """A pass needs data, labels or a package that is not there."""


class OutputError(OnnxcompError, OSError):
    """A result cannot be written where it was asked for."""


class RuntimeFailure(OnnxcompError, RuntimeError):  # noqa: N818 - "RuntimeError" is taken, and it is a failure
    """ONNX Runtime refused a model or failed to run it."""


class WorkerDied(RuntimeFailure):
    """The worker process ended by itself (a crash, out of memory) or ran out of time."""
