"""The demo page, built as its README says and used in a real browser."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.deployed import fashion_images, first_outputs, on_host
from tests.markdown import ROOT, shell_commands
from tests.models import Array

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCORES = 1e-4
"""How far the logits (up to 4) may be from ONNX Runtime's in Python: some hundred float32 roundings."""

UNSHIPPED = 100
"""Of the test images, one that the page does not have."""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that the README's command makes."""
    folder = tmp_path_factory.mktemp("demo")
    [words] = [command.words for command in shell_commands("docs/demo/README.md") if "build.py" in command.line]
    command = [{"python": sys.executable, "demo-site": str(folder / "site")}.get(word, word) for word in words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        subprocess.run(command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    return folder / "site"


@pytest.fixture
def address(site) -> Iterator[str]:
    """Where the folder is served."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not Path(CHROMIUM).exists():
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address) -> Iterator[Page]:
    """The page, loaded; in the end it must have said nothing and asked no other host for anything."""
    context = browser.new_context(viewport={"width": 320, "height": 640})
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    context.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    wait(page, 1)
    yield page
    context.close()
    assert said == []
    assert "model.onnx" in [urlsplit(url).path.rpartition("/")[2] for url in asked]
    assert {urlsplit(url).hostname for url in asked} == {"127.0.0.1"}


def wait(page: Page, done: int) -> None:
    """Wait for the result of the classification of this number."""
    page.wait_for_selector(f'body[data-done="{done}"]')


def scores(page: Page) -> Array:
    rows = page.locator("#bars tr").all()
    return np.array([float(row.get_attribute("data-score") or "nan") for row in rows])


def python_scores(site: Path, image: Array) -> Array:
    scores: Array = first_outputs(on_host(site / "model.onnx", [{"image": image.reshape(1, 1, 28, 28)}]))[0]
    return scores


def assert_shows(page: Page, wanted: Array, classes: list[str]) -> None:
    np.testing.assert_allclose(scores(page), wanted, rtol=0, atol=SCORES)
    shares = np.exp(wanted - wanted.max()) / np.exp(wanted - wanted.max()).sum()
    best = int(wanted.argmax())
    assert page.inner_text("#verdict") == f"{classes[best]}, {100 * shares[best]:.1f} %"
    assert page.locator("#bars tr.best th").inner_text() == classes[best]
    shown = [float(text.removesuffix(" %")) for text in page.locator("#bars .number").all_inner_texts()]
    np.testing.assert_allclose(shown, 100 * shares, rtol=0, atol=0.051)


def test_each_shipped_image_gets_the_scores_that_python_gets(page, site):
    facts = json.loads((site / "demo.json").read_text(encoding="utf-8"))

    for number, sample in enumerate(facts["samples"]):
        page.locator("#samples button").nth(number).click()
        wait(page, number + 2)  # the page starts with the last one
        pixels = np.asarray(Image.open(site / sample["file"]), np.float32) / np.float32(255)
        assert_shows(page, python_scores(site, pixels), facts["classes"])
        assert page.inner_text("#truth") == f"It is labelled: {sample['label']}"

    assert float(page.inner_text("#time").removesuffix(" ms")) > 0
    assert page.inner_text("#size") == f"{round((site / 'model.onnx').stat().st_size / 1000)} kB"
    assert page.inner_text("#before") == "755 kB"


@pytest.mark.parametrize("inverted", [False, True])
def test_an_image_of_ones_own_is_made_what_the_model_wants(page, site, tmp_path, inverted):
    image = fashion_images(UNSHIPPED + 1)[UNSHIPPED, 0]
    pixels = np.round(image * 255).astype(np.uint8)
    Image.fromarray(255 - pixels if inverted else pixels).save(tmp_path / "own.png")
    classes = json.loads((site / "demo.json").read_text(encoding="utf-8"))["classes"]

    page.set_input_files("#file", tmp_path / "own.png")
    wait(page, 2)

    assert page.is_checked("#invert") == inverted
    assert_shows(page, python_scores(site, image), classes)
    page.click("#invert")
    wait(page, 3)
    assert_shows(page, python_scores(site, (255 - pixels) / np.float32(255)), classes)


def test_a_large_photo_is_shrunk_whole(page, tmp_path):
    photo = Image.new("RGB", (600, 1000), "white")
    photo.paste("navy", (150, 0, 450, 1000))
    photo.save(tmp_path / "photo.jpg")

    page.set_input_files("#file", tmp_path / "photo.jpg")
    wait(page, 2)

    row = page.evaluate("Array.from(document.getElementById('seen').getContext('2d').getImageData(0, 14, 28, 1).data)")
    brightness = np.array(row).reshape(28, 4)[:, 0]
    assert (brightness > 200).sum() in range(7, 11)  # 300 of the 1000 pixels of the longer side, on 28
    assert (brightness < 60).sum() in range(17, 21)


def test_a_file_that_is_no_image_is_told_and_the_result_stays(page, tmp_path):
    (tmp_path / "note.txt").write_text("no image")
    before = page.inner_text("#verdict")

    page.set_input_files("#file", tmp_path / "note.txt")
    page.wait_for_selector("#problem:visible")

    assert page.inner_text("#problem") == "note.txt cannot be read as an image; choose a PNG, JPEG or WebP."
    assert page.inner_text("#verdict") == before


def test_everything_can_be_reached_with_the_keyboard(page):
    focused = "document.activeElement.id || document.activeElement.title"
    reached = []
    for _ in range(11):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(focused))
        if len(reached) == 3:
            page.keyboard.press("Enter")
            wait(page, 2)

    assert page.inner_text("#truth") == "It is labelled: Pullover"
    assert page.locator('#samples button[aria-pressed="true"]').get_attribute("title") == "Pullover"
    assert reached[0] == "T-shirt or top"
    assert reached[-1] == "file"


def test_nothing_sticks_out_on_a_small_phone(page):
    assert page.evaluate("document.documentElement.scrollWidth") == 320


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_background_are_far_enough_apart(page, scheme):
    page.emulate_media(color_scheme=scheme)
    script = """name => { const style = getComputedStyle(document.querySelector(name));
        return [style.color, style.backgroundColor].map(text => text.match(/[\\d.]+/g).slice(0, 3).map(Number)) }"""
    [text, background] = page.evaluate(script, "body")
    [soft, _] = page.evaluate(script, ".hint")
    [_, card] = page.evaluate(script, ".card")
    [button, on] = page.evaluate(script, ".button")

    assert contrast(text, background) > 7  # WCAG AAA
    assert contrast(soft, card) > 4.5  # WCAG AA
    assert contrast(button, on) > 4.5
    assert (sum(background) > sum(text)) == (scheme == "light")


def contrast(one: list[float], other: list[float]) -> float:
    """The contrast of two sRGB colours as WCAG 2 has it."""

    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colour) / 255]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)


def test_a_page_that_was_not_built_says_so(browser, address, site):
    page = browser.new_page()
    page.route("**/demo.json", lambda route: route.fulfill(status=404))
    page.goto(address)
    page.wait_for_selector("#problem:visible")

    assert page.inner_text("#problem") == "demo.json: the server answered 404; was the page built?"
    assert page.inner_text("#verdict") == "It does not run here."
    page.close()
