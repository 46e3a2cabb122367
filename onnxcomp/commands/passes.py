"""`onnxcomp passes`: which passes there are, and what they do."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from onnxcomp.commands.guard import GuardedCommand
from onnxcomp.report.text import printable

if TYPE_CHECKING:
    from onnxcomp.passes import Pass

__all__ = ["passes_command"]


@click.command("passes", cls=GuardedCommand, short_help="List the passes; explain one.")
@click.argument("name", required=False)
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks of internal errors.")
def passes_command(name: str | None, verbose: bool) -> None:
    """List the passes that are installed, or explain the pass NAME: before and after, what it leaves alone, options."""
    from onnxcomp.passes import find_pass, registered_passes

    if name is not None:
        click.echo("\n".join(_explained(find_pass(name))))
        return
    known = registered_passes()
    width = max(map(len, known), default=0)
    for title, cls in known.items():
        summary = (inspect.getdoc(cls) or "").partition("\n")[0]
        needs = f" (needs {', '.join(sorted(cls.requires))})" if cls.requires else ""
        click.echo(f"{printable(title):<{width}}  {printable(summary)}{needs}")


def _explained(cls: type[Pass]) -> Iterator[str]:
    yield cls.name
    yield ""
    yield from (printable(line) for line in (inspect.getdoc(cls) or "").splitlines())
    yield ""
    cost = "is lossless" if cls.lossless else "may cost accuracy"
    *most, last = sorted(cls.requires) or ["no data"]
    yield f"It {cost} and needs {' and '.join([*filter(None, [', '.join(most)]), last])}."
    if cls.mends:
        yield "It is judged together with the lossy passes before it, back to the last one that trains."
    if cls.pays_with:
        yield f"It pays only with a later {cls.pays_with}, and is judged together with it."
    options = dataclasses.fields(cls)
    yield ""
    yield "Options:" if options else "It has no options."
    for option in options:
        yield f"  {option.name}={_written(option.default)}"
        yield f"      {printable(option.metadata.get('description', ''))}{_limits(option.metadata)}"


def _written(value: Any) -> str:
    """A default as `-p NAME:option=value` takes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "|".join(map(str, value))
    return printable(value)


def _limits(metadata: Any) -> str:
    parts = []
    if metadata.get("choices"):
        parts.append(f"one of {', '.join(metadata['choices'])}")
    low, high = metadata.get("minimum"), metadata.get("maximum")
    if low is not None and high is not None:
        parts.append(f"from {low} to {high}")
    elif low is not None or high is not None:
        parts.append(f"at least {low}" if high is None else f"at most {high}")
    return f" ({', '.join(parts)})" if parts else ""
