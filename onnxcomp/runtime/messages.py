"""What ONNX Runtime says, in one line."""

from __future__ import annotations

import re

__all__ = ["tidy"]

_REASON_CHARACTERS = 400
_NOISE = (
    r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ",
    r"Load model from .*? failed:\s*",
    r"^External data path validation failed for initializer: .*? Error: (?=.*does not exist)",
    r"\S+\.(?:cc|h|hpp|cpp):\d+ [^()]*\([^()]*\)(?: const)? ",  # where in ONNX Runtime's source, with a signature
    r"\S+\.(?:cc|h|hpp|cpp):\d+ \w+ ",  # the same with a bare function name
)


def tidy(error: Exception) -> str:
    """Make one readable line of an exception, most often ONNX Runtime's own.

    >>> tidy(RuntimeError("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from m.onnx failed:Parsing failed."))
    'Parsing failed.'
    """
    text = " ".join(str(error).split())
    for noise in _NOISE:
        text = re.sub(noise, "", text)
    kind = type(error)
    if not kind.__module__.startswith("onnxruntime.") and kind not in (RuntimeError, ValueError):
        text = f"{kind.__name__}: {text}" if text else kind.__name__
    return text if len(text) <= _REASON_CHARACTERS else text[: _REASON_CHARACTERS - 1] + "…"
