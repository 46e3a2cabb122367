"""The figures of one model: what it weighs, what runs it, and what it loses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from onnxcomp.analysis import count_parameters, deflated_bytes
from onnxcomp.ledger import Figures
from onnxcomp.model import Model
from onnxcomp.quality import Quality
from onnxcomp.runtime import Census, Timing

__all__ = ["model_figures", "with_timing"]

DEFLATE_LIMIT_BYTES = 1 << 29
"""Deflating takes about 4 seconds a 64 MB: larger models are not worth the wait."""


def model_figures(
    model: Model, path: Path, census: Census, quality: Quality, macs: tuple[int, int], load_ms: float | None
) -> Figures:
    """All that is known of a model but its time.

    Args:
        model: The model.
        path: Its file.
        census: ONNX Runtime's optimized graph of it.
        quality: What it loses.
        macs: Multiply-accumulates of one run, and how many of them run in int8 kernels.
        load_ms: The time to make a session; None: this host is not its target.
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


def with_timing(figures: Figures, timing: Timing | None, evidence: str = "not measured") -> Figures:
    """Figures with what was timed; `evidence` is how the speed is known where nothing was."""
    if timing is None:
        return dataclasses.replace(figures, latency_evidence=evidence)
    return dataclasses.replace(
        figures,
        latency_ms=timing.median_ms,
        latency_p10_ms=timing.p10_ms,
        latency_p90_ms=timing.p90_ms,
        latency_evidence="measured",
    )
