"""Whether an exported model is what its module computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcomp.errors import ModelError, RuntimeFailure
from onnxcomp.exporting.inputs import Axes, Examples
from onnxcomp.exporting.modules import run
from onnxcomp.exporting.reasons import reason, short
from onnxcomp.runtime.client import Runtime
from onnxcomp.runtime.results import TensorInfo

Array = np.ndarray[Any, Any]

MAX_ERROR = 1e-3
"""What an output may be off by, relative to its largest value: float32 sums in another order stay 100 times below."""

MAX_ERROR_HALF = 1e-2
"""The same for a float16 output: ten roundings."""

RANDOM_BATCHES = 2
"""Of the size of the example, beside it."""

OTHER_SIZES = 2
"""Of each dynamic axis."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was checked.

    Attributes:
        path: The file.
        opset: The version of its operator set.
        inputs: As ONNX Runtime sees them.
        outputs: The same.
        batches: How many batches torch and ONNX Runtime were compared on.
        sizes: The sizes of the dynamic axes in them, by the axis' name; each with the example's own first.
        errors: The largest relative error of each output.
    """

    path: Path
    opset: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    batches: int
    sizes: Mapping[str, tuple[int, ...]]
    errors: Mapping[str, float]

    @property
    def error(self) -> float:
        """The largest relative error."""
        return max(self.errors.values(), default=0.0)


def check_repeatable(module: Any, examples: Examples) -> None:
    """Refuse a module that gives other outputs for the same inputs: nothing could be compared with it."""
    one, other = run(module, examples), run(module, examples)
    for name, value in one.items():
        error = relative_error(value, other.get(name))
        if error > MAX_ERROR:
            message = f"the output {name!r} of the module is random: two runs on the same inputs differ by {error:.1e}"
            raise ModelError(message)


def verified(module: Any, examples: Examples, axes: Axes, path: Path, target: Path, opset: int, seed: int) -> Exported:
    """Compare torch with ONNX Runtime on the example and on random inputs, also of other sizes.

    Raises:
        ModelError: An output differs.
        RuntimeFailure: ONNX Runtime does not run the model.
    """
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        message = f"the exported model is not valid: {reason(error)}"
        raise ModelError(message) from error
    with Runtime() as runtime:
        try:
            info = runtime.check(path)
        except RuntimeFailure as error:
            raise _not_run(error, path, "") from error
        _check_dynamic(info.inputs, axes)
        given = {tensor.name for tensor in info.inputs}
        names = [tensor.name for tensor in info.outputs]
        errors = dict.fromkeys(names, 0.0)
        sizes: dict[str, list[int]] = {name: [size] for name, size in examples.sizes(axes).items()}
        count = 0
        for batch, wanted in _batches(module, examples, axes, sizes, seed):
            count += 1
            feed = {name: value for name, value in batch.arrays().items() if name in given}
            try:
                [got] = runtime.run(path, [feed])
            except RuntimeFailure as error:
                raise _not_run(error, path, f" on inputs of {batch}") from error
            if len(got) != len(wanted):
                message = f"the module gives {len(wanted)} tensors, and the exported model {len(got)}"
                raise ModelError(message)
            for name, one, other in zip(names, wanted, got, strict=True):
                off = relative_error(one, other)
                limit = MAX_ERROR_HALF if one.dtype == np.float16 else MAX_ERROR
                if off > limit:
                    message = (
                        f"the output {name!r} of the exported model differs from the module's by {off:.1e} of its"
                        f" largest value, more than {limit:g}, on inputs of {batch}; nothing was written"
                    )
                    raise ModelError(message)
                errors[name] = max(errors[name], off)
    measured = {name: tuple(found) for name, found in sizes.items()}
    return Exported(target, opset, info.inputs, info.outputs, count, measured, errors)


def _batches(
    module: Any, examples: Examples, axes: Axes, sizes: dict[str, list[int]], seed: int
) -> Iterator[tuple[Examples, list[Array]]]:
    """Inputs to compare on, with what torch gives for them; notes the sizes in `sizes`.

    Raises:
        ModelError: torch takes no other size than the example's of an axis that is to be dynamic.
    """
    for batch in (examples, *(examples.drawn(seed + number) for number in range(RANDOM_BATCHES))):
        yield batch, list(run(module, batch).values())
    for dim, found in sizes.items():
        for size in examples.other_sizes(dim, found[0]):
            batch = examples.resized(axes, dim, size, seed)
            try:
                wanted = list(run(module, batch).values())
            except ModelError:
                continue  # torch takes not every size either
            found.append(size)
            yield batch, wanted
            if len(found) > OTHER_SIZES:
                break
        if len(found) == 1:
            message = f"the module takes no other size than {found[0]} of the axis {dim!r}; it cannot be dynamic"
            raise ModelError(message)


def _check_dynamic(inputs: tuple[TensorInfo, ...], axes: Axes) -> None:
    """Refuse a model in which an axis that was to be dynamic has come out fixed."""
    for tensor in inputs:
        for axis, dim in axes.get(tensor.name, {}).items():
            if axis < len(tensor.shape) and isinstance(size := tensor.shape[axis], int):
                message = (
                    f"axis {axis} ({dim}) of the input {tensor.name!r} came out fixed to {size}: the module depends on"
                    " that size; give all inputs of that axis the same size, or make it static"
                )
                raise ModelError(message)


def _not_run(error: RuntimeFailure, path: Path, where: str) -> RuntimeFailure:
    told = str(error).removeprefix(f"{path}: ").replace(str(path), "the model")
    return type(error)(f"ONNX Runtime does not run the exported model{where}: {short(told)}")


def relative_error(wanted: Array, got: Any) -> float:
    """The largest difference over the largest value; for whole numbers the share of those that differ."""
    if not isinstance(got, np.ndarray) or got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    if not wanted.size:
        return 0.0
    if wanted.dtype.kind not in "fc":
        return float(np.mean(wanted != got))
    odd = ~np.isfinite(wanted)
    if not np.array_equal(wanted[odd], got[odd], equal_nan=True):
        return float("inf")
    difference = np.abs(wanted[~odd].astype(np.float64) - got[~odd]).max(initial=0.0)
    largest = np.abs(wanted[~odd].astype(np.float64)).max(initial=0.0)
    if np.isnan(difference):
        return float("inf")
    return float(difference / largest) if largest else float("inf") if difference else 0.0
