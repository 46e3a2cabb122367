from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import onnx
import pytest

from onnxcomp import Budget, Model, OutputError, Pass, Result, optimize, option
from onnxcomp.ledger import Attempt, PassEntry, StageEntry
from onnxcomp.passes import Changes, Context, find_pass
from onnxcomp.resume import KEPT_DAYS, Finished, cache_folder, run_key
from onnxcomp.run_options import Options
from onnxcomp.stages import Stage
from onnxcomp.targets import find_target, host_target
from onnxcomp.verdict import Kept
from tests.models import assert_same_outputs, external_model, graph_model, mlp_model, random_inputs, random_weights

CALLS: list[str] = []
"""What the test passes were asked to do, in order."""


@dataclass(frozen=True, kw_only=True)
class Mark(Pass):
    """Write a word into the metadata; lossless, so that it is always kept."""

    name: ClassVar[str] = "mark"
    lossless: ClassVar[bool] = True
    word: str = option("", "The word.")

    def rewrite(self, model: Model, context: Context) -> Changes:
        CALLS.append(self.word)
        changes = Changes()
        changes.add("the model", "marked")
        node = model.graph.nodes[0]
        node.name = self.word[: len(node.name)] or node.name  # no larger: the stage would be dropped
        return changes


@dataclass(frozen=True, kw_only=True)
class LossyMark(Mark):
    """The same, without the claim."""

    name: ClassVar[str] = "lossy-mark"
    lossless: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Interrupt(Pass):
    """Stand for Ctrl-C in a long stage, the first time only."""

    name: ClassVar[str] = "interrupt"
    lossless: ClassVar[bool] = True

    def rewrite(self, model: Model, context: Context) -> Changes:
        CALLS.append("interrupt")
        if CALLS.count("interrupt") == 1:
            raise KeyboardInterrupt
        return Changes()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test; the calls start anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    CALLS.clear()
    return tmp_path / "cache" / "onnxcomp" / "runs"


def named_mlp() -> onnx.ModelProto:
    proto = mlp_model((16, 32, 4))
    proto.graph.node[0].name = "first"
    return proto


def run(source: Any = None, *, passes: Sequence[Pass | Stage] | None = None, **options: Any) -> Result:
    """Two stages that end, then one that is interrupted in the first run."""
    passes = passes or [Mark(word="one"), find_pass("quantize-weights")(), Interrupt()]
    return optimize(source or named_mlp(), passes=passes, timing=False, **options)


def interrupted(source: Any = None, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(source, **options)


def resumed_stages(result: Result) -> list[bool]:
    return [stage.resumed for stage in result.report.stages]


def records(cache: Path, pattern: str = "*.json") -> list[Path]:
    return sorted(cache.glob(f"*/{pattern}"))


# --- going on ---------------------------------------------------------------------------------------------------------


def test_goes_on_after_the_finished_stages():
    interrupted()
    assert CALLS == ["one", "interrupt"]

    result = run()

    assert CALLS == ["one", "interrupt", "interrupt"]
    assert resumed_stages(result) == [True, True, False]


def test_the_outcome_is_that_of_a_run_without_an_interruption():
    interrupted()
    resumed = run()
    CALLS[:] = ["interrupt"]

    whole = run()

    assert resumed_stages(whole) == [False, False, False]
    assert resumed.model.digest == whole.model.digest
    for one, other in zip(resumed.report.stages, whole.report.stages, strict=True):
        assert (one.name, one.verdict) == (other.name, other.verdict)
    assert resumed.report.after.size_bytes == whole.report.after.size_bytes


def test_a_finished_stage_keeps_its_entry_in_the_report():
    interrupted()

    entry = run().report.stages[1]

    assert (entry.name, entry.verdict, entry.resumed) == ("quantize-weights", "kept", True)
    assert [change["where"] for change in entry.attempts[0].passes[0].changed] == ["W0", "W1"]


def test_a_stage_that_changed_nothing_is_not_run_again_either():
    passes = [find_pass("simplify")(), Interrupt()]
    interrupted(passes=passes)

    result = run(passes=passes)

    assert [(stage.verdict, stage.resumed) for stage in result.report.stages] == [
        ("unchanged", True),
        ("unchanged", False),
    ]


def test_a_run_that_ends_leaves_nothing_behind(cache: Path):
    interrupted()
    assert len(records(cache)) == 2

    run()

    assert not list(cache.iterdir())


def test_nothing_appears_beside_the_model(tmp_path: Path):
    folder = tmp_path / "models"
    folder.mkdir()
    onnx.save(named_mlp(), folder / "model.onnx")

    interrupted(folder / "model.onnx")

    assert [path.name for path in folder.iterdir()] == ["model.onnx"]


def key(*, digest: str = "model", samples: str = "samples", stages: list[Stage] | None = None, **options: Any) -> str:
    """The key of a run."""
    defaults: dict[str, Any] = {
        **{"budget": Budget(), "metric": None, "target": host_target(), "exclude": (), "force": False},
        **{"time_limit": None, "seed": 0, "threads": 1, "shapes": {}, "keep_debug": False, "timing": True},
        **{"allow_code": False, "resume": True},
    }
    judge: Any = SimpleNamespace(original_digest=digest)
    data: Any = SimpleNamespace(digest=samples)
    return run_key(judge, Options(**{**defaults, **options}), data, stages or [Stage((Mark(word="one"),))])


@pytest.mark.parametrize(
    "other",
    [
        {"digest": "another"},
        {"samples": "others"},
        {"stages": [Stage((Mark(word="two"),))]},
        {"stages": [Stage((Mark(word="one"),), share=0.5)]},
        {"stages": [Stage((Mark(word="one"),)), Stage((Mark(word="one"),))]},
        {"stages": [Stage((Mark(word="one"), Mark(word="one")))]},
        {"budget": Budget(max_drop=0.1)},
        {"target": find_target("web")},
        {"metric": "top1"},
        {"exclude": ("head",)},
        {"force": True},
        {"seed": 1},
        {"threads": 2},
        {"shapes": {"x": (1, 2)}},
        {"keep_debug": True},
        {"timing": False},
    ],
    ids=str,
)
def test_another_command_has_another_key(other: dict[str, Any]):
    assert key(**other) != key()


def test_what_only_shows_progress_is_not_part_of_the_key():
    assert key(progress=print) == key()


def test_without_resume_nothing_is_kept_or_taken_over(cache: Path):
    interrupted(resume=False)
    assert not records(cache)
    CALLS.clear()
    interrupted()

    assert resumed_stages(run(resume=False)) == [False, False, False]


# --- what the result may be used for ----------------------------------------------------------------------------------


def test_a_resumed_model_still_refuses_to_overwrite_its_input(tmp_path: Path):
    path = tmp_path / "model.onnx"
    onnx.save(named_mlp(), path)
    interrupted(path)
    before = path.read_bytes()

    with pytest.raises(OutputError, match="would overwrite the input"):
        run(path).save(path)

    assert path.read_bytes() == before


def test_a_resumed_model_with_external_data_can_be_saved(tmp_path: Path, cache: Path):
    path = external_model(tmp_path)
    passes = [find_pass("quantize-weights")(), Interrupt()]
    interrupted(path, passes=passes)
    assert records(cache, "*.data")
    result = run(path, passes=passes)
    (tmp_path / "out").mkdir()

    result.save(tmp_path / "out" / "model.onnx")

    assert resumed_stages(result) == [True, False]
    assert not records(cache)
    saved = onnx.load(tmp_path / "out" / "model.onnx")
    assert_same_outputs(result.model, saved, random_inputs(saved), exact=True)


# --- records that cannot be used --------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_model(path: Path) -> None:
    path.with_suffix(".onnx").unlink()


def cut_model(path: Path) -> None:
    cut(path.with_suffix(".onnx"))


def other_fields(path: Path) -> None:
    saved = json.loads(path.read_text())
    saved["entry"]["mood"] = "good"
    path.write_text(json.dumps(saved))


def no_fields(path: Path) -> None:
    path.write_text("[]")


def kept_one() -> Kept:
    """After one stage that changed the model."""
    model = Model.load(named_mlp())
    passes = [PassEntry("mark", {"word": "one"}, [{"where": "the model", "what": "marked"}])]
    entry = StageEntry("mark", "kept", "smaller", 1.5, [Attempt(passes, "kept", "smaller", 1.5, drop_interval=None)])
    return Kept.start(model).after(model, entry, Stage((LossyMark(),)))


def test_a_stored_stage_is_loaded_as_it_was():
    kept = kept_one()
    Finished("k").store(0, kept)

    loaded = Finished("k").load(0)

    assert loaded is not None
    model, entry = loaded
    assert model is not None
    assert (model.digest, entry) == (kept.model.digest, kept.stages[0])


@pytest.mark.parametrize("damage", [cut, lose_model, cut_model, other_fields, no_fields, Path.unlink])
def test_a_damaged_record_is_ignored(cache: Path, damage: Callable[[Path], None]):
    Finished("k").store(0, kept_one())
    damage(records(cache)[0])

    assert Finished("k").load(0) is None


def test_what_follows_a_damaged_record_runs_again(cache: Path):
    interrupted()
    cut(records(cache)[0])

    result = run()

    assert resumed_stages(result) == [False, False, False]
    assert [stage.verdict for stage in result.report.stages] == ["kept", "kept", "unchanged"]


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(cache: Path):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")

    interrupted()

    assert resumed_stages(run()) == [False, False, False]


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_cache_is_where_the_desktop_standard_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert cache_folder() == tmp_path / "there" / "onnxcomp"

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "onnxcomp"


def test_a_cache_folder_that_is_not_absolute_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "onnxcomp"


def test_a_user_without_a_home_folder_gets_a_result_and_nothing_is_kept(monkeypatch):
    def homeless() -> Path:
        message = "Could not determine home directory."
        raise RuntimeError(message)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert optimize(mlp_model(), timing=False).report.stages
    with pytest.raises(OutputError, match="there is no home folder to keep files in; set XDG_CACHE_HOME to a folder"):
        cache_folder()


def test_what_nobody_came_back_for_is_removed_after_a_week(cache: Path):
    interrupted()
    [folder] = cache.iterdir()
    recent = time.time() - (KEPT_DAYS - 1) * 86400
    os.utime(folder, (recent, recent))
    Finished(None)
    assert folder.exists()

    old = time.time() - (KEPT_DAYS + 1) * 86400
    os.utime(folder, (old, old))
    Finished(None)

    assert not folder.exists()


def test_every_field_of_an_entry_survives_the_file(cache: Path):
    interrupted()
    saved = json.loads(records(cache)[1].read_text())["entry"]

    entry = run().report.stages[1]

    assert {**dataclasses.asdict(entry), "resumed": False} == saved


def test_a_stage_that_the_time_limit_skipped_is_not_remembered(cache: Path):
    kept = Kept.start(Model.load(named_mlp())).with_entry(
        StageEntry("mark", "skipped", "the time limit was reached", 0.0)
    )

    Finished("k").store(0, kept)

    assert not records(cache)


def test_a_model_with_a_loop_is_taken_over_whole():
    proto = graph_model(
        """g (float[N, 16] first) => (float[N, 32] y) {
            [first] h = MatMul(first, W)
            go = Constant<value = bool {1}>()
            two = Constant<value_int = 2>()
            y = Loop(two, go, h) <
                body = turn (int64 i, bool b, float[N, 32] c) => (bool a, float[N, 32] d) {
                    a = Identity(b)
                    d = Add(c, c)
                }
            >
        }""",
        W=random_weights(16, 32),
    )
    interrupted(proto)

    resumed = run(proto)

    assert resumed_stages(resumed) == [True, True, False]
    onnx.checker.check_model(resumed.model.to_proto(), full_check=True)
