"""The data that drive calibration and evaluation: what a user gives, or what is generated for a model.

Everything is read in batches that fit the model's inputs; the whole set is never needed in memory. `open_data`
says which sources there are, `generate` makes inputs where there are none, `Dataset` is what both return.
"""

from __future__ import annotations

from onnxcomp.data.dataset import Batch, Dataset
from onnxcomp.data.generate import generate
from onnxcomp.data.images import ImageOptions
from onnxcomp.data.sources import open_data
from onnxcomp.data.specs import InputSpec, apply_shapes, input_specs, parse_shapes

__all__ = [
    "Batch",
    "Dataset",
    "ImageOptions",
    "InputSpec",
    "apply_shapes",
    "generate",
    "input_specs",
    "open_data",
    "parse_shapes",
]
