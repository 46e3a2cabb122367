"""The layers that need nothing but the wheel of ONNX Runtime: other optimizations, ARM's fusions, the ORT format."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from onnxcomp.errors import RuntimeFailure
from onnxcomp.ort_format import is_ort, read_ort
from onnxcomp.runtime import Runtime
from onnxcomp.targets import ARM_FUSION, Target, host_target
from onnxcomp.verification.differences import difference, too_far
from onnxcomp.verification.results import LayerResult
from onnxcomp.verification.samples import FewSamples

__all__ = ["CPU", "Always", "ort_runtime"]

NOT_FOR_ARM = ("NchwcTransformer",)
"""Blocked layouts of x86: no model for another processor may have them."""

CPU = "CPUExecutionProvider"


def ort_runtime(*, threads: int = 1) -> Runtime:
    """A runtime that optimizes as for ARM: what the ORT format is written by, and what it must equal."""
    return Runtime(threads=threads, session_config=dict(ARM_FUSION), disabled_optimizers=NOT_FOR_ARM)


@dataclass(frozen=True)
class Always:
    """Runs them on one model.

    Attributes:
        runtime: This host's CPU provider, set to fuse as the target does.
        few: Samples and what is known of them.
        path: The model.
        target: What it is for.
        seconds: How long each variant may run, its loading apart.
        folder: Where files may be written.
    """

    runtime: Runtime
    few: FewSamples
    path: Path
    target: Target
    seconds: float
    folder: Path

    def cpu(self) -> list[LayerResult]:
        """The CPU provider as it is, with optimizations off, and with ARM's fusions."""
        results = [self._layer("cpu", "as it is", self._as_it_is)]
        if is_ort(self.path):
            return results
        results.append(self._layer("cpu", "optimizations off", self._plain))
        if self.target.session_config != ARM_FUSION and host_target().name != "arm64":
            results.append(self._layer("cpu", "ARM's int8 fusions", self._arm))
        return results

    def ort(self) -> list[LayerResult]:
        """The model in the ORT format: written, read again, and compared bit for bit."""
        if is_ort(self.path):
            reason = "the model is in the ORT format already: that is what the layer cpu runs"
            return [LayerResult("ort", "written and read again", "skipped", reason)]
        return [self._layer("ort", "written and read again", self._written)]

    def _layer(self, name: str, what: str, run: Callable[[], LayerResult]) -> LayerResult:
        started = time.monotonic()
        try:
            result = run()
        except RuntimeFailure as error:
            return LayerResult(name, what, "failed", str(error), _version(), seconds=time.monotonic() - started)
        return replace(result, name=name, what=what, seconds=time.monotonic() - started)

    def _as_it_is(self) -> LayerResult:
        outputs = self.few.new(len(self.few.feeds))
        return self._compared(self.runtime, outputs, outputs)

    def _plain(self) -> LayerResult:
        outputs = self.few.run(self.runtime, self.path, self.seconds, optimize=False)
        return self._compared(self.runtime, outputs, self.few.new(len(outputs)), optimize=False)

    def _arm(self) -> LayerResult:
        with Runtime(session_config=dict(ARM_FUSION)) as runtime:
            outputs = self.few.run(runtime, self.path, self.seconds)
            return self._compared(runtime, outputs, self.few.new(len(outputs)))

    def _written(self) -> LayerResult:
        written = self.folder / "model.ort"
        with ort_runtime() as runtime:
            runtime.convert(self.path, written)
            outputs = self.few.run(runtime, written, self.seconds)
            same = list(runtime.run(self.path, self.few.feeds[: len(outputs)], outputs=self.few.names))
            result = self._compared(runtime, outputs, self.few.new(len(outputs)), census=written)
        gap = difference(same, outputs)
        if gap.equal:
            return result
        reason = f"read again, it differs from the model it was written from by {gap.max_abs:g}"
        return replace(result, status="failed", reason=reason)

    def _compared(
        self,
        runtime: Runtime,
        outputs: Sequence[list[Any]],
        cpu: Sequence[list[Any]],
        *,
        optimize: bool = True,
        census: Path | None = None,
    ) -> LayerResult:
        """The result of a variant, which fails where it is too far from the CPU's."""
        samples = self.few.count(len(outputs))
        original = self.few.original(len(outputs))
        versus_original, versus_cpu = (difference(one, outputs, samples=samples) for one in (original, cpu))
        rounding = self.few.rounding if versus_cpu.error else 0.0
        reason = too_far(difference(original, cpu), versus_original, versus_cpu, rounding)
        file = census or self.path
        counts = read_ort(file).operators if is_ort(file) else runtime.census(file, optimize=optimize).counts()
        return LayerResult(
            "",
            "",
            "failed" if reason else "ran",
            reason or "",
            _version(),
            {CPU: counts},
            versus_original,
            versus_cpu,
        )


def _version() -> str:
    return f"ONNX Runtime {version('onnxruntime')}"
