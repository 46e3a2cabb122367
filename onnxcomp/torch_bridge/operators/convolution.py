"""Convolutions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from onnxcomp.torch_bridge.operators.windows import flat_pads, windows_of
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__ = ["conv"]

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@operator("Conv")
def conv(call: NodeCall, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution of one to three dimensions."""
    windows = windows_of(call, x.shape[2:], weight.shape[2:])
    padding = windows.before
    if not windows.symmetric:
        x, padding = F.pad(x, flat_pads(windows.before, windows.after)), [0] * len(padding)
    function = CONVOLUTIONS[weight.ndim - 2]
    return function(x, weight, bias, windows.strides, padding, windows.dilations, call.get("group", 1))


@operator("ConvTranspose")
def _conv_transpose(call: NodeCall, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = weight.shape[2:]
    rank = len(kernel)
    strides, dilations = call.get("strides") or [1] * rank, call.get("dilations") or [1] * rank
    more = list(call.get("output_padding") or [0] * rank)
    before, after = _transposed_pads(call, x.shape[2:], kernel, more)
    function = TRANSPOSED[rank]
    group = call.get("group", 1)
    fits = all(0 <= extra < max(pair) for extra, *pair in zip(more, strides, dilations, strict=True))
    if before == after and fits and min(before) >= 0:
        return function(x, weight, bias, strides, before, more, group, dilations)
    full = function(x, weight, None, strides, 0, 0, group, dilations)
    behind = [extra - pad for extra, pad in zip(more, after, strict=True)]
    found = F.pad(full, flat_pads([-pad for pad in before], behind))
    return found if bias is None else found + bias.reshape(-1, *[1] * rank)


def _transposed_pads(
    call: NodeCall, sizes: tuple[int, ...], kernel: tuple[int, ...], more: list[int]
) -> tuple[list[int], list[int]]:
    """What is cut off in front and behind."""
    rank = len(kernel)
    auto = call.get("auto_pad", "NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else auto
    wanted = call.get("output_shape")
    if wanted is None and not auto.startswith("SAME"):
        pads = (call.get("pads") if auto != "VALID" else None) or [0] * (2 * rank)
        return list(pads[:rank]), list(pads[rank:])
    strides, dilations = call.get("strides") or [1] * rank, call.get("dilations") or [1] * rank
    targets = list(wanted)[-rank:] if wanted else [size * stride for size, stride in zip(sizes, strides, strict=True)]
    before, after = [], []
    for axis, target in enumerate(targets):
        span = strides[axis] * (sizes[axis] - 1) + more[axis] + (kernel[axis] - 1) * dilations[axis] + 1
        total = span - target
        if total < 0 and wanted:  # a larger output than there is: the rest is filled
            more[axis] -= total
        total = max(total, 0)
        small, large = total // 2, total - total // 2
        before.append(small if auto == "SAME_UPPER" else large)
        after.append(large if auto == "SAME_UPPER" else small)
    return before, after


@operator("Col2Im")
def _col2im(call: NodeCall, x: Tensor, image: Tensor, block: Tensor) -> Tensor:
    sizes, kernel = image.tolist(), block.tolist()
    windows = windows_of(call, sizes, kernel)
    if len(sizes) == 2 and windows.symmetric:
        return F.fold(x, sizes, kernel, windows.dilations, windows.before, windows.strides)
    # Each place of a block is one channel of a transposed convolution whose weights are 0 and 1.
    area = block.prod().item()
    count, channels = x.shape[0], x.shape[1] // area
    spans = zip(sizes, windows.before, windows.after, kernel, windows.strides, windows.dilations, strict=True)
    blocks = [(size + a + b - (k - 1) * d - 1) // s + 1 for size, a, b, k, s, d in spans]
    weight = torch.eye(area, dtype=x.dtype).reshape(area, 1, *kernel)
    columns = x.reshape(count * channels, area, *blocks)
    full = TRANSPOSED[len(sizes)](columns, weight, None, windows.strides, 0, 0, 1, windows.dilations)
    found = F.pad(full, flat_pads([-a for a in windows.before], [0] * len(sizes)))
    wanted = [size - have for size, have in zip(sizes, found.shape[2:], strict=True)]
    return F.pad(found, flat_pads([0] * len(sizes), wanted)).reshape(count, channels, *sizes)
