"""The page of a comparison in a real browser, opened from disk."""

from __future__ import annotations

import json

import pytest

from onnxcomp.compared import Comparisons
from tests.comparisons import candidate, sample_comparison
from tests.reports import detail, layer
from tests.test_comparison_page import hostile_comparison
from tests.test_report_page_runs import PAPER, axe, browser, column, shown

__all__ = ["axe", "browser", "shown"]  # fixtures

pytestmark = pytest.mark.slow

WHOLE_SECONDS = 5


def many(count: int) -> Comparisons:
    """More models than there are colours."""
    return sample_comparison(*(candidate(f"{number}.onnx", speed=1 + number / 10) for number in range(count)))


def test_each_model_is_a_mark_of_its_own_beside_the_original_the_front_and_the_budget(shown):
    page = shown(sample_comparison())
    marks = [canvas.get_attribute("data-marks") for canvas in page.locator("canvas").all()]
    # Three models, the original, the budget's two ends, and a front of two; by size the third is not beaten either.
    assert marks == ["8", "9"]
    assert page.evaluate("drawn[0].data.datasets.map(set => set.label)") == [
        "int8.onnx",
        "half.onnx",
        "pruned.onnx",
        "original",
        "not beaten in both",
        "budget 0.005",
    ]


def test_what_is_over_the_budget_is_not_filled_and_beyond_the_edge_a_triangle(shown):
    page = shown(sample_comparison())
    sets = page.evaluate("drawn[0].data.datasets.slice(0, 3).map(set => [set.backgroundColor, set.pointStyle])")
    assert [fill == "transparent" for fill, _ in sets] == [False, False, True]
    assert [style for _, style in sets] == ["circle", "rect", "triangle"]
    assert page.locator(".hint").first.inner_text() == (
        "1 with more than 0.020 is drawn at the upper edge, as a triangle."
    )


def test_more_models_than_colours_are_told_apart_by_the_budget_alone(shown):
    page = shown(many(30))
    labels = page.evaluate("drawn[0].data.datasets.map(set => set.label)")
    assert labels[:2] == ["inside the budget", "over the budget"]
    assert page.locator("canvas").first.get_attribute("data-marks") == str(30 + 1 + 2 + 2)


def test_the_layers_of_one_model_can_be_shown_alone(shown):
    page = shown(sample_comparison())
    assert column(page, "model") == ["pruned.onnx", "int8.onnx", "int8.onnx"]
    page.select_option("#filter", "model=int8.onnx")
    assert column(page, "model") == ["int8.onnx", "int8.onnx"]
    page.fill("#search", "conv2")
    assert column(page, "layer") == ["conv2"]


def test_a_layer_of_one_model_has_a_panel_that_names_both(shown):
    layers = [layer("conv1", error=0.2, detail=detail()), layer("conv2", error=0.3)]
    page = shown(sample_comparison(candidate("a.onnx"), candidate("b.onnx", layers=layers)))
    page.locator(".opener").click()
    assert page.locator("#panel .title strong").inner_text() == "conv1, b.onnx"
    assert all(int(canvas.get_attribute("data-marks") or 0) for canvas in page.locator("#panel canvas").all())
    assert page.locator("#panel canvas").count() == 4


def test_what_is_printed_has_room_on_paper(shown):
    page = shown(sample_comparison(), viewport={"width": PAPER, "height": 1000})
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER


def test_10000_layers_of_five_models_are_there_in_5_seconds(shown):
    models = [
        candidate(
            f"{number}.onnx", layers=[layer(f"/block.{index}/MatMul", error=index / 2000) for index in range(2000)]
        )
        for number in range(5)
    ]
    page = shown(sample_comparison(*models))
    page.select_option("#filter", "model=3.onnx")
    assert page.inner_text("#count") == "Rows 1 to 25 of 2,000 found in 10,000"
    assert page.evaluate("performance.now()") < WHOLE_SECONDS * 1000


def test_a_hostile_comparison_does_nothing(shown):
    page = shown(hostile_comparison())
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 3
    page.select_option("#filter", index=1)
    assert column(page, "layer")[0].startswith("</script><script>alert(1)</script>")


@pytest.mark.parametrize("width", [320, 375, 768])
@pytest.mark.parametrize("found", [sample_comparison(), sample_comparison(candidate()), hostile_comparison()])
def test_nothing_sticks_out_on_a_small_screen(shown, found, width):
    page = shown(found, viewport={"width": width, "height": 700})
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("found", [sample_comparison(), sample_comparison(candidate())])
def test_axe_finds_no_violation(shown, axe, scheme, width, found):
    page = shown(found, color_scheme=scheme, viewport={"width": width, "height": 900})
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
    page.evaluate(axe)
    violations = page.evaluate("axe.run().then(found => found.violations)")
    told = [(one["id"], one["help"], [node["html"] for node in one["nodes"]]) for one in violations]
    assert told == [], json.dumps(told, indent=2)
