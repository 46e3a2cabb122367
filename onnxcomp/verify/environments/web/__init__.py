"""ONNX Runtime as a browser has it: WebAssembly, in Node."""

from onnxcomp.verify.environments.web.environment import Web

__all__ = ["Web"]
