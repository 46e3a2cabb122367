"""`onnxcomp distill`: train a compressed model with the answers of the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcomp.commands.guard import GuardedCommand, emit_json, parsed, progress_to, stdout_console
from onnxcomp.commands.options import (
    check_code,
    data_options,
    image_from,
    json_option,
    output_options,
    shape_option,
    shapes_from,
)
from onnxcomp.errors import OptionError
from onnxcomp.values import parse_share

if TYPE_CHECKING:
    from onnxcomp.train import Loss, Pruning, TrainOptions

__all__ = ["distill_command"]


@click.command("distill", cls=GuardedCommand, short_help="Train a compressed model with the original's answers.")
@click.argument("teacher", type=click.Path(path_type=Path))
@click.argument("student", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write; else STUDENT.distilled.onnx.")
@data_options
@click.option("--epochs", type=float, default=5.0, show_default=True, help="Passes over the samples.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Samples in a step.")
@click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="The highest; it rises and falls.")
@click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True, help="How.")
@click.option("--weight-decay", type=float, default=0.0, help="Of weights of two axes or more.")
@click.option("--ema", type=float, default=0.0, help="Decay of an average of the weights, which is kept; 0: none.")
@click.option("--accumulate", type=click.IntRange(min=1), default=1, help="Run a step's samples in this many parts.")
@click.option("--held-out", callback=parsed(parse_share), default="10%", help="Share of samples that judge; 10%.")
@click.option("--patience", type=click.IntRange(min=0), default=0, help="End after so many judgements without gain.")
@click.option("--augment", default="", metavar="HOW", help="shift:N, flip, both by a comma, or module:function.")
@click.option("--temperature", type=float, default=2.0, show_default=True, help="Evens out class probabilities.")
@click.option("--alpha", type=float, default=0.9, show_default=True, help="Weight of the teacher against labels.")
@click.option("--features", type=float, default=0.0, help="Weight of inner tensors' errors.")
@click.option("--attention", type=float, default=0.0, help="Weight of attention maps' distances.")
@click.option("--relational", type=float, default=0.0, help="Weight of distances and angles in a batch.")
@click.option("--graph", type=float, default=0.0, help="Weight of similarities in a batch.")
@click.option("--tensor", "tensors", multiple=True, metavar="NAME", help="Inner tensors to compare; else chosen.")
@click.option("--loss", "user", metavar="REF", help="A further term: module:function of both's tensors and labels.")
@click.option("--prune", "sparsity", callback=parsed(parse_share), metavar="X", help="Zeros to reach, such as 95%.")
@click.option(
    "--prune-how", type=click.Choice(["gradual", "once", "penalty"]), default="gradual", show_default=True,
    help="More and more; all at first; or by a penalty on weights.",
)  # fmt: skip
@click.option("--prune-end", type=float, default=0.6, help="Share of training after which no more zeros are made; 0.6.")
@click.option("--max-drop", callback=parsed(parse_share), metavar="X", help="Pruning waits while more is lost.")
@click.option("--freeze", multiple=True, metavar="PATTERN", help="Weights that are not trained, such as 'embed*'.")
@click.option("--learn-scales", is_flag=True, help="Train the scales of quantized values too (LSQ).")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where to train.")
@click.option("--log-dir", type=click.Path(path_type=Path), help="Where to write a TensorBoard log.")
@click.option("--resume/--no-resume", default=True, help="Go on with the same training where it was interrupted.")
@shape_option
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of everything random; 0 unless given.")
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Threads of one operator; 1 unless given.")
@json_option
@output_options
def distill_command(**options: Any) -> None:
    """Train STUDENT, a compressed form of TEACHER, to answer as TEACHER does.

    Labels are not needed; where --data has some of classes, --alpha divides the weight. Zeros, codebooks and integer
    grids of STUDENT stay. Samples that are held out judge the training, and the best weights on them are written. With
    torchrun several processes train together.
    """
    from onnxcomp.files import check_writable
    from onnxcomp.structure import model_files

    if not options["data"]:
        message = "--data is missing: there is nothing to train on without samples"
        raise OptionError(message)
    check_code(allow_code=options["allow_code"], data=options["data"], metric=options["metric"], loss=options["user"])
    teacher, student = options["teacher"], options["student"]
    output = options["output"] or student.with_name(f"{student.stem}.distilled.onnx")
    inputs = (*model_files(teacher), *model_files(student), Path(options["data"]))
    check_writable(output, inputs=inputs)
    with progress_to(verbose=options["verbose"], quiet=options["quiet"]) as progress:
        from onnxcomp.train import distill

        found = distill(
            teacher,
            student,
            options["data"],
            loss=_loss(options),
            options=_training(options),
            pruning=_pruning(options),
            metric=options["metric"],
            freeze=options["freeze"],
            learn_scales=options["learn_scales"],
            resume=options["resume"],
            log_dir=options["log_dir"],
            allow_code=options["allow_code"],
            image=image_from(options),
            shapes=shapes_from(options["shape"]),
            progress=progress or (lambda _: None),
        )
    if found.rank:
        return
    found.model.save(output)
    from onnxcomp.report.document import jsonable

    document = {**found.to_dict(), "output": str(output)}
    taken = emit_json(json.dumps(jsonable(document), indent=2, allow_nan=False) + "\n", options["json_path"])
    if not taken and not options["quiet"]:
        from onnxcomp.report.training import print_training

        print_training(found, output, stdout_console())


def _loss(options: dict[str, Any]) -> Loss:
    from onnxcomp.train import Loss

    names = ("temperature", "alpha", "features", "attention", "relational", "graph", "user", "allow_code")
    return Loss(tensors=options["tensors"] or "auto", **{name: options[name] for name in names})


def _training(options: dict[str, Any]) -> TrainOptions:
    from onnxcomp.train import TrainOptions

    names = (
        *("epochs", "batch_size", "learning_rate", "optimizer", "weight_decay", "ema", "accumulate", "held_out"),
        *("patience", "augment", "device", "seed", "threads"),
    )
    return TrainOptions(**{name: options[name] for name in names})


def _pruning(options: dict[str, Any]) -> Pruning | None:
    if options["sparsity"] is None:
        return None
    from onnxcomp.train import Pruning

    return Pruning(
        sparsity=options["sparsity"],
        how=options["prune_how"],
        end=options["prune_end"],
        max_drop=options["max_drop"] or 0.0,
    )
