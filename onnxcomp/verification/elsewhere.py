"""The layers that run the model in another environment: another processor, build or execution provider."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.errors import OnnxcompError, RequirementError
from onnxcomp.model import Model
from onnxcomp.runtime import Array, Feed, Runtime
from onnxcomp.verification.always import CPU
from onnxcomp.verification.differences import difference, too_far
from onnxcomp.verification.environments import Environment, Execution
from onnxcomp.verification.results import LayerResult, NodeDifference
from onnxcomp.verification.samples import FewSamples
from onnxcomp.verification.steps import expose_codes, parting_nodes

__all__ = ["run_elsewhere"]

TRACED_SAMPLES = 2
"""Samples with different outputs on which the nodes are looked for where that begins."""


def run_elsewhere(
    environment: Environment,
    artifact: Path,
    model: Model | None,
    few: FewSamples,
    runtime: Runtime,
    *,
    plain: bool,
    config: Mapping[str, str],
    install: bool,
    folder: Path,
    progress: Callable[[str], None],
) -> LayerResult:
    """Run a model in an environment and compare it with this host's CPU provider.

    Args:
        environment: Where to run it.
        artifact: The file that is shipped.
        model: The model that it was made of; None where that is not known.
        few: Samples, and what this host gives on them.
        runtime: This host's CPU provider, set to fuse as the target does.
        plain: Whether only the CPU provider of that build is to be used.
        config: Session configuration entries.
        install: Whether to install what is missing.
        folder: Where files may be written.
        progress: Called with a short line on what is going on.
    """
    started = time.monotonic()
    provider = "CPU provider" if plain or environment.provider == CPU else environment.provider
    name, what = environment.name, f"{environment.description}: {provider.removesuffix('ExecutionProvider')}"
    missing = environment.missing()
    if missing and install:
        progress(f"installing what {name} needs")
        try:
            environment.install(progress)
        except RequirementError as error:
            return LayerResult(name, what, "skipped", str(error))
        missing = environment.missing()
    if missing:
        return LayerResult(name, what, "skipped", missing)
    progress(f"running on {name}")
    try:
        ran = environment.run(artifact, few.feeds, outputs=few.names, plain=plain, config=config)
    except (OnnxcompError, ValueError) as error:
        return LayerResult(name, what, "failed", str(error), seconds=time.monotonic() - started)
    outputs = [[run[output] for output in few.names] for run in ran.outputs]
    cpu, original = few.new(len(outputs)), few.original(len(outputs))
    samples = few.count(len(outputs))
    versus_cpu = difference(cpu, outputs, samples=samples)
    parting: tuple[NodeDifference, ...] = ()
    untold = ""
    if not versus_cpu.equal and model is not None:
        progress(f"looking for the nodes that differ on {name}")
        feeds = [
            feed
            for feed, one, other in zip(few.feeds, cpu, outputs, strict=False)
            if not difference([one], [other]).equal
        ]
        parting, untold = _parting(
            environment, model, feeds[:TRACED_SAMPLES], runtime, plain=plain, config=config, folder=folder
        )
    versus_original = difference(original, outputs, samples=samples)
    rounding = few.rounding if versus_cpu.error else 0.0
    wrong = too_far(difference(original, cpu), versus_original, versus_cpu, rounding)
    status, reason = ("failed", wrong) if wrong else _placement(environment, ran, plain=plain)
    return LayerResult(
        name,
        what,
        "failed" if status == "failed" else "ran",
        "; ".join(part for part in (reason, untold) if part),
        ran.runtime,
        ran.nodes,
        versus_original,
        versus_cpu,
        parting,
        time.monotonic() - started,
    )


def _placement(environment: Environment, ran: Execution, *, plain: bool) -> tuple[str, str]:
    """Whether the nodes ran where they should, and what is to be said of those that did not."""
    wanted = CPU if plain else environment.provider
    here = sum(ran.nodes.get(wanted, {}).values())
    elsewhere = {provider: sum(nodes.values()) for provider, nodes in ran.nodes.items() if provider != wanted}
    if not here and (ran.nodes or wanted != CPU):
        fell = f": all fell back to {', '.join(elsewhere)}" if elsewhere else ", as far as its profile tells"
        return "failed", f"no node ran on {wanted}{fell}"
    if any(elsewhere.values()):
        count = sum(elsewhere.values())
        fell = ", ".join(sorted({op for provider in elsewhere for op in ran.nodes[provider]}))
        return "ran", f"{count} of {here + count} nodes fell back to {', '.join(elsewhere)}, unverified there: {fell}"
    return "ran", ""


def _parting(
    environment: Environment,
    model: Model,
    feeds: Sequence[Feed],
    runtime: Runtime,
    *,
    plain: bool,
    config: Mapping[str, str],
    folder: Path,
) -> tuple[tuple[NodeDifference, ...], str]:
    """The quantized nodes where a difference begins, none where the model has none; and why they cannot be told."""
    exposed, names = expose_codes(model)
    if not names:
        return (), ""
    path = folder / "exposed.onnx"
    try:
        exposed.save(path, durable=False)
        ours = _by_name(names, list(runtime.run(path, feeds, outputs=names)))
        ran = environment.run(path, feeds, outputs=names, plain=plain, config=config)
    except (OnnxcompError, ValueError) as error:  # the outputs were compared all the same
        return (), f"the nodes where codes differ cannot be told: {error}"
    return parting_nodes(model, ours, {name: [run[name] for run in ran.outputs] for name in names}), ""


def _by_name(names: Sequence[str], runs: Sequence[Sequence[Any]]) -> dict[str, list[Array]]:
    return {name: [run[index] for run in runs] for index, name in enumerate(names)}
