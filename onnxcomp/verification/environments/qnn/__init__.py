"""Qualcomm's HTP, the processor for int8 of its phones, on this machine."""

from onnxcomp.verification.environments.qnn.environment import Qnn

__all__ = ["Qnn"]
