"""`onnxcomp distill`: train a compressed model with the answers of the original."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
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

_INNER = ("features", "attention", "relational", "graph")


def _number(*, above: float = -math.inf, least: float = -math.inf, below: float = math.inf) -> Any:
    """An option's callback that refuses numbers out of range."""
    limits = ((above, "above", float.__gt__), (least, "of at least", float.__ge__), (below, "below", float.__lt__))
    told = " and ".join(f"{word} {limit:g}" for limit, word, _ in limits if math.isfinite(limit))

    def check(value: float) -> float:
        if not math.isfinite(value) or not all(holds(value, limit) for limit, _, holds in limits):
            message = f"expected a number {told}, got {value:g}"
            raise OptionError(message)
        return value

    return parsed(check)  # type: ignore[arg-type] # click has made a number of the text


def _weight(name: str, of: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(name, type=float, default=0.0, callback=_number(least=0), metavar="X", help=f"Weight of {of}.")


def _share(text: str) -> float:
    share = parse_share(text)
    if not 0 < share < 1:
        message = f"expected a share above 0 and below 1, such as 10%, got {text!r}"
        raise OptionError(message)
    return share


@click.command("distill", cls=GuardedCommand, short_help="Train a compressed model with the original's answers.")
@click.argument("teacher", type=click.Path(path_type=Path))
@click.argument("student", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Where to write; else STUDENT.distilled.onnx.",
)
@data_options
@click.option(
    "--epochs",
    type=float,
    default=5.0,
    callback=_number(above=0),
    metavar="X",
    show_default=True,
    help="Passes over the samples.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, metavar="N", show_default=True, help="Samples in a step."
)
@click.option(
    "--learning-rate",
    type=float,
    default=1e-3,
    callback=_number(above=0),
    metavar="X",
    show_default=True,
    help="The highest: it rises to this, then falls to nothing.",
)
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "sgd"]),
    default="adamw",
    show_default=True,
    help="What makes steps of gradients.",
)
@click.option(
    "--weight-decay",
    type=float,
    default=0.0,
    callback=_number(least=0),
    metavar="X",
    help="Of weights of two axes or more; none unless given.",
)
@click.option(
    "--ema",
    type=float,
    default=0.0,
    callback=_number(least=0, below=1),
    metavar="X",
    help="Judge and keep an average of the weights, with this decay, such as 0.99.",
)
@click.option(
    "--accumulate",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Run a step in this many parts, for less memory.",
)
@click.option(
    "--held-out",
    callback=parsed(_share),
    default="10%",
    metavar="X",
    show_default=True,
    help="Share of the samples that judge the training.",
)
@click.option(
    "--patience",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="End after this many judgements without gain; else never.",
)
@click.option(
    "--augment",
    default="",
    metavar="HOW",
    help="Change inputs at random: shift:N, flip, both with a comma between, or module:function.",
)
@click.option(
    "--temperature",
    type=float,
    default=2.0,
    callback=_number(above=0),
    metavar="X",
    show_default=True,
    help="Evens out class probabilities.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1),
    default=0.9,
    metavar="X",
    show_default=True,
    help="Weight of the teacher's answers; that of labels is the rest.",
)
@_weight("--features", "the errors of inner tensors")
@_weight("--attention", "the distances of attention maps of inner tensors")
@_weight("--relational", "distances and angles between samples, by inner tensors")
@_weight("--graph", "similarities between samples, by inner tensors")
@click.option("--tensor", "tensors", multiple=True, metavar="NAME", help="An inner tensor for these; else chosen.")
@click.option(
    "--loss",
    "user",
    metavar="REF",
    help="A further term: module:function of the student's tensors, the teacher's, and labels or None.",
)
@click.option("--prune", "sparsity", callback=parsed(_share), metavar="X", help="Zeros to reach, such as 95%.")
@click.option(
    "--prune-how",
    type=click.Choice(["gradual", "once", "penalty"]),
    help="More and more (gradual, unless given), all at first, or drawn to zero by a penalty.",
)
@click.option(
    "--prune-end",
    type=float,
    callback=_number(above=0, below=1),
    metavar="X",
    help="Part of the training by which all zeros are made; 0.6 unless given.",
)
@click.option(
    "--max-drop",
    callback=parsed(parse_share),
    metavar="X",
    help="Make no more zeros while more than this is lost.",
)
@click.option("--freeze", multiple=True, metavar="PATTERN", help="Weights that are not trained, such as 'embed*'.")
@click.option("--learn-scales", is_flag=True, help="Train the scales of quantized values too (LSQ).")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    show_default=True,
    help="Where to train.",
)
@click.option("--log-dir", type=click.Path(path_type=Path), metavar="PATH", help="Write a TensorBoard log there.")
@click.option("--no-resume", is_flag=True, help="Start over instead of going on with an interrupted training.")
@shape_option
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Of everything random; 0 unless given."
)
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, metavar="N", help="Threads of one operator; 1 unless given."
)
@json_option
@output_options
def distill_command(**options: Any) -> None:
    """Train STUDENT, a compressed form of TEACHER, to answer as TEACHER does.

    Labels are not needed; where the data have those of classes, --alpha divides the weight. Zeros, shared values and
    integer grids of STUDENT stay. Samples that are held out judge the training, and the weights that are best on them
    are written. Under torchrun several processes train together.
    """
    _check_sense(options)
    teacher, student = options["teacher"], options["student"]
    output = options["output"] or student.with_name(f"{student.stem}.distilled.onnx")
    _check_files(options, output)
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
            resume=not options["no_resume"],
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

        print_training(found, student, output, stdout_console())


def _check_sense(options: dict[str, Any]) -> None:
    """Refuse what is missing or has no effect."""
    if not options["data"]:
        message = "--data is missing: there is nothing to train on without samples"
        raise OptionError(message)
    augment = "" if options["augment"].startswith("shift:") else options["augment"]
    check_code(
        allow_code=options["allow_code"],
        data=options["data"],
        metric=options["metric"],
        loss=options["user"],
        augment=augment,
    )
    if options["sparsity"] is None:
        for name in ("prune_how", "prune_end", "max_drop"):
            if options[name] is not None:
                message = f"--{name.replace('_', '-')} is of pruning; give --prune too"
                raise OptionError(message)
    if options["tensors"] and not any(options[name] for name in (*_INNER, "user")):
        message = f"--tensor names what is compared by {', '.join(f'--{name}' for name in _INNER)} or --loss; give one"
        raise OptionError(message)


def _check_files(options: dict[str, Any], output: Path) -> None:
    """Refuse outputs that cannot be written, or would overwrite what is read, before any work starts."""
    from onnxcomp.files import check_outputs
    from onnxcomp.structure import model_files

    inputs = (*model_files(options["teacher"]), *model_files(options["student"]), Path(options["data"]))
    json_path = Path(options["json_path"]) if options["json_path"] not in {None, "-"} else None
    check_outputs({"-o": output, "--json": json_path}, inputs=inputs)


def _loss(options: dict[str, Any]) -> Loss:
    from onnxcomp.train import Loss

    names = ("temperature", "alpha", *_INNER, "user", "allow_code")
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

    given = {"how": options["prune_how"], "end": options["prune_end"], "max_drop": options["max_drop"]}
    return Pruning(sparsity=options["sparsity"], **{name: value for name, value in given.items() if value is not None})
