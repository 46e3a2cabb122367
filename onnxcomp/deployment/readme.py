"""The short README of a package: what is in it, and the lines that load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

__all__ = ["package_readme", "snippet"]


@dataclass(frozen=True)
class _Language:
    """A language that a model is loaded from.

    Attributes:
        title: Its heading.
        file: The snippet.
        fence: The name of its code blocks.
        needs: What the app has to depend on.
        options: Target -> what its session is made with.
    """

    title: str
    file: str
    fence: str
    needs: str
    options: Mapping[str, str]


KOTLIN = _Language(
    "Android (Kotlin)",
    "load.kt",
    "kotlin",
    "The Maven package `com.microsoft.onnxruntime:onnxruntime-android`, VERSION or later.",
    {
        "xnnpack": 'addXnnpack(mapOf("intra_op_num_threads" to "2")); setIntraOpNumThreads(1)',
        "nnapi": "addNnapi()",
        "qnn": 'addQnn(mapOf("backend_path" to "libQnnHtp.so"))',
        "": "setIntraOpNumThreads(2)",
    },
)
SWIFT = _Language(
    "iOS (Swift)",
    "load.swift",
    "swift",
    "The Swift package `onnxruntime-swift-package-manager` or the pod `onnxruntime-objc`, VERSION or later.",
    {
        "coreml": "try options.appendCoreMLExecutionProvider(with: ORTCoreMLExecutionProviderOptions())",
        "": "try options.setIntraOpNumThreads(2)",
    },
)
JAVASCRIPT = _Language(
    "Browser (JavaScript)",
    "load.mjs",
    "js",
    "The npm package `onnxruntime-web`, VERSION or later.",
    {"": 'executionProviders: ["wasm"]'},
)
PYTHON = _Language("Python", "load_python.txt", "python", "The package `onnxruntime`, VERSION or later.", {"": ""})

LANGUAGES = {
    "arm64": (KOTLIN, SWIFT),
    "xnnpack": (KOTLIN,),
    "nnapi": (KOTLIN,),
    "coreml": (SWIFT,),
    "qnn": (KOTLIN,),
    "web": (JAVASCRIPT,),
}
"""Target -> the languages that its apps are written in; Python for all others."""

OPERATORS = (
    "- `required_operators_and_types.config`: for a build of ONNX Runtime with these kernels alone",
    "  (`--include_ops_by_config`). Not needed with a stock build.",
)


def snippet(language: _Language, manifest: Mapping[str, Any]) -> str:
    """The lines that load a model, out of the file that holds them."""
    text = files("onnxcomp.deployment").joinpath("snippets", language.file).read_text(encoding="utf-8")
    source, result = manifest["inputs"][0], manifest["outputs"][0]
    name = str(manifest["model"]["file"])
    stem, _, suffix = name.rpartition(".")
    shape = [dim if isinstance(dim, int) else 1 for dim in source["shape"]]
    words = {
        "MODEL_FILE": _quoted(name, language),
        "MODEL_STEM": _quoted(stem, language),
        "MODEL_SUFFIX": suffix,
        "INPUT": _quoted(str(source["name"]), language),
        "OUTPUT": _quoted(str(result["name"]), language),
        "OPTIONS": language.options.get(manifest["target"], language.options[""]),
        "SHAPE": ", ".join(map(str, shape)),
    }
    # All at once: a name may be called INPUT or SHAPE itself.
    return re.sub("|".join(words), lambda found: words[found[0]], text)


def _quoted(name: str, language: _Language) -> str:
    """A name as it stands between double quotes in a language."""
    text = json.dumps(name, ensure_ascii=False)[1:-1]
    return text.replace("$", "\\$") if language is KOTLIN else text


def package_readme(manifest: Mapping[str, Any]) -> str:
    """The README of a package.

    Args:
        manifest: As it is written.
    """
    model, target = manifest["model"], manifest["target"]
    lines = [
        f"# {model['file']} for {target}",
        "",
        f"- `{model['file']}`: the model, {model['bytes']:,} bytes.",
        *(f"- `{part['file']}`: its weights, {part['bytes']:,} bytes: beside it." for part in model["data"]),
        "- `manifest.json`: its inputs and outputs, how inputs are made, versions, hashes.",
        "- `samples/`: inputs and the outputs that are expected of them: run them once on the device. Raw numbers,",
        "  little endian, in the order of the manifest's shapes.",
        *(OPERATORS if manifest["operators"] else ()),
        "",
    ]
    for side in ("inputs", "outputs"):
        lines += [f"| {side[:-1]} | type | shape |", "| --- | --- | --- |"]
        lines += [f"| `{_cell(end['name'])}` | {end['dtype']} | {_shape(end['shape'])} |" for end in manifest[side]]
        lines.append("")
    if manifest["preprocessing"]:
        told = ", ".join(f"{name} {value}" for name, value in manifest["preprocessing"].items())
        lines += [f"Pixels become inputs so: {told}; `(pixels * scale - mean) / std`.", ""]
    for language in LANGUAGES.get(target, (PYTHON,)):
        needs = language.needs.replace("VERSION", manifest["runtime"]["minimum"])
        code = snippet(language, manifest).rstrip("\n")
        lines += [f"## {language.title}", "", needs, "", f"```{language.fence}", code, "```", ""]
    if not _is_plain(manifest):
        lines += ["The lines show the first input and output as float32; the manifest has them all.", ""]
    return "\n".join(lines)


def _cell(name: str) -> str:
    """A name as it stands in a table."""
    return " ".join(name.split()).replace("|", "\\|").replace("`", "'")


def _shape(shape: list[Any]) -> str:
    return " x ".join(str(dim) if dim is not None else "any" for dim in shape) or "scalar"


def _is_plain(manifest: Mapping[str, Any]) -> bool:
    ends = [*manifest["inputs"], *manifest["outputs"]]
    return len(ends) == 2 and all(end["dtype"] == "float32" for end in ends)
