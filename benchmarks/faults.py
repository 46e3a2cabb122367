"""What is left of a run that is killed: the old output or the whole new one, and a resumed run that ends as any other.

    python benchmarks/faults.py [--kills 200] [--interrupts 100] [MODEL]

A run of `onnxcomp optimize --no-timing` on the sample LeNet is killed (SIGKILL) or interrupted (SIGINT) at a random
moment, again and again, each go with `--resume` from the last. Told are the moments, what lay at the output afterwards,
and what was left beside it.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "sample_models"
OLD = b"what was there before"
PYTHON_S = 0.2
"""Before that an interrupt meets Python, which has not begun with us."""


@dataclass
class Outcome:
    """What was seen after each go.

    Attributes:
        held: What the output held -> how often: "old", "new", or what it must never hold.
        ends: How goes ended -> how often.
        stray: Temporary files that were left beside the output by processes that were killed while they wrote it.
        wrong: What must not be.
    """

    held: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    stray: int = 0
    wrong: list[str] = field(default_factory=list)


def command(model: Path, output: Path) -> list[str]:
    data = ["--data", str(FOLDER / "fashion_calib.npz"), "--no-timing"]
    return [sys.executable, "-m", "onnxcomp", "optimize", str(model), *data, "-o", str(output)]


def start(model: Path, output: Path, cache: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(
        command(model, output), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def strike(model: Path, work: Path, count: int, number: signal.Signals, generator: random.Random) -> Outcome:
    """Stop runs at random moments, and look at what is left."""
    whole, output, cache = work / "whole.onnx", work / "out" / "m.onnx", work / "cache"
    output.parent.mkdir(exist_ok=True)
    started = time.monotonic()
    first = start(model, whole, work / "other cache")
    first.communicate()
    seconds, expected = time.monotonic() - started, whole.read_bytes()
    outcome = Outcome()
    for _ in range(count):
        output.write_bytes(OLD)
        process = start(model, output, cache)
        time.sleep(generator.uniform(PYTHON_S, seconds))
        if number == signal.SIGKILL:
            process.kill()
        else:
            process.send_signal(number)
        told = process.communicate()[1].decode(errors="replace")
        outcome.ends[str(process.returncode)] += 1
        held = output.read_bytes()
        name = "old" if held == OLD else "new" if held == expected else f"{len(held)} other bytes"
        outcome.held[name] += 1
        if name not in {"old", "new"}:
            outcome.wrong.append(f"the output held {name}")
        if "Traceback" in told:
            outcome.wrong.append(f"a traceback: {told.strip().splitlines()[-1]}")
        others = [path for path in output.parent.iterdir() if path != output]
        outcome.stray += len(others)
        if number != signal.SIGKILL and others:
            outcome.wrong.append(f"left behind: {others[0].name}")
        for path in others:
            path.unlink()
    last = start(model, output, cache)
    last.communicate()
    if output.read_bytes() != expected:
        outcome.wrong.append("the resumed run ended with another file")
    return outcome


def tell(what: str, outcome: Outcome) -> None:
    print(f"{what}: output held {dict(outcome.held)}, exit codes {dict(outcome.ends)}, stray files {outcome.stray}")
    for line in outcome.wrong:
        print(f"  WRONG: {line}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=FOLDER / "fashion_lenet.onnx", help="the model")
    parser.add_argument("--kills", type=int, default=200, help="goes that end with SIGKILL")
    parser.add_argument("--interrupts", type=int, default=100, help="goes that end with SIGINT")
    arguments = parser.parse_args()
    generator = random.Random(0)
    wrong = 0
    for count, number in ((arguments.kills, signal.SIGKILL), (arguments.interrupts, signal.SIGINT)):
        with tempfile.TemporaryDirectory() as work:
            outcome = strike(arguments.model.resolve(), Path(work), count, number, generator)
        tell(f"{count} times {number.name}", outcome)
        wrong += len(outcome.wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
