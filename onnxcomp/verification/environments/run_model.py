"""Run a model in a Python that has numpy and ONNX Runtime and nothing else: ``run_model.py REQUEST ANSWER``.

The file is copied, with tensor_files.py beside it, to where that Python finds it; `foreign` calls it. REQUEST is a
JSON file::

    {"model": path, "feeds": tensors file, "results": tensors file to write, "profile": prefix of a file to write,
     "outputs": names or null for all, "threads": 1, "config": {session entry: value},
     "providers": [[name, {option: value}], ...],
     "plugin": null or {"provider": name, "library": path, "chosen": {option: value}}}

A plug-in is a library that brings an execution provider of its own; it comes before `providers`. ANSWER becomes a
JSON file: what ran (`version`, `machine`), `profile` and the `seconds` that each run took, or `error` in one line.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from tensor_files import read_tensors, write_tensors  # type: ignore[import-not-found,unused-ignore] # the copy
except ImportError:
    from onnxcomp.verification.environments.tensor_files import read_tensors, write_tensors

__all__ = ["run_request"]

_PROFILED_RUNS = 8  # a profile grows with every run; what executes which node is known by then


def run_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """Make a session, run it on every feed and write the outputs.

    Args:
        request: As in the module's description.

    Returns:
        The answer.
    """
    import onnxruntime

    session = _session(onnxruntime, request)
    names = request["outputs"] or [info.name for info in session.get_outputs()]
    results, seconds = [], []
    profile = ""
    for number, feed in enumerate(read_tensors(Path(request["feeds"])), start=1):
        begun = time.perf_counter()
        try:
            values = session.run(names, feed)
        except Exception as error:
            message = f"{_told(error)} (run {number})"
            raise RuntimeError(message) from error
        seconds.append(time.perf_counter() - begun)
        results.append(dict(zip(names, values, strict=True)))
        if number == _PROFILED_RUNS:
            profile = session.end_profiling()
    write_tensors(Path(request["results"]), results)
    return {
        "version": onnxruntime.__version__,
        "machine": platform.machine(),
        "profile": profile or session.end_profiling(),
        "seconds": seconds,
    }


def _session(onnxruntime: Any, request: Mapping[str, Any]) -> Any:
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = request["profile"]
    for key, value in request["config"].items():
        options.add_session_config_entry(key, value)
    plugin = request["plugin"]
    if plugin is not None:
        _add_plugin(onnxruntime, options, **plugin)
        return onnxruntime.InferenceSession(request["model"], options)
    providers: Sequence[tuple[str, dict[str, str]]] = [(name, chosen) for name, chosen in request["providers"]]
    _refuse_unknown([name for name, _ in providers], onnxruntime.get_available_providers())
    return onnxruntime.InferenceSession(request["model"], options, providers=providers)


def _add_plugin(onnxruntime: Any, options: Any, provider: str, library: str, chosen: Mapping[str, str]) -> None:
    onnxruntime.register_execution_provider_library(provider, library)
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider]
    _refuse_unknown([provider], [provider] if devices else [])
    options.add_provider_for_devices(devices, dict(chosen))


def _refuse_unknown(wanted: Sequence[str], available: Sequence[str]) -> None:
    """ONNX Runtime only warns of a provider that its build has not, and takes the next."""
    for name in wanted:
        if name not in available:
            message = f"no execution provider {name}; this build has {', '.join(available) or 'no device for it'}"
            raise ValueError(message)


def _told(error: Exception) -> str:
    """The error in one line; ONNX Runtime's own need no name of a class."""
    text = " ".join(str(error).split())
    plain = type(error).__module__.startswith("onnxruntime.") or type(error) in (RuntimeError, ValueError)
    return text if plain else f"{type(error).__name__}: {text}"


def main(request: Path, answer: Path) -> None:
    """Carry out a request file."""
    try:
        told = run_request(json.loads(request.read_text(encoding="utf-8")))
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller tells it
        told = {"error": _told(error)}
    answer.write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # all is written, and the end of some providers' libraries is slow or crashes
