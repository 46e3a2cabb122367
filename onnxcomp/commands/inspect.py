"""`onnxcomp inspect`: what is in a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxcomp.commands.guard import GuardedCommand, check_results, emit_json, stdout_console
from onnxcomp.commands.options import json_option, output_options, plain_option, shape_option, shapes_from

if TYPE_CHECKING:
    from onnxcomp.advice import Advice
    from onnxcomp.facts import ModelFacts

__all__ = ["inspect_command"]


@click.command("inspect", cls=GuardedCommand, short_help="Show what is in a model, and what would suit it.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--advise", is_flag=True, help="Say which techniques suit the model, with reasons and estimates.")
@shape_option
@json_option
@plain_option
@output_options
def inspect_command(
    model: Path, advise: bool, shape: tuple[str, ...], json_path: str | None, plain: bool, quiet: bool, verbose: bool
) -> None:
    """Show MODEL's inputs, outputs, operators, weights, multiply-accumulates and zeros, without running it."""
    from onnxcomp.facts import inspect

    check_results({"--json": json_path}, (model,))
    facts = inspect(model, shapes=shapes_from(shape))
    advice: list[Advice] = []
    if advise:
        from onnxcomp.advice import advise as advised

        advice = advised(facts)
    if emit_json(_json(facts, advice if advise else None), json_path) or quiet:
        return
    from onnxcomp.report.views import print_facts

    print_facts(facts, advice, stdout_console(plain=plain), verbose=verbose)


def _json(facts: ModelFacts, advice: list[Advice] | None) -> str:
    import dataclasses

    from onnxcomp.report.document import jsonable

    document = facts.to_dict()
    if advice is not None:
        document["advice"] = [dataclasses.asdict(item) for item in advice]
    return json.dumps(jsonable(document), indent=2, allow_nan=False) + "\n"
