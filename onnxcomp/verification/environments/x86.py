"""The layer `x86`: an x86-64 without VNNI, whose sums of products of uint8 and int8 saturate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from onnxcomp.targets import cpu_features
from onnxcomp.verification.environments import debian
from onnxcomp.verification.environments.emulated import QEMU_PACKAGE, EmulatedProcessor, unpack_qemu
from onnxcomp.verification.environments.foreign import ForeignPython, present_python
from onnxcomp.verification.environments.installed import unfit_host

__all__ = ["X86"]

CPU = "Haswell-v4"
"""AVX2 and no more, as in most processors up to 2018; v4 leaves out what qemu cannot emulate."""

_VNNI = frozenset({"avx512_vnni", "avx_vnni"})


class X86(EmulatedProcessor):
    """ONNX Runtime's CPU provider on an x86-64 with AVX2 and without VNNI.

    Its kernels add two products of uint8 and int8 in 16 bits, which is too narrow for weights that use all 8 bits. A
    machine with VNNI never shows it.
    """

    name = "x86"
    description = "x86-64 without VNNI, Linux"
    size = "80 MB to download, 14 MB to keep"

    def __init__(self) -> None:
        super().__init__({"processor": CPU})

    def _present(self) -> ForeignPython | None:
        features = cpu_features()
        without = unfit_host() is None and bool(features) and _VNNI.isdisjoint(features)
        return present_python("CPU, this x86-64 without VNNI") if without else None

    def _emulated(self, folder: Path, versions: Mapping[str, str]) -> ForeignPython:
        """This very Python with its ONNX Runtime, on another processor."""
        python = present_python(f"CPU, x86-64 without VNNI ({CPU} by qemu {versions['qemu']})")
        # What a library was told about this machine's processor is wrong there, and would crash it.
        variables = {name: value for name, value in python.variables.items() if name != "OPENBLAS_CORETYPE"}
        command = (str(folder / "qemu-x86_64"), "-cpu", CPU, *python.command)
        return ForeignPython(command, variables, python.title, {**python.versions, **versions})

    def _fill(self, folder: Path, downloads: Path, progress: Callable[[str], None]) -> dict[str, str]:
        progress("x86: fetching qemu (a Debian package, 80 MB)")
        package = debian.packages(downloads, [QEMU_PACKAGE])[QEMU_PACKAGE]
        qemu = unpack_qemu(package, folder / "qemu-x86_64")
        progress("x86: starting it for the first time")
        self._emulated(folder, {"qemu": qemu}).start("import numpy, onnxruntime")
        return {"qemu": qemu}
