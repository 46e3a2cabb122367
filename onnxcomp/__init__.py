"""onnxcomp: makes ONNX models smaller and faster, never worse, with the proof.

Names are imported when they are first used, so that `import onnxcomp` itself is light.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcomp.advice import Advice, advise
    from onnxcomp.budget import Budget
    from onnxcomp.comparison import Comparison, Comparisons, compare, compare_all
    from onnxcomp.deployment import Package, deploy
    from onnxcomp.errors import (
        DataError,
        ModelError,
        OnnxcompError,
        OptionError,
        OutputError,
        RequirementError,
        RuntimeFailure,
        WorkerDied,
    )
    from onnxcomp.exporting import Exported, export
    from onnxcomp.facts import ModelFacts, inspect
    from onnxcomp.ledger import Report
    from onnxcomp.model import Model
    from onnxcomp.passes import Changes, Context, Pass, option, register
    from onnxcomp.pipeline import Result, Shared, optimize
    from onnxcomp.recipe import load_recipe
    from onnxcomp.stages import Stage
    from onnxcomp.verification import Verification, verify

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some builds of ONNX Runtime write some as they are imported

__all__ = [
    "Advice",
    "Budget",
    "Changes",
    "Comparison",
    "Comparisons",
    "Context",
    "DataError",
    "Exported",
    "Model",
    "ModelError",
    "ModelFacts",
    "OnnxcompError",
    "OptionError",
    "OutputError",
    "Package",
    "Pass",
    "Report",
    "RequirementError",
    "Result",
    "RuntimeFailure",
    "Shared",
    "Stage",
    "Verification",
    "WorkerDied",
    "advise",
    "compare",
    "compare_all",
    "deploy",
    "export",
    "inspect",
    "load_recipe",
    "optimize",
    "option",
    "register",
    "verify",
]

_HOMES = {
    "advice": ("Advice", "advise"),
    "budget": ("Budget",),
    "comparison": ("Comparison", "Comparisons", "compare", "compare_all"),
    "deployment": ("Package", "deploy"),
    "exporting": ("Exported", "export"),
    "facts": ("ModelFacts", "inspect"),
    "ledger": ("Report",),
    "model": ("Model",),
    "passes": ("Changes", "Context", "Pass", "option", "register"),
    "pipeline": ("Result", "Shared", "optimize"),
    "recipe": ("load_recipe",),
    "stages": ("Stage",),
    "verification": ("Verification", "verify"),
}
"""Module -> the public names in it; what is in none of these is an error class."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        message = f"module 'onnxcomp' has no attribute {name!r}"
        raise AttributeError(message)
    home = next((module for module, names in _HOMES.items() if name in names), "errors")
    value = getattr(importlib.import_module(f"onnxcomp.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
