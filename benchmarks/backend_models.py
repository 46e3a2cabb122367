"""Does anything break on the models of ONNX's own backend test suite? Every operator, every opset, every corner.

Each model is loaded and saved, rewritten by every registered pass in its default form (those that train in a cheap one)
and optimized as a whole, with the inputs of its own test case for data. What comes out must be checker-valid, with the
same inputs and outputs, unchanged by a second run of the pass, and run in ONNX Runtime with its optimizations on and
off, or in ONNX's reference evaluator where ONNX Runtime does not run the original right. Lossless passes must give
the expected outputs within the tolerance of the test case and make no model bigger; of all others the ledger must have
a verdict and a reason. Errors must be `OnnxcompError`.

    python -m benchmarks.backend_models                     # all of them: more than an hour
    python -m benchmarks.backend_models --only simplify --only "load and save"
    python -m benchmarks.backend_models --sample 100 --seed 3
    python -m benchmarks.backend_models --models test_loop13_seq --list
    python -m benchmarks.backend_models --only onnxsim --only onnxslim --rivals other/bin/python
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import onnx

from benchmarks.backend_cases import load_cases
from benchmarks.backend_checks import LOAD_AND_SAVE, OPTIMIZE, Expected, Outcome, Tools, check, expect, judge, judged
from onnxcomp.passes import registered_passes

__all__ = ["RIVALS", "check_cases", "everything", "run_all"]

CHUNK = 60
CASE_SECONDS = 180.0
RIVALS = ("onnxsim", "onnxslim")

Task = tuple[str, str]
"""A case, and what is done with it."""


def everything() -> list[str]:
    """All that is done with a model, other tools left out."""
    return [LOAD_AND_SAVE, *registered_passes(), OPTIMIZE]


# --- other tools ------------------------------------------------------------------------------------------------------


class Rivals:
    """Other tools, in an environment of their own."""

    def __init__(self, python: str) -> None:
        """Start the process.

        Args:
            python: The interpreter of the environment.
        """
        script = Path(__file__).with_name("backend_rivals.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # The type of **pipes tells no overload of Popen from another.
        self._process = subprocess.Popen([python, str(script), *RIVALS], text=True, **pipes)  # type: ignore[call-overload]
        if self._read() != "ready":
            message = f"{python}: cannot import {' and '.join(RIVALS)}"
            raise RuntimeError(message)

    def _read(self) -> str:
        return str(self._process.stdout.readline()).rstrip("\n")

    def check(self, expected: Expected, tool: str, folder: Path) -> Outcome:
        """Let a tool simplify a model, and judge what comes out as that of a lossless pass."""
        source, result = folder / "source.onnx", folder / "rival.onnx"
        onnx.save(expected.case.model, source)
        result.unlink(missing_ok=True)
        started, ran = time.monotonic(), bool(expected.outputs)
        self._process.stdin.write(f"{tool}\t{source}\t{result}\n")
        self._process.stdin.flush()
        words = self._read()
        seconds = time.monotonic() - started
        if words != "ok":
            return Outcome(expected.case.name, tool, "crash", words, ran=ran, seconds=seconds)
        made = onnx.load(result)
        reason = judge(expected, made, lossless=True, ours=False)
        outcome = judged(expected, tool, reason, (source, result), int(made != expected.case.model))
        return Outcome(**{**vars(outcome), "ran": ran, "seconds": seconds})

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


# --- running many -----------------------------------------------------------------------------------------------------


def _work(tasks: list[Task], python: str | None, pipe: Connection) -> None:
    cases = load_cases()
    rivals = Rivals(python) if python else None
    known = functools.lru_cache(maxsize=1)(lambda name: expect(cases[name]))
    with tempfile.TemporaryDirectory() as folder:
        tools = Tools(Path(folder))
        with tools.stack:
            for name, what in tasks:
                pipe.send((name, what))
                expected = known(name)
                if rivals and what in RIVALS:
                    pipe.send(rivals.check(expected, what, tools.folder))
                else:
                    pipe.send(check(expected, what, tools))
    if rivals:
        rivals.close()
    pipe.send(None)


def _run_chunk(tasks: list[Task], python: str | None) -> list[Outcome]:
    """Do some tasks in a process of their own, again without the one that killed it."""
    outcomes: list[Outcome] = []
    left = list(tasks)
    context = multiprocessing.get_context("fork")  # the parent has the cases loaded, and no ONNX Runtime
    while left:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(left, python, sender), daemon=False)
        process.start()
        sender.close()
        running = left[0]
        try:
            while (message := _receive(receiver)) is not None:
                if isinstance(message, Outcome):
                    outcomes.append(message)
                    left.remove((message.name, message.what))
                else:
                    running = message
            left = []
        except (EOFError, TimeoutError) as error:
            process.kill()
            why = "took too long" if isinstance(error, TimeoutError) else "the process died"
            outcomes.append(Outcome(*running, "crash", why))
            left.remove(running)
        process.join()
    return outcomes


def _receive(receiver: Connection) -> Any:
    if not receiver.poll(CASE_SECONDS):
        raise TimeoutError
    return receiver.recv()


def check_cases(
    names: Iterable[str], what: Sequence[str] = (), jobs: int = 2, rivals: str | None = None
) -> list[Outcome]:
    """Check cases, some at a time, each chunk in a process of its own.

    Args:
        names: The cases.
        what: What is done with each; by default `everything`.
        jobs: Processes at a time.
        rivals: A Python interpreter that can import other tools, if some are in `what`.
    """
    load_cases()
    names, what = list(names), list(what) or everything()
    chunks = [[(n, w) for n in names[start : start + CHUNK] for w in what] for start in range(0, len(names), CHUNK)]
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda chunk: _run_chunk(chunk, rivals), chunks)
        return [outcome for outcomes in done for outcome in outcomes]


def run_all(sample: int | None = None, seed: int = 0, models: str = "", **more: Any) -> list[Outcome]:
    """Check all cases, a seeded sample of them, or those whose name contains `models`; see `check_cases`."""
    names = sorted(name for name in load_cases() if models in name)
    random.Random(seed).shuffle(names)
    return check_cases(names[:sample], **more)


# --- the table --------------------------------------------------------------------------------------------------------

COLUMNS = ("what", "models", "changed", "same outputs", "refused", "crash", "invalid", "wrong", "size", "seconds")


def _row(what: str, outcomes: Sequence[Outcome]) -> list[str]:
    counts = Counter(each.status for each in outcomes)
    ok = [each for each in outcomes if each.status == "ok"]
    before, after = (sum(getattr(each, name) for each in ok) for name in ("bytes_before", "bytes_after"))
    numbers = (
        *(len(outcomes), sum(each.changes > 0 for each in ok), sum(each.ran for each in ok)),
        *(counts[status] for status in ("refused", "crash", "invalid", "wrong")),
    )
    seconds = sum(each.seconds for each in outcomes)
    return [what, *(f"{number:,}" for number in numbers), f"{before / max(after, 1):.2f}", f"{seconds:.0f}"]


def _print(outcomes: Sequence[Outcome], *, everything: bool) -> None:
    for outcome in sorted(outcomes, key=lambda each: (each.what, each.name)):
        if outcome.broken or (everything and outcome.why):
            print(f"{outcome.status:8} {outcome.what:18} {outcome.name:60} {outcome.why[:300]}")
    reasons = Counter((each.what, each.why[:160]) for each in outcomes if each.status == "refused")
    print(f"\n{len({each.name for each in outcomes if not each.ran})} models run right in no runtime")
    for (what, why), count in reasons.most_common(12):
        print(f"{count:6} refused by {what}: {why}")
    print(f"\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for what in dict.fromkeys(each.what for each in outcomes):
        print(f"| {' | '.join(_row(what, [each for each in outcomes if each.what == what]))} |")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sample", type=int, help="how many cases, drawn by --seed; all by default")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--models", default="", help="only cases whose name contains this")
    options.add_argument("--only", action="append", default=[], metavar="WHAT", help="a pass, load and save, optimize")
    options.add_argument("--rivals", help=f"a Python interpreter that can import {' and '.join(RIVALS)}")
    options.add_argument("--jobs", type=int, default=2, help="processes at a time")
    options.add_argument("--list", action="store_true", help="list also what is refused")
    arguments = options.parse_args()
    what = arguments.only or [*everything(), *(RIVALS if arguments.rivals else ())]
    unknown = [each for each in what if each not in {*everything(), *(RIVALS if arguments.rivals else ())}]
    if unknown:
        options.error(f"--only must be one of {', '.join(everything())}, got {unknown[0]!r}")
    more = {"what": what, "jobs": arguments.jobs, "rivals": arguments.rivals}
    outcomes = run_all(arguments.sample, arguments.seed, arguments.models, **more)
    _print(outcomes, everything=arguments.list)
    return 1 if any(outcome.broken and outcome.what not in RIVALS for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
