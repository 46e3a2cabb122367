"""Verification: what a model does on other processors, other builds of ONNX Runtime and other execution providers."""
