"""The files of a package: the model, the operators that it needs, a few samples, and what the manifest says of them."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data import Dataset, ImageOptions, input_specs
from onnxcomp.errors import RuntimeFailure
from onnxcomp.model import Model
from onnxcomp.ort_format import required_operators
from onnxcomp.runtime import Runtime
from onnxcomp.targets import ARM_FUSION, Target
from onnxcomp.verification.always import ort_runtime

__all__ = ["MANIFEST", "OPERATORS", "SAMPLES", "sha256", "write_files"]

SAMPLES = 2
"""Inputs with expected outputs that are shipped: for a first run on the device."""

MANIFEST = "manifest.json"
OPERATORS = "required_operators_and_types.config"

TOLERANCE = {"float": 1e-3, "int8": 2e-2}
"""What outputs on the device may differ by, relative to the largest expected value: float rounding, or a step or two of
int8 codes."""

QUANTIZED = re.compile("QuantizeLinear|QLinear|QGemm|Integer|DynamicQuantize|QAttention")
"""Names of operators that give or take 8-bit codes."""


def write_files(
    model: Model, name: str, target: Target, samples: Dataset, folder: Path, image: ImageOptions | None
) -> dict[str, Any]:
    """Write all files but the manifest and the README; what the manifest says."""
    file = folder / Path(name).with_suffix(f".{target.artifact}").name
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as temporary, ort_runtime() as runtime:
        plain = Path(temporary) / "model.onnx"
        model.save(plain)
        needed = _as_ort(runtime, plain, file if target.artifact == "ort" else None)
        if target.artifact != "ort":
            model.save(file, external_data=False)  # unless they are too large for one file
        if needed:
            (folder / OPERATORS).write_text(required_operators(needed), encoding="utf-8")
        with Runtime(session_config=dict(target.session_config)) as host:
            shipped = _write_samples(host, file, samples, folder)
            info = host.check(file)
    specs = {spec.name: spec for spec in input_specs(model.proto())}
    quantized = any(QUANTIZED.search(node.op) for node in model.graph.nodes)
    beside = sorted(path for path in folder.glob(f"{file.name}.*") if path.is_file())
    return {
        "format": 1,
        "target": target.name,
        "model": {
            "file": file.name,
            "bytes": file.stat().st_size,
            "sha256": sha256(file),
            "data": [{"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} for path in beside],
            "opset": model.opset,
            "ir_version": model.ir_version,
        },
        "inputs": [
            {"name": end.name, "dtype": specs[end.name].dtype.name, "shape": list(specs[end.name].shape)}
            for end in info.inputs
        ],
        "outputs": [{"name": end.name, "dtype": _dtype(end.type), "shape": [*end.shape]} for end in info.outputs],
        "preprocessing": {key: value for key, value in asdict(image).items() if value not in (None, ())}
        if image
        else {},
        "metadata": dict(model.metadata),
        "runtime": {"minimum": _minimum(model, target), "written_with": version("onnxruntime")},
        "onnxcomp": version("onnxcomp"),
        "session": dict(target.session_config if target.session_config != ARM_FUSION else {}),
        "operators": OPERATORS if needed else None,
        "samples": shipped,
        "tolerance": TOLERANCE["int8" if quantized else "float"],
    }


def _as_ort(runtime: Runtime, plain: Path, shipped: Path | None) -> list[Path]:
    """Write the model in ONNX Runtime's own format, which tells the kernels that it needs.

    Args:
        runtime: Optimizes as for ARM.
        plain: The model.
        shipped: Where the optimized file goes, if that is what is shipped. Other files are optimized on the device:
            kernels for before and after; what the format cannot hold has none that could be told.
    """
    optimized, kept = plain.with_name("optimized.ort"), plain.with_name("plain.ort")
    try:
        runtime.convert(plain, optimized)
        if shipped is not None:
            shutil.copyfile(optimized, shipped)
            return [optimized]
        runtime.convert(plain, kept, level="none")
    except RuntimeFailure:
        if shipped is not None:
            raise
        return []
    return [optimized, kept]


def _write_samples(runtime: Runtime, file: Path, samples: Dataset, folder: Path) -> list[dict[str, Any]]:
    """Write a few inputs and what this host's CPU provider gives for them, as raw numbers."""
    few = samples.subset(range(min(SAMPLES, samples.size)))
    names = [end.name for end in runtime.check(file).outputs]
    shipped = []
    for index, feed in enumerate(few.feeds(1)):
        results = next(iter(runtime.run(file, [feed])))
        sample: dict[str, Any] = {"inputs": {}, "outputs": {}}
        for side, values in (("inputs", feed), ("outputs", dict(zip(names, results, strict=True)))):
            for place, (name, value) in enumerate(values.items()):
                if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
                    continue  # sequences and strings have no raw form
                path = folder / "samples" / str(index) / f"{side[:-1]}_{place}.bin"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<")).tobytes())
                sample[side][name] = {
                    "file": path.relative_to(folder).as_posix(),
                    "dtype": value.dtype.name,
                    "shape": list(value.shape),
                }
        shipped.append(sample)
    return shipped


def _minimum(model: Model, target: Target) -> str:
    """The oldest ONNX Runtime that is sure to read the file: older ones need not know its format or its opset."""
    newer = model.opset > target.max_opset or model.ir_version > target.max_ir_version
    return version("onnxruntime") if newer or target.artifact == "ort" else target.min_runtime


def _dtype(text: str) -> str:
    """ONNX Runtime's spelling of a type in numpy's.

    >>> _dtype("tensor(float)"), _dtype("tensor(int64)"), _dtype("seq(tensor(float))")
    ('float32', 'int64', 'seq(tensor(float))')
    """
    inner = text.removeprefix("tensor(").removesuffix(")") if text.startswith("tensor(") else text
    return {"float": "float32", "double": "float64"}.get(inner, inner)


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
