"""Run a model in a Python that has numpy and ONNX Runtime and nothing else: ``run_model.py``.

`foreign` copies it, with tensor_files.py beside it, to the folder where it runs; see `processes` for the files there.
The job is a JSON file::

    {"model": path, "outputs": names or null for all, "config": {session entry: value},
     "plugin": null or {"provider": name, "library": path, "chosen": {option: value}}}

A plug-in is a library that brings an execution provider; what it does not take stays with the CPU's. "answer.json"
tells the `version` of ONNX Runtime and, with a plug-in, the parts of the graph as they were `assigned`: the provider
and the operators of each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    from tensor_files import read_tensors, write_tensors  # type: ignore[import-not-found,unused-ignore] # the copy
except ImportError:
    from onnxcomp.verification.environments.tensor_files import read_tensors, write_tensors

__all__ = ["run_job"]

_REFUSED = 3
_PROFILED_RUNS = 8  # a profile grows with every run; what executes which node is known by then


def run_job(job: Mapping[str, Any]) -> None:
    """Make a session, run it on every feed and write what came of it."""
    import onnxruntime

    session = _session(onnxruntime, job)
    names = job["outputs"] or [info.name for info in session.get_outputs()]
    results = []
    for number, feed in enumerate(read_tensors(Path("feeds")), start=1):
        try:
            values = session.run(names, feed)
        except Exception as error:
            message = f"{_told(error)} (run {number})"
            raise RuntimeError(message) from error
        results.append(dict(zip(names, values, strict=True)))
        if number == _PROFILED_RUNS:
            session.end_profiling()
    if len(results) < _PROFILED_RUNS:
        session.end_profiling()
    parts = [] if job["plugin"] is None else session.get_provider_graph_assignment_info()
    assigned = [[part.ep_name, [node.op_type for node in part.get_nodes()]] for part in parts]
    answer = {"version": onnxruntime.__version__, "assigned": assigned}
    Path("answer.json").write_text(json.dumps(answer), encoding="utf-8")
    write_tensors(Path("results"), results)


def _session(onnxruntime: Any, job: Mapping[str, Any]) -> Any:
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = "profile"
    for key, value in job["config"].items():
        options.add_session_config_entry(key, value)
    if job["plugin"] is None:
        return onnxruntime.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    _add_plugin(onnxruntime, options, **job["plugin"])
    return onnxruntime.InferenceSession(job["model"], options)


def _add_plugin(onnxruntime: Any, options: Any, provider: str, library: str, chosen: Mapping[str, str]) -> None:
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    onnxruntime.register_execution_provider_library(provider, library)
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider]
    if not devices:  # ONNX Runtime would take the CPU provider without a word
        message = f"no device for {provider} is here"
        raise ValueError(message)
    options.add_provider_for_devices(devices[:1], dict(chosen))


def _told(error: Exception) -> str:
    """The error; ONNX Runtime's own need no name of a class."""
    plain = type(error).__module__.startswith("onnxruntime.") or type(error) in (RuntimeError, ValueError)
    return str(error) if plain else f"{type(error).__name__}: {error}"


def main() -> int:
    """Carry out the job; the exit code."""
    try:
        run_job(json.loads(Path("job.json").read_text(encoding="utf-8")))
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller tells it
        Path("refusal").write_text(_told(error), encoding="utf-8")
        return _REFUSED
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # all is written, and the end of some providers' libraries is slow or crashes
