"""Per-node times from ONNX Runtime's profiler, in the worker."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from onnxcomp.runtime.results import Feed
from onnxcomp.runtime.sessions import Sessions

_WARM_UP_RUNS = 3
_KERNEL = "_kernel_time"


def profile(sessions: Sessions, path: str, feed: Feed, runs: int, folder: Path) -> dict[str, float]:
    """Run a model under the profiler.

    Args:
        sessions: Where sessions come from.
        path: The model file.
        feed: The inputs of every run.
        runs: Runs to average, after the warm-up.
        folder: Where the profiler may write.

    Returns:
        Node name -> mean milliseconds a run, slowest first.
    """
    options = sessions.options()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = sessions.make_named(path, options)
    for _ in range(_WARM_UP_RUNS + runs):
        session.run(None, feed)
    return node_times(json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")), runs)


def node_times(events: list[dict[str, Any]], runs: int) -> dict[str, float]:
    """Mean milliseconds of each node over the last `runs` runs in a profiler's trace, slowest first."""
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    total_us: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(_KERNEL) and event["ts"] >= starts[-runs]:
            total_us[event["name"].removesuffix(_KERNEL)] += event["dur"]
    return {
        name: total / runs / 1e3 for name, total in sorted(total_us.items(), key=lambda item: item[1], reverse=True)
    }
