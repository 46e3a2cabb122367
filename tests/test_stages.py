from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from onnxcomp import optimize
from onnxcomp.errors import OptionError
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass, find_pass
from onnxcomp.stages import Stage, default_stages, joined
from tests.small import save_classifier


def test_without_data_only_passes_that_need_none_run():
    stages = default_stages(data=False)
    assert [stage.name for stage in stages] == ["simplify", "quantize-weights", "float16", "prune + cluster + pack"]
    assert not any(step.requires for stage in stages for step in stage.passes)


def test_with_data_int8_compute_takes_over_from_int8_storage():
    names = [stage.name for stage in default_stages(data=True)]
    assert names == [
        "simplify",
        "quantize-weights",
        "quantize",
        "quantize-dynamic",
        "float16",
        "prune + cluster + pack",
    ]


def test_is_named_after_its_passes():
    passes = tuple(find_pass(name)() for name in ("simplify", "quantize-weights"))
    assert Stage(passes).name == "simplify + quantize-weights"


@pytest.mark.parametrize("share", [0, -0.5, 1.01, "half", True, float("nan")])
def test_refuses_a_share_outside_0_to_1(share):
    with pytest.raises(OptionError, match="share of a stage must be above 0 and at most 1"):
        Stage((find_pass("simplify")(),), share)


def test_refuses_a_stage_without_passes():
    with pytest.raises(OptionError, match="at least one pass"):
        Stage(())


def test_refuses_a_class_where_a_pass_is_wanted():
    with pytest.raises(OptionError, match=r"as in Simplify\(\)"):
        Stage((find_pass("simplify"),))  # type: ignore[arg-type]


# --- passes that pay only together ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shave(Pass):
    """Pays with "Press"."""

    name: ClassVar[str] = "shave"
    pays_with: ClassVar[str] = "press"

    def rewrite(self, model: Model, context: Context) -> Changes:
        return Changes()


@dataclass(frozen=True, kw_only=True)
class Press(Shave):
    """Pays by itself."""

    name: ClassVar[str] = "press"
    pays_with: ClassVar[str] = ""


SIMPLIFY = find_pass("simplify")()


@pytest.mark.parametrize(
    ("items", "names"),
    [
        ([Shave(), Press()], ["shave + press"]),
        (
            [SIMPLIFY, Shave(), SIMPLIFY, Shave(), Press(), SIMPLIFY],
            ["simplify", "shave + simplify + shave + press", "simplify"],
        ),
        ([Press(), Shave()], ["press", "shave"]),
        ([Shave(), Press(), Shave(), Press()], ["shave + press", "shave + press"]),
        ([Shave(), Stage((SIMPLIFY,)), Press()], ["shave", "simplify", "press"]),
        ([Shave(), Stage((Press(),))], ["shave", "press"]),
        ([], []),
    ],
)
def test_a_pass_is_judged_with_the_one_that_it_pays_with(items: list[Pass | Stage], names: list[str]):
    assert [stage.name for stage in joined(items)] == names


def test_stages_keep_their_share():
    stage = Stage((Shave(), Press()), 0.4)
    assert joined([stage]) == [stage]


def test_passes_given_one_by_one_are_joined_in_a_run(tmp_path: Path):
    source = save_classifier(tmp_path / "model.onnx")
    result = optimize(source, passes=[Shave(), Press(), SIMPLIFY], timing=False)
    assert [stage.name for stage in result.report.stages] == ["shave + press", "simplify"]
