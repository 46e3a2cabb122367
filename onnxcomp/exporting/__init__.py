"""A torch module as an ONNX model, written only if ONNX Runtime computes what torch does."""

from onnxcomp.exporting.checking import MAX_ERROR, Exported
from onnxcomp.exporting.inputs import DTYPES, Shape, parse_dynamic, parse_examples
from onnxcomp.exporting.writing import export

__all__ = ["DTYPES", "MAX_ERROR", "Exported", "Shape", "export", "parse_dynamic", "parse_examples"]
