"""`compare` and `compare_all`: how models differ from another on the same data: accuracy, outputs, bytes, speed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onnxcomp.budget import Budget
from onnxcomp.compared import Candidate, Comparison, Comparisons
from onnxcomp.comparing import Asked, Measured, Outcome, measure
from onnxcomp.data import ImageOptions
from onnxcomp.errors import OptionError
from onnxcomp.ledger import Figures
from onnxcomp.metrics import Metric
from onnxcomp.model import ModelSource
from onnxcomp.pairs import source_name
from onnxcomp.reporting import environment, model_facts
from onnxcomp.targets import Target

__all__ = ["Comparison", "Comparisons", "compare", "compare_all", "shortfalls", "worth"]

FIXED_LIMITS = ("sqnr", "agreement", "size", "speed")

SAME = 0.02
"""Speeds that differ by less are the same: no clock tells more."""

SAME_SIZE = 0.001


def compare(
    original: ModelSource,
    new: ModelSource,
    *,
    data: Any = None,
    metric: str | Callable[..., Any] | Metric | None = None,
    threads: int = 1,
    target: str | Target | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    image: ImageOptions | None = None,
    allow_code: bool = False,
    timing: bool = True,
    layers: bool = False,
) -> Comparison:
    """Compare a model with another that takes the same inputs.

    Args:
        original: A path, a ModelProto or a Model.
        new: The same, to be measured against it.
        data: Samples, labelled ones for a metric; see `onnxcomp.data.open_data`. Without data inputs are generated.
        metric: "top1", "top5", "mse", "auc", "module:function" or a function of (outputs, labels).
        threads: Threads that ONNX Runtime runs and is timed with.
        target: What the models are for; this host by default. Only this host's clock is evidence of speed.
        shapes: Sizes of dynamic inputs, for generated inputs.
        seed: Of generated inputs and intervals.
        image: How to read a folder of images.
        allow_code: Whether "module:function" may be imported and called.
        timing: Whether to time the models.
        layers: Whether to measure the error of each layer too, on all of the data.

    Raises:
        OnnxcompError: A model cannot be read or run, the models do not fit each other, or the data do not fit them.
    """
    asked = Asked(
        data=data,
        metric=metric,
        threads=threads,
        target=target,
        shapes=shapes,
        seed=seed,
        image=image,
        allow_code=allow_code,
        timing=timing,
        layers=layers,
    )
    outcome = measure(original, [new], asked, strict=True)
    [found] = outcome.found
    return Comparison(
        original=source_name(original),
        new=found.name,
        before=outcome.before,
        after=found.after,
        speed=found.speed,
        size=outcome.before.size_bytes / found.after.size_bytes,
        quality=outcome.quality,
        sqnr_db=found.sqnr_db,
        metric=outcome.metric,
        data=outcome.data,
        target=outcome.target.name,
        threads=threads,
        warnings=[*outcome.warnings, *found.warnings],
        layers=found.layers,
    )


def compare_all(
    original: ModelSource,
    candidates: Sequence[ModelSource],
    *,
    data: Any = None,
    metric: str | Callable[..., Any] | Metric | None = None,
    budget: Budget | None = None,
    limits: Mapping[str, float] | None = None,
    threads: int = 1,
    target: str | Target | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    image: ImageOptions | None = None,
    allow_code: bool = False,
    timing: bool = True,
    layers: bool = False,
    strict: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Comparisons:
    """Compare a model with several others, in one run: the same samples, one reference, all timed in turn.

    A candidate that cannot be read or run, or has other inputs or outputs, is told as "failed" with its reason.

    Args:
        original: A path, a ModelProto or a Model.
        candidates: The same, each to be measured against it.
        data: Samples, as for `compare`.
        metric: As for `compare`.
        budget: What verdicts go by; by default that of `optimize`.
        limits: As for `shortfalls`, which are told of each candidate.
        threads: Threads that ONNX Runtime runs and is timed with.
        target: What the models are for, as for `compare`.
        shapes: Sizes of dynamic inputs, for generated inputs.
        seed: Of generated inputs and intervals.
        image: How to read a folder of images.
        allow_code: Whether "module:function" may be imported and called.
        timing: Whether to time the models.
        layers: Whether to measure the error of each layer too.
        strict: Raise what a candidate fails with.
        progress: Called with what is being done.

    Raises:
        OnnxcompError: The original cannot be read or run, the data do not fit, or a limit is on what was not measured.
    """
    if isinstance(candidates, str | Path):
        message = f"candidates: expected a list of models, got {str(candidates)!r}; put it into one, or use compare"
        raise OptionError(message)
    if not candidates:
        message = "there is nothing to compare the original with; give at least one candidate"
        raise OptionError(message)
    began = time.monotonic()
    asked = Asked(
        data=data,
        metric=metric,
        threads=threads,
        target=target,
        shapes=shapes,
        seed=seed,
        image=image,
        allow_code=allow_code,
        timing=timing,
        layers=layers,
        sharing=len(candidates),
        hashes=True,
        progress=progress,
    )
    outcome = measure(original, candidates, asked, strict=strict)
    kept = budget or Budget()
    found = Comparisons(
        model=model_facts(outcome.model, original),
        before=outcome.before,
        candidates=[_candidate(one, outcome, kept) for one in outcome.found],
        quality=outcome.quality,
        metric=outcome.metric,
        budget=dataclasses.asdict(kept),
        limits=dict(limits or {}),
        data=outcome.data,
        target=outcome.target.name,
        options={
            "seed": seed,
            "timing": timing,
            "layers": layers,
            "shapes": {name: list(shape) for name, shape in (shapes or {}).items()},
        },
        environment=environment(threads),
        seconds=time.monotonic() - began,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        warnings=outcome.warnings,
    )
    for candidate in found.measured:
        candidate.shortfalls += shortfalls(found.pair(candidate), found.limits)
    return found


def _candidate(one: Measured, outcome: Outcome, budget: Budget) -> Candidate:
    if one.error is not None or one.model is None or one.quality is None:
        path = str(one.source) if isinstance(one.source, str | Path) else None
        nothing = dict.fromkeys(("sha256", "size_bytes", "opset", "ir_version"))
        return Candidate({"path": path, **nothing}, "failed", str(one.error).removeprefix(f"{path}: "))
    size = outcome.before.size_bytes / one.after.size_bytes
    inside = budget.allows(one.quality)
    return Candidate(
        model=model_facts(one.model, one.source),
        verdict=worth(size, one.speed) if inside else "over",
        reason=_told(size, one.speed, one.after, inside=inside),
        after=one.after,
        speed=one.speed,
        size=size,
        sqnr_db=dict(one.sqnr_db),
        warnings=one.warnings,
        layers=one.details,
    )


def worth(size: float, speed: float | None) -> str:
    """Whether what is inside the budget is worth having: the verdict.

    Example:
        >>> worth(2.0, 1.0), worth(2.0, 0.9)
        ('better', 'no gain')
    """
    pace = 1.0 if speed is None else speed
    worse = size < 1 - SAME_SIZE or pace < 1 - SAME
    gains = size > 1 + SAME_SIZE or pace > 1 + SAME
    return "better" if gains and not worse else "no gain"


def _told(size: float, speed: float | None, after: Figures, *, inside: bool) -> str:
    """What a candidate gains and loses, in one line."""
    parts = ["the same size" if abs(size - 1) < SAME_SIZE else _times(size, "smaller", "larger")]
    if speed is not None:
        parts.append("the same speed" if abs(speed - 1) < SAME else _times(speed, "as fast", "as slow"))
    if after.drop is not None:
        parts.append(f"drop {after.drop:.4f}")
    elif after.error is not None:
        parts.append(f"relative error {after.error:.2%}")
    return ", ".join(parts) + ("" if inside else " (over the budget)")


def _times(ratio: float, more: str, less: str) -> str:
    return f"{ratio:.2f} times {more}" if ratio >= 1 else f"{1 / ratio:.2f} times {less}"


def shortfalls(comparison: Comparison, limits: Mapping[str, float]) -> list[str]:
    """Say which limits a comparison does not reach.

    Args:
        comparison: What `compare` found.
        limits: Name -> the least that will do. "sqnr" (dB, the worst output), "agreement", "size" and "speed"
            (ratios), or the name of the metric; where lower is better, a metric above its limit falls short.

    Returns:
        A line for each limit that is not reached.

    Raises:
        OptionError: A limit is on something that was not measured.
    """
    return [line for name, limit in limits.items() if (line := _shortfall(comparison, name, limit))]


def _shortfall(comparison: Comparison, name: str, limit: float) -> str | None:
    after, metric = comparison.after, comparison.metric
    values = {
        "sqnr": after.sqnr_db,
        "agreement": after.agreement,
        "size": comparison.size,
        "speed": comparison.speed,
    }
    if metric is not None:
        values[str(metric["name"])] = after.metric
    value = values.get(name)
    if value is None and metric is not None and name == metric["name"]:
        return f"{name} cannot be computed from its outputs"
    if value is None:
        measured = ", ".join(key for key, known in values.items() if known is not None)
        message = f"{name!r} was not measured, so it has no limit to keep; measured were {measured}"
        raise OptionError(message)
    lower = metric is not None and name == metric["name"] and not metric["higher_is_better"]
    if lower:
        return f"{name} is {value:.6g}, above the limit of {limit:g}" if value > limit else None
    return None if value >= limit else f"{name} is {value:.6g}, under the limit of {limit:g}"
