"""The main job on real models with real data: what it keeps, and what it costs in time and memory.

    ONNXCOMP_BENCH=DIR python benchmarks/tasks.py [--no-data] [NAME...]

DIR holds `tasks/NAME/` with model.onnx, calib.npz, test.npz and task.json; `evaluate.py TASK_DIR MODEL --latency`,
which scores a model and times it in turn with the original; and `peers.json`, what other tools reach on the same tasks.
Each task runs `onnxcomp optimize` in a process of its own, with default settings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

MAX_DROP = 0.005
MIN_SPEED = 0.97
POLL_SECONDS = 0.02
CLI = (sys.executable, "-c", "from onnxcomp.cli import main; main()")

HEAD = ("task", "drop", "speed", "size", "speed x size", "seconds", "peak MB", "process MB", "kept")
PEER_HEAD = ("best kept static peer", "its speed x size", "ratio")


@dataclass(frozen=True)
class Usage:
    """What a command took.

    Attributes:
        seconds: Wall-clock time.
        tree_bytes: The highest sum of resident memory over the process and its children; shared pages count for each.
        process_bytes: The highest resident memory of one of them.
    """

    seconds: float
    tree_bytes: int
    process_bytes: int


@dataclass(frozen=True)
class Row:
    """One task's figures. `drop` is in points of the task's metric; `speed` and `size` are original over new."""

    task: str
    drop: float
    speed: float
    size: float
    usage: Usage

    @property
    def value(self) -> float:
        """Times faster by times smaller."""
        return self.speed * self.size

    @property
    def kept(self) -> bool:
        """Whether it is as good as the original and not slower."""
        return self.drop <= MAX_DROP and self.speed >= MIN_SPEED


def run_measured(command: Sequence[str]) -> Usage:
    """Run a command, watching the memory of all its processes.

    Raises:
        CalledProcessError: It failed.
    """
    peaks = {"tree": 0, "process": 0}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        watch = threading.Thread(target=_watch, args=(psutil.Process(process.pid), process, peaks), daemon=True)
        watch.start()
        code = process.wait()
        seconds = time.monotonic() - started
        watch.join()
        if code:
            said.seek(0)
            raise subprocess.CalledProcessError(code, list(command), said.read())
    return Usage(seconds, peaks["tree"], peaks["process"])


def _watch(root: psutil.Process, process: subprocess.Popen[bytes], peaks: dict[str, int]) -> None:
    while process.poll() is None:
        sizes = [_resident(each) for each in _tree(root)]
        peaks["tree"] = max(peaks["tree"], sum(sizes))
        peaks["process"] = max(peaks["process"], *sizes, 0)
        time.sleep(POLL_SECONDS)


def _tree(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:  # it ended since it was listed
        return 0


def run_task(folder: Path, task: Path, *, data: bool) -> Row:
    """Optimize a task's model and evaluate the result."""
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "model.onnx"
        given = ["--data", str(task / "calib.npz")] if data else []
        command = [*CLI, "optimize", str(task / "model.onnx"), *given, "-o", str(output), "--no-resume"]
        usage = run_measured(command)
        evaluated = [sys.executable, str(folder / "evaluate.py"), str(task), str(output), "--latency"]
        found = json.loads(subprocess.run(evaluated, check=True, capture_output=True, text=True).stdout)
    return Row(task.name, found["original"] - found["score"], found["speedup"], found["size_ratio"], usage)


def best_static_peer(peers: dict[str, Any], task: str) -> tuple[str, float] | None:
    """The best kept result of another tool that calibrates (not "dynamic"), and its speed x size."""
    kept = {
        name: result["speed"] * result["size"]
        for name, result in peers.get(task, {}).items()
        if result["kept"] and "dynamic" not in name
    }
    return max(kept.items(), key=lambda item: item[1], default=None)


def cells(row: Row, peer: tuple[str, float] | None) -> list[str]:
    """A row of the table."""
    usage = row.usage
    own = [
        row.task,
        f"{row.drop:+.4f}",
        f"{row.speed:.2f}",
        f"{row.size:.2f}",
        f"{row.value:.2f}",
        f"{usage.seconds:.1f}",
        f"{usage.tree_bytes / 1e6:.0f}",
        f"{usage.process_bytes / 1e6:.0f}",
        "yes" if row.kept else "NO",
    ]
    return own + (["none", "", ""] if peer is None else [peer[0], f"{peer[1]:.2f}", f"{row.value / peer[1]:.2f}"])


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="tasks to run; all by default")
    parser.add_argument("--no-data", action="store_true", help="do not give the calibration data to the tool")
    arguments = parser.parse_args()
    if not os.environ.get("ONNXCOMP_BENCH"):
        parser.error("set ONNXCOMP_BENCH to a folder of tasks, as benchmarks/README.md describes it")
    folder = Path(os.environ["ONNXCOMP_BENCH"])
    tasks = sorted(path.parent for path in folder.glob("tasks/*/task.json"))
    unknown = set(arguments.names).difference(task.name for task in tasks)
    if unknown or not tasks:
        parser.error(f"no task in {folder} is called {', '.join(sorted(unknown)) or 'anything'}")
    peers_file = folder / "peers.json"
    peers = json.loads(peers_file.read_text(encoding="utf-8"))["tasks"] if peers_file.is_file() else {}
    rows = []
    for task in tasks:
        if not arguments.names or task.name in arguments.names:
            print(f"running {task.name}", file=sys.stderr)
            rows.append(run_task(folder, task, data=not arguments.no_data))
    print_table(HEAD + PEER_HEAD, (cells(row, best_static_peer(peers, row.task)) for row in rows))
    return 0 if all(row.kept for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
