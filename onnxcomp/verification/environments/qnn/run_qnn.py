"""Runs a model on Qualcomm's provider, in a process of its own: ``python run_qnn.py JOB.json``.

Files: see the environment. Exit code 3: ONNX Runtime refused the model or a feed, and the file "refusal" holds its
message.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnxruntime

from onnxcomp.verification.environments.processes import REFUSED
from onnxcomp.verification.environments.tensor_files import read_tensors, write_tensors

PROVIDER = "QNNExecutionProvider"


def session_for(job: dict[str, Any]) -> onnxruntime.InferenceSession:
    """The model on the provider; what the provider does not take stays with the CPU's."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = "profile"
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in job["config"].items():
        options.add_session_config_entry(key, value)
    if job["library"] is None:
        return onnxruntime.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    onnxruntime.register_execution_provider_library(PROVIDER, job["library"])
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
    options.add_provider_for_devices(devices[:1], job["options"])
    return onnxruntime.InferenceSession(job["model"], options)


def run(job: dict[str, Any]) -> None:
    """Do what the job says and write what came of it."""
    session = session_for(job)
    names = job["outputs"] or [output.name for output in session.get_outputs()]
    runs = [dict(zip(names, session.run(names, feed), strict=True)) for feed in read_tensors(Path("feeds"))]
    write_tensors(Path("results"), runs)
    parts = [
        [part.ep_name, [node.op_type for node in part.get_nodes()]]
        for part in session.get_provider_graph_assignment_info()
    ]
    Path("assigned.json").write_text(json.dumps(parts), encoding="utf-8")
    Path(session.end_profiling()).rename("profile.json")


if __name__ == "__main__":
    try:
        run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except Exception as refusal:  # noqa: BLE001 - ONNX Runtime's have no common base
        Path("refusal").write_text(str(refusal), encoding="utf-8")
        sys.exit(REFUSED)
