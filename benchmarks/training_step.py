"""What a step of training takes in the bridge, against the same module written in torch.

    python -m benchmarks.training_step [--runs N]

A step is forward, cross entropy, backward and SGD on 64 samples, on one thread; weights are random in the native
module, which makes no difference in time. Both run in turn, and the median counts. "one by one" is the bridge without
the steps that it puts together (onnxcomp/torch_bridge/fusion.py). Normalization keeps its statistics in both. The
recurrent network is an LSTM of 128 on 30 steps of 64 numbers and a bidirectional GRU of 128. "int8" is the same model
with its weights and activations quantized by ONNX Runtime, against the native float module.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.tasks import print_table
from onnxcomp.torch_bridge import GraphModule, load
from sample_models.train import VisionTransformer, build_mobilenet

SAMPLES = Path(__file__).resolve().parent.parent / "sample_models"
MOBILENET = "fashion_mobilenet"
BATCH, CLASSES, TIME, WIDTH = 64, 10, 30, 64
WARM_UP = 3
HEAD = ("model", "native, ms", "bridge, ms", "over native", "one by one, over native")


class Recurrent(nn.Module):  # type: ignore[misc] # torch has no type information here
    """An LSTM, a GRU of both directions, and a classifier of the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 2 * WIDTH)
        self.gru = nn.GRU(2 * WIDTH, 2 * WIDTH, bidirectional=True)
        self.classify = nn.Linear(4 * WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classify sequences x (time, N, numbers)."""
        logits: Tensor = self.classify(self.gru(self.lstm(x)[0])[0][-1])
        return logits


def exported(module: nn.Module, example: Tensor, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about batch sizes and its own future
        torch.onnx.export(module, (example,), str(path), dynamo=False, opset_version=17, input_names=["x"])
    return path


def quantized(folder: Path) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc] # onnxruntime has no type information
        """Some images."""

        def __init__(self) -> None:
            self.left = iter([{"image": np.load(SAMPLES / "fashion_calib.npz")["image"][:BATCH]}])

        def get_next(self) -> Any:
            """The next images, or None."""
            return next(self.left, None)

    path = folder / "int8.onnx"
    quantize_static(str(SAMPLES / f"{MOBILENET}.onnx"), str(path), Reader(), per_channel=True)
    return path


def cases(folder: Path) -> Iterator[tuple[str, nn.Module, Path, Tensor]]:
    """Name, native module, model and input."""
    images, sequences = torch.rand(BATCH, 1, 28, 28), torch.randn(TIME, BATCH, WIDTH)
    yield MOBILENET, build_mobilenet(), SAMPLES / f"{MOBILENET}.onnx", images
    yield "fashion_vit", VisionTransformer(), SAMPLES / "fashion_vit.onnx", images
    last = torch.channels_last
    turned = build_mobilenet().to(memory_format=last)
    yield f"{MOBILENET}, channels last", turned, SAMPLES / f"{MOBILENET}.onnx", images.contiguous(memory_format=last)
    recurrent = Recurrent()
    yield "LSTM and GRU", recurrent, exported(recurrent, sequences, folder / "recurrent.onnx"), sequences
    yield f"{MOBILENET}, int8", build_mobilenet(), quantized(folder), images


def step_of(module: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    labels = torch.randint(0, CLASSES, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(module(x), labels).backward()
        optimizer.step()

    return step


def one_by_one(module: GraphModule) -> GraphModule:
    module._fast = module.plan
    return module


def medians(steps: Sequence[Callable[[], None]], runs: int) -> list[float]:
    """Milliseconds of each, in turn."""
    seconds: list[list[float]] = [[] for _ in steps]
    for run in range(WARM_UP + runs):
        for step, taken in zip(steps, seconds, strict=True):
            begin = time.perf_counter()
            step()
            if run >= WARM_UP:
                taken.append(time.perf_counter() - begin)
    return [1e3 * statistics.median(taken) for taken in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    runs = parser.parse_args().runs
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, native, path, x in cases(Path(folder)):
            modules = [native.eval(), load(path), one_by_one(load(path))]
            if "channels last" in name:
                modules[1:] = [module.to(memory_format=torch.channels_last) for module in modules[1:]]
            base, bridge, slow = medians([step_of(module, x) for module in modules], runs)
            rows.append((name, f"{base:.1f}", f"{bridge:.1f}", f"{bridge / base:.2f}", f"{slow / base:.2f}"))
    print_table(HEAD, rows)


if __name__ == "__main__":
    main()
