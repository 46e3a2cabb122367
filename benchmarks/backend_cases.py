"""The models of ONNX's own backend test suite, with their inputs and outputs, and two runtimes to run them with."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcomp.weights import stored_bytes

__all__ = ["LEVELS", "Case", "difference", "load_cases", "run_model"]

KINDS = ("simple", "pytorch-converted", "pytorch-operator", "node")

LEVELS = ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL", "REFERENCE")
"""Ways to run a model: ONNX Runtime with and without its optimizations, and ONNX's reference evaluator."""

PACKED = {getattr(onnx.TensorProto, name) for name in ("INT4", "UINT4", "INT2", "UINT2", "FLOAT4E2M1")}
EXOTIC = {
    f"tensor({name.lower()})": getattr(onnx.TensorProto, name)
    for name in (
        *("BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"),
        *("INT4", "UINT4", "INT2", "UINT2"),
    )
}
"""Element types that ONNX Runtime does not exchange with numpy."""


@dataclass(frozen=True)
class Case:
    """One model with its inputs and the outputs that are expected of it (None: those of the original)."""

    name: str
    model: onnx.ModelProto
    data: tuple[tuple[list[Any], list[Any] | None], ...]
    rtol: float
    atol: float

    @property
    def inputs(self) -> list[str]:
        """The names of what is fed."""
        weights = {tensor.name for tensor in self.model.graph.initializer}
        return [info.name for info in self.model.graph.input if info.name not in weights]


# --- the cases --------------------------------------------------------------------------------------------------------


@cache
def load_cases() -> dict[str, Case]:
    """Every case of the installed onnx package, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        cases = [_case(kind, test) for kind in KINDS for test in load_model_tests(kind=kind)]
    cases.extend(_light_cases())
    return {case.name: case for case in cases}


def _case(kind: str, test: Any) -> Case:
    if test.model is not None:
        data = tuple(([_value(x) for x in inputs], [_value(y) for y in outputs]) for inputs, outputs in test.data_sets)
        return Case(f"{kind}/{test.name}", test.model, data, test.rtol, test.atol)
    folder = Path(test.model_dir)
    model = onnx.load(folder / "model.onnx")
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [info.type for info in model.graph.input if info.name not in initializers]
    outputs = [info.type for info in model.graph.output]
    sets = sorted(folder.glob("test_data_set_*"))
    data = tuple((_read(each, "input", inputs), _read(each, "output", outputs)) for each in sets)
    return Case(f"{kind}/{test.name}", model, data, test.rtol, test.atol)


def _value(item: Any) -> Any:
    if isinstance(item, onnx.TensorProto):
        return numpy_helper.to_array(item)
    return np.asarray(item) if isinstance(item, np.generic) else item


def _read(folder: Path, stem: str, types: list[onnx.TypeProto]) -> list[Any]:
    values: list[Any] = []
    for number, value_type in enumerate(types):
        path = folder / f"{stem}_{number}.pb"
        if not path.exists():
            break
        which = value_type.WhichOneof("value")
        if which == "sequence_type":
            sequence = onnx.SequenceProto.FromString(path.read_bytes())
            values.append(numpy_helper.to_list(sequence))
        elif which == "optional_type":
            values.append(numpy_helper.to_optional(onnx.OptionalProto.FromString(path.read_bytes())))
        else:
            values.append(numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes())))
    return values


def _light_cases() -> Iterator[Case]:
    """Well-known image classifiers with generated weights; what they give is compared with the original."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    for path in sorted(folder.glob("*.onnx")):
        model = onnx.load(path)
        initializers = {tensor.name for tensor in model.graph.initializer}
        rng = np.random.default_rng(0)
        inputs = [
            rng.normal(size=[dim.dim_value or 1 for dim in info.type.tensor_type.shape.dim]).astype(np.float32)
            for info in model.graph.input
            if info.name not in initializers
        ]
        yield Case(f"light/{path.stem}", model, ((inputs, None),), 1e-3, 1e-7)


# --- running one ------------------------------------------------------------------------------------------------------


def _session(model: onnx.ModelProto, level: str) -> Any:
    import onnxruntime  # see _run

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: list[Any]) -> list[Any]:
    """Run a session; element types that numpy has no name for go in and out as raw bytes."""
    import onnxruntime  # only in the processes that run models: it must not be there when they are forked

    feeds = {info.name: value for info, value in zip(session.get_inputs(), inputs, strict=False)}
    kinds = {info.name: EXOTIC.get(info.type) for info in (*session.get_inputs(), *session.get_outputs())}
    if not any(kinds.values()):
        return list(session.run(None, feeds))
    values = {}
    for name, value in feeds.items():
        kind = kinds[name] or helper.np_dtype_to_tensor_dtype(value.dtype)
        if kind in PACKED:
            raise NotImplementedError(kind)  # numpy cannot feed packed types: the case counts as not run
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value, kind)
    names = [info.name for info in session.get_outputs()]
    results = session.run_with_ort_values(names, values)
    return [_raw(result, kinds[name]) for name, result in zip(names, results, strict=True)]


def _raw(result: Any, kind: int | None) -> Any:
    if kind is None:
        return result.numpy()
    tensor = onnx.TensorProto(data_type=kind, dims=result.shape())
    tensor.raw_data = ctypes.string_at(result.data_ptr(), stored_bytes(tuple(result.shape()), kind))
    return numpy_helper.to_array(tensor)


def run_model(case: Case, model: onnx.ModelProto, level: str) -> list[list[Any]]:
    """The outputs of a model on the inputs of a case, by one of `LEVELS`. Raises what the runtime raises."""
    if level != "REFERENCE":
        session = _session(model, level)
        return [_run(session, inputs) for inputs, _ in case.data]
    from onnx.reference import ReferenceEvaluator

    names = case.inputs
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        evaluator: Any = ReferenceEvaluator(model)
        return [evaluator.run(None, dict(zip(names, inputs, strict=False))) for inputs, _ in case.data]


def difference(expected: Sequence[Any], got: Sequence[Any], case: Case) -> str:
    """Why outputs are not what is expected, or an empty string; as ONNX's own runner compares."""
    if len(expected) != len(got):
        return f"{len(got)} outputs, expected {len(expected)}"
    for number, (wanted, value) in enumerate(zip(expected, got, strict=True)):
        if isinstance(wanted, list | tuple):
            reason = "not a list" if not isinstance(value, list | tuple) else difference(wanted, value, case)
        elif wanted is None or value is None:
            reason = "" if wanted is value else "only one is empty"
        else:
            reason = _array_difference(np.asarray(wanted), np.asarray(value), case)
        if reason:
            return f"output {number}: {reason}"
    return ""


def _array_difference(wanted: np.ndarray[Any, Any], got: np.ndarray[Any, Any], case: Case) -> str:
    if wanted.shape != got.shape:
        return f"shape {got.shape}, expected {wanted.shape}"
    if wanted.dtype.kind in "OUS":
        return "" if wanted.astype(str).tolist() == got.astype(str).tolist() else "other strings"
    if wanted.dtype != got.dtype:
        return f"dtype {got.dtype}, expected {wanted.dtype}"
    if wanted.dtype.kind == "V":  # bfloat16, float8: numpy cannot compare them with a tolerance
        wanted, got = wanted.astype(np.float32), got.astype(np.float32)
    if np.allclose(got, wanted, rtol=case.rtol, atol=case.atol, equal_nan=True):
        return ""
    with np.errstate(invalid="ignore"):  # infinities may be among them
        return f"largest difference {np.max(np.abs(got.astype('f8') - wanted.astype('f8')))}"
