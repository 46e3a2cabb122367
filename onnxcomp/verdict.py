"""One stage: apply its passes, measure, and decide: kept, tried in a weaker form, or dropped with the reason."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from onnxcomp.candidate import Candidate, loss_text, pass_entry
from onnxcomp.errors import ModelError, OnnxcompError, RequirementError, RuntimeFailure
from onnxcomp.judge import NOT_SLOWER, Judge
from onnxcomp.ledger import Attempt, StageEntry
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass
from onnxcomp.stages import Stage
from onnxcomp.verification.candidate import CandidateCheck

__all__ = ["Kept", "StageRunner"]

WORTH_KEEPING = 1.03
"""A lossy stage must make the model at least this much better (times faster by times smaller): less is clock noise."""

LESS = 0.7
LEAST_SHARE = 0.3
"""A stage that does not hold on other samples chooses again within 0.7 of the budget, then 0.49, then 0.34."""

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
        measurable = self.judge.unmeasured is None or self._force or stage.required
        forms = [form for form in _forms(stage) if form.lossless or measurable]
        if past is not None:
            forms = forms[forms.index(past) + 1 :] if past in forms else forms
            if not forms:
                return kept.with_entry(StageEntry(stage.name, "dropped", "there is no weaker form", 0.0))
        if not forms:
            reason = f"{self.judge.unmeasured}, so no loss can be measured"
            return kept.with_entry(StageEntry(stage.name, "skipped", reason, 0.0))
        attempts: list[Attempt] = []
        for form in forms:
            self._context.progress(f"{stage.name}{'' if not attempts else ', a weaker form'}")
            candidate = self._best_of(form, kept)
            verdict, reason = self._verdict(candidate, kept.model, form)
            attempts.append(candidate.attempt(verdict, reason))
            if verdict in {"kept", "forced"}:
                if form.lossless and not stage.lossless:
                    reason = f"{form.name} alone ({_last_dropped(attempts).reason}): {reason}"
                entry = StageEntry(stage.name, verdict, reason, time.monotonic() - started, attempts)
                if not (form.lossless or form.required):
                    self._last = form, candidate.chose
                return kept.after(candidate.model, entry, form)
            if verdict == "dropped" and candidate.written:
                self.judge.forget(candidate.model)
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
            reason = f"did not hold on the samples kept for confirmation: {loss_text(quality)}"
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

        A form that chose nothing would come out as before: its weaker forms are next. What labels called free and was
        not is chosen more cautiously.
        """
        form, chose = self._last or (stage, True)
        past = None if chose or form not in _forms(stage) else form
        if past is None:
            self._share *= LESS
        enough = self._share < LEAST_SHARE or self._context.out_of_time()
        passes = stage.lossless_passes if enough else stage.passes
        self.judge.cautious = True
        kept = self.run(replace(stage, passes=passes), before, past=past) if passes else before.with_entry(dropped)
        self.judge.cautious = False
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

    def _best_of(self, form: Stage, kept: Kept) -> Candidate:
        """A form as it is, or without its last lossy pass, where that found nothing: the others may then spend all."""
        candidate = self._apply(form, kept)
        lossy = [place for place, step in enumerate(form.passes) if not step.lossless]
        if candidate.failure or not candidate.chose or len(lossy) < 2 or self._context.out_of_time():
            return candidate
        *_, idle = lossy
        if candidate.passes[idle].changed:
            return candidate
        other = self._best_of(replace(form, passes=form.passes[:idle] + form.passes[idle + 1 :]), kept)
        worse, better = candidate, other
        if not self._beats(other, candidate, kept, form):
            worse, better = other, candidate
        if worse.written:
            self.judge.forget(worse.model)
        if better is other:
            other.passes.insert(idle, candidate.passes[idle])
            other.started = candidate.started
        return better

    def _beats(self, other: Candidate, candidate: Candidate, kept: Kept, form: Stage) -> bool:
        """Whether another candidate of a form is worth more, and fit to be kept."""
        if other.failure or other.score is None or self._against(other, kept.model, form) is not None:
            return False
        return candidate.score is None or other.score.value > candidate.score.value

    def _apply(self, form: Stage, kept: Kept) -> Candidate:
        """Apply the passes of one form, checking the structure after each, then measure.

        A mistake in a pass costs the stage, not the run: the candidate is a copy, and is dropped.
        """
        candidate = Candidate(kept.model.fork())
        self._context.exact = kept.exact
        try:
            self._rewrite(form, candidate, kept.model)
            if candidate.count and not candidate.failure:
                self._measure(candidate, kept.model)
        except (OnnxcompError, OSError, Warning):  # of the data, the disk, or a warning that is to be an error
            raise
        except Exception as error:  # noqa: BLE001 - whatever a pass raises that is no error of ours
            candidate.failure = f"internal error ({type(error).__name__}: {error})"
            warning = RuntimeWarning(f"{form.name}: {candidate.failure}; it is left out, please report it")
            warning.__cause__ = error
            warnings.warn(warning, stacklevel=2)
        return candidate

    def _rewrite(self, form: Stage, candidate: Candidate, base: Model) -> None:
        """Apply the passes until one fails."""
        for step, share in zip(form.passes, self._shares(form, base), strict=True):
            started = time.monotonic()
            self._context.share, self._context.was_asked, candidate.written = share, False, False
            try:
                changes = step.rewrite(candidate.model, self._context)
                candidate.chose |= self._context.was_asked
            except (RuntimeFailure, ModelError, RequirementError) as error:
                candidate.failure = f"{step.name} failed: {error}"
                return
            except MemoryError:
                candidate.failure = f"{step.name} ran out of memory"
                return
            if changes.count and not (step.lossless or step.rounds):
                self._context.exact = None  # the weights are others now, and not for rounding
            candidate.passes.append(pass_entry(step, changes, time.monotonic() - started))
            candidate.failure = self._structure(candidate, step, changes)
            if candidate.failure:
                return

    def _shares(self, form: Stage, base: Model) -> Iterator[float]:
        """The part of the budget that each pass may have used up: lossy ones get equal parts of what is left.

        Otherwise the first would spend it all, and nothing would be left for those that it is to pay with.
        """
        lossy = [not step.lossless for step in form.passes]
        used = self.judge.used(base) if sum(lossy) > 1 else 0.0
        for count in itertools.accumulate(lossy):
            part = max(count, 1) / max(sum(lossy), 1)
            yield form.share * self._share * (used + (1.0 - used) * part)

    def _structure(self, candidate: Candidate, step: Pass, changes: Changes) -> str | None:
        """What is wrong with the candidate's structure, if anything is."""
        if not changes.count:
            return None
        model = candidate.model
        try:
            if _interface(model) != _interface(self.original):
                return f"{step.name} changed the model's inputs or outputs"
            path, candidate.written = self.judge.path_of(model), True
            self.judge.runtime.check(path)
            self.judge.runtime.check(path, optimize=False)
        except RuntimeFailure as error:
            return f"ONNX Runtime does not load the result of {step.name}: {error}"
        except ModelError as error:
            return f"{step.name} broke the model: {error}"
        return None

    def _measure(self, candidate: Candidate, base: Model) -> None:
        candidate.written = True
        try:
            candidate.quality = self.judge.quality(candidate.model)
            candidate.score = self.judge.score(candidate.model, quality=candidate.quality)
            candidate.versus_base = self._versus(base, candidate)
        except RuntimeFailure as error:
            candidate.failure = f"ONNX Runtime fails on it: {error}"
        except MemoryError:
            candidate.failure = "measuring it ran out of memory"

    def _versus(self, base: Model, candidate: Candidate) -> float:
        """How many times faster than the model before the stage; each was timed in turn with the original."""
        assert candidate.score is not None
        before = self.judge.score(base)
        if self.judge.same_kernels(before.census, candidate.score.census):
            return 1.0
        return candidate.score.speed / before.speed

    # --- the verdict ------------------------------------------------------------------------------------------------

    def _verdict(self, candidate: Candidate, base: Model, stage: Stage) -> tuple[str, str]:
        """The verdict and its reason."""
        if candidate.failure:
            return "dropped", candidate.failure
        if not candidate.count:
            return "unchanged", candidate.nothing(stage)
        assert candidate.quality is not None
        assert candidate.score is not None
        against = self._against(candidate, base, stage) or self._check.against(candidate.model, candidate.quality)
        if against is None:
            return "kept", candidate.gain
        if stage.required:
            return "kept", f"the target needs it, although: {against}"
        return ("forced", f"{self._forced}, although: {against}") if self._force else ("dropped", against)

    def _against(self, candidate: Candidate, base: Model, stage: Stage) -> str | None:
        """What speaks against keeping a measured candidate, or None."""
        quality, score, lossless = candidate.quality, candidate.score, stage.lossless
        assert quality is not None
        assert score is not None
        if lossless and self.judge.is_lossless(self.judge.quality(base)) and not self.judge.is_lossless(quality):
            return f"claims to be lossless, but the outputs differ by {quality.plain_error:.2g} (relative)"
        if not lossless and not self.judge.allows(quality, stage.share):
            return f"over the budget: {loss_text(quality)}"
        # With no kernel more than before and some fewer, a slower clock is a noisy one. The kernels of what was kept
        # already are no slower than that: without this stage the model would be as slow.
        known = self.judge.score(base).census
        alike = self.judge.same_kernels(score.census, known)
        noise = alike or (lossless and self.judge.no_more_kernels(score.census, known))
        if score.speed < NOT_SLOWER and not noise:
            return f"slower than the original: {score.speed:.2f} times as fast ({score.evidence})"
        if candidate.versus_base < NOT_SLOWER and lossless and not noise:
            return f"slower than before: {candidate.versus_base:.2f} times as fast"
        before = self.judge.score(base)
        smaller = before.size_bytes / score.size_bytes
        if lossless:
            grows = any(step.grows for step in stage.passes)
            return None if smaller >= 1 or grows else f"larger than before: {score.size_bytes:,} bytes"
        if score.size < 1:
            return f"larger than the original: {score.size_bytes:,} bytes"
        if candidate.versus_base * smaller < WORTH_KEEPING:
            faster = candidate.versus_base
            return f"does not pay: {faster:.2f} times as fast and {smaller:.2f} times as small as without it"
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


def _interface(model: Model) -> tuple[object, ...]:
    """Names, types and dims of the inputs and outputs. Before IR 4, initializers are listed as inputs and are none."""
    graph = model.proto().graph
    listed = {tensor.name for tensor in graph.initializer} if model.ir_version < 4 else set()
    return (
        [(info.name, info.type.SerializeToString()) for info in graph.input if info.name not in listed],
        [(info.name, info.type.SerializeToString()) for info in graph.output],
    )
