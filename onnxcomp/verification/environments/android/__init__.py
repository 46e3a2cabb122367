"""The Android build of ONNX Runtime, with XNNPACK in it, run on Linux."""

from __future__ import annotations

from onnxcomp.verification.environments.android.environment import Android

__all__ = ["Android"]
