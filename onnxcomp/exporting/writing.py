"""`export`: a torch module as an ONNX model, written only if ONNX Runtime computes what torch does."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from onnxcomp.errors import ModelError, OptionError
from onnxcomp.exporting.checking import Exported, check_repeatable, verified
from onnxcomp.exporting.inputs import Axes, Examples, axes_of, examples_of
from onnxcomp.exporting.modules import (
    Progress,
    evaluating,
    files_of,
    import_torch,
    load_weights,
    module_of,
    run,
)
from onnxcomp.exporting.reasons import innermost, reason
from onnxcomp.files import check_writable
from onnxcomp.model import Model
from onnxcomp.runtime.census import graphs
from onnxcomp.workfolder import work_folder

MIN_OPSET = 18
"""The least that the exporter writes without converting, which often fails."""


def export(
    source: Any,
    inputs: Any,
    path: str | Path,
    *,
    static: bool = False,
    dynamic: Axes | None = None,
    opset: int | None = None,
    weights: str | Path | None = None,
    allow_code: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Exported:
    """Write a torch module as an ONNX model.

    It is exported in evaluation mode by `torch.onnx.export(dynamo=True)`, checked, and run beside torch on random
    batches, also of other sizes. Where the source of a path on this machine was noted, it is dropped.

    Args:
        source: A `torch.nn.Module`, or `module:factory`: a function without arguments that gives one, or a pair of one
            and its example inputs.
        inputs: Example inputs: a tensor, a tuple of them, or a mapping of a `Shape` (or sizes) by the names of
            `forward`'s arguments. None where the factory gives them.
        path: Where to.
        static: Fix the size of the batch: by default axis 0 is dynamic in each input that has as many rows as the
            first.
        dynamic: Further dynamic axes: input name -> {axis: name}. Axes of one name have one size.
        opset: The operator set, 18 or later; by default the exporter's own.
        weights: A .safetensors file, or one of torch, loaded without running code, of a state_dict.
        allow_code: Whether `module:factory` may be imported and run.
        seed: Of random inputs.
        progress: Told what is being done.

    Returns:
        What was written, with the largest error of each output.

    Raises:
        OptionError: Code may not be run, or fails; inputs or axes do not suit the module.
        RequirementError: torch, onnxscript or safetensors is missing.
        ModelError: The module cannot be exported, or the result is not what torch computes. Nothing is written.
        RuntimeFailure: ONNX Runtime cannot run the result. Nothing is written.
        OutputError: It cannot be written there.
    """
    path, tell = Path(path), progress or (lambda text: None)
    if opset is not None and opset < MIN_OPSET:
        message = f"opset must be at least {MIN_OPSET}, got {opset}"
        raise OptionError(message)
    check_writable(path, inputs=(Path(weights),) if weights is not None else ())
    torch = import_torch()
    module, given = module_of(source, allow_code, tell)
    check_writable(path, inputs=files_of(module))
    if inputs is not None and given is not None:
        message = f"{source!r} gives example inputs itself; give no shapes beside them"
        raise OptionError(message)
    if weights is not None:
        load_weights(module, Path(weights))
    examples = examples_of(module, given if inputs is None else inputs, seed)
    axes, examples = axes_of(examples, dynamic or {}, batch=not static)
    with evaluating(module), torch.no_grad(), work_folder() as folder:
        names = [f"{name}_out" if name in examples.tensors else name for name in run(module, examples)]
        check_repeatable(module, examples)
        tell("exporting")
        exported = folder / "exported.onnx"
        _export(module, examples, axes, names, opset, exported)
        _strip(exported)
        model = Model.load(exported)
        if opset not in {None, model.opset}:
            message = f"the exporter cannot write opset {opset}; it gave {model.opset}"
            raise OptionError(message)
        checked = folder / "model.onnx"
        model.save(checked, external_data=False)
        tell("comparing with torch")
        result = verified(module, examples, axes, checked, path, model.opset, seed)
        model.save(path, external_data=False)
    return result


def _export(module: Any, examples: Examples, axes: Axes, outputs: list[str], opset: int | None, path: Path) -> None:
    import torch

    dims = {name: torch.export.Dim(name) for chosen in axes.values() for name in chosen.values()}
    chosen = {name: {axis: dims[dim] for axis, dim in axes.get(name, {}).items()} for name in examples.tensors}
    try:
        with _silence():
            program = torch.onnx.export(
                module,
                examples.args,
                kwargs=examples.kwargs or None,
                dynamo=True,
                verbose=False,
                input_names=list(examples.tensors),
                output_names=outputs,
                opset_version=opset,
                dynamic_shapes=examples.arranged(chosen) if axes else None,
            )
            program.save(path, external_data=True)
    except Exception as error:  # the exporter raises whatever went wrong in any of its parts
        told = reason(innermost(error))
        message = f"the module cannot be exported: {told}"
        if axes and re.search(r"dynamic|constrain|speciali", told, re.IGNORECASE):
            message += f" (the dynamic axes are {', '.join(dims)}; a static batch may do)"
        raise ModelError(message) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing of what the exporter prints, warns of and logs; what matters is in its error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)


def _strip(path: Path) -> None:
    """Drop the exporter's notes: where on this machine a node's source is, and how torch called it."""
    model = onnx.load(path, load_external_data=False)
    nodes = [node for graph in graphs(model.graph) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    parts = [model, *model.functions, *nodes]
    for graph in graphs(model.graph):
        parts += [graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
    for part in parts:
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    path.write_bytes(model.SerializeToString())
