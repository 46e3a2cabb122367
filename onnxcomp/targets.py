"""The one table of deployment targets: what each wants of a quantized model, and how it is shipped and verified.

The quantization rules come from ONNX Runtime's fusion rules and were checked by running; see docs/how-it-works.md.
"""

from __future__ import annotations

import difflib
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from onnxcomp.errors import OptionError

__all__ = ["ARM_FUSION", "TARGETS", "QuantizationRules", "Target", "cpu_features", "find_target", "host_target"]


@dataclass(frozen=True)
class QuantizationRules:
    """How int8 must look for a target's kernels to run it.

    Weights are always int8, symmetric (zero point 0): every target with int8 kernels takes that, and only that has one
    scale a channel.

    Attributes:
        activations: The type of activations.
        per_channel: Whether weights may have one scale per output channel.
        per_tensor: Operators whose weights have a single scale all the same.
        reduce_range: Whether weights must stay in 7 bits, because the kernel adds pairs of products in 16 bits, which
            saturate (x86 before VNNI).
        operators: The operators that the target has 8-bit kernels for; None: all that ONNX Runtime's CPU provider has.
        wide: The type of 16-bit activations, where the target has kernels for them; they cannot be seen on a CPU.
        cpu: Whether ONNX Runtime's CPU provider runs the model: operators without an int8 kernel may then be said with
            those that have one.
        zero_points: Whether the zero point of a weight must be written out, though it is 0.
        quantized_outputs: Whether a matrix product is a kernel only with a quantized output. Elsewhere it may end in
            float where no 8-bit node reads it.

    Example:
        >>> rules = QuantizationRules(per_tensor=frozenset({"MatMul"}), operators=frozenset({"Conv", "MatMul"}))
        >>> rules.supports("Gemm"), rules.channel_scales("Conv"), rules.channel_scales("MatMul")
        (False, True, False)
    """

    activations: Literal["uint8", "int8", "uint16"] = "uint8"
    per_channel: bool = True
    per_tensor: frozenset[str] = frozenset()
    reduce_range: bool = False
    operators: frozenset[str] | None = None
    cpu: bool = True
    zero_points: bool = False
    quantized_outputs: bool = False
    wide: Literal["uint16"] | None = None

    def supports(self, operator: str) -> bool:
        """Whether the target may run this operator in 8 bits."""
        return self.operators is None or operator in self.operators

    @property
    def levels(self) -> int:
        """How many values an activation may have."""
        return 1 << 8 * np.dtype(self.activations).itemsize

    @property
    def is_wide(self) -> bool:
        """Whether activations have 16 bits."""
        return self.activations == self.wide

    def channel_scales(self, operator: str) -> bool:
        """Whether the weight of this operator has one scale per output channel."""
        return self.per_channel and operator not in self.per_tensor


@dataclass(frozen=True)
class Target:
    """What a deployment target wants.

    Attributes:
        name: As on the command line.
        description: One line for `--help`.
        rules: How int8 must look; None where the target has no Q/DQ kernels at all.
        artifact: What is shipped: an .onnx or an .ort file.
        verify_layers: The layers of `verify` that say something about this target.
        min_runtime: The oldest ONNX Runtime that the output is made for.
        max_opset: The newest default operator set that this runtime has.
        max_ir_version: The newest IR version that this runtime reads.
        static_shapes: Whether dynamic axes must be fixed.
        dynamic_batch: Whether the first axis of an input may stay dynamic all the same.
        session_config: ONNX Runtime session entries that make another host fuse as the target does.
    """

    name: str
    description: str
    rules: QuantizationRules | None
    artifact: Literal["onnx", "ort"] = "onnx"
    verify_layers: tuple[str, ...] = ("cpu",)
    min_runtime: str = "1.16"
    max_opset: int = 19
    max_ir_version: int = 9
    static_shapes: bool = False
    dynamic_batch: bool = False
    session_config: tuple[tuple[str, str], ...] = ()

    @property
    def is_host(self) -> bool:
        """Whether this machine is such a target, so that its clock is evidence of speed."""
        return self.name == host_target().name

    @property
    def saturates_here(self) -> bool:
        """Whether this host's int8 kernels saturate where the target's do not, so that a loss measured here is too bad.

        Targets without VNNI get weights that saturate nowhere.
        """
        return self.rules is not None and not self.rules.reduce_range and host_target().name == "x86"


ARM_FUSION = (("session.qdqisint8allowed", "1"),)

_NNAPI_OPERATORS = frozenset(
    {"Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "AveragePool", "MaxPool", "Resize", "Transpose", "Reshape"}
)
_XNNPACK_OPERATORS = frozenset({"Conv", "MaxPool", "Resize"})
"""Also ConvTranspose, with one scale a weight: that kernel cannot be seen on a CPU, so it is not made. Softmax is uint8
only, as is every Conv around it then, with one scale a weight: int8 is worth more. uint8 AveragePool, which it is said
to take, was left to the CPU provider at every opset tried."""

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("x86-vnni", "x86-64 servers and desktops with VNNI (AVX512-VNNI or AVX-VNNI)", QuantizationRules()),
        Target(
            "x86",
            "x86-64 without VNNI: 7-bit weights, no saturation",
            QuantizationRules(reduce_range=True),
            verify_layers=("cpu", "x86"),
        ),
        Target(
            "arm64",
            "64-bit ARM: phones, Apple silicon, Graviton",
            QuantizationRules(activations="int8"),
            artifact="ort",
            verify_layers=("cpu", "ort", "arm64", "android"),
            session_config=ARM_FUSION,
        ),
        Target(
            "xnnpack",
            "ONNX Runtime Mobile with XNNPACK",
            QuantizationRules(activations="int8", operators=_XNNPACK_OPERATORS, cpu=False, zero_points=True),
            verify_layers=("cpu", "android"),
            static_shapes=True,
            dynamic_batch=True,
            session_config=ARM_FUSION,
        ),
        Target(
            "nnapi",
            "Android's NNAPI",
            QuantizationRules(
                per_tensor=frozenset({"Gemm", "MatMul"}), operators=_NNAPI_OPERATORS, cpu=False, quantized_outputs=True
            ),
            static_shapes=True,
        ),
        Target("coreml", "Apple's CoreML: no Q/DQ operators, weights stored small", None, static_shapes=True),
        Target(
            "qnn",
            "Qualcomm HTP",
            QuantizationRules(
                per_tensor=frozenset({"Gemm", "MatMul"}), cpu=False, quantized_outputs=True, wide="uint16"
            ),
            verify_layers=("cpu", "qnn"),
            static_shapes=True,
        ),
        Target("web", "browsers: ONNX Runtime Web (WASM)", QuantizationRules(), verify_layers=("cpu", "web")),
    )
}


def find_target(name: str) -> Target:
    """The target with this name.

    Raises:
        OptionError: There is none.
    """
    if name in TARGETS:
        return TARGETS[name]
    close = difflib.get_close_matches(name, TARGETS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(TARGETS)}"
    message = f"no target is called {name!r}; {hint}"
    raise OptionError(message)


@cache
def host_target() -> Target:
    """The target that this machine is."""
    if platform.machine().lower() in {"arm64", "aarch64"}:
        return TARGETS["arm64"]
    return TARGETS["x86-vnni" if {"avx512_vnni", "avx_vnni"} & set(cpu_features()) else "x86"]


@cache
def cpu_features() -> tuple[str, ...]:
    """The processor's features that matter to int8 and float kernels, where the system tells them."""
    wanted = {"sse4_1", "avx", "avx2", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return tuple(sorted(wanted.intersection(flags)))
