"""What verification found: a result for each layer, and what could not be verified at all."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from onnxcomp.lints import Finding

__all__ = ["Coverage", "Difference", "LayerResult", "NodeDifference", "Verification"]


@dataclass(frozen=True)
class Difference:
    """How outputs differ from others on the same samples.

    Attributes:
        samples: How many samples were compared.
        equal: Whether all outputs are equal bit for bit.
        error: The relative error of the worst output: root mean square of the difference over that of the other.
        sqnr_db: The same as a signal-to-noise ratio; infinite where there is no difference.
        max_abs: The largest difference of one element.
        agreement: How often the largest class score is at the same place; None where no output holds class scores.
    """

    samples: int
    equal: bool
    error: float
    sqnr_db: float
    max_abs: float
    agreement: float | None = None


@dataclass(frozen=True)
class NodeDifference:
    """A quantized node that gives other codes there, though its inputs are the same.

    Attributes:
        node: The node's name.
        op: Its operator.
        steps: The largest difference, in steps of its output's scale.
        share: The part of its outputs' elements that differ.
    """

    node: str
    op: str
    steps: int
    share: float


@dataclass(frozen=True)
class Coverage:
    """Which part of a model an execution provider has operators for, out of ONNX Runtime's own lists.

    Attributes:
        provider: "NNAPI" or "CoreML".
        nodes: How many nodes the model has.
        supported: How many of them the provider has operators for, at the shapes that the model has.
        partitions: Into how many runs of nodes these fall; each is a way there and back.
        unsupported: The operators that it has not.
        reason: Why nothing could be told; empty where it could.
    """

    provider: str
    nodes: int
    supported: int
    partitions: int
    unsupported: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class LayerResult:
    """What came of one layer.

    Attributes:
        name: As in `--layers`.
        what: What ran: "optimizations off", say.
        status: Whether it ran and held, was skipped, or failed.
        reason: Why it was skipped or failed.
        runtime: What ran the model.
        nodes: Execution provider -> operator -> number of nodes.
        versus_original: The difference to the original's outputs.
        versus_cpu: The difference to what this host's CPU provider gives of the same model.
        differing: The nodes where a difference to the CPU begins.
        seconds: How long it took.
    """

    name: str
    what: str
    status: Literal["ran", "skipped", "failed"]
    reason: str = ""
    runtime: str = ""
    nodes: dict[str, dict[str, int]] = field(default_factory=dict)
    versus_original: Difference | None = None
    versus_cpu: Difference | None = None
    differing: tuple[NodeDifference, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Verification:
    """All that `verify` found.

    Attributes:
        original: The file of the original, or "model".
        new: The file of the model that was verified.
        target: What it is for.
        data: {description, samples, generated, labels}.
        quality: How its outputs differ from the original's on all samples: {kind, drop, interval, error, ...}.
        layers: A result for each layer that was asked for, or that the target has.
        coverage: What NNAPI and CoreML have operators for.
        findings: What the lints found.
        unverified: What cannot be verified off the device, in words.
        warnings: What to know before trusting a figure.
        seconds: How long all of it took.
    """

    original: str
    new: str
    target: str
    data: dict[str, Any]
    quality: dict[str, Any]
    layers: tuple[LayerResult, ...]
    coverage: tuple[Coverage, ...]
    findings: tuple[Finding, ...]
    unverified: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether no layer failed and no lint found an error. What was skipped is not verified, and does not fail."""
        failed = any(layer.status == "failed" for layer in self.layers)
        return not failed and not any(finding.severity == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The verification as plain data."""
        return {**dataclasses.asdict(self), "passed": self.passed}
