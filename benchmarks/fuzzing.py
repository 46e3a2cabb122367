"""Can any file break what reads files? Coverage-guided fuzzing with atheris.

Each reader gets files that a fuzzer changes bit by bit, and keeps those that reach new code. What comes out must be a
result that holds or an `OnnxcompError`; any other exception, a hang or a process of more than 2 GB is a finding. Files
of `model` and `npz` are also changed by their structure: random bytes hardly ever make a message or a checksum.

    pip install atheris                                     # in an environment of its own, beside onnxcomp
    python -m benchmarks.fuzzing                            # all readers, 60 seconds each
    python -m benchmarks.fuzzing model npz --seconds 3600 --keep corpora
    python -m benchmarks.fuzzing model --file corpora/model-findings/crash-0a1b
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from benchmarks.fuzzing_models import change_archive, change_model
from benchmarks.fuzzing_seeds import image_seeds, large_model_seeds, model_seeds, npy_seeds, npz_seeds, recipe_seeds
from onnxcomp.data import open_data
from onnxcomp.data.specs import InputSpec
from onnxcomp.errors import OnnxcompError
from onnxcomp.model import Model, value_of
from onnxcomp.recipe import dump_recipe, load_recipe
from onnxcomp.skeleton import CUT_BYTES, load_skeleton

__all__ = ["READERS", "Reader", "check_file"]

Change = Callable[[bytes, int, int], bytes]
"""Makes another file of a file, of at most so many bytes, by a seed."""

MEMORY_MB = 2048
SECONDS_A_FILE = 25


@dataclass(frozen=True)
class Reader:
    """Something that reads files.

    Attributes:
        check: Reads a file in a folder of its own; raises on anything that is wrong with the result.
        suffix: Of the file's name.
        seeds: Files to start from.
        change: Changes a file by its structure; None: bytes alone are changed.
    """

    check: Callable[[Path], None]
    suffix: str
    seeds: Callable[[], Iterator[bytes]]
    change: Change | None = None


# --- what must hold ---------------------------------------------------------------------------------------------------


def check_model(path: Path) -> None:
    """A model that loads can be looked at, copied and saved, and if it is valid, what was saved is the same model."""
    model = Model.load(path)
    digest = model.digest
    for constant in model.constants():
        value_of(constant)
    model.fork().save(path.with_name("saved.onnx"))
    if Model.load(path.with_name("saved.onnx")).digest != digest and _is_valid(path):
        message = "what was saved is another model"
        raise AssertionError(message)


def _is_valid(path: Path) -> bool:
    try:
        onnx.checker.check_model(onnx.load(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError, OSError):
        return False
    return True


def check_skeleton(path: Path) -> None:
    """A model without its weights differs from the whole one by the weights alone."""
    whole = onnx.ModelProto()
    try:
        whole.ParseFromString(path.read_bytes())
    except DecodeError:
        with contextlib.suppress(DecodeError):
            load_skeleton(path)
        return
    skeleton = load_skeleton(path)
    for tensor in skeleton.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get("location") == path.name:
            start = int(entries["offset"])
            tensor.raw_data = path.read_bytes()[start : start + int(entries["length"])]
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    for tensor in whole.graph.initializer:
        if len(tensor.raw_data) >= CUT_BYTES:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    if skeleton.SerializeToString(deterministic=True) != whole.SerializeToString(deterministic=True):
        message = "the skeleton with its weights is another model"
        raise AssertionError(message)


SPECS = {
    "x": InputSpec("x", np.dtype(np.float32), ("N", 3)),
    "ids": InputSpec("ids", np.dtype(np.int64), ("N",)),
    "image": InputSpec("image", np.dtype(np.float32), ("N", 3, 8, 8)),
}


def check_npz(path: Path) -> None:
    """Samples that are read have the types and shapes of the model's inputs."""
    _check_samples(path, [SPECS["x"], SPECS["ids"]])


def check_npy(path: Path) -> None:
    """Samples that are read have the types and shapes of the model's inputs."""
    _check_samples(path, [SPECS["x"]])


def check_images(path: Path) -> None:
    """The same for a folder with one image; what follows a zero byte is its file of labels, if anything does."""
    data = path.read_bytes()
    path.unlink()
    name, _, rest = data.partition(b"\0")
    pixels, _, labels = rest.partition(b"LABELS")
    folder = path.with_name("images")
    folder.mkdir()
    written = [(folder / f"image{_suffix(name)}", pixels)]
    if labels:
        written.append((folder / "labels.csv", labels))
    for file, contents in written:
        file.write_bytes(contents)
    try:
        _check_samples(folder, [SPECS["image"]])
    finally:
        for file, _ in written:
            file.unlink()
        folder.rmdir()


def _suffix(name: bytes) -> str:
    suffixes = (".png", ".jpg", ".bmp", ".webp")
    return suffixes[name[0] % len(suffixes)] if name else suffixes[0]


def _check_samples(path: Path, specs: list[InputSpec]) -> None:
    with open_data(path, specs) as samples:
        samples.labels()
        for feed in samples.feeds():
            for spec in specs:
                array = feed[spec.name]
                odd = (isinstance(w, int) and w != size for size, w in zip(array.shape, spec.shape, strict=True))
                if array.dtype != spec.dtype or any(odd):
                    message = f"{spec.name} is {spec}, got {array.dtype} {array.shape}"
                    raise AssertionError(message)


def check_recipe(path: Path) -> None:
    """A recipe that is read can be written, and says the same."""
    recipe = load_recipe(path)
    text = dump_recipe(recipe.stages, max_drop=recipe.max_drop, max_error=recipe.max_error, options=recipe.options)
    path.write_text(text, encoding="utf-8")
    if repr(load_recipe(path)) != repr(recipe):  # by text: not a number is not equal to itself
        message = "what was written is another recipe"
        raise AssertionError(message)


READERS = {
    "model": Reader(check_model, ".onnx", model_seeds, change_model),
    "skeleton": Reader(check_skeleton, ".onnx", large_model_seeds, change_model),
    "npz": Reader(check_npz, ".npz", npz_seeds, change_archive),
    "npy": Reader(check_npy, ".npy", npy_seeds),
    "images": Reader(check_images, ".bin", image_seeds),
    "recipe": Reader(check_recipe, ".toml", recipe_seeds),
}


def check_file(reader: Reader, data: bytes, folder: Path) -> str:
    """Give a reader a file; returns what it refuses it with, or an empty string.

    Raises:
        Exception: Something that is no `OnnxcompError`: a finding.
    """
    path = folder / f"file{reader.suffix}"
    path.write_bytes(data)
    try:
        reader.check(path)
    except OnnxcompError as error:
        return f"{type(error).__name__}: {error}"
    return ""


# --- the fuzzer: one process a reader ---------------------------------------------------------------------------------


def _fuzz(name: str, arguments: list[str], folder: Path) -> None:
    """Fuzz one reader in this process, which libFuzzer ends."""
    import atheris

    reader = READERS[name]

    def one(data: bytes) -> None:
        check_file(reader, data, folder)

    def change(data: bytes, most: int, seed: int) -> bytes:
        assert reader.change is not None
        changed = atheris.Mutate(data, most) if seed % 3 == 0 else reader.change(data, most, seed)
        return bytes(changed)[:most]

    _instrument(atheris)
    more = {"custom_mutator": change} if reader.change else {}
    atheris.Setup([sys.argv[0], *arguments], one, **more)
    atheris.Fuzz()


def _instrument(atheris: Any) -> None:
    """Follow which lines run in this package, and in what reads its formats in Python."""
    prefixes = ("onnxcomp.", "tomllib", "zipfile", "numpy.lib", "onnx_graphsurgeon.")
    for module in [module for name, module in sys.modules.items() if name.startswith(prefixes)]:
        for value in list(vars(module).values()):
            _instrument_member(atheris, value, module.__name__)


def _instrument_member(atheris: Any, value: Any, module: str) -> None:
    if getattr(value, "__module__", None) != module:
        return
    if isinstance(value, type):
        for member in vars(value).values():
            _instrument_member(atheris, getattr(member, "__func__", member), module)
    elif hasattr(value, "__code__"):
        atheris.instrument_func(value)


@dataclass
class Total:
    """What became of one reader."""

    executions: int = 0
    files: int = 0
    peak_mb: int = 0
    findings: int = 0
    seconds: float = 0.0


def _run(name: str, seconds: float, folder: Path) -> Total:
    """Fuzz one reader for some seconds; begin again after each finding."""
    corpus, findings = folder / name, folder / f"{name}-findings"
    for each in (corpus, findings):
        each.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(READERS[name].seeds()):
        (corpus / f"seed-{number}").write_bytes(data)
    total, started = Total(), time.monotonic()
    while (left := seconds - (time.monotonic() - started)) > 1:
        options = {"max_total_time": int(left), "rss_limit_mb": MEMORY_MB, "malloc_limit_mb": MEMORY_MB}
        options |= {"timeout": SECONDS_A_FILE, "print_final_stats": 1, "verbosity": 0, "max_len": 1 << 16}
        flags = [f"-{key}={value}" for key, value in options.items()]
        command = [sys.executable, "-m", "benchmarks.fuzzing", "--one", name, "--"]
        command += [*flags, f"-artifact_prefix={findings}/", str(corpus)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        for key, value in re.findall(r"stat::(\w+):\s+(\d+)", done.stderr):
            total.executions += int(value) if key == "number_of_executed_units" else 0
            total.peak_mb = max(total.peak_mb, int(value) if key == "peak_rss_mb" else 0)
        if done.returncode:
            total.findings += 1
            print(_told(name, done.stdout, done.stderr), file=sys.stderr, flush=True)
            if not re.search("stat::", done.stderr):
                break  # it never began
    total.files, total.seconds = len(list(corpus.iterdir())), time.monotonic() - started
    return total


def _told(name: str, output: str, errors: str) -> str:
    """What a finding is: the exception, or what libFuzzer says, and the file."""
    exception = output.partition("Uncaught Python exception: ===")[2].strip().splitlines()[:1]
    summary = re.findall(r"^(?:SUMMARY: .*|==\d+== ERROR.*|\w*Error: .*)$", errors, re.MULTILINE)
    file = re.findall(r"Test unit written to (\S+)", errors)
    return "  ".join([f"finding of {name}:", *(exception or summary[:1] or [errors[-500:]]), *file])


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.one:
            _fuzz(arguments.readers[0], arguments.rest, Path(temporary))
        if arguments.file:
            print(check_file(READERS[arguments.readers[0]], arguments.file.read_bytes(), Path(temporary)) or "fine")
            return 0
        print("| reader | executions | seconds | files that reach new code | peak MB | findings |")
        print("| --- | --- | --- | --- | --- | --- |")
        found = 0
        for name in arguments.readers or READERS:
            total = _run(name, arguments.seconds, arguments.keep or Path(temporary))
            row = (name, f"{total.executions:,}", f"{total.seconds:.0f}", total.files, total.peak_mb, total.findings)
            print(f"| {' | '.join(map(str, row))} |", flush=True)
            found += total.findings
    return 1 if found else 0


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("readers", nargs="*", metavar="reader", help=f"which of {', '.join(READERS)}; all by default")
    options.add_argument("--seconds", type=float, default=60, help="how long to fuzz each")
    options.add_argument("--keep", type=Path, help="a folder for files that reach new code, and for findings")
    options.add_argument("--file", type=Path, help="give this file to the reader once")
    options.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    before, _, rest = " ".join(sys.argv[1:]).partition(" -- ") if "--" in sys.argv else (None, "", "")
    arguments = options.parse_args(before.split() if before is not None else None)
    arguments.rest = rest.split()
    unknown = set(arguments.readers) - set(READERS)
    if unknown or ((arguments.file or arguments.one) and len(arguments.readers) != 1):
        options.error(f"unknown reader {min(unknown)!r}" if unknown else "--file needs one reader")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
