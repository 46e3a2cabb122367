from __future__ import annotations

import pytest

from onnxcomp.errors import OptionError
from onnxcomp.passes import find_pass
from onnxcomp.stages import Stage, default_stages


def test_without_data_only_passes_that_need_none_run():
    stages = default_stages(data=False)
    assert [stage.name for stage in stages] == ["simplify", "quantize-weights", "float16"]
    assert not any(step.requires for stage in stages for step in stage.passes)


def test_with_data_int8_compute_takes_over_from_int8_storage():
    names = [stage.name for stage in default_stages(data=True)]
    assert names == ["simplify", "quantize-weights", "quantize", "quantize-dynamic", "float16"]


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
