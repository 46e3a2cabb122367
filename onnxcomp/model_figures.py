"""The figures of one model: what it weighs, what runs it, and what it loses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcomp.analysis import count_parameters, deflated_bytes, mac_counts
from onnxcomp.ledger import Figures
from onnxcomp.model import Model
from onnxcomp.quality import Quality
from onnxcomp.runtime import Census, Timing, explain
from onnxcomp.runtime.census import graphs, node_names
from onnxcomp.targets import Target

if TYPE_CHECKING:
    import onnx

__all__ = ["model_figures", "with_timing", "work"]

DEFLATE_LIMIT_BYTES = 1 << 29
"""Deflating an eighth of it takes about 4 seconds: larger models are not worth the wait."""

INTEGER_PRODUCTS = frozenset(
    {"ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm", "QLinearConv", "QLinearMatMul"}
)
"""Of a MatMulInteger it depends on what is around it: that is for `explain` to tell."""


def work(model: Model, census: Census, shapes: Mapping[str, Sequence[int]], target: Target) -> tuple[int, int]:
    """Multiply-accumulates of one run, and how many of them run in int8 kernels on the target.

    Args:
        model: The model.
        census: ONNX Runtime's optimized graph of it.
        shapes: Of the inputs.
        target: What it is for; one that takes no int8 operators has no such kernels.
    """
    counts, rules = mac_counts(model, shapes), target.rules
    int8: set[str] = set()
    if rules is not None:
        proto = model.proto()
        int8.update(explain(proto, census, wide=rules.wide).int8, _in_integers(proto.graph))
    return sum(counts.values()), sum(macs for name, macs in counts.items() if name in int8)


def _in_integers(graph: onnx.GraphProto) -> Iterator[str]:
    """The names of the nodes that are int8 kernels as they stand, in a model of another tool's."""
    nodes = (node for inner in graphs(graph) for node in inner.node)
    for name, node in zip(node_names(graph), nodes, strict=True):
        if node.op_type in INTEGER_PRODUCTS:
            yield name


def model_figures(
    model: Model, path: Path, census: Census, quality: Quality, macs: tuple[int, int], *, load_ms: float | None
) -> Figures:
    """All that is known of a model but its time.

    Args:
        model: The model.
        path: Its file.
        census: ONNX Runtime's optimized graph of it.
        quality: What it loses.
        macs: As `work` counts them.
        load_ms: The time to make a session; None where it tells nothing of the target.
    """
    parameters, nonzeros = count_parameters(model)
    return Figures(
        size_bytes=model.size_bytes,
        deflated_bytes=deflated_bytes(path) if model.size_bytes <= DEFLATE_LIMIT_BYTES else None,
        resident_bytes=census.initializer_bytes,
        parameters=parameters,
        nonzeros=nonzeros,
        macs=macs[0],
        int8_macs=macs[1],
        load_ms=load_ms,
        metric=quality.metric,
        drop=quality.drop,
        drop_interval=quality.interval,
        error=quality.error,
        error_interval=quality.error_interval,
        sqnr_db=quality.sqnr_db,
        agreement=quality.agreement,
        kernels=census.counts(),
    )


def with_timing(figures: Figures, timing: Timing | None) -> Figures:
    """Figures with what was timed, if anything was."""
    if timing is None:
        return figures
    return dataclasses.replace(
        figures,
        latency_ms=timing.median_ms,
        latency_p10_ms=timing.p10_ms,
        latency_p90_ms=timing.p90_ms,
        latency_evidence="measured",
    )
