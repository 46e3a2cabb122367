"""Does anything break on the models of ONNX's own backend test suite? Every operator, every opset, every corner.

Each model that ONNX Runtime runs right is loaded and saved, then simplified. The result must be checker-valid, not
bigger, unchanged by a second simplify, and give the expected outputs within the tolerance of its own test case, with
the optimizations of ONNX Runtime on and off.

    python -m benchmarks.backend_models                     # all of them: some minutes
    python -m benchmarks.backend_models --sample 100 --seed 3
    python -m benchmarks.backend_models --only test_loop13_seq
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcomp.model import Model
from onnxcomp.passes import Context
from onnxcomp.weights import stored_bytes
from onnxcomp_passes.simplify import Simplify

__all__ = ["Case", "Outcome", "check_cases", "load_cases", "run_all"]

KINDS = ("simple", "pytorch-converted", "pytorch-operator", "node")
CHUNK = 60
CASE_SECONDS = 120.0

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


@dataclass(frozen=True)
class Outcome:
    """What became of a case: "ok", "skipped" (ONNX Runtime does not run the original right) or "broken"."""

    name: str
    status: str
    why: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    changes: int = 0


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


def check_case(case: Case, folder: Path) -> Outcome:
    """Load and save, then simplify one case, and compare."""
    expected: dict[str, list[list[Any]]] = {}
    why = ""
    for level in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL"):
        try:
            session = _session(case.model, level)
            results = [_run(session, inputs) for inputs, _ in case.data]
        except Exception as error:  # noqa: BLE001 - whatever ONNX Runtime raises, it does not run this model
            why = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        wanted = [outputs if outputs is not None else got for (_, outputs), got in zip(case.data, results, strict=True)]
        why = "; ".join(filter(None, (difference(w, g, case) for w, g in zip(wanted, results, strict=True))))
        if not why:
            expected[level] = wanted
    if not expected:
        return Outcome(case.name, "skipped", why)
    return _check_rewrites(case, expected, folder)


def _check_rewrites(case: Case, expected: dict[str, list[list[Any]]], folder: Path) -> Outcome:
    source, saved, simple = (folder / f"{name}.onnx" for name in ("source", "saved", "simple"))
    onnx.save(case.model, source)
    before, count = source.stat().st_size, 0
    try:
        model = Model.load(source)
        model.save(saved)
        reason = _judge(case, expected, onnx.load(saved))
        if reason:
            return Outcome(case.name, "broken", f"load and save: {reason}")
        count = Simplify().rewrite(model, Context()).count
        model.save(simple)
        after = simple.stat().st_size
        reason = _judge(case, expected, onnx.load(simple))
        again = Simplify().rewrite(Model.load(simple), Context())
    except Exception as error:  # noqa: BLE001 - any exception is what this looks for
        return Outcome(case.name, "broken", f"{type(error).__name__}: {error}", before)
    if not reason and after > before:
        reason = f"bigger: {before} -> {after} bytes"
    if not reason and again.count:
        reason = f"a second simplify changes more: {again.changed[0]}"
    if not reason and count == 0 and onnx.load(simple) != onnx.load(saved):
        reason = "changed without saying so"
    return Outcome(case.name, "broken" if reason else "ok", reason, before, after, count)


def _judge(case: Case, expected: dict[str, list[list[Any]]], model: onnx.ModelProto) -> str:
    """Why a rewritten model is wrong, or an empty string."""
    if _is_valid(case.model) and not _is_valid(model):
        return "not valid for onnx.checker any more"
    for name in ("input", "output"):
        old, new = (_interface(each, name) for each in (case.model, model))
        if old != new:
            return f"the graph's {name}s changed"
    for level, wanted in expected.items():
        try:
            session = _session(model, level)
            results = [_run(session, inputs) for inputs, _ in case.data]
        except Exception as error:  # noqa: BLE001 - any refusal is a break
            return f"{level}: {type(error).__name__}: {error}"
        for outputs, got in zip(wanted, results, strict=True):
            if reason := difference(outputs, got, case):
                return f"{level}: {reason}"
    return ""


def _is_valid(model: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return False
    return True


def _interface(model: onnx.ModelProto, name: str) -> list[onnx.ValueInfoProto]:
    """Inputs or outputs; before IR 4 initializers are listed as inputs, and are not meant here."""
    initializers = {tensor.name for tensor in model.graph.initializer} if model.ir_version < 4 else set()
    return [info for info in getattr(model.graph, name) if info.name not in initializers]


# --- running many -----------------------------------------------------------------------------------------------------


def _work(names: list[str], pipe: Connection) -> None:
    cases = load_cases()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            pipe.send(name)
            pipe.send(check_case(cases[name], Path(folder)))
    pipe.send(None)


def _run_chunk(names: list[str]) -> list[Outcome]:
    """Run some cases in a process of their own, again without the one that killed it."""
    outcomes: list[Outcome] = []
    left = list(names)
    context = multiprocessing.get_context("fork")  # the parent has the cases loaded, and no ONNX Runtime
    while left:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(left, sender), daemon=False)
        process.start()
        sender.close()
        running = left[0]
        try:
            while (message := _receive(receiver)) is not None:
                if isinstance(message, str):
                    running = message
                else:
                    outcomes.append(message)
                    left.remove(message.name)
            left = []
        except (EOFError, TimeoutError) as error:
            process.kill()
            why = "took too long" if isinstance(error, TimeoutError) else "the process died"
            outcomes.append(Outcome(running, "broken", why))
            left.remove(running)
        process.join()
    return outcomes


def _receive(receiver: Connection) -> Any:
    if not receiver.poll(CASE_SECONDS):
        raise TimeoutError
    return receiver.recv()


def check_cases(names: Iterable[str], jobs: int = 2) -> list[Outcome]:
    """Check cases, some at a time, each chunk in a process of its own."""
    load_cases()
    names = list(names)
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    with ThreadPoolExecutor(jobs) as pool:
        return [outcome for outcomes in pool.map(_run_chunk, chunks) for outcome in outcomes]


def run_all(sample: int | None = None, seed: int = 0, only: str = "", jobs: int = 2) -> list[Outcome]:
    """Check all cases, a seeded sample of them, or those whose name contains `only`."""
    names = sorted(name for name in load_cases() if only in name)
    random.Random(seed).shuffle(names)
    return check_cases(names[:sample], jobs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="how many cases, drawn by --seed; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--skipped", action="store_true", help="list also what ONNX Runtime itself does not run right")
    arguments = parser.parse_args()
    started = time.monotonic()
    outcomes = run_all(arguments.sample, arguments.seed, arguments.only, arguments.jobs)
    for outcome in sorted(outcomes, key=lambda each: each.name):
        if outcome.status == "broken" or (arguments.skipped and outcome.status == "skipped"):
            print(f"{outcome.status:8} {outcome.name:64} {outcome.why}")
    table: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        table.setdefault(outcome.name.split("/")[0], Counter())[outcome.status] += 1
    print(f"\n{'kind':20} {'ok':>6} {'broken':>7} {'not run by ONNX Runtime':>24}")
    for kind, counts in (*sorted(table.items()), ("all", sum(table.values(), Counter()))):
        print(f"{kind:20} {counts['ok']:6} {counts['broken']:7} {counts['skipped']:24}")
    run = [outcome for outcome in outcomes if outcome.status == "ok"]
    before, after = (sum(getattr(each, name) for each in run) for name in ("bytes_before", "bytes_after"))
    changed = sum(each.changes > 0 for each in run)
    print(f"\n{changed} of {len(run)} simplified, {before:,} -> {after:,} bytes, {time.monotonic() - started:.0f} s")
    return 1 if any(outcome.status == "broken" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
