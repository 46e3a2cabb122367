"""`onnxcomp report`: an earlier run's JSON as a page."""

from __future__ import annotations

from pathlib import Path

import click

from onnxcomp.commands.guard import GuardedCommand
from onnxcomp.commands.options import output_options
from onnxcomp.report.text import bytes_text, printable

__all__ = ["report_command"]


@click.command("report", cls=GuardedCommand, short_help="Make a page of an earlier run's JSON report.")
@click.argument("source", metavar="REPORT", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write; else REPORT.html beside it.")
@output_options
def report_command(source: Path, output: Path | None, *, quiet: bool, verbose: bool) -> None:
    """Make one HTML file of REPORT, a JSON file that `optimize --json` or `compare --json` wrote.

    The page opens from disk and loads nothing, so that it can be sent to others as it is.

    Exit codes: 0 done, 1 failure, 2 usage.
    """
    from onnxcomp.files import check_writable
    from onnxcomp.report import read_any_json
    from onnxcomp.report.page import write_page

    report = read_any_json(source)  # a path that has no name to put an ending to is told here
    path = output or source.with_suffix(".html")
    check_writable(path, inputs=(source,))
    size = write_page(report, path)
    if not quiet:
        click.echo(f"{printable(path)}: {bytes_text(size)}")
