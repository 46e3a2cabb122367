"""`onnxcomp compare`: one model against another, also as a check in a user's CI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from onnxcomp.commands.guard import BUDGET_NOT_MET, GuardedCommand, emit_json, parsed, progress_to, stdout_console
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

__all__ = ["compare_command"]


def _limit(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        message = f"expected NAME=VALUE, such as top1=0.90, got {text!r}"
        raise OptionError(message)
    try:
        return name.strip(), parse_share(value)
    except OptionError:
        message = f"{name.strip()} must be a number of at least 0, got {value!r}"
        raise OptionError(message) from None


@click.command("compare", cls=GuardedCommand, short_help="Compare a model with another on the same data.")
@click.argument("original", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@data_options
@click.option(
    "--fail-under", "limits", multiple=True, callback=parsed(_limit), metavar="NAME=VALUE",
    help="Exit with 3 if NEW does not reach this: the metric's name, sqnr, agreement, size or speed.",
)  # fmt: skip
@click.option("--target", metavar="NAME", help="What the models are for, such as arm64; else this machine.")
@shape_option
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of generated inputs and intervals.")
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Threads to run and time with.")
@click.option("--layers", is_flag=True, help="Measure the error of each layer too, and list the worst first.")
@click.option("--no-timing", is_flag=True, help="Do not time the models.")
@json_option
@output_options
@click.pass_context
def compare_command(ctx: click.Context, /, **options: Any) -> None:
    """Compare NEW with ORIGINAL: metric, outputs, bytes, speed and kernels.

    A limit of --fail-under on a metric where lower is better, such as mse, is the most that will do. Exit codes: 0
    done, 1 failure, 2 usage, 3 a limit is not reached.
    """
    from onnxcomp.comparison import compare, shortfalls

    check_code(allow_code=options["allow_code"], data=options["data"], metric=options["metric"])
    limits = dict(options["limits"])
    with progress_to(verbose=options["verbose"], quiet=options["quiet"]) as progress:
        if progress:
            progress("running both models")
        comparison = compare(
            options["original"],
            options["new"],
            data=options["data"],
            metric=options["metric"] or _named_metric(limits),
            threads=options["threads"],
            target=options["target"],
            shapes=shapes_from(options["shape"]),
            seed=options["seed"],
            image=image_from(options),
            allow_code=options["allow_code"],
            timing=not options["no_timing"],
            layers=options["layers"],
        )
    missed = shortfalls(comparison, limits)
    from onnxcomp.report.document import jsonable

    document = {**comparison.to_dict(), "limits": limits, "shortfalls": missed}
    taken = emit_json(json.dumps(jsonable(document), indent=2, allow_nan=False) + "\n", options["json_path"])
    if not taken and not options["quiet"]:
        from onnxcomp.report.views import print_comparison

        print_comparison(comparison, stdout_console(), verbose=options["verbose"])
    for line in missed:
        click.echo(f"Error: {line}", err=True)
    if missed:
        ctx.exit(BUDGET_NOT_MET)


def _named_metric(limits: dict[str, float]) -> str | None:
    """The metric that a limit is on, so that it need not be named twice."""
    from onnxcomp.comparison import FIXED_LIMITS

    return next((name for name in limits if name not in FIXED_LIMITS), None)
