"""Reports to look at: docs/gallery/, made of the sample models and of a detector out of a Python package.

    python -m benchmarks.gallery [--cache DIR] [NAME...]
    python -m benchmarks.gallery --screenshot

Runs the main job with default settings, in a folder of its own, so that the pages name files as a user would. The
MobileNet is judged by labelled test images, the others by samples without labels. `--screenshot` takes the picture of
one page; it needs playwright and a chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.package_inputs import prepare

FOLDER = Path(__file__).resolve().parent.parent
SAMPLES = FOLDER / "sample_models"
GALLERY = FOLDER / "docs" / "gallery"
PACKAGED = {"yolov8n": "nudenet YOLOv8n"}
"""Page -> model of `package_models`."""
NAMES = ("fashion_lenet", "fashion_mobilenet", "fashion_vit", *PACKAGED)
SHOWN = "fashion_mobilenet"
LABELLED = {"fashion_mobilenet"}
BEGIN, END = "<!-- pages -->\n", "<!-- end of the pages -->\n"


def make_page(name: str, cache: Path) -> None:
    """Optimize a model and write its page to the gallery.

    Raises:
        CalledProcessError: The command failed.
    """
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as temporary:
        work = Path(temporary)
        if name in PACKAGED:
            model, data, _ = prepare(PACKAGED[name], cache)
            given = ["--data", "photographs.npz"]
        elif name in LABELLED:
            model, data = SAMPLES / f"{name}.onnx", SAMPLES / "fashion_test.npz"
            given = ["--data", "fashion_test.npz", "--metric", "top1", "--max-drop", "0.5%"]
        else:
            model, data = SAMPLES / f"{name}.onnx", SAMPLES / "fashion_calib.npz"
            given = ["--data", "fashion_calib.npz"]
        shutil.copyfile(model, work / f"{name}.onnx")
        shutil.copyfile(data, work / given[1])
        command = [sys.executable, "-m", "onnxcomp", "optimize", f"{name}.onnx", *given, "-o", f"{name}.small.onnx"]
        command += ["--report", f"{name}.html", "--json", f"{name}.json", "-q", "--no-resume"]
        subprocess.run(command, check=True, cwd=work)
        GALLERY.mkdir(exist_ok=True)
        shutil.copyfile(work / f"{name}.html", GALLERY / f"{name}.html")
        write_row(name, json.loads((work / f"{name}.json").read_text())["verdict"])


def write_row(name: str, verdict: str) -> None:
    """Put a page's verdict into the gallery's README."""
    path = GALLERY / "README.md"
    head, _, rest = path.read_text().partition(BEGIN)
    rows, _, tail = rest.partition(END)
    table = {row.split("](")[0]: row for row in rows.splitlines() if row.startswith("| [")}
    table[f"| [{name}"] = f"| [{name}]({name}.html) | {verdict} |"
    lines = [table[f"| [{each}"] for each in NAMES if f"| [{each}" in table]
    text = "\n".join(["| page | result |", "| --- | --- |", *lines]) + "\n"
    path.write_text(f"{head}{BEGIN}{text}{END}{tail}")


def take_screenshot() -> None:
    """Take a picture of the top of one page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 1560})
        page.goto((GALLERY / f"{SHOWN}.html").as_uri())
        page.screenshot(path=GALLERY / "report.png")
        browser.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="pages to make; all by default")
    parser.add_argument("--screenshot", action="store_true", help="take the picture instead")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "onnxcomp-models")
    arguments = parser.parse_args()
    if arguments.screenshot:
        take_screenshot()
        return 0
    arguments.cache.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or NAMES:
        make_page(name, arguments.cache)
    return 0


if __name__ == "__main__":
    sys.exit(main())
