"""Training on the ONNX graph: a compressed model learns the original's answers.

Needs torch (`pip install 'onnxcomp[train]'`).
"""

from onnxcomp.errors import RequirementError

try:
    import torch as _torch  # noqa: F401
except ImportError as _error:
    _message = "training needs torch: pip install 'onnxcomp[train]'"
    raise RequirementError(_message) from _error

from onnxcomp.train.distilling import Trained, distill
from onnxcomp.train.history import Evaluation, History
from onnxcomp.train.losses import Loss
from onnxcomp.train.options import Pruning, TrainOptions

__all__ = ["Evaluation", "History", "Loss", "Pruning", "TrainOptions", "Trained", "distill"]
