"""`onnxcomp optimize`: the main job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcomp.commands.guard import (
    BUDGET_NOT_MET,
    GIVEN,
    GuardedCommand,
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
from onnxcomp.errors import OptionError, OutputError
from onnxcomp.values import parse_duration, parse_share

if TYPE_CHECKING:
    from onnxcomp.passes import Pass
    from onnxcomp.recipe import Recipe

__all__ = ["optimize_command"]


def _pass(text: str) -> Pass:
    from onnxcomp.recipe import parse_pass

    return parse_pass(text)


def _target(text: str) -> str:
    from onnxcomp.targets import find_target

    return find_target(text).name


@click.command("optimize", cls=GuardedCommand, short_help="Make a model smaller and faster, with the proof.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write; else MODEL.opt.onnx beside it.")
@data_options
@click.option("--max-drop", callback=parsed(parse_share), metavar="X", help="What the metric may lose: 0.5% or 0.005.")
@click.option(
    "--max-error", callback=parsed(parse_share), metavar="X", help="Allowed relative error where there is no metric."
)
@click.option(
    "-p", "--pass", "passes", multiple=True, callback=parsed(_pass), metavar="NAME[:OPTION=VALUE,...]",
    help="A pass to try instead of the default ones; may be given several times.",
)  # fmt: skip
@click.option("--recipe", type=click.Path(path_type=Path), help="A TOML file of stages, budget and options.")
@click.option(
    "--target", "targets", multiple=True, callback=parsed(_target), metavar="NAME",
    help="What the model is for, such as arm64; else this machine. With several, -o is a folder.",
)  # fmt: skip
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Node names to leave alone, such as '/head/*'.")
@shape_option
@click.option(
    "--time-limit", callback=parsed(parse_duration), metavar="TIME", help="Try nothing new after 90s, 10m, 1h."
)
@click.option("--seed", type=click.IntRange(min=0), help="Of everything random; 0 unless given.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to run and time with; 1 unless given.")
@click.option("--unpack", is_flag=True, help="Only turn packed weights back into dense ones; the file grows.")
@click.option("--force", is_flag=True, help="Keep every stage whatever it costs; all is still measured.")
@click.option("--keep-debug", is_flag=True, help="Keep the exporter's traces.")
@click.option("--no-timing", is_flag=True, help="Decide without the clock, so that the same input gives the same file.")
@click.option("--replay", type=click.Path(path_type=Path), help="Take over the decisions of an earlier run's report.")
@click.option("--no-resume", is_flag=True, help="Start over instead of going on with an interrupted run.")
@json_option
@click.option("--report", "page_path", metavar="PATH", help="Write a page to show to others: one HTML file.")
@plain_option
@output_options
@click.pass_context
def optimize_command(ctx: click.Context, /, **options: Any) -> None:
    """Make MODEL smaller and faster, and never worse.

    Every stage is measured, and kept only if it pays. Without --data only rewrites that need none are tried. The
    result is a standard ONNX model; MODEL itself is not touched.

    Exit codes: 0 done (also when nothing helped), 1 failure, 2 usage, 3 the result is not inside the budget that was
    asked for.
    """
    source: Path = options.pop("model")
    quiet, verbose, plain = (options.pop(name) for name in ("quiet", "verbose", "plain"))
    json_path, page_path = options.pop("json_path"), options.pop("page_path")
    targets: tuple[str, ...] = options.pop("targets")
    output: Path | None = options.pop("output")
    arguments, asked_budget = _arguments(options)
    targets = targets or ((arguments.pop("target"),) if "target" in arguments else ())
    jobs = list(_jobs(source, output, json_path, page_path, targets))
    if len(jobs) > 1:
        from onnxcomp.pipeline import Shared

        arguments["shared"] = Shared()
    _check_files(source, jobs, [arguments.get("data"), options["recipe"], options["replay"]])
    met = True
    for job in jobs:
        arguments["target"] = job.target
        met &= _run(source, job, arguments, ctx.meta[GIVEN], quiet=quiet, verbose=verbose, plain=plain)
    if asked_budget and not met:
        ctx.exit(BUDGET_NOT_MET)


def _arguments(options: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The arguments of `onnxcomp.optimize`: the command line's over the recipe's; and whether a budget is asked for."""
    check_code(allow_code=options["allow_code"], data=options["data"], metric=options["metric"])
    recipe = _recipe(options["recipe"], options["passes"], allow_code=options["allow_code"])
    passes = list(options["passes"]) or (list(recipe.stages) if recipe else None)
    if options["unpack"]:
        if passes or options["replay"]:
            message = "--unpack is all that is done; leave out --pass, --recipe and --replay, or use -p unpack"
            raise OptionError(message)
        from onnxcomp.passes import find_pass

        passes = [find_pass("unpack")()]
    given: dict[str, Any] = dict(recipe.options) if recipe else {}
    image = image_from(options)
    explicit = {
        "data": options["data"],
        "metric": options["metric"],
        "exclude": options["exclude"] or None,
        "shapes": shapes_from(options["shape"]),
        "time_limit": options["time_limit"],
        "seed": options["seed"],
        "threads": options["threads"],
        "force": options["force"] or None,
        "keep_debug": options["keep_debug"] or None,
        "timing": False if options["no_timing"] else None,
        "resume": False if options["no_resume"] else None,
        "replay": options["replay"],
        "allow_code": options["allow_code"] or None,
        "image": image,
        "passes": passes,
    }
    given.update({name: value for name, value in explicit.items() if value is not None})
    limits = {"max_drop": options["max_drop"], "max_error": options["max_error"]}
    if recipe:
        written = {"max_drop": recipe.max_drop, "max_error": recipe.max_error}
        limits = {name: written[name] if value is None else value for name, value in limits.items()}
    budget = {name: float(value) for name, value in limits.items() if value is not None}
    if budget:
        from onnxcomp.budget import Budget

        given["budget"] = Budget(**budget)
    return given, bool(budget)


def _recipe(path: Path | None, passes: tuple[Any, ...], *, allow_code: bool) -> Recipe | None:
    if path is None:
        return None
    if passes:
        message = "--recipe and --pass both say what to try; give one of them"
        raise OptionError(message)
    from onnxcomp.recipe import load_recipe

    return load_recipe(path, allow_code=allow_code)


@dataclass(frozen=True)
class _Job:
    """A target, and where its model, its JSON report and its page go."""

    target: str | None
    model: Path
    json: str | None
    page: Path | None


def _jobs(
    source: Path, output: Path | None, json_path: str | None, page_path: str | None, targets: tuple[str, ...]
) -> Iterator[_Job]:
    """A job for each target."""
    if len(targets) < 2:
        path = output or (source.with_name(f"{source.stem}.opt.onnx") if source.name else source)
        yield _Job(targets[0] if targets else None, path, json_path, None if page_path is None else Path(page_path))
        return
    if output is None:
        message = "several targets are written to a folder; give one with -o"
        raise OptionError(message)
    if json_path == "-":
        message = "several targets give several reports, which do not fit stdout; give --json a file name"
        raise OptionError(message)
    _make_folder(output)
    reports = [None if path is None else Path(path) for path in (json_path, page_path)]
    for report in reports:
        if report is not None and not report.name:  # such as "."
            message = f"{report}: the output is a folder, expected a file name"
            raise OutputError(message)
    for target in dict.fromkeys(targets):
        named, page = (path and path.with_suffix(f".{target}{path.suffix}") for path in reports)
        yield _Job(target, output / f"{source.stem}.{target}.onnx", str(named) if named else None, page)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        message = f"{path}: the folder for several targets cannot be made ({error.strerror})"
        raise OutputError(message) from error


def _check_files(source: Path, jobs: list[_Job], read: list[Any]) -> None:
    """Refuse outputs that cannot be written, or would overwrite what is read, before any work starts."""
    from onnxcomp.files import check_outputs
    from onnxcomp.structure import model_files

    inputs = (*model_files(source), *(Path(path) for path in read if path))
    for job in jobs:
        json_path = Path(job.json) if job.json not in {None, "-"} else None
        check_outputs({"-o": job.model, "--json": json_path, "--report": job.page}, inputs=inputs)


def _run(
    source: Path, job: _Job, arguments: dict[str, Any], given: list[str], *, quiet: bool, verbose: bool, plain: bool
) -> bool:
    """Optimize for one target, write and show what came of it; whether the result is inside the budget."""
    from onnxcomp.pipeline import optimize
    from onnxcomp.report import print_report, to_json
    from onnxcomp.report.page import write_page

    asked: dict[str, Any] = {"layers": True} if job.json is not None or job.page is not None else {}
    with progress_to(verbose=verbose, quiet=quiet, plain=plain) as progress:
        result = optimize(source, progress=progress, **asked, **arguments)
        result.save(job.model)
    result.report.options["command"] = given
    taken = emit_json(to_json(result.report), job.json)
    if job.page is not None:
        write_page(result.report, job.page)
    if not quiet and not taken:
        print_report(result.report, stdout_console(plain=plain), verbose=verbose)
    return bool(result.report.budget_met)
