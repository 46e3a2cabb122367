"""Products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from onnxcomp.torch_bridge.operators.common import wide
from onnxcomp.torch_bridge.registry import NodeCall, operator

__all__: list[str] = []


@operator("MatMul")
def _matmul(call: NodeCall, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b) if a.is_floating_point() else wide(torch.matmul, a, b)


@operator("Gemm")
def _gemm(call: NodeCall, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    if call.get("transA", 0):
        a = a.T
    if alpha == 1 and (c is None or (beta == 1 and c.ndim == 1)) and a.is_floating_point():
        return F.linear(a, b if call.get("transB", 0) else b.T, c)
    if call.get("transB", 0):
        b = b.T
    if not a.is_floating_point():
        product = alpha * (a @ b)
        return (product if c is None else product + beta * c).to(a.dtype)
    return alpha * (a @ b) if c is None else torch.addmm(c, a, b, alpha=alpha, beta=beta)


@operator("Einsum")
def _einsum(call: NodeCall, *inputs: Tensor) -> Tensor:
    equation = call.attrs["equation"]
    equation = equation.decode() if isinstance(equation, bytes) else equation
    if inputs[0].is_floating_point():
        return torch.einsum(equation, *inputs)
    return wide(lambda *each: torch.einsum(equation, *each), *inputs)


# --- of ONNX Runtime --------------------------------------------------------------------------------------------------


@operator("FusedMatMul", domain="com.microsoft")
def _fused_matmul(call: NodeCall, a: Tensor, b: Tensor) -> Tensor:
    if call.get("transBatchA", 0):
        a = a.movedim(0, -2)
    if call.get("transBatchB", 0):
        b = b.movedim(0, -2)
    if call.get("transA", 0) and a.ndim > 1:
        a = a.mT
    if call.get("transB", 0) and b.ndim > 1:
        b = b.mT
    alpha = call.get("alpha", 1.0)
    return torch.matmul(a, b) if alpha == 1 else alpha * torch.matmul(a, b)


@operator("MatMulNBits", domain="com.microsoft")
def _matmul_n_bits(
    call: NodeCall,
    a: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    groups: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    if groups is not None:
        message = "MatMulNBits with an order of groups"
        raise NotImplementedError(message)
    bits, rows, columns = call.get("bits", 4), call.attrs["N"], call.attrs["K"]
    size = call.attrs["block_size"]
    blocks = -(-columns // size)
    codes = _unpacked(packed.reshape(rows, blocks, -1), bits)[..., :size].to(scales.dtype)
    if zero_points is None:
        codes = codes - 2 ** (bits - 1)
    elif zero_points.is_floating_point():
        codes = codes - zero_points.reshape(rows, blocks, 1)
    else:
        codes = codes - _unpacked(zero_points.reshape(rows, -1), bits)[:, :blocks, None].to(scales.dtype)
    weight = (codes * scales.reshape(rows, blocks, 1)).reshape(rows, -1)[:, :columns]
    return F.linear(a, weight.to(a.dtype), bias)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Numbers of some bits out of bytes, the lowest bits first."""
    if bits not in {2, 4, 8}:
        message = f"MatMulNBits of {bits} bits"
        raise NotImplementedError(message)
    shifts = torch.arange(0, 8, bits, dtype=torch.int32)
    parts = (packed.to(torch.int32).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return parts.flatten(-2)
