"""`onnxcomp deploy`: the file that a target wants, with all that an app needs to know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxcomp.commands.guard import GuardedCommand, progress_to, stdout_console
from onnxcomp.commands.options import (
    check_code,
    image_from,
    output_options,
    plain_option,
    sample_options,
    shape_option,
    shapes_from,
)

__all__ = ["deploy_command"]


@click.command("deploy", cls=GuardedCommand, short_help="Write what a device needs of a model.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="NAME", help="What the model is for: arm64, xnnpack, nnapi, ...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@sample_options
@shape_option
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of made-up sample inputs.")
@click.option("--force", is_flag=True, help="Write it although lints found errors.")
@plain_option
@output_options
def deploy_command(**options: Any) -> None:
    """Write MODEL for a target, with a manifest, samples, and the lines that load it.

    The folder holds the .ort or .onnx file, whichever is right for the target, the operators that a reduced build of
    ONNX Runtime needs, a manifest, two inputs with the outputs that are expected, and a short README.
    """
    from onnxcomp.deployment import deploy

    check_code(allow_code=options["allow_code"], data=options["data"])
    with progress_to(verbose=options["verbose"], quiet=options["quiet"], plain=options["plain"]) as progress:
        if progress:
            progress("writing the package")
        package = deploy(
            options["model"],
            options["target"],
            options["output"],
            data=options["data"],
            shapes=shapes_from(options["shape"]),
            image=image_from(options),
            allow_code=options["allow_code"],
            seed=options["seed"],
            force=options["force"],
        )
    if not options["quiet"]:
        from onnxcomp.report.deployment import print_package

        print_package(package, stdout_console(plain=options["plain"]), verbose=options["verbose"])
