"""What the passes that train have in common: how they are told to, and what they say of it."""

from __future__ import annotations

import glob
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs

from onnxcomp.errors import OptionError, RequirementError
from onnxcomp.graph_io import sorted_nodes
from onnxcomp.model import Model
from onnxcomp.passes import Changes, Context, Pass, Table, option

if TYPE_CHECKING:
    from onnxcomp.train import Loss, Trained

__all__ = ["COLUMNS", "Training"]

COLUMNS = ("step", "loss", "drop", "error", "agreement", "zeros")

_SHIFT = re.compile(r"shift:0*[1-9][0-9]*")


@dataclass(frozen=True, kw_only=True)
class Training(Pass):
    """A pass that trains the model as it has become, with the original's answers or with labels."""

    epochs: float = option(10.0, "Passes over the training samples.", minimum=0.01)
    batch_size: int = option(64, "Samples in a step.", minimum=1)
    learning_rate: float = option(1e-3, "The highest; it rises, then falls along a cosine.", minimum=1e-12)
    weight_decay: float = option(0.0, "Of weights of two axes or more.", minimum=0.0)
    ema: float = option(0.0, "Decay of an average of the weights, which is kept; 0: none.", minimum=0.0, maximum=0.9999)
    patience: int = option(0, "Judgements without gain after which training ends; 0: never.", minimum=0)
    augment: str = option("", "What is done to images at random: shift:N, flip, or both, divided by a plus sign.")
    freeze: tuple[str, ...] = option((), "Patterns of names of weights that are not trained.")
    held_out: float = option(0.1, "Share of the samples that judge the training.", minimum=0.01, maximum=0.9)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            OptionError: What is to be done to images is not understood.
        """
        super().__post_init__()
        if not all(word == "flip" or _SHIFT.fullmatch(word) for word in self.augment.split("+") if self.augment):
            message = (
                f"{self.name}: augment must be shift:N, flip, or both, divided by a plus sign, got {self.augment!r}"
            )
            raise OptionError(message)

    def _train(
        self, model: Model, context: Context, changes: Changes, loss: Loss, came: Model | None = None, **more: Any
    ) -> None:
        """Train a model in place, and say how it went.

        Args:
            model: Trained in place.
            context: Its judge knows the original, which is the teacher.
            changes: Told how it went.
            loss: What is learnt.
            came: The teacher where there is no judge: the model before this pass; by default as it is.
            more: For `onnxcomp.train.distill`.
        """
        from onnxcomp.torch_bridge.weights import trainable_names
        from onnxcomp.train import TrainOptions, distill

        if context.data is None:
            message = f"{self.name} needs data; give --data"
            raise RequirementError(message)
        excluded = _weights_of_excluded(model, context)
        if excluded.issuperset(trainable_names(model.fork().graph)):
            changes.leave("the model", "has no weight that is not excluded")
            return
        teacher = Model.load(context.judge.original_path) if context.judge is not None else came or model.fork()
        options = TrainOptions(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            ema=self.ema,
            patience=self.patience,
            augment=self.augment.replace("+", ","),
            held_out=self.held_out,
            seed=int(context.rng.integers(1 << 31)),
        )
        metric = context.judge.metric if context.judge is not None else None
        found = distill(
            teacher, model, context.data, loss=loss, options=options, metric=metric,
            freeze=(*self.freeze, *map(glob.escape, sorted(excluded))),
            progress=context.progress, **more,
        )  # fmt: skip
        changes.tables.append(_table(found))
        if found.kept and found.changed:
            changes.add(f"{len(found.changed)} weights", self._told(found))
            model.become(found.model)
        else:
            changes.leave("the model", "training made it no better on the samples that were held out")

    @staticmethod
    def _told(found: Trained) -> str:
        before, after, steps = found.before, found.after, found.history.steps
        if before.drop is None or after.drop is None:
            return f"trained for {steps:,} steps: error {before.error:.2%} to {after.error:.2%}"
        return f"trained for {steps:,} steps: drop {before.drop:+.4f} to {after.drop:+.4f}"


def _weights_of_excluded(model: Model, context: Context) -> set[str]:
    """The names of the constants that excluded nodes read, whatever form they are held in."""
    behind: dict[int, frozenset[str]] = {}
    for graph in model.graphs():
        _find_constants_behind(graph, behind)
    nodes = [node for graph in model.graphs() for node in graph.nodes if context.excludes(node)]
    return {name for node in nodes for tensor in node.inputs for name in behind.get(id(tensor), ())}


def _find_constants_behind(graph: gs.Graph, behind: dict[int, frozenset[str]]) -> None:
    """Note the names of the constants that tensors are decoded from; not of those that depend on more than constants.

    Args:
        graph: The graph.
        behind: Names by the id of the tensor; those of the enclosing graphs are there.
    """
    for node in sorted_nodes(graph):
        read = [tensor for tensor in node.inputs if tensor.name]
        behind.update((id(tensor), frozenset({tensor.name})) for tensor in read if isinstance(tensor, gs.Constant))
        if node.op == "Constant":
            behind.update((id(tensor), frozenset({tensor.name})) for tensor in node.outputs)
        elif read and all(id(tensor) in behind for tensor in read):
            names = frozenset[str]().union(*(behind[id(tensor)] for tensor in read))
            behind.update((id(tensor), names) for tensor in node.outputs)


def _table(found: Trained) -> Table:
    rows: list[tuple[str | int | float | None, ...]] = [
        (
            each.step,
            each.loss if math.isfinite(each.loss) else None,
            each.drop,
            each.error,
            each.agreement,
            each.sparsity,
        )
        for each in found.history.evaluations
    ]
    return Table("training", COLUMNS, rows)
