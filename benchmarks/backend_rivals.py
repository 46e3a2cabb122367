"""Other tools that simplify, for `benchmarks.backend_models`: run in an environment where they are installed.

Reads lines of tool, model and result file, divided by tabs, and answers each with "ok" or what went wrong. Each model
gets a process of its own, so that a crash of one does not end the others.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import onnx

SECONDS = 60


def simplified(tool: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """What a tool makes of a model, by its function with default arguments."""
    made: Any
    if tool == "onnxsim":
        import onnxsim

        made, _ = onnxsim.simplify(model)
        return made  # type: ignore[no-any-return] # it has no type information everywhere
    import onnxslim

    return onnxslim.slim(model)  # type: ignore[no-any-return] # a ModelProto for a ModelProto


def _answer(tool: str, source: str, result: str) -> str:
    """Simplify in a child process; its last words come through a pipe."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            onnx.save(simplified(tool, onnx.load(source)), result)
            words = "ok"
        except BaseException as error:  # noqa: BLE001 - whatever it raises, it has failed on this model
            words = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        os.write(writer, words.encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        words = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "took too long" if number == signal.SIGALRM else f"the process died of signal {number}"
    return words


def main() -> None:
    for tool in sys.argv[1:]:
        __import__(tool)  # once, before the processes part
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the tools print is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(_answer(*line.rstrip("\n").split("\t")).replace("\n", " "), file=answers, flush=True)


if __name__ == "__main__":
    main()
