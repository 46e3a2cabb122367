"""ONNX graphs as trainable torch modules, and their weights back into the same graph.

Needs torch (`pip install 'onnxcomp[train]'`).
"""

from onnxcomp.errors import RequirementError

try:
    import torch as _torch  # noqa: F401
except ImportError as _error:
    _message = "training needs torch: pip install 'onnxcomp[train]'"
    raise RequirementError(_message) from _error

from onnxcomp.torch_bridge.module import GraphModule, load
from onnxcomp.torch_bridge.registry import NodeCall, operator, operator_names

__all__ = ["GraphModule", "NodeCall", "load", "operator", "operator_names"]
