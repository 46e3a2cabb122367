"""Which nodes run in int8, and which tensors between them need a QuantizeLinear and a DequantizeLinear.

The rules are those of ONNX Runtime's CPU provider, found by running: see docs/how-it-works.md.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp.graph_io import subgraphs, walk
from onnxcomp.passes import Changes, Context
from onnxcomp.targets import QuantizationRules, host_target
from onnxcomp_passes._companions import SAME_GRID, clip_low, data_inputs, is_adapted, is_supported
from onnxcomp_passes._stored import Stored, find_stored, is_decoded

__all__ = ["Layer", "Placement", "find_layers", "place", "rangeable"]

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
