"""Files in ONNX Runtime's own format: what is in one, and which operators and types a build needs to run it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxcomp.errors import ModelError

__all__ = ["OrtFile", "is_ort", "read_ort", "required_operators"]

SUFFIX = ".ort"
IDENTIFIER = b"ORTM"
"""At bytes 4 to 8 of a file, as flatbuffers put it."""


@dataclass(frozen=True)
class OrtFile:
    """What is in a file of ONNX Runtime's own format.

    Attributes:
        version: The version of the format.
        operators: Operator, with its domain in front unless that is ONNX's, -> number of nodes.
        saved_optimizations: How many optimizations are saved in it for the device to replay ("Runtime" style).
    """

    version: str
    operators: dict[str, int]
    saved_optimizations: int


def is_ort(path: Path) -> bool:
    """Whether a file says that it is in ONNX Runtime's own format."""
    try:
        with path.open("rb") as file:
            return file.read(8)[4:] == IDENTIFIER
    except OSError:
        return False


def read_ort(path: Path) -> OrtFile:
    """Read what is in a file of ONNX Runtime's own format.

    Raises:
        ModelError: The file is missing or broken.
    """
    import onnxruntime.tools.ort_format_model  # noqa: F401 - makes the next module importable
    from ort_flatbuffers_py import fbs  # type: ignore[import-not-found]

    if not is_ort(path):
        message = f"{path}: expected a file in ONNX Runtime's format, with {IDENTIFIER.decode()!r} at byte 4"
        raise ModelError(message)
    try:
        root = fbs.InferenceSession.InferenceSession.GetRootAsInferenceSession(path.read_bytes(), 0)
        graph = root.Model().Graph()
        operators = Counter(_operators(graph))
        saved = graph.RuntimeOptimizations()
        count = saved.RecordsLength() if saved else 0
        return OrtFile(root.OrtVersion().decode(), dict(operators.most_common()), count)
    except Exception as error:
        message = f"{path}: the file is broken ({type(error).__name__}: {error})"
        raise ModelError(message) from error


def _operators(graph: Any) -> Iterator[str]:
    for index in range(graph.NodesLength()):
        node = graph.Nodes(index)
        domain = node.Domain().decode()
        name = node.OpType().decode()
        yield f"{domain}:{name}" if domain not in {"", "ai.onnx"} else name
        for place in range(node.AttributesLength()):
            inner = node.Attributes(place).G()
            if inner is not None:
                yield from _operators(inner)


def required_operators(paths: Sequence[Path]) -> str:
    """The configuration of a build of ONNX Runtime that has the kernels of some models and no others.

    Args:
        paths: Files in ONNX Runtime's format.

    Returns:
        What `--include_ops_by_config` of ONNX Runtime's build script reads, types included.
    """
    import tempfile

    from onnxruntime.tools.ort_format_model import create_config_from_models

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    with (
        tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder,
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(action="ignore", category=ResourceWarning),  # it leaves its files open
    ):
        written = Path(folder) / "config"
        create_config_from_models(list(paths), written, enable_type_reduction=True)
        lines = written.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#")) + "\n"
