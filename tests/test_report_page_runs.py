"""The report's page in a real browser, opened from disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, sync_playwright

from onnxcomp.compared import Comparisons
from onnxcomp.ledger import PassEntry, Report
from onnxcomp.report.page import write_page
from tests.graphs import graph_of
from tests.reports import detail, large_report, layer, sample_report
from tests.test_demo_runs import CHROMIUM, QUIET
from tests.test_report_page import hostile_report

pytestmark = pytest.mark.slow

AXE = "axe-core@4.14.1"
AXE_SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"
ROWS_A_PAGE = 25
PAPER = 718
"""CSS pixels between the margins of A4."""

WHOLE_SECONDS = 5
"""In which a page of 20,000 layers is there, sorted and searched."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not Path(CHROMIUM).exists():
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def full_report() -> Report:
    """A report with something for each chart and table."""
    names = [f"/features/{index}/Conv" for index in range(60)]
    layers = [
        layer(
            name,
            error=index / 100,
            weight_bytes_before=1000 + index,
            reason="its bias is float" if index == 7 else None,
            detail=None if index % 10 == 8 else detail(),
        )
        for index, name in enumerate(names)
    ]
    report = sample_report(layers=layers)
    curves = {
        "title": "accuracy against sparsity",
        "columns": ["weight", "error at 50%", "error at 75%", "error at 90%"],
        "rows": [[name, 0.01 * index, 0.02 * index, 0.04 * index] for index, name in enumerate(names[:4])],
    }
    report.stages[-1].attempts[-1].passes.append(PassEntry("prune", {}, tables=[curves], notes=["a note"]))
    report.stages[-1].attempts[0].drop = 0.4
    return report


@pytest.fixture
def shown(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Opens a report's or comparison's page from disk; it must say nothing and ask for nothing but itself."""
    contexts: list[BrowserContext] = []
    said: list[str] = []
    asked: list[str] = []
    path = tmp_path / "report.html"

    def show(report: Report | Comparisons, **options: Any) -> Page:
        write_page(report, path)
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]")
        return page

    yield show
    for context in contexts:
        context.close()
    assert said == []
    assert set(asked) == {path.as_uri()}


def column(page: Page, key: str) -> list[str]:
    """The cells of a column of the table of layers, by its title."""
    place = page.locator("#table thead th").evaluate_all(
        "(cells, key) => cells.findIndex(c => c.dataset.key === key)", key
    )
    return page.locator(f"#table tbody tr > :nth-child({place + 1})").all_inner_texts()


def header(page: Page, title: str) -> Any:
    return page.locator("#table thead").get_by_role("button", name=title, exact=True)


# --- charts -----------------------------------------------------------------------------------------------------------


def test_every_chart_has_drawn_a_mark_for_each_thing_that_it_shows(shown):
    page = shown(full_report())
    marks = [
        (figure.get_attribute("data-chart"), figure.locator("canvas").get_attribute("data-marks"))
        for figure in page.locator("figure").all()
    ]
    # Two candidates, the original, the result, the budget's two ends, and a front of three; five operators twice.
    assert marks == [("candidates", "9"), ("candidates", "9"), ("operators", "10"), ("time", "3"), ("curves", "12")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_chart_has_ink_in_the_colours_of_the_scheme(shown, scheme):
    page = shown(full_report(), color_scheme=scheme)
    inked = page.locator("canvas").evaluate_all(
        """canvases => canvases.map(canvas => {
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return pixels.filter((_, index) => index % 4 === 3 && pixels[index] > 200).length;
        })"""
    )
    assert len(inked) == 5
    assert min(inked) > 500


def test_the_charts_follow_a_change_of_the_colour_scheme(shown):
    page = shown(full_report(), color_scheme="light")
    shot = "document.querySelector('canvas').toDataURL()"
    light = page.evaluate(shot)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"light => {shot} !== light", arg=light)


def test_a_loss_far_over_the_budget_is_drawn_at_the_edge_and_told(shown):
    page = shown(full_report())
    hint = page.locator('figure[data-chart="candidates"] .hint').first.inner_text()
    assert hint == "1 with more than 0.020 is drawn at the upper edge, as a triangle."


def test_what_is_printed_has_room_on_paper_with_the_names_of_layers_in_few_lines(shown):
    text = "from before: 100% of the noise, by /blocks/blocks.2/attention/Mul_1_output_0 (15.3 dB)"
    names = [f"/blocks/blocks.{index}/attention/project/MatMul" for index in range(5)]
    layers = [layer(name, cause=text, rank=[8], detail=detail()) for name in names]
    page = shown(sample_report(layers=layers), viewport={"width": PAPER, "height": 1000})
    page.locator(".opener").first.click()
    page.emulate_media(media="print")

    page.wait_for_function(f"() => document.documentElement.scrollWidth <= {PAPER}", timeout=5000)
    heights = page.locator("#table tbody tr.opens th .opener").evaluate_all("all => all.map(one => one.offsetHeight)")
    assert max(heights) < 60


# --- the table of layers ----------------------------------------------------------------------------------------------


def test_the_worst_layers_come_first_a_page_at_a_time(shown):
    page = shown(full_report())
    errors = [float(text.removesuffix("%")) for text in column(page, "error")]
    assert errors == [float(number) for number in range(59, 59 - ROWS_A_PAGE, -1)]
    assert page.inner_text("#count").startswith("Rows 1 to 25 of ")


def test_a_layer_whose_error_is_infinite_comes_first_and_leaves_the_other_bars_as_they_are(shown):
    lost = layer("lost", error=None, sqnr_db=None)
    page = shown(sample_report(layers=[layer("half", error=0.1), lost, layer("worst", error=0.2)]))
    assert column(page, "error")[:3] == ["infinite", "20.00%", "10.00%"]
    widths = page.locator("#table .meter.error").evaluate_all("meters => meters.map(one => one.style.width)")
    assert widths == ["100%", "100%", "50%"]


def test_a_header_sorts_and_sorts_the_other_way_when_pressed_again(shown):
    page = shown(full_report())
    header(page, "Layer").click()
    first = column(page, "layer")
    header(page, "Layer").click()

    assert first == sorted(first)
    assert column(page, "layer")[0] == "bn1" or column(page, "layer")[0].startswith("node")
    assert page.locator('#table th[data-key="layer"]').get_attribute("aria-sort") == "descending"
    assert page.locator("#table th[aria-sort]").count() == 1


def test_searching_shows_the_rows_that_have_every_word(shown):
    page = shown(full_report())
    page.fill("#search", "bias FLOAT")
    assert column(page, "layer") == ["/features/7/Conv"]
    page.fill("#search", "no such thing")
    assert page.inner_text("#count").startswith("None of ")


def test_only_layers_that_were_left_can_be_shown(shown):
    page = shown(full_report())
    page.select_option("#filter", "left")
    assert set(column(page, "layer")) == {"/head/Gemm", *(f"node{index}" for index in range(5))}


def test_the_table_is_worked_with_the_keyboard_alone(shown):
    page = shown(full_report())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("#search").focus()
    page.keyboard.type("features/1")
    assert len(column(page, "layer")) == 11
    header(page, "Bytes before").focus()
    page.keyboard.press("Enter")
    assert column(page, "layer")[0] == "/features/19/Conv"
    page.locator("#search").focus()
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    page.locator("#following").focus()
    page.keyboard.press("Space")
    assert page.inner_text("#page").startswith("Page 2 of ")


def test_20000_layers_are_there_sorted_and_searched_in_5_seconds(shown):
    report = large_report(20_000)
    path_clock = "performance.now()"
    page = shown(report)
    header(page, "Layer").click()
    page.fill("#search", "layers.2499 block.7")
    assert column(page, "layer") == ["/encoder/layers.2499/block.7/attention/query/MatMul"]
    assert page.evaluate(path_clock) < WHOLE_SECONDS * 1000  # since the page was opened


# --- the panel of a layer ---------------------------------------------------------------------------------------------


def opened(page: Page, name: str = "/features/59/Conv") -> Locator:
    """The panel of a layer, once its name was pressed."""
    page.get_by_role("button", name=name, exact=True).click()
    return page.locator("#panel")


def test_a_click_on_a_layer_shows_its_charts_with_every_mark(shown):
    page = shown(full_report())
    assert page.locator("#panel").count() == 0

    panel = opened(page)
    marks = [
        (figure.get_attribute("data-chart"), figure.locator("canvas").get_attribute("data-marks"))
        for figure in panel.locator("figure").all()
    ]
    # 28 bins of each model; a range that was seen and one of a scale; 24 values and the two ends of the rank's line.
    assert marks == [("histogram", "56"), ("ranges", "2"), ("ranges", "1"), ("singular", "26")]
    assert page.locator("#table tbody tr.panel").evaluate(
        "row => row.previousSibling.querySelector('.opener').textContent"
    ) == ("/features/59/Conv")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_charts_of_a_panel_have_ink_in_both_schemes(shown, scheme):
    page = shown(full_report(), color_scheme=scheme)
    inked = (
        opened(page)
        .locator("canvas")
        .evaluate_all(
            """canvases => canvases.map(canvas => {
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return pixels.filter((_, index) => index % 4 === 3 && pixels[index] > 200).length;
        })"""
        )
    )
    assert len(inked) == 4
    assert min(inked) > 500


def test_the_figures_of_a_panel_are_there_as_text(shown):
    panel = opened(shown(full_report()))
    panel.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")

    sizes = panel.locator(".scroll").evaluate_all("all => all.map(one => [one.scrollWidth, one.clientWidth])")
    assert all(whole <= seen for whole, seen in sizes)
    counts = panel.locator('figure[data-chart="histogram"] tbody tr').all_inner_texts()
    assert len(counts) == 28
    assert counts[1].split() == ["-0.48", "-0.44", "28", "27"]
    hints = panel.locator("figure > .hint").all_inner_texts()
    assert hints[1] == "256 codes (uint8), 0.02344 apart, zero point 0; a line of the grid every 32."
    assert hints[2].startswith("No scale was chosen for it")
    assert "the last bar have those beyond them too" in hints[0]
    assert "8 of 24" in hints[3]


def test_a_panel_is_opened_and_closed_with_the_keyboard(shown):
    page = shown(full_report())
    button = page.get_by_role("button", name="/features/58/Conv", exact=True)
    assert button.count() == 0  # nothing was looked at there
    button = page.get_by_role("button", name="/features/57/Conv", exact=True)
    assert button.get_attribute("aria-expanded") == "false"

    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    assert page.locator(f"#{button.get_attribute('aria-controls')}").count() == 1
    assert button.evaluate("one => one === document.activeElement")
    page.locator("#panel summary").first.focus()
    page.keyboard.press("Escape")

    assert page.locator("#panel").count() == 0
    assert button.get_attribute("aria-expanded") == "false"
    assert button.evaluate("one => one === document.activeElement")


def test_one_panel_is_open_at_a_time_and_its_row_closes_it(shown):
    page = shown(full_report())
    opened(page)
    panel = opened(page, "/features/57/Conv")
    assert panel.count() == 1
    assert panel.locator(".title strong").inner_text() == "/features/57/Conv"
    assert page.locator('[aria-expanded="true"]').count() == 1

    page.locator("#table tbody tr", has_text="/features/57/Conv").first.locator("td").nth(1).click()
    assert panel.count() == 0


def test_a_panel_stays_with_its_layer_while_the_table_is_sorted_and_searched_and_goes_with_its_page(shown):
    page = shown(full_report())
    panel = opened(page, "/features/50/Conv")
    header(page, "Bytes before").click()
    page.fill("#search", "features/5")

    assert panel.locator(".title strong").inner_text() == "/features/50/Conv"
    assert page.locator("#table tbody tr.panel").evaluate(
        "row => row.previousSibling.querySelector('.opener').textContent"
    ) == ("/features/50/Conv")
    assert page.get_by_role("button", name="/features/50/Conv", exact=True).get_attribute("aria-expanded") == "true"
    page.fill("#search", "features/4")
    assert panel.count() == 0


def test_the_close_button_leads_back_to_the_layer(shown):
    page = shown(full_report())
    opened(page).get_by_role("button", name="Close").click()
    assert page.locator("#panel").count() == 0
    assert page.evaluate("document.activeElement.textContent") == "/features/59/Conv"


def test_the_charts_of_a_panel_follow_the_scheme_and_are_dropped_with_it(shown):
    page = shown(full_report(), color_scheme="light")
    others = page.evaluate("drawn.length")
    opened(page)
    shot = "document.querySelector('#panel canvas').toDataURL()"
    light = page.evaluate(shot)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"light => {shot} !== light", arg=light)

    page.keyboard.press("Escape")
    page.emulate_media(color_scheme="light")
    assert page.evaluate("drawn.length") == others == page.locator("figure[data-chart]").count()


@pytest.mark.parametrize("width", [320, 1280])
def test_the_panel_of_a_hostile_layer_does_nothing_and_fits(shown, width):
    page = shown(hostile_report(), viewport={"width": width, "height": 700})
    page.locator(".opener").first.click()

    panel = page.locator("#panel")
    assert panel.locator(".title strong").inner_text().startswith("</script><script>alert(1)</script>")
    assert panel.locator("figure").count() == 4
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 3
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_a_panel_is_as_wide_as_what_is_seen_of_the_table(shown):
    page = shown(full_report(), viewport={"width": 375, "height": 700})
    sheet, seen = opened(page), page.locator(".scroll", has=page.locator("#table"))
    box, around = sheet.bounding_box(), seen.bounding_box()
    assert box is not None
    assert around is not None
    assert abs(box["width"] - around["width"]) <= 2
    seen.evaluate("region => { region.scrollLeft = 300 }")
    moved = sheet.bounding_box()
    assert moved is not None
    assert abs(moved["x"] - around["x"]) <= 2


# --- the graph --------------------------------------------------------------------------------------------------------


def around(page: Page) -> tuple[str, list[str], list[str]]:
    """The node that is shown, what makes what it reads, and what reads what it makes: by operator and name."""
    reads, read_by = page.locator("#around .around > div:not(.chosen)").all()
    buttons = [[text.replace("\n", " ") for text in box.locator(".node").all_inner_texts()] for box in (reads, read_by)]
    return page.inner_text("#around .chosen h4"), buttons[0], buttons[1]


def test_a_node_is_shown_with_what_it_reads_and_what_reads_it(shown):
    page = shown(sample_report())
    assert around(page) == ("conv1", ["DequantizeLinear d0", "DequantizeLinear d1"], ["Relu relu1"])
    told = page.locator("#around .tensor").all_inner_texts()
    assert "from weight: conv1.weight_q int8 (8, 3, 3, 3)" in told
    assert "bn1_out float32 (N, 8, 30, 30)" in told


def test_a_weight_that_is_decoded_in_several_nodes_is_told_with_what_it_comes_from(shown):
    nodes = [
        ("gather", "Gather", ["codebook", "codes"], ["g"]),
        ("shape", "Reshape", ["g", "sizes"], ["r"]),
        ("conv", "Conv", ["x", "r"], ["y"]),
    ]
    constants = {"codebook": "float32 (16,)", "codes": "uint8 (576, 1)", "sizes": "int64 (4,)"}
    graph = graph_of(nodes, constants)
    page = shown(sample_report(graph={"before": graph, "after": graph}))
    assert "through 2 nodes from weight: codes uint8 (576, 1)" in page.locator("#around .tensor").all_inner_texts()


def test_a_neighbour_is_walked_to_and_back_with_the_keyboard(shown):
    page = shown(sample_report())
    page.locator("#around .node").first.focus()
    page.keyboard.press("Enter")
    assert around(page) == ("d0", ["QuantizeLinear q0"], ["Conv conv1"])
    assert page.evaluate("document.activeElement.textContent") == "d0"
    page.locator("#around .back").focus()
    page.keyboard.press("Space")
    assert around(page)[0] == "conv1"
    assert page.locator("#around .back").count() == 0


def test_the_same_node_is_shown_in_the_other_graph(shown):
    page = shown(sample_report())
    page.get_by_role("button", name="Show it in the original").click()
    assert around(page) == ("conv1", [], ["BatchNormalization bn1"])
    assert "weight: conv1.weight float32 (8, 3, 3, 3)" in page.locator("#around .tensor").all_inner_texts()
    assert page.input_value("#node-side") == "before"


def test_a_node_of_another_name_that_writes_the_same_tensor_is_the_same_one(shown):
    page = shown(sample_report())
    page.select_option("#node-side", "before")
    page.fill("#node-search", "normalization")
    page.locator("#node-found .node").click()
    assert "It is a Conv there." in page.inner_text("#around .chosen")
    page.get_by_role("button", name="Show it in the result").click()
    assert around(page)[0] == "conv1"


def test_a_node_that_only_one_graph_has_is_told_to_be_so(shown):
    page = shown(sample_report())
    page.fill("#node-search", "quantizelinear q0")
    page.locator("#node-found .node").click()
    assert "It is not in the original." in page.inner_text("#around .chosen")
    assert "input of the model: x float32 (N, 3, 32, 32)" in page.locator("#around .tensor").all_inner_texts()


def test_searching_nodes_tells_how_many_there_are(shown):
    page = shown(large_report(20))
    page.fill("#node-search", "layers.1 relu")
    assert page.inner_text("#node-count") == "24 found in 100 nodes of the result; the first 12 are shown"
    page.fill("#node-search", "no such thing")
    assert page.inner_text("#node-count") == "0 found in 100 nodes of the result"
    assert page.locator("#node-found .node").count() == 0


def test_a_layer_of_the_table_leads_to_its_node(shown):
    page = shown(large_report(20))
    page.fill("#search", "layers.1/block.3")
    page.get_by_role("button", name="Show /encoder/layers.1/block.3/attention/query/MatMul in the graph").click()
    node, _, readers = around(page)
    assert node == "/encoder/layers.1/block.3/attention/query/MatMul"
    assert readers == ["Relu /encoder/layers.1/block.3/attention/query/Relu"]


def test_a_tensor_that_many_nodes_read_shows_some_of_them_first(shown):
    nodes = [("first", "Conv", ["x"], ["t"]), *((f"r{index}", "Relu", ["t"], [f"y{index}"]) for index in range(40))]
    graph = graph_of(nodes, {}, outputs=["y0"])
    page = shown(sample_report(graph={"before": graph, "after": graph}))
    assert len(around(page)[2]) == 12
    page.get_by_role("button", name="Show 28 more").click()
    assert len(around(page)[2]) == 40
    assert page.evaluate("document.activeElement.textContent") == "Relur12"


def test_names_that_take_two_halves_of_a_letter_are_shown_whole(shown):
    names = ["\U0001f600", "\U0001f600a", "\U0001f601"]
    nodes = [(name, "Conv", [f"t{index}"], [f"t{index + 1}"]) for index, name in enumerate(names)]
    graph = graph_of(nodes, {}, inputs=["t0"], outputs=["t3"])
    page = shown(sample_report(graph={"before": graph, "after": graph}))
    page.fill("#node-search", "conv")
    assert page.locator("#node-found .node").all_inner_texts() == [f"Conv\n{name}" for name in names]


# --- safe, readable, usable -------------------------------------------------------------------------------------------


def test_a_hostile_report_does_nothing(shown):
    page = shown(hostile_report())
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 3
    assert column(page, "layer")[0].startswith("</script><script>alert(1)</script>")


@pytest.mark.parametrize("width", [320, 375, 768])
@pytest.mark.parametrize("report", [full_report, hostile_report])
def test_nothing_sticks_out_on_a_small_screen(shown, report, width):
    page = shown(report(), viewport={"width": width, "height": 700})
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_it_prints_without_what_only_a_screen_can_do(shown):
    page = shown(full_report(), color_scheme="dark")
    page.emulate_media(media="print")
    assert not page.locator(".copy, .tools, .pager").locator("visible=true").count()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_charts_are_printed_in_the_light_colours_and_shown_in_the_dark_ones_again(shown):
    shot = "document.querySelector('canvas').toDataURL()"
    light = shown(full_report(), color_scheme="light").evaluate(shot)
    page = shown(full_report(), color_scheme="dark")
    dark = page.evaluate(shot)

    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    printed = page.evaluate(shot)
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")

    assert printed == light != dark
    assert page.evaluate(shot) == dark


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The accessibility checks of axe-core, fetched from the npm registry."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("there is no npm: apt-get install npm")
    folder = tmp_path_factory.mktemp("axe")
    if subprocess.run([npm, "pack", "--silent", AXE], cwd=folder, stdin=subprocess.DEVNULL).returncode:
        pytest.skip(f"{AXE} cannot be fetched here")
    [archive] = folder.glob("*.tgz")
    shutil.unpack_archive(archive, folder, filter="data")
    text = (folder / "package" / "axe.min.js").read_bytes()
    assert hashlib.sha256(text).hexdigest() == AXE_SHA256
    return text.decode()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_axe_finds_no_violation(shown, axe, scheme, width):
    page = shown(full_report(), color_scheme=scheme, viewport={"width": width, "height": 900})
    opened(page)
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
    page.evaluate(axe)
    found = page.evaluate("axe.run().then(found => found.violations)")
    told = [(one["id"], one["help"], [node["html"] for node in one["nodes"]]) for one in found]
    assert told == [], json.dumps(told, indent=2)
