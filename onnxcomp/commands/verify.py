"""`onnxcomp verify`: what a model does on its target, as far as it can be tried here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from onnxcomp.commands.guard import (
    BUDGET_NOT_MET,
    GuardedCommand,
    check_results,
    emit_json,
    parsed,
    progress_to,
    stdout_console,
)
from onnxcomp.commands.options import (
    check_code,
    data_options,
    image_from,
    json_option,
    output_options,
    plain_option,
    shape_option,
    shapes_from,
)
from onnxcomp.errors import OptionError

__all__ = ["verify_command"]


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        message = "expected names of layers, such as cpu,ort, and found none"
        raise OptionError(message)
    return names


@click.command("verify", cls=GuardedCommand, short_help="Run a model in every way that its target has.")
@click.argument("original", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@data_options
@click.option("--target", metavar="NAME", help="What NEW is for, such as arm64; else this machine.")
@click.option(
    "--layers", callback=parsed(_names), metavar="NAME,...",
    help="Of cpu, ort, arm64, x86, android, qnn, web; else those of the target.",
)  # fmt: skip
@click.option("--install", is_flag=True, help="Install what a layer lacks, once, into the user's cache folder.")
@click.option("--samples", type=click.IntRange(min=1), default=8, help="Samples that each layer runs on; 8.")
@shape_option
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of generated inputs and intervals.")
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Threads to run with here.")
@json_option
@plain_option
@output_options
@click.pass_context
def verify_command(ctx: click.Context, /, **options: Any) -> None:
    """Verify that NEW does on its target what it does here, and here what ORIGINAL does.

    NEW is an .onnx or .ort file. Each layer ran, failed, or was skipped with the reason; lints name what the target
    does not take. Exit codes: 0 nothing failed, 1 failure, 2 usage, 3 a layer failed or a lint found an error.
    """
    from onnxcomp.verification import verify

    check_code(allow_code=options["allow_code"], data=options["data"], metric=options["metric"])
    check_results({"--json": options["json_path"]}, (options["original"], options["new"]), options["data"])
    with progress_to(verbose=options["verbose"], quiet=options["quiet"], plain=options["plain"]) as progress:
        found = verify(
            options["original"],
            options["new"],
            data=options["data"],
            target=options["target"],
            layers=options["layers"],
            install=options["install"],
            samples=options["samples"],
            shapes=shapes_from(options["shape"]),
            seed=options["seed"],
            threads=options["threads"],
            image=image_from(options),
            allow_code=options["allow_code"],
            metric=options["metric"],
            progress=progress,
        )
    from onnxcomp.report.document import jsonable

    document = jsonable(found.to_dict())
    taken = emit_json(json.dumps(document, indent=2, allow_nan=False) + "\n", options["json_path"])
    if not taken and not options["quiet"]:
        from onnxcomp.report.verification import print_verification

        print_verification(found, stdout_console(plain=options["plain"]), verbose=options["verbose"])
    if not found.passed:
        ctx.exit(BUDGET_NOT_MET)
