"""A torch module: found, given its weights, run."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data.user_code import is_reference, load_function
from onnxcomp.errors import ModelError, OptionError, RequirementError
from onnxcomp.exporting.inputs import DTYPES, Examples
from onnxcomp.exporting.reasons import reason, short

Array = np.ndarray[Any, Any]
Progress = Callable[[str], None]


def _is_installed(name: str) -> bool:
    return find_spec(name) is not None


def import_torch() -> Any:
    """Import torch.

    Raises:
        RequirementError: It or the exporter's other half is missing.
    """
    missing = [name for name in ("torch", "onnxscript") if not _is_installed(name)]
    if missing:
        message = f"exporting needs {' and '.join(missing)}: pip install 'onnxcomp[train]'"
        raise RequirementError(message)
    import torch

    return torch


def module_of(source: Any, allow_code: bool, tell: Progress) -> tuple[Any, Any]:
    """The module, and the example inputs that its factory gives."""
    from torch import nn

    if isinstance(source, nn.Module):
        return source, None
    if not isinstance(source, str) or not is_reference(source):
        message = f"expected module:factory or a torch.nn.Module, got {source!r}"
        raise OptionError(message)
    factory = load_function(source, allow_code)
    tell(f"making the module by {source}")
    try:
        made = factory()
    except (Exception, SystemExit) as error:  # a user's function may raise anything, and scripts like to exit
        message = f"{source!r} failed: {reason(error)}"
        raise OptionError(message) from error
    pair = made if isinstance(made, tuple) else (made, None)
    if len(pair) != 2 or not isinstance(pair[0], nn.Module):
        kind = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
        message = f"{source!r} must give a torch.nn.Module, or a pair of one and its example inputs; it gave {kind}"
        raise OptionError(message)
    return pair


def files_of(module: Any) -> tuple[Path, ...]:
    """The source file of a module's class, where it has one."""
    found = getattr(sys.modules.get(type(module).__module__), "__file__", None)
    return (Path(found),) if found else ()


def load_weights(module: Any, path: Path) -> None:
    """Put a file's weights into a module.

    Raises:
        ModelError: The file is missing or no such file, or its weights are not those of the module.
        RequirementError: safetensors is missing.
    """
    if not path.is_file():
        message = f"{path}: there is no such file of weights"
        raise ModelError(message)
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    inner = state.get("state_dict") if isinstance(state, Mapping) else None
    state = inner if isinstance(inner, Mapping) else state
    if not isinstance(state, Mapping):
        message = f"{path}: expected a state_dict, got a {type(state).__name__}"
        raise ModelError(message)
    try:
        module.load_state_dict(state)
    except Exception as error:  # torch raises RuntimeError of many lines; a state of other things, anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = f"{path}: the weights do not fit the module: {short(' '.join(lines[1:] or lines))}"
        raise ModelError(message) from error


def _read_safetensors(path: Path) -> Any:
    if not _is_installed("safetensors"):
        message = f"{path}: reading it needs safetensors: pip install safetensors"
        raise RequirementError(message)
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # its own class, derived from Exception alone
        message = f"{path}: cannot be read ({reason(error)})"
        raise ModelError(message) from error


def _read_torch(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling what is no pickle may raise anything
        message = f"{path}: not a file of weights that torch reads without running code ({type(error).__name__})"
        raise ModelError(message) from error


@contextlib.contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Evaluation mode for a while; each part then has the mode that it had."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def run(module: Any, examples: Examples) -> dict[str, Array]:
    """The module's outputs, by the names that they get."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fresh = examples.copied()  # a module may write to its inputs
            result = module(*fresh.args, **fresh.kwargs)
    except Exception as error:  # a user's module may raise anything
        message = f"the module fails on inputs of {examples}: {reason(error)}"
        raise ModelError(message) from error
    outputs = dict(_flat(result, ""))
    if not outputs:
        message = "the module gives no tensor"
        raise ModelError(message)
    return outputs


def _flat(value: Any, name: str) -> Iterator[tuple[str, Array]]:
    """Tensors in tuples, lists and mappings, in the exporter's order, with names."""
    import torch

    if isinstance(value, torch.Tensor):
        if (kind := str(value.dtype).removeprefix("torch.")) not in DTYPES:
            message = f"the module gives {kind} as {name or 'output'!r}; expected one of {', '.join(DTYPES)}"
            raise ModelError(message)
        yield name or "output", value.detach().cpu().numpy().copy()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}_{key}" if name else str(key))
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from _flat(item, f"{name or 'output'}_{number}")
    elif value is not None:
        message = f"the module gives a {type(value).__name__} as {name or 'output'!r}; expected tensors only"
        raise ModelError(message)
