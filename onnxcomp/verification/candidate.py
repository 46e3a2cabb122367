"""The always layer on a candidate of `optimize`: cheap enough for every stage that is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnxcomp.errors import RuntimeFailure
from onnxcomp.lints import lint_model
from onnxcomp.verification.always import ort_runtime
from onnxcomp.verification.differences import FLOAT_ERROR, WORST_ERROR, difference
from onnxcomp.workfolder import work_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnxcomp.judge import Judge
    from onnxcomp.model import Model
    from onnxcomp.quality import Quality
    from onnxcomp.runtime import Feed

__all__ = ["CandidateCheck"]

BOTH_SIDES = 2.0
"""Two ways of running a model may miss the original on either side, each by as much as it loses; see `too_far`."""


class CandidateCheck:
    """What speaks against keeping a candidate, though it is small, fast and close to the original here.

    Args:
        judge: Runs candidates, and knows what they are for.
        original: The model that they are compared with: traps that it has already are not held against them.
    """

    def __init__(self, judge: Judge, original: Model) -> None:
        self._judge = judge
        self._known = self._traps(original)

    def _traps(self, model: Model) -> dict[str, str]:
        """The lints that find errors, each with the first place."""
        found = lint_model(model, self._judge.target)
        errors = [finding for finding in found if finding.severity == "error"]
        return {finding.id: f"{finding.where}: {finding.what}" for finding in reversed(errors)}

    def against(self, model: Model, quality: Quality) -> str | None:
        """Why a candidate should not be kept; None where nothing speaks against it."""
        for name, where in self._traps(model).items():
            if name not in self._known:
                return f"{self._judge.target.name} does not take it: {where} (lint {name})"
        if not self._judge.deterministic:
            return None
        path, feeds = self._judge.path_of(model), self._judge.few_feeds()
        try:
            return self._unlike_plain(path, feeds, quality) or self._unlike_written(path, feeds)
        except RuntimeFailure as error:
            return f"ONNX Runtime fails on it in another way of running: {error}"

    def _unlike_plain(self, path: Path, feeds: Sequence[Feed], quality: Quality) -> str | None:
        """Whether ONNX Runtime's optimizations change what the model computes."""
        runtime = self._judge.runtime
        optimized, plain = (list(runtime.run(path, feeds, optimize=optimize)) for optimize in (True, False))
        error = difference(optimized, plain).error
        allowed = min(max(FLOAT_ERROR, self._judge.rounding, BOTH_SIDES * quality.plain_error), WORST_ERROR)
        if error <= max(allowed, self._judge.rounding):
            return None
        return f"with ONNX Runtime's optimizations off its outputs differ by {error:.2%}, of {allowed:.2%} at most"

    def _unlike_written(self, path: Path, feeds: Sequence[Feed]) -> str | None:
        """Whether the model comes back from the ORT format as it went in, where that is what is shipped."""
        if self._judge.target.artifact != "ort":
            return None
        # Not beside the file: a candidate equal to the original is the user's own.
        with work_folder() as folder, ort_runtime() as runtime:
            written = folder / "model.ort"
            runtime.convert(path, written)
            before, after = (list(runtime.run(file, feeds)) for file in (path, written))
        gap = difference(before, after)
        return None if gap.equal else f"read again from the ORT format, its outputs differ by {gap.max_abs:g}"
