"""What every environment can do: tell what it lacks, install it once, and run a model there."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from onnxcomp.runtime import Array, Feed

__all__ = ["Environment", "Execution", "executed_nodes", "with_compiled_parts"]


@dataclass(frozen=True)
class Execution:
    """What came of running a model in an environment.

    Attributes:
        outputs: For each feed, output name -> array.
        nodes: Execution provider -> operator -> number of nodes that it really executed, out of a profile: what was
            planned is no evidence.
        runtime: What ran it, such as "ONNX Runtime 1.29.0, Android, x86-64".
        versions: Name -> version of what was installed, for the report.
    """

    outputs: list[dict[str, Array]]
    nodes: dict[str, dict[str, int]]
    runtime: str
    versions: dict[str, str] = field(default_factory=dict)


class Environment(ABC):
    """A machine, a build or a provider of ONNX Runtime that this machine can run.

    Attributes:
        name: As in `--layers`.
        description: What it is, in one line.
        provider: The execution provider that must execute nodes for the environment to prove anything.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    provider: ClassVar[str] = "CPUExecutionProvider"

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot run now, in one line with what to do about it; None: it can."""

    @abstractmethod
    def install(self, progress: Callable[[str], None]) -> None:
        """Install what is missing into the user's cache folder, whole or not at all.

        Raises:
            RequirementError: It cannot be had, or is not what was expected (its hash differs).
        """

    @abstractmethod
    def run(
        self,
        model: Path,
        feeds: Sequence[Feed],
        *,
        outputs: Sequence[str] | None = None,
        plain: bool = False,
        config: Mapping[str, str] | None = None,
        timeout_s: float = 600.0,
    ) -> Execution:
        """Run a model in a process of its own.

        Args:
            model: An .onnx or .ort file.
            feeds: The inputs, one mapping a run. Tensors only.
            outputs: The outputs to give; None: all.
            plain: Only the CPU provider of the same build, to tell the provider's part in a difference from the
                build's.
            config: Session configuration entries.
            timeout_s: The longest that the whole may take, in seconds.

        Raises:
            RequirementError: Something is missing.
            RuntimeFailure: It refused the model or a feed; the message is its own, in one line.
            WorkerDied: It crashed or did not end in time.
        """


def executed_nodes(profile: Path) -> dict[str, dict[str, int]]:
    """Count the nodes that a profile of ONNX Runtime shows to have been executed.

    Args:
        profile: The JSON file that a session with profiling on has written.

    Returns:
        Execution provider -> operator -> number of nodes.
    """
    events: list[dict[str, Any]] = json.loads(profile.read_text(encoding="utf-8"))
    ran = {
        (str(event["args"].get("provider", "")), str(event["args"]["op_name"]), str(event["name"]))
        for event in events
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time")
    }
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for provider, operator, _ in sorted(ran):  # a set has another order in each process
        counts[provider][operator] += 1
    return {provider: dict(operators.most_common()) for provider, operators in counts.items()}


def with_compiled_parts(
    nodes: Mapping[str, Mapping[str, int]], assigned: Sequence[tuple[str, Sequence[str]]], provider: str
) -> dict[str, dict[str, int]]:
    """Count also the nodes inside the parts that a provider has compiled.

    A profile shows one event for a compiled part. When every part that was given to the provider has been executed,
    so has every node in it; otherwise it cannot be said which, and the parts are counted.

    Args:
        nodes: What the profile shows.
        assigned: For each part of the graph its provider and its operators.
        provider: The one that compiles.

    Returns:
        As `nodes`.
    """
    counted = {name: dict(operators) for name, operators in nodes.items()}
    parts = [operators for name, operators in assigned if name == provider]
    if executed := sum(nodes.get(provider, {}).values()):
        operators = Counter(operator for part in parts for operator in part)
        counted[provider] = dict(operators.most_common()) if executed == len(parts) else {"compiled part": executed}
    return counted
