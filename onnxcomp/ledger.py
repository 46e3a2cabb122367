"""What one run did and measured: the ledger of stages, and the `Report` that holds it. Plain data, JSON-ready."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcomp.report.frames import Rows

__all__ = ["SCHEMA_VERSION", "Attempt", "Figures", "PassEntry", "Report", "StageEntry"]

SCHEMA_VERSION = "1.2"
"""Of the report's JSON. The first number changes when a reader of the old form would break."""

WHOLE_OUTPUT = 0.5
"""The share of the budget's `max_error` that a whole output may be off by, its constant part included: all that there
is of made-up inputs."""


@dataclass
class Figures:
    """What was measured of one model. None: not measured, and `Report.notes` or the evidence says why.

    Attributes:
        size_bytes: The file, external data included.
        deflated_bytes: The same after zlib, as in an APK, a wheel or a zip; estimated for a file above 16 MB.
        resident_bytes: What the weights take in memory once loaded, by ONNX Runtime's optimized graph.
        parameters: Numbers in float weights or their quantized codes.
        nonzeros: How many of them are not zero.
        macs: Multiply-accumulates of Conv, Gemm and MatMul for one run of the timed input.
        int8_macs: How many of those run in int8 kernels, by ONNX Runtime's optimized graph.
        latency_ms: The median time of one run.
        latency_p10_ms: The 10th percentile.
        latency_p90_ms: The 90th percentile.
        load_ms: The time to make a session.
        latency_evidence: "measured" (the target is this host), "same kernels" (ONNX Runtime makes the same program
            of it), "estimated" (from the kernels) or "not measured".
        metric: The value of the task metric, where there are labels.
        drop: How much worse than the original, bigger is worse; see `Report.quality`.
        drop_interval: The 95% interval of the drop.
        error: The largest relative error over the outputs.
        error_interval: Its 95% interval over the samples; its upper end is held against the budget.
        sqnr_db: The smallest signal-to-noise ratio over the outputs, in dB.
        agreement: For classifiers, how often the top class is the original's.
        kernels: Operators of ONNX Runtime's optimized graph and how often each occurs.
    """

    size_bytes: int = 0
    deflated_bytes: int | None = None
    resident_bytes: int | None = None
    parameters: int | None = None
    nonzeros: int | None = None
    macs: int | None = None
    int8_macs: int | None = None
    latency_ms: float | None = None
    latency_p10_ms: float | None = None
    latency_p90_ms: float | None = None
    load_ms: float | None = None
    latency_evidence: str = "not measured"
    metric: float | None = None
    drop: float | None = None
    drop_interval: tuple[float, float] | None = None
    error: float | None = None
    error_interval: tuple[float, float] | None = None
    sqnr_db: float | None = None
    agreement: float | None = None
    kernels: dict[str, int] = field(default_factory=dict)


@dataclass
class PassEntry:
    """One pass of a stage: its options, what it changed, and what it left alone and why."""

    name: str
    options: dict[str, Any]
    changed: list[dict[str, str]] = field(default_factory=list)
    left: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    """What was measured or counted: each with `title`, `columns` and `rows`."""
    seconds: float = 0.0


@dataclass
class Attempt:
    """One form of a stage that was tried and judged. `speed` and `size` are ratios, original over new."""

    passes: list[PassEntry]
    verdict: str
    reason: str
    seconds: float
    speed: float | None = None
    size: float | None = None
    drop: float | None = None
    drop_interval: tuple[float, float] | None = None
    error: float | None = None
    error_interval: tuple[float, float] | None = None
    evidence: str = "not measured"


@dataclass
class StageEntry:
    """One stage: every form of it that was tried, and the verdict that fell."""

    name: str
    verdict: str
    """"kept", "dropped", "forced", "unchanged" (nothing was changed) or "skipped" (not run; the reason says why)."""
    reason: str
    seconds: float
    attempts: list[Attempt] = field(default_factory=list)
    resumed: bool = False


@dataclass
class Report:
    """Everything that one run decided and measured.

    Attributes:
        verdict: The answer in one line.
        speed: Original latency over new latency; above 1 is faster.
        size: Original bytes over new bytes; above 1 is smaller.
        quality: How `drop` was measured: "metric", "expected-drop" (no labels, a classifier: how much less the
            original believes in the new answer than in its own), or "relative-error".
        budget_met: Whether the result is inside the budget on the samples kept for confirmation.
        model: {path, sha256, size_bytes, opset, ir_version}.
        output: {path, sha256, size_bytes} or None before it is saved.
        data: {description, sha256, samples, generated, labels, calibrate, select, confirm}.
        budget: {max_drop, max_error}.
        options: Every option of the run.
        environment: Versions, platform, CPU features, threads.
        warnings: What the user should know before trusting a figure.
        notes: What was not done and why.
        layers: A row for each layer of the original and of the result, the least signal-to-noise ratio first; empty
            unless `optimize` was asked for them. See `onnxcomp.layer_table.LayerRow`
            and `onnxcomp.layer_details`.
        graph: {before, after}: the operators, nodes and tensors of both models, as `onnxcomp.graph_table.graph_table`
            lists them; None unless `optimize` was asked for the layers.
    """

    verdict: str
    speed: float | None
    size: float
    quality: str
    budget_met: bool
    before: Figures
    after: Figures
    stages: list[StageEntry]
    model: dict[str, Any]
    output: dict[str, Any] | None
    data: dict[str, Any]
    metric: dict[str, Any] | None
    budget: dict[str, Any]
    target: str
    options: dict[str, Any]
    environment: dict[str, Any]
    seconds: float
    created: str
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    graph: dict[str, Any] | None = None
    schema_version: str = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data, as the shipped schema describes it."""
        # The graphs are plain data, and large ones: they need no copy.
        return {**dataclasses.asdict(dataclasses.replace(self, graph=None)), "graph": self.graph}

    def to_frame(self, rows: str = "attempts") -> Rows:
        """Rows that `pandas.DataFrame` and `polars.DataFrame` take: flat, and with one type a column.

        Args:
            rows: "attempts" (each form of each stage), "stages", "figures" (original and result) or "layers".

        Raises:
            OptionError: There are no such rows.
        """
        from onnxcomp.report.frames import report_frame

        return report_frame(self, rows)

    @property
    def ledger(self) -> list[StageEntry]:
        """The stages, as the ledger shows them."""
        return self.stages

    def __str__(self) -> str:
        """The report as plain text."""
        from onnxcomp.report import plain_text

        return plain_text(self)

    def _repr_html_(self) -> str:
        """The report as a notebook shows it."""
        from onnxcomp.report import html_summary

        return html_summary(self)
