"""Checkpoints: tensors in safetensors, the rest as JSON inside of it, replaced whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from onnxcomp.errors import OptionError, RequirementError
from onnxcomp.files import replaced_whole

__all__ = ["load_checkpoint", "save_checkpoint"]

_STATE = "onnxcomp"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        message = "checkpoints need safetensors: pip install 'onnxcomp[train]'"
        raise RequirementError(message) from error
    return safetensors


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: The file; its folder must exist.
        tensors: Any names.
        state: What JSON can hold.

    Raises:
        OutputError: It cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = _safetensors().torch.save(plain, {_STATE: json.dumps(state)})
    with replaced_whole(path) as [file]:
        file.write(data)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint.

    Raises:
        OptionError: The file is none.
    """
    library = _safetensors()
    try:
        with library.safe_open(str(path), framework="pt") as file:
            state = json.loads(file.metadata()[_STATE])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118 - no mapping
    except (OSError, KeyError, TypeError, ValueError, library.SafetensorError) as error:
        message = f"{path}: is not a checkpoint of a training run: {error}; delete it to begin anew"
        raise OptionError(message) from error
