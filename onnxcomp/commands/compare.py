"""`onnxcomp compare`: models against an original, also as a check in a user's CI."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcomp.commands.guard import (
    BUDGET_NOT_MET,
    FAILURE,
    GIVEN,
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
from onnxcomp.report.text import printable
from onnxcomp.values import parse_share

if TYPE_CHECKING:
    from onnxcomp.compared import Comparisons

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


@click.command("compare", cls=GuardedCommand, short_help="Compare models with an original on the same data.")
@click.argument("original", type=click.Path(path_type=Path))
@click.argument("candidates", metavar="CANDIDATE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@data_options
@click.option("--max-drop", callback=parsed(parse_share), metavar="X", help="What the metric may lose: 0.5% or 0.005.")
@click.option(
    "--max-error", callback=parsed(parse_share), metavar="X", help="Allowed relative error where there is no metric."
)
@click.option(
    "--fail-under", "limits", multiple=True, callback=parsed(_limit), metavar="NAME=VALUE",
    help="Exit with 3 if a candidate does not reach this: the metric's name, sqnr, agreement, size or speed.",
)  # fmt: skip
@click.option("--target", metavar="NAME", help="What the models are for, such as arm64; else this machine.")
@shape_option
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of generated inputs and intervals.")
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Threads to run and time with.")
@click.option("--layers", is_flag=True, help="Measure the error of each layer too, and list the worst first.")
@click.option("--no-timing", is_flag=True, help="Do not time the models.")
@json_option
@click.option("--report", "page_path", metavar="PATH", help="Write a page to show to others: one HTML file.")
@plain_option
@output_options
@click.pass_context
def compare_command(ctx: click.Context, /, **options: Any) -> None:
    """Compare each CANDIDATE with ORIGINAL: metric, outputs, bytes, speed and kernels.

    All run on the same samples and are timed in turn. A candidate that cannot be compared is told with its reason, and
    the others go on. A limit of --fail-under on a metric where lower is better, such as mse, is the most that will do.

    Exit codes: 0 done, 1 failure, also of one candidate, 2 usage, 3 a candidate misses a limit or a budget that was
    asked for.
    """
    check_code(allow_code=options["allow_code"], data=options["data"], metric=options["metric"])
    results = {"--json": options["json_path"], "--report": options["page_path"]}
    check_results(results, (options["original"], *options["candidates"]), options["data"])
    quiet, verbose, plain = options["quiet"], options["verbose"], options["plain"]
    found = _compared(options)
    found.options["command"] = ctx.meta[GIVEN]
    from onnxcomp.report.comparison_document import comparison_to_json

    taken = emit_json(comparison_to_json(found), options["json_path"])
    if options["page_path"] is not None:
        from onnxcomp.report.page import write_page

        write_page(found, options["page_path"])
    if not taken and not quiet:
        from onnxcomp.report.compared import print_comparisons

        print_comparisons(found, stdout_console(plain=plain), verbose=verbose)
    asked = options["max_drop"] is not None or options["max_error"] is not None
    ctx.exit(_told(found, asked_budget=asked))


def _compared(options: dict[str, Any]) -> Comparisons:
    from onnxcomp.budget import Budget
    from onnxcomp.comparison import compare_all

    limits = dict(options["limits"])
    budget = {name: float(options[name]) for name in ("max_drop", "max_error") if options[name] is not None}
    with progress_to(verbose=options["verbose"], quiet=options["quiet"], plain=options["plain"]) as progress:
        return compare_all(
            options["original"],
            options["candidates"],
            data=options["data"],
            metric=options["metric"] or _named_metric(limits),
            budget=Budget(**budget),
            limits=limits,
            threads=options["threads"],
            target=options["target"],
            shapes=shapes_from(options["shape"]),
            seed=options["seed"],
            image=image_from(options),
            allow_code=options["allow_code"],
            timing=not options["no_timing"],
            layers=options["layers"],
            strict=len(options["candidates"]) == 1,
            progress=progress,
        )


def _told(found: Comparisons, *, asked_budget: bool) -> int:
    """Say on stderr which candidates failed or miss what was asked of them; the exit code."""
    several = len(found.candidates) > 1
    failed = missed = False
    for candidate in found.candidates:
        name = f"{candidate.model['path']}: " if several else ""
        lines = list(candidate.shortfalls)
        if candidate.verdict == "over" and asked_budget:
            lines.append(f"it is over the budget: {candidate.reason.removesuffix(' (over the budget)')}")
        if candidate.verdict == "failed":
            failed = True
            lines.append(candidate.reason)
        missed |= bool(lines)
        for line in lines:
            click.echo(f"Error: {printable(name + line)}", err=True)
    return FAILURE if failed else BUDGET_NOT_MET if missed else 0


def _named_metric(limits: dict[str, float]) -> str | None:
    """The metric that a limit is on, so that it need not be named twice."""
    from onnxcomp.comparison import FIXED_LIMITS

    return next((name for name in limits if name not in FIXED_LIMITS), None)
