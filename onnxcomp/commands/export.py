"""`onnxcomp export`: a torch module as an ONNX model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxcomp.commands.guard import GuardedCommand, progress_to
from onnxcomp.commands.options import output_options
from onnxcomp.errors import OptionError

if TYPE_CHECKING:
    from onnxcomp.exporting import Exported
    from onnxcomp.runtime.results import TensorInfo

__all__ = ["export_command"]


@click.command("export", cls=GuardedCommand, short_help="Write a torch module as an ONNX model, checked.")
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="PATH", help="Where to write the model."
)
@click.option("--allow-code", is_flag=True, help="Let MODULE:FACTORY be imported and run.")
@click.option(
    "--weights", type=click.Path(path_type=Path), metavar="PATH", help="Load them: a .safetensors or torch file."
)
@click.option(
    "--shape", "shapes", multiple=True, metavar="NAME=[TYPE:]N,N,...",
    help="An example input, such as image=1,3,224,224 or ids=int64:1,128; for a factory that gives none.",
)  # fmt: skip
@click.option(
    "--dynamic", multiple=True, metavar="NAME=AXIS[:CALLED],...",
    help="Dynamic axes of an input beside the batch, such as ids=1:tokens.",
)  # fmt: skip
@click.option("--static", is_flag=True, help="Fix the size of the batch, which is dynamic otherwise.")
@click.option("--opset", type=click.IntRange(min=18), metavar="N", help="The operator set; else the exporter's own.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of random inputs.")
@output_options
def export_command(
    factory: str,
    output: Path,
    allow_code: bool,
    weights: Path | None,
    shapes: tuple[str, ...],
    dynamic: tuple[str, ...],
    static: bool,
    opset: int | None,
    seed: int,
    quiet: bool,
    verbose: bool,
) -> None:
    """Write the torch module that MODULE:FACTORY makes as an ONNX model.

    FACTORY is a function without arguments that gives a torch.nn.Module, or a pair of one and a tuple of example
    inputs. The model is written only if ONNX Runtime computes what torch does, on random inputs too.
    """
    from onnxcomp.data.user_code import is_reference

    if not allow_code and is_reference(factory):
        message = f"{factory!r} names code to run; allow it with --allow-code"
        raise OptionError(message)
    from onnxcomp.exporting import export, parse_dynamic, parse_examples

    examples, axes = parse_examples(shapes), parse_dynamic(dynamic)
    with progress_to(verbose=verbose, quiet=quiet) as progress:
        result = export(
            factory,
            examples or None,
            output,
            static=static,
            dynamic=axes,
            opset=opset,
            weights=weights,
            allow_code=allow_code,
            seed=seed,
            progress=progress,
        )
    if not quiet:
        _show(result)


def _show(result: Exported) -> None:
    from onnxcomp.report.text import bytes_text, printable
    from onnxcomp.structure import model_files

    size = sum(path.stat().st_size for path in model_files(result.path))
    lines = [f"{result.path}: {bytes_text(size)}, opset {result.opset}"]
    lines += [f"  input  {_told(tensor)}" for tensor in result.inputs]
    lines += [f"  output {_told(tensor)}, error {result.errors[tensor.name]:.1e}" for tensor in result.outputs]
    sizes = "; ".join(f"{name} {', '.join(map(str, found))}" for name, found in result.sizes.items())
    lines.append(
        f"largest error, relative to torch: {result.error:.1e} on {result.batches} batches{f' ({sizes})' * bool(sizes)}"
    )
    for line in lines:
        click.echo(printable(line))


def _told(tensor: TensorInfo) -> str:
    return (
        f"{tensor.name} {tensor.type.removeprefix('tensor(').removesuffix(')')} [{', '.join(map(str, tensor.shape))}]"
    )
