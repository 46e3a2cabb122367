"""Per-node times from ONNX Runtime's profiler, in the worker."""

from __future__ import annotations

import json
import statistics
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path
from typing import Any

from onnxcomp.runtime.results import Feed
from onnxcomp.runtime.sessions import Sessions

_WARM_UP_RUNS = 3
_KERNEL = "_kernel_time"


def profile(
    sessions: Sessions, path: str, feed: Feed, runs: int, folder: Path, *, median: bool = False
) -> dict[str, float]:
    """Run a model under the profiler.

    Args:
        sessions: Where sessions come from.
        path: The model file.
        feed: The inputs of every run.
        runs: Runs to average, after the warm-up.
        folder: Where the profiler may write.
        median: Give the median of the runs instead of the mean.

    Returns:
        Node name -> milliseconds a run, slowest first.
    """
    options = sessions.options()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = sessions.make_named(path, options)
    for _ in range(_WARM_UP_RUNS + runs):
        session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return node_times(events, runs, median=median)


def node_times(events: list[dict[str, Any]], runs: int, *, median: bool = False) -> dict[str, float]:
    """Milliseconds of each node over the last `runs` runs in a profiler's trace, mean or median, slowest first."""
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")[-runs:]
    spent_us: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * runs)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(_KERNEL) and event["ts"] >= starts[0]:
            spent_us[event["name"].removesuffix(_KERNEL)][bisect_right(starts, event["ts"]) - 1] += event["dur"]
    of_runs = statistics.median if median else statistics.fmean
    times = {name: of_runs(each) / 1e3 for name, each in spent_us.items()}
    return dict(sorted(times.items(), key=lambda item: item[1], reverse=True))
