"""The passes that come with onnxcomp, loaded as any other plugin."""

from __future__ import annotations

from onnxcomp_passes.cluster import Cluster
from onnxcomp_passes.distill import Distill
from onnxcomp_passes.fine_tune import FineTune
from onnxcomp_passes.fit_target import FitTarget
from onnxcomp_passes.float16 import Float16
from onnxcomp_passes.low_rank import LowRank
from onnxcomp_passes.pack import Pack
from onnxcomp_passes.prune import Prune
from onnxcomp_passes.prune_channels import PruneChannels
from onnxcomp_passes.qat import Qat
from onnxcomp_passes.quantize import Quantize
from onnxcomp_passes.quantize_dynamic import QuantizeDynamic
from onnxcomp_passes.quantize_weights import QuantizeWeights
from onnxcomp_passes.simplify import Simplify
from onnxcomp_passes.unpack import Unpack

__all__ = [
    "Cluster",
    "Distill",
    "FineTune",
    "FitTarget",
    "Float16",
    "LowRank",
    "Pack",
    "Prune",
    "PruneChannels",
    "Qat",
    "Quantize",
    "QuantizeDynamic",
    "QuantizeWeights",
    "Simplify",
    "Unpack",
]
