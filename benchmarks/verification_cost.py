"""What the always layer of `verify` costs beside running the two models over the data.

    python benchmarks/verification_cost.py [ORIGINAL NEW DATA]

Without arguments the sample MobileNet and its int8 form run over the test images, repeated to 40,000: a run that takes
seconds, so that start-up does not count for everything. Both ways are whole processes, in turn, three times; the median
ratio counts. The issue was: at most 3.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent.parent / "sample_models"
CLI = (sys.executable, "-c", "from onnxcomp.cli import main; main()")
REPEATED = 40
ROUNDS = 3

RUN_BOTH = """
import sys
from onnxcomp.data import input_specs, open_data
from onnxcomp.model import Model
from onnxcomp.runtime import Runtime
original, new, data = sys.argv[1:]
with open_data(data, input_specs(Model.load(original).proto())) as samples, Runtime() as runtime:
    for path in (original, new):
        for _ in runtime.run(path, samples.feeds()):
            pass
"""


def seconds(*command: str) -> float:
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def main() -> int:
    with tempfile.TemporaryDirectory() as work:
        original, new, data = sys.argv[1:] if len(sys.argv) == 4 else _sample(Path(work))
        ratios = []
        for _ in range(ROUNDS):
            plain = seconds(sys.executable, "-c", RUN_BOTH, original, new, data)
            whole = seconds(*CLI, "verify", original, new, "--data", data, "--layers", "cpu,ort", "-q")
            ratios.append(whole / plain)
            print(f"both models {plain:.2f} s, verify {whole:.2f} s, ratio {whole / plain:.2f}", flush=True)
        print(f"median ratio {statistics.median(ratios):.2f}")
    return 0


def _sample(work: Path) -> tuple[str, str, str]:
    original, new, data = FOLDER / "fashion_mobilenet.onnx", work / "int8.onnx", work / "data.npz"
    calibration = ["--data", str(FOLDER / "fashion_calib.npz")]
    made = [str(original), *calibration, "-p", "simplify", "-p", "quantize", "-o", str(new), "-q", "--no-resume"]
    subprocess.run([*CLI, "optimize", *made], check=True)
    with np.load(FOLDER / "fashion_test.npz") as arrays:
        repeated: dict[str, Any] = {name: np.concatenate([arrays[name]] * REPEATED) for name in arrays.files}
    np.savez(data, **repeated)
    return str(original), str(new), str(data)


if __name__ == "__main__":
    sys.exit(main())
