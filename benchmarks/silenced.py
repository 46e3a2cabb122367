"""Channels that do nothing are taken out of trained models: all of them, nothing else, and at no loss.

    [ONNXCOMP_BENCH=DIR] python benchmarks/silenced.py [--share S] [--multiple M] [MODEL.onnx...]

A share (by default a third) of the units of every group of channels is silenced: the weights and biases that make them
become zero. `prune-channels` must then take out exactly these. The models are those of sample_models/ and, where DIR is
given, two of the tasks of tasks.py. Compared are the silenced model and the pruned one: they are to compute the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcomp import Context, Model
from onnxcomp.analysis import mac_counts
from onnxcomp.data import generate
from onnxcomp.runtime import Runtime
from onnxcomp.weights import Spool
from onnxcomp_passes._channels_groups import Channels, Slot, find_channels
from onnxcomp_passes._stored import lift_constants
from onnxcomp_passes._views import find_views
from onnxcomp_passes.prune_channels import PruneChannels
from onnxcomp_passes.simplify import Simplify

Array = np.ndarray[Any, Any]

FOLDER = Path(__file__).resolve().parent.parent / "sample_models"
TASKS = ("ic01_resnet8", "kws01_dscnn")
HEAD = ("model", "groups", "silenced", "removed", "bytes", "left", "MACs", "left", "largest error", "speed")

OFFSETS = {"Conv": (2,), "ConvTranspose": (2,), "Gemm": (2,), "BatchNormalization": (2, 3), "Add": (0, 1)}
"""Operator -> the inputs that may be added to each channel: with these zero, zero stays zero."""


def silence(
    model: Model, generator: np.random.Generator, share: float, multiple: int = 1
) -> tuple[Channels, dict[str, Array]]:
    """Make a share of the units of every group zero, in place.

    Args:
        model: The model, without weights in Constant nodes.
        generator: Draws the units.
        share: Of each group's units, rounded; one unit at least stays.
        multiple: As many units stay as are a multiple of this, where a group has as many.

    Returns:
        The model's channels, and the silenced units of each group.
    """
    channels = find_channels(model)
    nodes = {node.outputs[0].name: node for node in model.graph.nodes}
    counts = {group.name: group.units - _kept(group.units, share, multiple) for group in channels.groups}
    drawn = {group.name: generator.permutation(group.units)[: counts[group.name]] for group in channels.groups}
    silenced = channels.allowed({name: units for name, units in drawn.items() if units.size})
    views = {(view.node.outputs[0].name, view.index): view for view in find_views(model)}
    spool = Spool()
    for name, units in silenced.items():
        group = channels.group(name)
        for slot in group.producers:
            view = views[slot.node, slot.index]
            view.write(_zeroed(view.read(), slot, units), spool)
        for slot in group.coupled:
            node = nodes[slot.node]
            constant = node.inputs[slot.index]
            if slot.index in OFFSETS.get(node.op, ()) and isinstance(constant, gs.Constant):
                constant.values = _zeroed(constant.values, slot, units)
    return channels, silenced


def _kept(units: int, share: float, multiple: int) -> int:
    """How many units stay."""
    kept = max(1, units - round(share * units))
    rounded = round(kept / multiple) * multiple
    return min(units, rounded) if units >= multiple and rounded else kept


def _zeroed(values: Array, slot: Slot, units: Array) -> Array:
    values = np.array(values)
    np.moveaxis(values, slot.axis, 0)[slot.entries[units].reshape(-1)] = 0
    return values


def run_model(path: Path, share: float, multiple: int) -> list[str]:
    """Silence, prune, compare: a row of the table."""
    model = Model.load(path)
    lift_constants(model.graph)
    Simplify().rewrite(model, Context())
    channels, silenced = silence(model, np.random.default_rng(0), share, multiple)
    pruned = model.fork()
    PruneChannels().rewrite(pruned, Context())
    units = {group.name: group.units for group in channels.groups}
    left = {group.name: group.units for group in find_channels(pruned).groups}
    removed = sum(units[name] - left.get(name, 1) for name in units)
    with Runtime() as runtime, tempfile.TemporaryDirectory() as work:
        paths = [Path(work) / "silenced.onnx", Path(work) / "pruned.onnx"]
        for each, place in zip((model, pruned), paths, strict=True):
            each.save(place)
        feeds = list(generate(model.proto(), count=16).feeds())
        error = max(_errors(*(runtime.run(place, feeds) for place in paths)))
        before, after = (timing.median_ms for timing in runtime.time(paths, feeds[0], max_rounds=2000))
        sizes = [place.stat().st_size for place in paths]
    macs = [sum(mac_counts(each).values()) for each in (model, pruned)]
    return [
        path.stem if path.stem != "model" else path.parent.name,
        f"{len(channels.groups)}",
        f"{sum(len(each) for each in silenced.values())}",
        f"{removed}",
        f"{sizes[0]:,}",
        f"{sizes[1] / sizes[0]:.0%}",
        f"{macs[0]:,}",
        f"{macs[1] / macs[0]:.0%}",
        f"{error:.1e}",
        f"{before / after:.2f}",
    ]


def _errors(wanted: Iterator[list[Any]], got: Iterator[list[Any]]) -> Iterator[float]:
    """The largest difference of each output of each run, relative to the output's largest value."""
    for left, right in zip(wanted, got, strict=True):
        for one, other in zip(left, right, strict=True):
            yield float(np.max(np.abs(one - other)) / np.max(np.abs(one)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.onnx", help="instead of those above")
    parser.add_argument("--share", type=float, default=1 / 3, help="of each group's units that are silenced")
    parser.add_argument("--multiple", type=int, default=1, help="what stays of each group is a multiple of this")
    arguments = parser.parse_args()
    paths = arguments.models or [path for path in sorted(FOLDER.glob("*.onnx")) if ".opt" not in path.name]
    if not arguments.models and (bench := os.environ.get("ONNXCOMP_BENCH")):
        paths += [Path(bench) / "tasks" / name / "model.onnx" for name in TASKS]
    print("| " + " | ".join(HEAD) + " |")
    print("|" + " --- |" * len(HEAD))
    for path in paths:
        print("| " + " | ".join(run_model(path, arguments.share, arguments.multiple)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
