"""ONNX's operators on torch tensors, one module a family; importing this registers them all."""

from onnxcomp.torch_bridge.operators import elementwise, quantization

__all__ = ["elementwise", "quantization"]
