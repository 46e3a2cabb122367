"""The figures of one model: what it weighs, what runs it, and what it loses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxcomp.analysis import count_parameters, deflated_bytes, mac_counts
from onnxcomp.ledger import Figures
from onnxcomp.model import Model
from onnxcomp.quality import Quality
from onnxcomp.runtime import Census, Timing, explain

__all__ = ["model_figures", "with_timing"]


def model_figures(
    model: Model,
    path: Path,
    census: Census,
    quality: Quality,
    shapes: Mapping[str, Sequence[int]],
    *,
    wide: str | None,
    load_ms: float,
) -> Figures:
    """All that is known of a model but its time.

    Args:
        model: The model.
        path: Its file.
        census: ONNX Runtime's optimized graph of it.
        quality: What it loses.
        shapes: Of the inputs that multiply-accumulates are counted for.
        wide: What the target's int8 kernels do with wide weights; see `explain`.
        load_ms: The time to make a session.
    """
    macs = mac_counts(model, shapes)
    int8 = set(explain(model.proto(), census, wide=wide).int8)
    parameters, nonzeros = count_parameters(model)
    return Figures(
        size_bytes=model.size_bytes,
        deflated_bytes=deflated_bytes(path),
        resident_bytes=census.initializer_bytes,
        parameters=parameters,
        nonzeros=nonzeros,
        macs=sum(macs.values()),
        int8_macs=sum(count for name, count in macs.items() if name in int8),
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
