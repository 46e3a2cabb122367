"""Puts the demo page together in a folder that any web server can serve; see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from onnxcomp.errors import OnnxcompError
from onnxcomp.verification.environments.web import FILES, VERSION, Web

HERE = Path(__file__).resolve().parent
SAMPLES = HERE.parent.parent / "sample_models"
PAGE = ("index.html", "demo.css", "demo.mjs")
CLASSES = (
    "T-shirt or top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def make_model(source: Path, target: Path) -> None:
    """Make the model small with the default recipe for browsers."""
    command = [sys.executable, "-m", "onnxcomp", "optimize", str(source), "--data", str(SAMPLES / "fashion_calib.npz")]
    subprocess.run([*command, "--target", "web", "-o", str(target), "--quiet"], check=True)


def make_images(folder: Path) -> list[dict[str, str]]:
    """Write the first test image of each class as a PNG; returns their names and classes."""
    folder.mkdir(exist_ok=True)
    with np.load(SAMPLES / "fashion_test.npz") as arrays:
        images, labels = arrays["image"], arrays["label"]
    made = []
    for number, name in enumerate(CLASSES):
        pixels = np.round(images[np.flatnonzero(labels == number)[0], 0] * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png", optimize=True)
        made.append({"file": f"images/{number}.png", "label": name})
    return made


def build(folder: Path) -> None:
    """Fill the folder: the page, the model, the images, and onnxruntime-web."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PAGE:
        shutil.copy(HERE / name, folder / name)
    web = Web()
    web.install(print)
    (folder / "onnxruntime-web").mkdir(exist_ok=True)
    for name in FILES:
        shutil.copy(web.folder / name, folder / "onnxruntime-web" / name)
    source, model = SAMPLES / "fashion_mobilenet.onnx", folder / "model.onnx"
    make_model(source, model)
    facts = {
        "classes": CLASSES,
        "samples": make_images(folder / "images"),
        "originalBytes": source.stat().st_size,
        "runtime": f"onnxruntime-web {VERSION}",
    }
    (folder / "demo.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def main() -> None:
    """Build, and say how to look at it."""
    parser = argparse.ArgumentParser(description="Put the demo page together in a folder to be served.")
    parser.add_argument("--out", type=Path, default=Path("demo-site"), help="the folder; demo-site unless given")
    folder = parser.parse_args().out
    try:
        build(folder)
    except OnnxcompError as error:
        sys.exit(f"Error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # it has said why
    print(f"{folder} is ready: python -m http.server --directory {folder}")


if __name__ == "__main__":
    main()
