"""What removed channels cost and gain, without training: held-out accuracy and time, by criterion.

    python -m benchmarks.channels [NAME...] [--ratio SHARE...] [--scope global|group] [--only TEXT] [--criterion C...]
    ONNXCOMP_BENCH=DIR python -m benchmarks.channels ic01_resnet8 "fashion_mobilenet (task)" --ratio 0.25
    ONNXCOMP_BENCH=DIR python -m benchmarks.channels paraphrase_minilm_l3 --scope group --only intermediate --round-to 1

NAME is as pruning.py takes it. Channels are removed in float32 by `prune-channels` alone behind `simplify`, with the
calibration data and no labels; figures are of the test data, which nothing else sees. --only leaves all groups alone
whose name does not hold the text.

The share is of all multiply-accumulates (scope global) or of the units of each group (scope group). "MACs" and "units"
are what went: of all multiply-accumulates, and of the units of the groups that may lose some. "drop" is that of the
metric with the layers behind fitted by least squares, with the 95% interval of 1,000 paired resamples of the test data;
"drop, no refit" has them as they were. "speed" is how many times faster than the original the fitted model runs, by
median time of runs in turn, both behind `simplify`; seconds are those of the pass.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.pruning import Task, find_tasks, interval
from benchmarks.tasks import print_table
from onnxcomp import Context, Model
from onnxcomp.budget import Budget
from onnxcomp.data import input_specs, open_data
from onnxcomp.judge import Judge
from onnxcomp.runtime import Runtime
from onnxcomp.targets import host_target
from onnxcomp_passes._channels_groups import Group, find_channels, macs_by_node
from onnxcomp_passes._stored import lift_constants
from onnxcomp_passes.prune_channels import PruneChannels
from onnxcomp_passes.simplify import Simplify

CRITERIA = ("output", "l1", "l2", "activation", "median")
HEAD = (
    *("model", "criterion", "asked", "MACs", "units", "metric", "drop", "95% interval"),
    *("drop, no refit", "speed", "seconds"),
)


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        ratios: Shares that go.
        scope: Of what, as `prune-channels` takes it.
        criteria: In the order of the table.
        only: The groups that may lose units have this in their name.
        multiple: Of what the units that stay are a multiple.
    """

    ratios: Sequence[float]
    scope: str
    criteria: Sequence[str]
    only: str
    multiple: int


def groups_of(model: Model) -> list[Group]:
    """The groups of a model, which is not changed."""
    fork = model.fork()
    lift_constants(fork.graph)
    return list(find_channels(fork, lambda _: False).groups)


def rows(task: Task, asked: Asked) -> Iterator[list[str]]:
    """The rows of the table for one task."""
    with Runtime() as runtime, tempfile.TemporaryDirectory() as folder:
        original = Model.load(task.model)
        Simplify().rewrite(original, Context())
        data = open_data(task.calibration, input_specs(original.proto()))
        judge = Judge(
            original,
            select=data,
            confirm=data,
            metric=None,
            budget=Budget(),
            runtime=runtime,
            target=host_target(),
            workdir=Path(folder),
        )
        context = Context(data=data, runtime=runtime, workdir=Path(folder), judge=judge)
        with np.load(task.test) as file:
            everything = np.arange(len(file["label"]))
        before = task.measure(runtime, judge.original_path)
        groups = groups_of(original)
        skip = tuple(group.name for group in groups if asked.only not in group.name)
        units = sum(group.units for group in groups if group.name not in skip)
        macs = sum(macs_by_node(original).values())
        path = Path(folder) / "model.onnx"
        for ratio in asked.ratios:
            for criterion in asked.criteria:
                drops = {}
                for refit in (False, True):
                    pruned = PruneChannels(
                        ratio=ratio,
                        scope=asked.scope,
                        criterion=criterion,
                        round_to=asked.multiple,
                        skip=skip,
                        refit=refit,
                    )
                    model, started = original.fork(), time.monotonic()
                    changes = pruned.rewrite(model, context)
                    seconds = time.monotonic() - started
                    model.save(path)
                    drops[refit] = task.measure(runtime, path)
                left = sum(macs_by_node(model).values())
                gone = sum(int(each.rpartition("=")[2]) for each in changes.resolved.get("removed", ()))
                low, high = interval(before, drops[True], len(everything))
                timings = judge.time([judge.original_path, path])
                yield [
                    task.name,
                    criterion,
                    f"{ratio:.0%}",
                    f"{1 - left / macs:.1%}",
                    f"{gone} of {units}",
                    f"{before(everything):.4f}",
                    f"{before(everything) - drops[True](everything):+.4f}",
                    f"{low:+.4f} to {high:+.4f}",
                    f"{before(everything) - drops[False](everything):+.4f}",
                    f"{timings[0].median_ms / timings[1].median_ms:.2f}",
                    f"{seconds:.1f}",
                ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models and tasks to run")
    parser.add_argument("--ratio", type=float, nargs="+", default=(0.25, 0.5), help="shares that go")
    parser.add_argument("--scope", choices=("global", "group"), default="global", help="what the shares are of")
    parser.add_argument("--criterion", nargs="+", choices=CRITERIA, default=CRITERIA, help="which units go first")
    parser.add_argument("--only", default="", metavar="TEXT", help="groups with this in their name")
    parser.add_argument("--round-to", type=int, default=8, help="units that stay are a multiple of this")
    given = parser.parse_args()
    bench = os.environ.get("ONNXCOMP_BENCH")
    tasks = find_tasks(Path(bench) if bench else None)
    if unknown := set(given.names).difference(tasks):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(tasks)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    asked = Asked(given.ratio, given.scope, given.criterion, given.only, given.round_to)
    print_table(HEAD, (row for name in given.names or tasks for row in rows(tasks[name], asked)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
