"""What packed weights cost and gain, against the same model with the same weights stored dense.

    python -m benchmarks.packing [NAME...]
    python -m benchmarks.packing NAME -p prune:sparsity=0.9 -p cluster:bits=4 -p pack
    python -m benchmarks.packing --large

NAME is a model of sample_models/ or a model file, which then needs -p. By default fashion_lenet with 95% zeros and 16
values a weight, forced, and every sample model with the passes `prune`, `cluster` and `pack` as they choose themselves.
The command runs in a process of its own, with the calibration data unless --force, and --unpack makes the dense twin.

"load" is the time to make a session, of both models in turn, the median of 60; "ms a tensor" is the difference over
the packed weights, and "CPU ms" the same of the processor's time, which other work on the machine does not lengthen.
"speed" is the time of the dense model over that of the packed one on one sample, in turn; sessions
are made anew, since where a session's memory lies moves its speed. "equal" is whether all outputs on the test data have
the same bits.

--large packs one weight of 10,000 x 10,000 with 95% zeros and 16 values. Needs 1 GB on the disk.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from benchmarks.tasks import CLI, Usage, print_table, run_measured
from onnxcomp import Model
from onnxcomp.analysis import deflated_bytes
from onnxcomp.data import input_specs, open_data
from onnxcomp.packed import find_packed
from onnxcomp.runtime import Runtime

Array = np.ndarray[Any, Any]

SAMPLES = Path(__file__).resolve().parent.parent / "sample_models"
FORCED = ("prune:sparsity=0.95", "cluster:bits=4", "pack")
CHOSEN = ("prune", "cluster", "pack")
HEAD = (
    "model",
    "passes",
    "packed tensors",
    "bytes before",
    "bytes dense",
    "bytes packed",
    "smaller",
    "deflated before",
    "deflated dense",
    "deflated packed",
    "resident dense",
    "resident packed",
    "load dense, ms",
    "load packed, ms",
    "ms a tensor",
    "CPU ms a tensor",
    "speed",
    "equal",
)
LARGE_HEAD = (
    "elements",
    "bytes dense",
    "bytes packed",
    "pack alone, seconds",
    "peak MB",
    "optimize, seconds",
    "process MB",
    "tree MB",
    "load dense, ms",
    "load packed, ms",
    "equal",
)
LOADS, WARM_UP = 60, 5
SESSIONS, RUNS = 20, 400
SIZE, VALUES, ZEROS = 10_000, 16, 0.95

PACK = """
import sys, time
from onnxcomp.model import Model
from onnxcomp.pass_options import parse_pass
from onnxcomp.passes import Context

def peak_mb():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

started = time.monotonic()
model = Model.load(sys.argv[1])
parse_pass("pack").rewrite(model, Context())
model.save(sys.argv[2])
print(time.monotonic() - started, peak_mb())
"""


@dataclass(frozen=True)
class Case:
    """A model and what is done to it.

    Attributes:
        model: The file.
        passes: The recipe.
        data: Inputs for calibration; None forces the recipe without.
        test: Inputs to compare outputs on; None makes some.
    """

    model: Path
    passes: tuple[str, ...]
    data: Path | None
    test: Path | None


@dataclass(frozen=True)
class Clock:
    """What making sessions of the dense and of the packed model takes, and how they run: median milliseconds."""

    load: Array
    load_cpu: Array
    run: Array


def cells(case: Case) -> list[str]:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as work, Runtime() as runtime:
        dense, packed = Path(work) / "dense.onnx", Path(work) / "packed.onnx"
        given = ["--data", str(case.data)] if case.data else ["--force"]
        words = [word for step in case.passes for word in ("-p", step)]
        optimize(str(case.model), *words, *given, "-o", str(packed))
        optimize(str(packed), "--unpack", "-o", str(dense))
        tensors = len(find_packed(Model.load(packed)))
        feeds = list(_feeds(case, packed))
        clock = timed(dense, packed, feeds[0])
        paths = (case.model, dense, packed)
        sizes = [Model.load(path).size_bytes for path in paths]
        resident = [runtime.census(path).initializer_bytes for path in (dense, packed)]
        deflated = [deflated_bytes(path) for path in paths]
        equal = same_bits(runtime, dense, packed, feeds)
    return [
        case.model.stem,
        ", ".join(case.passes),
        str(tensors),
        *(f"{size:,}" for size in sizes),
        f"{sizes[0] / sizes[2]:.1f}",
        *(f"{size:,}" for size in deflated),
        *(f"{size:,}" for size in resident),
        *(f"{ms:.2f}" for ms in clock.load),
        *(f"{(ms[1] - ms[0]) / max(1, tensors):.2f}" for ms in (clock.load, clock.load_cpu)),
        f"{clock.run[0] / clock.run[1]:.3f}",
        "yes" if equal else "NO",
    ]


def optimize(*arguments: str) -> None:
    """Run the command quietly in a process of its own."""
    subprocess.run([*CLI, "optimize", *arguments, "--no-resume", "-q"], check=True)


def _feeds(case: Case, model: Path) -> Iterator[dict[str, Any]]:
    specs = input_specs(Model.load(model).proto())
    with open_data(case.test, specs) as data:
        yield from data.subset(range(data.size)).feeds()


def timed(dense: Path, packed: Path, feed: dict[str, Any]) -> Clock:
    """Time both models in turn."""
    loads = np.array([[_load_ms(path) for path in (dense, packed)] for _ in range(WARM_UP + LOADS)])
    runs: list[list[float]] = [[], []]
    for number in range(SESSIONS):
        order = (0, 1) if number % 2 else (1, 0)
        sessions = {place: _session((dense, packed)[place]) for place in order}
        for turn in range(WARM_UP + RUNS):
            for place in order if turn % 2 else order[::-1]:
                started = time.perf_counter()
                sessions[place].run(None, feed)
                if turn >= WARM_UP:
                    runs[place].append((time.perf_counter() - started) * 1e3)
    load, cpu = np.median(loads[WARM_UP:], axis=0).T
    return Clock(load, cpu, np.median(runs, axis=1))


def _session(path: Path) -> Any:
    """A session with one thread and ONNX Runtime's own level of optimization."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def same_bits(runtime: Runtime, one: Path, other: Path, feeds: Sequence[dict[str, Any]]) -> bool:
    """Whether two models give the same bits for all inputs."""
    pairs = zip(runtime.run(one, feeds), runtime.run(other, feeds), strict=True)
    return all(a.tobytes() == b.tobytes() for pair in pairs for a, b in zip(*pair, strict=True))


# --- one large weight -------------------------------------------------------------------------------------------------


def make_large(folder: Path) -> Path:
    """A MatMul with one weight, mostly zeros."""
    rng = np.random.default_rng(0)
    values = np.concatenate([[0.0], rng.normal(0, 0.02, VALUES - 1)]).astype(np.float32)
    codes = rng.integers(1, VALUES, SIZE * SIZE, np.uint8)
    codes[rng.random(codes.size, np.float32) < ZEROS] = 0
    weight = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[SIZE, SIZE], raw_data=values[codes].tobytes())
    interface = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", SIZE]) for name in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])], "large", interface[:1], interface[1:], [weight]
    )
    path = folder / "large.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def large_cells() -> list[str]:
    """The row of the large weight."""
    with tempfile.TemporaryDirectory() as folder, Runtime() as runtime:
        dense, packed = make_large(Path(folder)), Path(folder) / "packed.onnx"
        alone = subprocess.run(
            [sys.executable, "-c", PACK, str(dense), str(packed)], check=True, stdout=subprocess.PIPE, text=True
        )
        seconds, peak = map(float, alone.stdout.split())
        usage = run_measured([*CLI, "optimize", str(dense), "-p", "pack", "-o", str(packed), "--no-resume"])
        loads = [[_load_ms(path) for path in (dense, packed)] for _ in range(5)]
        feeds = [{"x": np.random.default_rng(1).normal(0, 1, (2, SIZE)).astype(np.float32)}]
        equal = same_bits(runtime, dense, packed, feeds)
        sizes = [Model.load(path).size_bytes for path in (dense, packed)]
    return _large_row(sizes, seconds, peak, usage, np.median(loads, axis=0)[:, 0], equal=equal)


def _large_row(
    sizes: Sequence[int],
    seconds: float,
    peak: float,
    usage: Usage,
    loads: Array,
    *,
    equal: bool,
) -> list[str]:
    return [
        f"{SIZE * SIZE:,}",
        *(f"{size:,}" for size in sizes),
        f"{seconds:.1f}",
        f"{peak:.0f}",
        f"{usage.seconds:.1f}",
        f"{usage.process_bytes / 1e6:.0f}",
        f"{usage.tree_bytes / 1e6:.0f}",
        *(f"{ms:.0f}" for ms in loads),
        "yes" if equal else "NO",
    ]


def _load_ms(path: Path) -> tuple[float, float]:
    """The time to make a session, and the processor's time of it."""
    started, cpu = time.perf_counter(), time.process_time()
    _session(path)
    return (time.perf_counter() - started) * 1e3, (time.process_time() - cpu) * 1e3


def find_cases(names: Sequence[str], passes: Sequence[str], *, force: bool) -> list[Case]:
    """What to measure: the default cases, or one for each name with these passes."""
    calibration, test = (SAMPLES / f"fashion_{kind}.npz" for kind in ("calib", "test"))
    paths = sorted(path for path in SAMPLES.glob("*.onnx") if not path.name.endswith(".opt.onnx"))
    chosen = [path for path in paths if not names or path.stem in names]
    if passes:
        files = [Path(name) for name in names if name not in {path.stem for path in paths}]
        own = [Case(path, tuple(passes), None, None) for path in files]
        return [Case(path, tuple(passes), None if force else calibration, test) for path in chosen] + own
    forced = [Case(path, FORCED, None, test) for path in chosen if path.stem == "fashion_lenet"]
    return forced + [Case(path, CHOSEN, calibration, test) for path in chosen]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="sample models or model files; all samples by default")
    parser.add_argument("-p", "--pass", dest="passes", action="append", default=[], help="a pass of the recipe")
    parser.add_argument("--force", action="store_true", help="with -p: keep the recipe whatever it loses, no data")
    parser.add_argument("--large", action="store_true", help="one weight of 100 million elements instead")
    arguments = parser.parse_args()
    if arguments.large:
        print_table(LARGE_HEAD, [large_cells()])
        return 0
    cases = find_cases(arguments.names, arguments.passes, force=arguments.force)
    if not cases:
        parser.error("there is no such sample model; a model file needs -p")
    print_table(HEAD, map(cells, cases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
