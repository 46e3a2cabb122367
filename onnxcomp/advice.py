"""Which technique suits a model, by rules over its facts. Nothing is run: every figure here is an estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onnxcomp.analysis import WeightRow
from onnxcomp.facts import ModelFacts, model_facts
from onnxcomp.model import Model
from onnxcomp.passes import registered_passes
from onnxcomp.report.text import bytes_text, count_text, percent

__all__ = ["Advice", "advise"]

FEW_MACS = 200_000
"""Below this a run is over in some microseconds, most of them spent around the kernels."""

MUCH = 0.5
"""A share that decides."""

BIG_MATRIX = 256
"""A rank-reduced matrix pays from about this many rows and columns."""

FLOATS = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class Advice:
    """One technique and what it would do for a model.

    Attributes:
        technique: What to do; the name of a pass where there is one.
        reason: What in the model speaks for or against it.
        estimate: What to expect; an estimate, as it says itself.
        available: Whether a pass of this name is installed.
    """

    technique: str
    reason: str
    estimate: str
    available: bool


def advise(model: Model | ModelFacts) -> list[Advice]:
    """Say which techniques suit a model, the most useful first.

    Args:
        model: A model, or what `onnxcomp.inspect` said of it.
    """
    facts = model if isinstance(model, ModelFacts) else model_facts(model)
    known = registered_passes()
    return [
        Advice(technique, reason, f"estimated: {estimate}", technique in known)
        for rule in _RULES
        for technique, reason, estimate in rule(facts)
    ]


Told = Iterator[tuple[str, str, str]]


def _simplify(facts: ModelFacts) -> Told:
    foldable = {
        op: facts.operators[op] for op in ("Constant", "Identity", "BatchNormalization") if op in facts.operators
    }
    if foldable:
        listed = ", ".join(f"{count} {op}" for op, count in foldable.items())
        yield "simplify", f"the graph holds {listed}", "the same results from fewer nodes"


def _store(facts: ModelFacts) -> Told:
    storable = sum(row.bytes for row in facts.weights if row.dtype == "float32" and row.elements >= 1024)
    if not facts.size_bytes or storable < 0.1 * facts.size_bytes:
        return
    ratio = facts.size_bytes / (facts.size_bytes - 0.74 * storable)
    reason = f"{bytes_text(storable)} of {bytes_text(facts.size_bytes)} are float32 weights"
    yield "quantize-weights", reason, f"{ratio:.1f} times smaller at the same speed; needs no data"


def _compute(facts: ModelFacts) -> Told:
    if facts.quantized:
        yield "quantize", "it computes in quantized values already", "nothing to gain"
        return
    by_node = {row.node: row for row in facts.weights if len(row.shape) > 1}
    dense = sum(macs for node, macs in facts.macs.items() if node in by_node and not _depthwise(by_node[node]))
    deep = sum(macs for node, macs in facts.macs.items() if node in by_node and _depthwise(by_node[node]))
    total = facts.total_macs
    if not total:
        return
    if total < FEW_MACS:
        yield "quantize", f"one run is only {count_text(total)} MACs", "little or no gain in speed"
    elif dense >= MUCH * total:
        reason = f"{percent(dense / total)} of {count_text(total)} MACs are in Conv, Gemm and MatMul with weights"
        yield "quantize", f"{reason}; needs data to calibrate", "1.2 to 2.5 times faster, 3 to 4 times smaller"
    elif deep >= MUCH * total:
        reason = f"{percent(deep / total)} of {count_text(total)} MACs are in depthwise convolutions"
        yield "quantize", reason, "little gain in speed: their int8 kernels are hardly faster"
    else:
        reason = f"only {percent((dense + deep) / total)} of {count_text(total)} MACs work on weights"
        yield "quantize", reason, "little gain in speed"


def _depthwise(row: WeightRow) -> bool:
    return row.op.endswith("Conv") and len(row.shape) > 2 and row.shape[1] == 1 and row.shape[0] > 1


def _rank(facts: ModelFacts) -> Told:
    big = [row for row in facts.weights if row.op in {"MatMul", "Gemm"} and _is_big(row)]
    elements = sum(row.elements for row in big)
    if big and elements >= 0.2 * facts.parameters:
        reason = f"{len(big)} matrices of {BIG_MATRIX} and more a side hold {percent(elements / facts.parameters)}"
        saved = facts.parameters / (facts.parameters - elements / 2)
        yield (
            "low-rank",
            f"{reason} of the parameters",
            f"{saved:.1f} times fewer parameters at half of the rank, where their spectra allow it",
        )


def _is_big(row: WeightRow) -> bool:
    return len(row.shape) == 2 and min(row.shape) >= BIG_MATRIX and row.dtype in FLOATS


def _tables(facts: ModelFacts) -> Told:
    tables = [row for row in facts.weights if row.op == "Gather" and len(row.shape) == 2 and row.dtype in FLOATS]
    held = sum(row.bytes for row in tables)
    if held and held >= 0.2 * facts.size_bytes:
        largest = max(tables, key=lambda row: row.bytes)
        reason = (
            f"embedding tables hold {percent(held / facts.size_bytes)} of the bytes (largest {largest.shape[0]} rows)"
        )
        yield "quantize-weights", reason, "tables shrink four times with a scale a row, at next to no loss"


def _zeros(facts: ModelFacts) -> Told:
    zeros = facts.parameters - facts.nonzeros
    share = zeros / facts.parameters if facts.parameters else 0.0
    if share >= MUCH:
        reason = f"{percent(share)} of the parameters are zero already"
        yield "pack", reason, f"up to {min(1 / (1 - share), 20) if share < 1 else 20:.1f} times smaller, no faster"
        return
    wide = sum(row.elements for row in facts.weights if row.op in {"MatMul", "Gemm", "Conv"} and _is_wide(row))
    if facts.parameters and wide >= MUCH * facts.parameters:
        reason = f"{percent(wide / facts.parameters)} of the parameters are in layers wide enough to spare some"
        yield "prune", reason, "up to 2 times smaller once packed, no faster; more with fine-tuning"


def _is_wide(row: WeightRow) -> bool:
    return len(row.shape) > 1 and math.prod(row.shape) >= BIG_MATRIX * BIG_MATRIX / 4 and not _depthwise(row)


_RULES: tuple[Callable[[ModelFacts], Told], ...] = (_store, _compute, _tables, _simplify, _rank, _zeros)
