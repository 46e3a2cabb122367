"""The command line: parse, call, print. It adds nothing that `import onnxcomp` lacks."""

from __future__ import annotations

import click

from onnxcomp.commands.compare import compare_command
from onnxcomp.commands.deploy import deploy_command
from onnxcomp.commands.distill import distill_command
from onnxcomp.commands.export import export_command
from onnxcomp.commands.inspect import inspect_command
from onnxcomp.commands.optimize import optimize_command
from onnxcomp.commands.passes import passes_command
from onnxcomp.commands.report import report_command
from onnxcomp.commands.verify import verify_command
from onnxcomp.commands.view import view_command

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="onnxcomp")
def main() -> None:
    """Make ONNX models smaller and faster, never worse, with the proof."""


for _command in (
    optimize_command,
    inspect_command,
    compare_command,
    verify_command,
    deploy_command,
    distill_command,
    export_command,
    passes_command,
    report_command,
    view_command,
):
    main.add_command(_command)
