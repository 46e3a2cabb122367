"""What must hold of a backend test model after it is loaded and saved, rewritten by a pass, or optimized."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.backend_cases import LEVELS, Case, difference, run_model
from onnxcomp import optimize
from onnxcomp.data import Dataset, generate, input_specs, open_data
from onnxcomp.errors import OnnxcompError
from onnxcomp.model import Model
from onnxcomp.passes import Context, Pass, find_pass, registered_passes
from onnxcomp.runtime import Runtime
from onnxcomp.stages import Stage

__all__ = ["LOAD_AND_SAVE", "OPTIMIZE", "Expected", "Outcome", "Tools", "check", "expect", "judge", "judged"]

LOAD_AND_SAVE, OPTIMIZE = "load and save", "optimize"

SAMPLES = 4
"""How often the inputs of a test case are repeated for passes that need data."""

TRAINING = {"epochs": 1.0, "batch_size": 2, "held_out": 0.5}
"""Options of the cheapest training that still takes steps."""

ORDER = (
    *("simplify", "fit-target", "low-rank", "prune-channels", "prune", "cluster", "quantize-weights", "quantize"),
    *("quantize-dynamic", "float16", "pack", "unpack"),
)
"""The stages of `optimize`: every pass that does not train, before those that it must not follow."""

INVALID = "not valid for onnx.checker any more: "
VERDICTS = {"kept", "unchanged", "dropped", "skipped", "forced"}


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        name: The case.
        what: What was done with it: "load and save", the name of a pass or another tool, or "optimize".
        status: "ok", "refused" (an `OnnxcompError` says why), or what must not be: "crash" (any other exception, the
            end of the process, too much time), "invalid" (for onnx.checker) or "wrong" (outputs, or anything else).
        why: Of what is not "ok".
        ran: Whether outputs could be compared: some runtime gives what is expected of the original.
    """

    name: str
    what: str
    status: str
    why: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    changes: int = 0
    ran: bool = True
    seconds: float = 0.0

    @property
    def broken(self) -> bool:
        """Whether it is what must not be."""
        return self.status not in {"ok", "refused"}


@dataclass(frozen=True)
class Expected:
    """A case, what each runtime that runs it right gives for it, and whether it is valid."""

    case: Case
    outputs: dict[str, list[list[Any]]]
    valid: bool
    why: str
    """Why no runtime runs it, if none does."""


@dataclass
class Tools:
    """What is made once for many cases: a runtime, and a folder."""

    folder: Path
    stack: ExitStack = field(default_factory=ExitStack)
    _runtime: Runtime | None = None

    @property
    def runtime(self) -> Runtime:
        """ONNX Runtime in a process of its own, started when it is first needed."""
        if self._runtime is None:
            self._runtime = self.stack.enter_context(Runtime())
        return self._runtime


def expect(case: Case) -> Expected:
    """Run the original."""
    outputs: dict[str, list[list[Any]]] = {}
    why = ""
    for level in LEVELS:
        if level == "REFERENCE" and outputs:
            break  # slow, and not needed
        try:
            results = run_model(case, case.model, level)
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises, it does not run this model
            why = why or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
            continue
        wanted = [given if given is not None else got for (_, given), got in zip(case.data, results, strict=True)]
        reason = "; ".join(filter(None, (difference(w, g, case) for w, g in zip(wanted, results, strict=True))))
        if reason:
            why = why or reason
        else:
            outputs[level] = wanted
    return Expected(case, outputs, not invalid(case.model), "" if outputs else why)


def check(expected: Expected, what: str, tools: Tools) -> Outcome:
    """Do one thing with a case, and judge what comes out."""
    started = time.monotonic()
    act: Callable[[Expected, Tools], Outcome] = {LOAD_AND_SAVE: _load_and_save, OPTIMIZE: _optimize}.get(
        what, lambda each, those: _apply(each, what, those)
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numpy, on values that no real model has
            outcome = act(expected, tools)
    except OnnxcompError as error:
        outcome = Outcome(expected.case.name, what, "refused", str(error))
    except Exception as error:  # noqa: BLE001 - any exception is what this looks for
        outcome = Outcome(expected.case.name, what, "crash", f"{type(error).__name__}: {error}")
    if outcome.status == "refused" and "\n" in outcome.why:
        outcome = replace(outcome, status="wrong", why=f"an error of several lines: {outcome.why!r}")
    return replace(outcome, ran=bool(expected.outputs), seconds=time.monotonic() - started)


# --- what is done with it ---------------------------------------------------------------------------------------------


def judged(expected: Expected, what: str, reason: str, files: tuple[Path, Path], changes: int = 0) -> Outcome:
    """The outcome where a model came out; an empty reason means that it is right."""
    before, after = (path.stat().st_size for path in files)
    status = "invalid" if reason.startswith(INVALID) else "wrong" if reason else "ok"
    return Outcome(expected.case.name, what, status, reason, before, after, changes)


def _load_and_save(expected: Expected, tools: Tools) -> Outcome:
    source, saved = (tools.folder / f"{name}.onnx" for name in ("source", "saved"))
    onnx.save(expected.case.model, source)
    model = Model.load(source)
    model.save(saved)
    reason = judge(expected, onnx.load(saved), lossless=True)
    if not reason and Model.load(saved).digest != model.digest:
        reason = "what was saved loads as another model"
    return judged(expected, LOAD_AND_SAVE, reason, (source, saved))


def _apply(expected: Expected, name: str, tools: Tools) -> Outcome:
    """Apply a pass in its default form; those that train in a cheap one."""
    step = _cheap(find_pass(name))
    source, saved, after = (tools.folder / f"{stem}.onnx" for stem in ("source", "saved", "after"))
    onnx.save(expected.case.model, source)
    model = Model.load(source)
    model.save(saved)
    unchanged = model.digest
    context = _context(expected.case, step, tools)
    changes = step.rewrite(model, context)
    if not changes.count:
        reason = "" if model.digest == unchanged else "changed without saying so"
        return judged(expected, name, reason, (source, saved))
    model.save(after)
    reason = judge(expected, onnx.load(after), lossless=step.lossless)
    if not reason and model.digest == unchanged:
        reason = f"changed nothing, but says {changes.changed[0]}"
    if not reason and step.lossless and not step.grows and after.stat().st_size > source.stat().st_size:
        reason = f"bigger: {source.stat().st_size} -> {after.stat().st_size} bytes"
    if not reason and step.idempotent:
        again = step.rewrite(Model.load(after), context)
        reason = f"a second {name} changes more: {again.changed[0]}" if again.count else ""
    return judged(expected, name, reason, (source, after), changes.count)


def _cheap(cls: type[Pass]) -> Pass:
    return cls(**TRAINING) if "torch" in cls.requires else cls()


def _context(case: Case, step: Pass, tools: Tools) -> Context:
    data = _samples(case, labels="labels" in step.requires) if step.requires & {"data", "labels"} else None
    return Context(data=data, runtime=tools.runtime, workdir=tools.folder)


def _feeds(case: Case) -> list[dict[str, Any]]:
    sets = [dict(zip(case.inputs, inputs, strict=False)) for inputs, _ in case.data]
    return [each for each in sets for _ in range(SAMPLES)]


def _samples(case: Case, *, labels: bool = False) -> Dataset:
    """The inputs of the case, repeated, or generated ones where they cannot be samples.

    Raises:
        OnnxcompError: The model has inputs that arrays cannot feed, or none.
    """
    feeds: Any = _feeds(case)
    if labels:
        feeds = [{**feed, "label": np.int64(0)} for feed in feeds]
    try:
        return open_data(feeds, input_specs(case.model))
    except OnnxcompError:
        return generate(case.model, count=SAMPLES)


def _optimize(expected: Expected, tools: Tools) -> Outcome:
    """The whole: each pass is a stage, and the ledger has a verdict and a reason for each."""
    case = expected.case
    source, after = (tools.folder / f"{stem}.onnx" for stem in ("source", "after"))
    onnx.save(case.model, source)
    known = registered_passes()
    stages = [Stage((known[name](),)) for name in ORDER]
    try:
        result = optimize(source, data=_feeds(case), passes=stages, timing=False, resume=False)
    except OnnxcompError:  # generated inputs are another chance
        free = [stage for stage in stages if not stage.passes[0].requires]
        result = optimize(source, passes=free, timing=False, resume=False)
        stages = free
    result.save(after)
    entries = result.report.stages
    reason = judge(expected, onnx.load(after), lossless=False)
    if [entry.name for entry in entries] != [stage.name for stage in stages]:
        reason = reason or "the ledger has other stages than the recipe"
    for entry in entries:
        if entry.verdict not in VERDICTS or not entry.reason:
            reason = reason or f"{entry.name}: the ledger has no verdict or no reason"
        if "internal error" in entry.reason:
            reason = reason or f"{entry.name}: {entry.reason}"
    if not reason and not result.report.budget_met:
        reason = "the result is over the budget"
    return judged(expected, OPTIMIZE, reason, (source, after), sum(entry.verdict == "kept" for entry in entries))


# --- the verdict ------------------------------------------------------------------------------------------------------


def judge(expected: Expected, model: onnx.ModelProto, *, lossless: bool, ours: bool = True) -> str:
    """Why a rewritten model is wrong, or an empty string.

    Args:
        expected: What it must be like.
        model: What came of it.
        lossless: Whether its outputs must be the same, within the tolerance of the case; else their types must be.
        ours: Whether all that the model declares of inputs and outputs must stay; other tools need keep their names.
    """
    case = expected.case
    if expected.valid and (reason := invalid(model)):
        return f"{INVALID}{reason}"
    for name in ("input", "output"):
        old, new = (_interface(each, name) for each in (case.model, model))
        if (old != new) if ours else [info.name for info in old] != [info.name for info in new]:
            return f"the graph's {name}s changed"
    for level, wanted in expected.outputs.items():
        try:
            results = _run(case, model, level)
        except Exception as error:  # noqa: BLE001 - any refusal is a break
            return f"{level}: {type(error).__name__}: {error}"
        for outputs, got in zip(wanted, results, strict=True):
            if reason := difference(outputs, got, case) if lossless else _other_kinds(outputs, got):
                return f"{level}: {reason}"
    return ""


def _run(case: Case, model: onnx.ModelProto, level: str) -> list[list[Any]]:
    """Run a model; the reference evaluator has not every version of every operator that ONNX Runtime has."""
    try:
        return run_model(case, model, level)
    except RuntimeError as error:
        if level == "REFERENCE" and "No implementation" in str(error):
            return run_model(case, model, "ORT_DISABLE_ALL")
        raise


def _other_kinds(wanted: list[Any], got: list[Any]) -> str:
    """Why outputs cannot stand for others: their number, types or numbers of axes."""
    kinds = [[_kind(value) for value in values] for values in (wanted, got)]
    return "" if kinds[0] == kinds[1] else f"outputs of other kinds: {kinds[1]}, expected {kinds[0]}"


def _kind(value: Any) -> str:
    if value is None or isinstance(value, list | tuple):
        return type(value).__name__
    array = np.asarray(value)
    return "strings" if array.dtype.kind in "OUS" else f"{array.dtype} of {array.ndim} axes"


def invalid(model: onnx.ModelProto) -> str:
    """What onnx.checker's full check says against a model, if anything."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


def _interface(model: onnx.ModelProto, name: str) -> list[onnx.ValueInfoProto]:
    """Inputs or outputs; before IR 4 initializers are listed as inputs, and are not meant here."""
    initializers = {tensor.name for tensor in model.graph.initializer} if model.ir_version < 4 else set()
    return [info for info in getattr(model.graph, name) if info.name not in initializers]
