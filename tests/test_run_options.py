"""Options of `optimize` that make no sense are refused before any work, and none is taken for another."""

from __future__ import annotations

from typing import Any

import pytest

from onnxcomp import optimize
from onnxcomp.errors import OptionError
from onnxcomp_passes import QuantizeWeights
from tests.small import classifier


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.01}, r"budget must be a Budget, such as Budget\(max_drop=0\.01\), got 0\.01"),
        ({"exclude": [3]}, r"exclude must be a list of patterns of node names, got \[3\]"),
        ({"time_limit": 0}, "time_limit must be a number of seconds above 0, got 0"),
        ({"time_limit": float("nan")}, "time_limit must be a number of seconds above 0, got nan"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        optimize("there is no such model", **options)


def test_an_excluded_text_is_one_pattern_and_not_one_for_each_letter():
    passes = [QuantizeWeights(min_elements=1)]
    report = optimize(classifier(), passes=passes, exclude="none*", force=True, timing=False).report
    left = report.stages[0].attempts[0].passes[0].left
    assert [each["where"] for each in left if each["why"] == "excluded"] == []
