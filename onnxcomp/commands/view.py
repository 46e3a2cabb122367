"""`onnxcomp view`: a model's graph in the browser."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from onnxcomp.commands.guard import GuardedCommand
from onnxcomp.commands.options import output_options
from onnxcomp.report.text import printable

__all__ = ["view_command"]


@click.command("view", cls=GuardedCommand, short_help="Show a model's graph in the browser, with netron.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(1, 65535), help="Where to listen; by default a free port is found.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@output_options
def view_command(model: Path, port: int | None, no_browser: bool, quiet: bool, verbose: bool) -> None:
    """Show MODEL's whole graph in the browser, with netron; Ctrl-C ends it.

    The page is served by this machine to itself. Nothing leaves it, netron's own messages included.

    Exit codes: 0 ended, 1 failure, 2 usage.
    """
    import webbrowser

    from onnxcomp.viewing import serve, wait

    address = serve(model, port=port)
    with contextlib.suppress(KeyboardInterrupt):  # `wait` ends well by one; so does what comes before it
        if not quiet:
            click.echo(f"{printable(model)}: {address} (Ctrl-C ends it)")
        if not no_browser:
            webbrowser.open(address)
        wait()
