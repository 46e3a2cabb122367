"""`deploy`: the file that a target wants, and all that an app needs to know of it, in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data import Dataset, ImageOptions, generate, input_specs, open_data
from onnxcomp.deployment.contents import MANIFEST, SAMPLES, sha256, write_files
from onnxcomp.deployment.folders import check_folder, replaced_folder
from onnxcomp.deployment.readme import package_readme
from onnxcomp.errors import ModelError, RuntimeFailure
from onnxcomp.fixed_shapes import made_static
from onnxcomp.lints import Finding, lint_model
from onnxcomp.model import Model, ModelSource
from onnxcomp.ort_format import is_ort
from onnxcomp.pairs import as_tuples
from onnxcomp.targets import Target, find_target

__all__ = ["Package", "deploy"]


@dataclass(frozen=True)
class Package:
    """What `deploy` wrote.

    Attributes:
        folder: Where it lies.
        manifest: What the manifest says.
        findings: What lints found in the model: traps for this target.
    """

    folder: Path
    manifest: dict[str, Any]
    findings: tuple[Finding, ...]

    @property
    def size_bytes(self) -> int:
        """The size of the model file."""
        return int(self.manifest["model"]["bytes"])


def deploy(
    source: ModelSource,
    target: str | Target,
    output: str | Path,
    *,
    data: Any = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    image: ImageOptions | None = None,
    allow_code: bool = False,
    seed: int = 0,
    force: bool = False,
) -> Package:
    """Write what a target needs of a model, and nothing else.

    Args:
        source: The model: a path, a ModelProto or a Model. It is not changed.
        target: What it is for.
        output: The folder to write; it is replaced whole if it is a package already, and must not hold anything else.
        data: Samples of which two are shipped with the outputs that are expected of them; made up without data.
        shapes: Sizes of dynamic inputs: of made-up samples, and of the model where the target wants static shapes; else
            those of the data, and a batch of 1.
        image: How images become inputs: written into the manifest, and used to read `data`.
        allow_code: Whether "module:function" may be imported and called.
        seed: Of made-up inputs.
        force: Write the package although lints found errors.

    Returns:
        What was written.

    Raises:
        ModelError: The model cannot be read, or has what the target does not take.
        OutputError: The folder cannot be written.

    Example:
        >>> import tempfile
        >>> from onnx import parser
        >>> graph = "g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"
        >>> model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}')
        >>> package = deploy(model, "arm64", Path(tempfile.mkdtemp()) / "app")
        >>> sorted(path.name for path in package.folder.iterdir())
        ['README.md', 'manifest.json', 'model.ort', 'required_operators_and_types.config', 'samples']
    """
    chosen = find_target(target) if isinstance(target, str) else target
    folder = Path(output)
    name = _name(source)
    check_folder(folder, source)
    sizes = as_tuples(shapes)
    model = _fitted(source, chosen, data, sizes, image, allow_code=allow_code)
    findings = lint_model(model, chosen)
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors and not force:
        raise ModelError(_refusal(name, chosen, errors))
    try:
        with (
            _samples(model, data, sizes, image, seed, allow_code=allow_code) as samples,
            replaced_folder(folder) as written,
        ):
            manifest = write_files(model, name, chosen, samples, written, image)
            digest = sha256(Path(source)) if isinstance(source, str | Path) else None
            manifest["source"] = {"file": name, "sha256": digest}
            (written / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            (written / "README.md").write_text(package_readme(manifest), encoding="utf-8")
    except RuntimeFailure as error:  # it names a temporary file
        message = f"{name}: {str(error).partition(': ')[2] or error}"
        raise type(error)(message) from error
    if not manifest["model"]["data"]:
        findings = tuple(finding for finding in findings if finding.id != "external-data")
    return Package(folder, manifest, findings)


def _refusal(name: str, target: Target, errors: Sequence[Finding]) -> str:
    """Why a model is not written, and what to do about the first reason."""
    first, others = errors[0], dict.fromkeys(finding.id for finding in errors)
    del others[first.id]
    more = f"; also {', '.join(others)}: see `onnxcomp verify --target {target.name}`" if others else ""
    return (
        f"{name}: {target.name} does not take it as it is ({first.id}): {first.where}: {first.what}; {first.fix}"
        f"{more}; or give --force"
    )


# --- the model --------------------------------------------------------------------------------------------------------


def _name(source: ModelSource) -> str:
    path = source if isinstance(source, str | Path) else getattr(source, "path", None)
    return Path(path).name if path else "model.onnx"


def _fitted(
    source: ModelSource,
    target: Target,
    data: Any,
    shapes: dict[str, tuple[int, ...]],
    image: ImageOptions | None,
    *,
    allow_code: bool,
) -> Model:
    """The model, with static shapes where the target wants these."""
    if isinstance(source, str | Path) and is_ort(Path(source)):
        message = f"{source}: it is in ONNX Runtime's own format already; give the .onnx file that it was made of"
        raise ModelError(message)

    def one_sample(fixed: Model) -> Mapping[str, Any] | None:
        if not isinstance(data, str | Path | Mapping | np.ndarray | list | tuple):
            return None
        specs = input_specs(fixed.proto())
        with open_data(data, specs, shapes=shapes, image=image, allow_code=allow_code) as samples:
            return next(samples.feeds(1)) if len(samples.groups()) == 1 else None

    # Packed weights stay: ONNX Runtime decodes them before any provider sees the graph.
    return made_static(Model.load(source), target, shapes, one_sample)


def _samples(
    model: Model,
    data: Any,
    shapes: dict[str, tuple[int, ...]],
    image: ImageOptions | None,
    seed: int,
    *,
    allow_code: bool,
) -> Dataset:
    if data is None:
        return generate(model.proto(), count=SAMPLES, seed=seed, shapes=shapes)
    return open_data(data, input_specs(model.proto()), shapes=shapes, image=image, allow_code=allow_code)
