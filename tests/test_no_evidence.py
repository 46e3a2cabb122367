"""Where the original's outputs could not show a loss, nothing that may lose something is kept."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp import compare, optimize
from tests.models import graph_model
from tests.small import classifier

SILENT = {
    "empty": "k = NonZero(o) t = Transpose<perm = [1, 0]>(k) y = GatherND(h, t)",
    "all 0": "n = Abs(h) m = Neg(n) y = Relu(m)",
    "not numbers": "n = Abs(h) m = Neg(n) s = Sub(m, one) y = Log(s)",
    "all false": "n = Abs(h) b = Greater(zero, n) y = Cast<to = 6>(b)",
}


def silent(ends: str):
    """A layer whose output is the same whatever its weight is."""
    kind = "int32" if "Greater" in ends else "float"
    rng = np.random.default_rng(0)
    return graph_model(
        f"g (float[N, 64] x) => ({kind}[A, B] y) {{ h = MatMul(x, W) o = Mul(h, zero) {ends} }}",
        W=rng.normal(size=(64, 64)).astype(np.float32),
        zero=np.zeros(1, np.float32),
        one=np.ones(1, np.float32),
    )


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("ends", [pytest.param(ends, id=name) for name, ends in SILENT.items()])
def test_weights_are_not_rounded_where_no_output_could_show_it(ends):
    report = optimize(silent(ends), timing=False).report

    [entry] = [entry for entry in report.stages if entry.name == "quantize-weights"]
    assert (entry.verdict, entry.reason) == (
        "skipped",
        "the model's outputs are empty, all 0 or not numbers on these samples, so no loss can be measured",
    )
    assert any("so these cannot show a loss; give --data" in told for told in report.warnings)


def test_a_comparison_says_that_no_loss_can_show():
    found = compare(silent(SILENT["all 0"]), silent(SILENT["all 0"]), timing=False)

    assert "the original's outputs are empty, all 0 or not numbers, so no loss can show" in found.warnings


def test_a_comparison_of_outputs_that_show_a_loss_does_not():
    assert not any("loss can show" in told for told in compare(classifier(), classifier(), timing=False).warnings)
