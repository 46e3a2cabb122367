"""`onnxcomp report`: an earlier run's JSON report as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxcomp.commands.guard import GuardedCommand
from onnxcomp.commands.options import output_options
from onnxcomp.report.text import bytes_text, printable

if TYPE_CHECKING:
    from onnxcomp.ledger import Report

__all__ = ["report_command", "write_page"]


@click.command("report", cls=GuardedCommand, short_help="Make a page of an earlier run's JSON report.")
@click.argument("source", metavar="REPORT", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write; else REPORT.html beside it.")
@output_options
def report_command(source: Path, output: Path | None, *, quiet: bool, verbose: bool) -> None:
    """Make one HTML file of REPORT, a JSON file that `optimize --json` wrote.

    The page opens from disk and loads nothing, so that it can be sent to others as it is.

    Exit codes: 0 done, 1 failure, 2 usage.
    """
    from onnxcomp.files import check_writable
    from onnxcomp.report import read_json

    path = output or source.with_suffix(".html")
    check_writable(path, inputs=(source,))
    size = write_page(read_json(source), path)
    if not quiet:
        click.echo(f"{printable(path)}: {bytes_text(size)}")


def write_page(report: Report, path: Path) -> int:
    """Write a report as a page, whole or not at all; its size in bytes."""
    from onnxcomp.report.document import write_text
    from onnxcomp.report.page import page_html

    text = page_html(report)
    write_text(text, path)
    return len(text.encode())
