"""What a device needs of a model, in one folder."""

from __future__ import annotations

from onnxcomp.deployment.deploying import Package, deploy

__all__ = ["Package", "deploy"]
