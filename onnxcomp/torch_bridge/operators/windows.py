"""Where the windows of convolutions and poolings lie: pads, strides, and what auto_pad makes of them."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcomp.torch_bridge.registry import NodeCall

__all__ = ["Windows", "flat_pads", "windows_of"]


class Windows:
    """The windows of one node over inputs of one size.

    Attributes:
        kernel: Sizes.
        strides: Steps from one to the next.
        dilations: Steps inside of one.
        before: Pads in front.
        after: Pads behind.
    """

    __slots__ = ("after", "before", "dilations", "kernel", "strides")

    def __init__(
        self,
        kernel: Sequence[int],
        strides: Sequence[int],
        dilations: Sequence[int],
        before: Sequence[int],
        after: Sequence[int],
    ) -> None:
        self.kernel, self.strides, self.dilations = kernel, strides, dilations
        self.before, self.after = before, after

    @property
    def symmetric(self) -> bool:
        """Whether there is as much padding in front as behind, and nothing is cut."""
        return list(self.before) == list(self.after) and min(self.before, default=0) >= 0


def windows_of(call: NodeCall, sizes: Sequence[int], kernel: Sequence[int], *, cuts: bool = False) -> Windows:
    """The windows of a Conv or a pooling over inputs of these spatial sizes.

    Args:
        call: The node's.
        sizes: Of the input.
        kernel: Sizes of a window.
        cuts: Whether SAME cuts where strides are longer than windows, as ONNX Runtime's poolings do and its Conv does
            not.
    """
    rank = len(kernel)
    strides = call.get("strides") or [1] * rank
    dilations = call.get("dilations") or [1] * rank
    auto = call.get("auto_pad", "NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else auto
    if auto in {"NOTSET", "", "VALID"}:
        pads = (call.get("pads") if auto != "VALID" else None) or [0] * (2 * rank)
        return Windows(kernel, strides, dilations, pads[:rank], pads[rank:])
    before, after = [], []
    for size, length, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = (-(-size // stride) - 1) * stride + (length - 1) * dilation + 1 - size
        if not cuts:
            total = max(total, 0)
        before.append(int((total if auto == "SAME_UPPER" else total + 1) / 2))
        after.append(total - before[-1])
    return Windows(kernel, strides, dilations, before, after)


def flat_pads(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Pads as torch's functional.pad wants them: the last axis first."""
    return [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair]
