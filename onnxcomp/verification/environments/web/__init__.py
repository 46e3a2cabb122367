"""ONNX Runtime as a browser has it: WebAssembly, in Node."""

from onnxcomp.verification.environments.web.environment import FILES, VERSION, Web

__all__ = ["FILES", "VERSION", "Web"]
