"""One stage: apply its passes, measure, and decide: kept, tried in a weaker form, or dropped with the reason."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from onnxcomp.errors import ModelError, RequirementError, RuntimeFailure
from onnxcomp.judge import NOT_SLOWER, Judge, Score
from onnxcomp.ledger import Attempt, PassEntry, StageEntry
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass
from onnxcomp.quality import Quality
from onnxcomp.stages import Stage
from onnxcomp.verification.candidate import CandidateCheck

__all__ = ["Kept", "StageRunner"]

WORTH_KEEPING = 1.03
"""A lossy stage must make the model at least this much better (times faster by times smaller): less is clock noise."""

LESS = 0.7
LEAST_SHARE = 0.3
"""A stage that does not hold on other samples chooses again within 0.7 of the budget, then 0.49, then 0.34."""

WHOLE = "the model"
"""Where passes say that they leave what has no name of its own."""

MAX_WEAKER = 6
"""Weaker forms of one stage that are tried at most."""


@dataclass(frozen=True)
class Kept:
    """The model as it is after some stages, how it came to be, and what to go back to."""

    model: Model
    stages: tuple[StageEntry, ...] = ()
    before: Kept | None = None
    """All as it was before the last lossy stage that was kept."""
    exact: Model | None = None
    """The model before its weights were rounded; None: they are not."""

    @staticmethod
    def start(original: Model) -> Kept:
        """Nothing done yet."""
        return Kept(original.fork())

    def with_entry(self, entry: StageEntry) -> Kept:
        """A stage that changed nothing was run."""
        return replace(self, stages=(*self.stages, entry))

    def after(self, model: Model, entry: StageEntry, stage: Stage) -> Kept:
        """A stage was kept."""
        stages = (*self.stages, entry)
        if stage.lossless or stage.required:
            return replace(self, model=model, stages=stages)
        return Kept(model, stages, before=self, exact=(self.exact or self.model) if stage.rounds else None)

    def after_resumed(self, model: Model | None, entry: StageEntry, stage: Stage) -> Kept:
        """A stage was finished by an earlier run; None: it did not change the model."""
        entry = replace(entry, resumed=True)
        return self.with_entry(entry) if model is None else self.after(model, entry, stage)


@dataclass
class Trial:
    """A form of a stage that was applied: the candidate and what its passes said."""

    model: Model
    passes: list[PassEntry] = field(default_factory=list)
    failure: str | None = None
    quality: Quality | None = None
    score: Score | None = None
    versus_base: float = 1.0
    chose: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def count(self) -> int:
        """How many places changed."""
        return sum(len(entry.changed) for entry in self.passes)

    def attempt(self, verdict: str, reason: str) -> Attempt:
        """The trial as the ledger shows it."""
        score, quality = self.score, self.quality
        return Attempt(
            passes=self.passes,
            verdict=verdict,
            reason=reason,
            seconds=time.monotonic() - self.started,
            speed=score.speed if score else None,
            size=score.size if score else None,
            drop=quality.drop if quality else None,
            drop_interval=quality.interval if quality else None,
            error=quality.error if quality else None,
            error_interval=quality.error_interval if quality else None,
            evidence=score.evidence if score else "not measured",
        )


class StageRunner:
    """Runs stages one after another.

    Args:
        original: What candidates are compared with.
        judge: Measures them.
        context: What passes may use.
        force: Keep every stage whatever it costs.
        replay: Take decisions as given: nothing is timed, every stage that can run is kept.
    """

    def __init__(self, original: Model, judge: Judge, context: Context, *, force: bool, replay: bool) -> None:
        self.original = original
        self.judge = judge
        self._context = context
        self._force = force or replay
        self._forced = "the decision of the earlier run" if replay else "kept by --force"
        self._check = CandidateCheck(judge, original)
        self._share = 1.0
        """The part of the budget to choose within, less where an earlier choice did not hold."""
        self._last: tuple[Stage, bool] | None = None
        """The form of the last lossy stage that was kept, and whether it chose within the budget."""

    def run(self, stage: Stage, kept: Kept, *, past: Stage | None = None) -> Kept:
        """Run one stage in its first form that is worth keeping; of those after `past`, where that is given."""
        started = time.monotonic()
        if self._context.out_of_time():
            entry = StageEntry(stage.name, "skipped", "the time limit was reached", 0.0)
            return kept.with_entry(entry)
        measurable = self.judge.deterministic or self._force or stage.required
        forms = [form for form in _forms(stage) if form.lossless or measurable]
        if past is not None:
            forms = forms[forms.index(past) + 1 :] if past in forms else forms
            if not forms:
                return kept.with_entry(StageEntry(stage.name, "dropped", "there is no weaker form", 0.0))
        if not forms:
            reason = "the model's outputs are random, so no loss can be measured"
            return kept.with_entry(StageEntry(stage.name, "skipped", reason, 0.0))
        attempts: list[Attempt] = []
        for form in forms:
            self._context.progress(f"{stage.name}{'' if not attempts else ', a weaker form'}")
            trial = self._apply(form, kept)
            verdict, reason = self._verdict(trial, kept.model, form)
            attempts.append(trial.attempt(verdict, reason))
            if verdict in {"kept", "forced"}:
                if form.lossless and not stage.lossless:
                    reason = f"{form.name} alone ({_last_dropped(attempts).reason}): {reason}"
                entry = StageEntry(stage.name, verdict, reason, time.monotonic() - started, attempts)
                if not (form.lossless or form.required):
                    self._last = form, trial.chose
                return kept.after(trial.model, entry, form)
            if verdict == "dropped":
                self.judge.forget(trial.model)
            if self._context.out_of_time() or (verdict == "unchanged" and form is stage):
                break
        last = _last_dropped(attempts)
        return kept.with_entry(StageEntry(stage.name, last.verdict, last.reason, time.monotonic() - started, attempts))

    def confirm(self, kept: Kept, stages: Sequence[Stage]) -> Kept:
        """Check the whole on samples that no choice saw.

        While it does not hold, the last lossy stage chooses again within a part of the budget, then is dropped.
        """
        while kept.before and not self._force:
            quality = self.judge.confirm(kept.model)
            if self.judge.allows(quality):
                break
            before, index = kept.before, len(kept.before.stages)
            reason = f"did not hold on the samples kept for confirmation: {_loss(quality)}"
            dropped, later = _dropped(kept.stages[index], reason), kept.stages[index + 1 :]
            kept = self._with_later(self._again(stages[index], before, dropped), stages[index + 1 :], later)
        self._share = 1.0
        return kept

    def _with_later(self, kept: Kept, stages: Sequence[Stage], entries: Sequence[StageEntry]) -> Kept:
        """Run what was kept after a stage that has chosen again: nothing lossy, or that would have gone first."""
        for stage, entry in zip(stages, entries, strict=True):
            if entry.verdict != "kept":
                kept = kept.with_entry(entry)
                continue
            kept = self.run(replace(stage, passes=stage.lossless_passes), kept)
            last = kept.stages[-1]
            last = replace(last, name=entry.name, seconds=last.seconds + entry.seconds)
            kept = replace(kept, stages=(*kept.stages[:-1], last))
        return kept

    def _again(self, stage: Stage, before: Kept, dropped: StageEntry) -> Kept:
        """Run a stage once more within less of the budget; after some tries, its lossless passes alone.

        A form that chose nothing would come out as before: its weaker forms are next.
        """
        form, chose = self._last or (stage, True)
        past = None if chose or form not in _forms(stage) else form
        if past is None:
            self._share *= LESS
        enough = self._share < LEAST_SHARE or self._context.out_of_time()
        passes = stage.lossless_passes if enough else stage.passes
        kept = self.run(replace(stage, passes=passes), before, past=past) if passes else before.with_entry(dropped)
        entry = kept.stages[-1]
        if kept.before is not before:
            self._share = 1.0  # the stage before it has tries of its own
        if entry.verdict != "kept":
            return before.with_entry(replace(dropped, attempts=[*dropped.attempts, *entry.attempts]))
        entry = replace(
            entry,
            name=stage.name,
            seconds=entry.seconds + dropped.seconds,
            attempts=[*dropped.attempts, *entry.attempts],
        )
        return replace(kept, stages=(*kept.stages[:-1], entry))

    # --- one form ---------------------------------------------------------------------------------------------------

    def _apply(self, form: Stage, kept: Kept) -> Trial:
        """Apply the passes of one form, checking the structure after each, then measure."""
        base = kept.model
        trial = Trial(base.fork())
        self._context.exact = kept.exact
        for step, share in zip(form.passes, self._shares(form, base), strict=True):
            started = time.monotonic()
            self._context.share, self._context.was_asked = share, False
            try:
                changes = step.rewrite(trial.model, self._context)
                trial.chose |= self._context.was_asked
            except (RuntimeFailure, ModelError, RequirementError) as error:
                trial.failure = f"{step.name} failed: {error}"
                return trial
            except MemoryError:
                trial.failure = f"{step.name} ran out of memory"
                return trial
            if changes.count and not (step.lossless or step.rounds):
                self._context.exact = None  # the weights are others now, and not for rounding
            trial.passes.append(_entry(step, changes, time.monotonic() - started))
            trial.failure = self._structure(trial.model, step, changes)
            if trial.failure:
                return trial
        if trial.count:
            self._measure(trial, base)
        return trial

    def _shares(self, form: Stage, base: Model) -> Iterator[float]:
        """The part of the budget that each pass may have used up: lossy ones get equal parts of what is left.

        Otherwise the first would spend it all, and nothing would be left for those that it is to pay with.
        """
        lossy = [not step.lossless for step in form.passes]
        used = self.judge.used(base) if sum(lossy) > 1 else 0.0
        for count in itertools.accumulate(lossy):
            part = max(count, 1) / max(sum(lossy), 1)
            yield form.share * self._share * (used + (1.0 - used) * part)

    def _structure(self, model: Model, step: Pass, changes: Changes) -> str | None:
        """What is wrong with the candidate's structure, if anything is."""
        if not changes.count:
            return None
        if _interface(model) != _interface(self.original):
            return f"{step.name} changed the model's inputs or outputs"
        try:
            path = self.judge.path_of(model)
            self.judge.runtime.check(path)
            self.judge.runtime.check(path, optimize=False)
        except RuntimeFailure as error:
            return f"ONNX Runtime does not load the result of {step.name}: {error}"
        return None

    def _measure(self, trial: Trial, base: Model) -> None:
        try:
            trial.quality = self.judge.quality(trial.model)
            trial.score = self.judge.score(trial.model, quality=trial.quality)
            trial.versus_base = self._versus(base, trial)
        except RuntimeFailure as error:
            trial.failure = f"ONNX Runtime fails on it: {error}"
        except MemoryError:
            trial.failure = "measuring it ran out of memory"

    def _versus(self, base: Model, trial: Trial) -> float:
        """How many times faster than the model before the stage; each was timed in turn with the original."""
        assert trial.score is not None
        before = self.judge.score(base)
        if self.judge.same_kernels(before.census, trial.score.census):
            return 1.0
        return trial.score.speed / before.speed

    # --- the verdict ------------------------------------------------------------------------------------------------

    def _verdict(self, trial: Trial, base: Model, stage: Stage) -> tuple[str, str]:
        """The verdict and its reason."""
        if trial.failure:
            return "dropped", trial.failure
        if not trial.count:
            return "unchanged", _nothing(trial, stage)
        assert trial.quality is not None
        assert trial.score is not None
        against = self._against(trial, base, stage) or self._check.against(trial.model, trial.quality)
        if against is None:
            return "kept", _gain(trial)
        if stage.required:
            return "kept", f"the target needs it, although: {against}"
        return ("forced", f"{self._forced}, although: {against}") if self._force else ("dropped", against)

    def _against(self, trial: Trial, base: Model, stage: Stage) -> str | None:
        """What speaks against keeping a measured candidate, or None."""
        quality, score, lossless = trial.quality, trial.score, stage.lossless
        assert quality is not None
        assert score is not None
        if lossless and self.judge.is_lossless(self.judge.quality(base)) and not self.judge.is_lossless(quality):
            return f"claims to be lossless, but the outputs differ by {quality.plain_error:.2g} (relative)"
        if not lossless and not self.judge.allows(quality, stage.share):
            return f"over the budget: {_loss(quality)}"
        # With no kernel more than before and some fewer, a slower clock is a noisy one.
        noise = lossless and self.judge.no_more_kernels(score.census, self.judge.score(base).census)
        if score.speed < NOT_SLOWER and not noise:
            return f"slower than the original: {score.speed:.2f} times as fast ({score.evidence})"
        if trial.versus_base < NOT_SLOWER and lossless and not noise:
            return f"slower than before: {trial.versus_base:.2f} times as fast"
        before = self.judge.score(base)
        smaller = before.size_bytes / score.size_bytes
        if lossless:
            grows = any(step.grows for step in stage.passes)
            return None if smaller >= 1 or grows else f"larger than before: {score.size_bytes:,} bytes"
        if score.size < 1:
            return f"larger than the original: {score.size_bytes:,} bytes"
        if trial.versus_base * smaller < WORTH_KEEPING:
            return f"does not pay: {trial.versus_base:.2f} times as fast and {smaller:.2f} times as small as without it"
        return None


def _dropped(entry: StageEntry, reason: str) -> StageEntry:
    """A kept stage's entry once it turns out not to hold."""
    attempts = [
        *entry.attempts[:-1],
        *(replace(last, verdict="dropped", reason=reason) for last in entry.attempts[-1:]),
    ]
    return replace(entry, verdict="dropped", reason=reason, attempts=attempts)


def _last_dropped(attempts: Sequence[Attempt]) -> Attempt:
    """The last attempt that was dropped; where none was, the last."""
    return next((attempt for attempt in reversed(attempts) if attempt.verdict == "dropped"), attempts[-1])


def _nothing(trial: Trial, stage: Stage) -> str:
    """Why nothing changed: what each lossy pass says of the whole model, else of most that it left."""
    told = []
    for step, entry in zip(stage.passes, trial.passes, strict=True):
        whole = [left["why"] for left in entry.left if left["where"] == WHOLE]
        whys = Counter(whole or (left["why"] for left in entry.left))
        if whys and not step.lossless:
            why, count = whys.most_common(1)[0]
            who = f"{step.name}: " if len(stage.passes) > 1 else ""
            told.append(f"{who}{why}" + (f" ({count} of {whys.total()})" if whys.total() > 1 else ""))
    return "; ".join(told) or "nothing to do"


def _forms(stage: Stage) -> Iterator[Stage]:
    """The stage as it is, then with each pass's weaker forms, one pass at a time, then its lossless passes alone."""
    yield stage
    weaker = (
        (*stage.passes[:index], other, *stage.passes[index + 1 :])
        for index, step in enumerate(stage.passes)
        for other in step.weaker()
    )
    for passes in itertools.islice(weaker, MAX_WEAKER):
        yield replace(stage, passes=passes)
    if stage.lossless_passes and not stage.lossless:
        yield replace(stage, passes=stage.lossless_passes)


def _entry(step: Pass, changes: Changes, seconds: float) -> PassEntry:
    return PassEntry(
        name=step.name,
        options={**step.options(), **changes.resolved},
        changed=[{"where": change.where, "what": change.what} for change in changes.changed],
        left=[{"where": left.where, "why": left.why} for left in changes.left],
        notes=list(changes.notes),
        tables=[dataclasses.asdict(table) for table in changes.tables],
        seconds=seconds,
    )


def _interface(model: Model) -> tuple[object, ...]:
    """Names, types and dims of the inputs and outputs. Before IR 4, initializers are listed as inputs and are none."""
    graph = model.proto().graph
    listed = {tensor.name for tensor in graph.initializer} if model.ir_version < 4 else set()
    return (
        [(info.name, info.type.SerializeToString()) for info in graph.input if info.name not in listed],
        [(info.name, info.type.SerializeToString()) for info in graph.output],
    )


def _gain(trial: Trial) -> str:
    assert trial.score is not None
    assert trial.quality is not None
    score = trial.score
    return f"{score.size:.2f} times smaller, {score.speed:.2f} times as fast ({score.evidence}), {_loss(trial.quality)}"


def _loss(quality: Quality) -> str:
    """A loss in words."""
    error = f"relative error {quality.error:.2%}" if math.isfinite(quality.error) else "different shapes or NaN"
    if quality.drop is None or quality.interval is None:
        most = f"95% interval to {quality.error_interval[1]:.2%}, " if math.isfinite(quality.error) else ""
        return f"{error} ({most}{quality.samples} samples)"
    low, high = quality.interval
    drop = f"drop {quality.drop:.4f} (95% interval {low:.4f} to {high:.4f}, {quality.samples} samples)"
    return f"{drop}, {error}" if quality.guessed or quality.detection else drop
