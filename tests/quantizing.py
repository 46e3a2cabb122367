"""Runs `quantize` on a model and looks at the kernels that come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcomp.data import input_specs, open_data
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context
from onnxcomp.relative_error import relative_error
from onnxcomp.runtime import Runtime, explain
from onnxcomp.targets import find_target
from onnxcomp_passes.quantize import Quantize

Array = np.ndarray[Any, Any]

SAMPLES = 16
BORDER = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class Quantized:
    """What `quantize` made of a model.

    Attributes:
        model: The result.
        changes: What it said.
        kernels: Operators of ONNX Runtime's optimized graph -> how many.
        missed: Quantized layers without an int8 kernel, and the rule that they miss.
        errors: Relative error of the first output, with ONNX Runtime's optimizations on and off.
    """

    model: Model
    changes: Changes
    kernels: Mapping[str, int]
    missed: list[tuple[str, str]]
    errors: tuple[float, float]

    def count(self, *ops: str) -> tuple[int, ...]:
        """How many kernels there are of each of these operators."""
        return tuple(self.kernels.get(op, 0) for op in ops)


def random_samples(model: Model, *, samples: int = SAMPLES) -> dict[str, Array]:
    """Samples for the float inputs of a model; unknown axes get 4."""
    rng = np.random.default_rng(1)
    return {
        spec.name: rng.standard_normal([samples, *(d if isinstance(d, int) else 4 for d in spec.shape[1:])]).astype(
            np.float32
        )
        for spec in input_specs(model.proto())
    }


def quantize(
    proto: onnx.ModelProto,
    runtime: Runtime,
    folder: Path,
    *,
    target: str = "x86-vnni",
    feed: Mapping[str, Array] | None = None,
    exclude: tuple[str, ...] = (),
    **options: Any,
) -> Quantized:
    """Quantize every layer that can be, on random samples, and run the result."""
    model = Model.load(proto)
    samples = dict(feed) if feed is not None else random_samples(model)
    data = open_data(samples, input_specs(model.proto()))
    context = Context(data=data, runtime=runtime, workdir=folder, target=find_target(target), exclude=exclude)
    result = model.fork()
    changes = Quantize(choose=False, **options).rewrite(result, context)
    paths = [folder / "float.onnx", folder / "int8.onnx"]
    for path, one in zip(paths, (model, result), strict=True):
        one.save(path)
    onnx.checker.check_model(result.to_proto(), full_check=True)
    census = runtime.census(paths[1])
    missed = [(miss.node, miss.rule) for miss in explain(result.proto(), census).missed]
    feeds = [samples]  # those that the ranges come from: nothing is cut, and what is left is rounding
    wanted = next(iter(runtime.run(paths[0], feeds)))[0]
    errors = tuple(
        relative_error([(wanted, next(iter(runtime.run(paths[1], feeds, optimize=optimize)))[0])])
        for optimize in (True, False)
    )
    return Quantized(result, changes, census.counts(), missed, (errors[0], errors[1]))
