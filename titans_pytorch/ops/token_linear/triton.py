"""Kernel of a linear layer for one token, in one launch: norm, product and gate.

A program is one warp, which computes one output of one batch entry: warps that share nothing never wait for each
other. The norm is a factor on the result, and every program computes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._triton import contiguous_inside

# features at a time, at most
BLOCK = 1024


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, gain, out, normed,
    stride_b, eps,
    OUTPUTS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    NORMS: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    row, entry = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x += entry * stride_b
    # of the two rows of a gated output, the second is for the gate
    to_value = weight + row.to(tl.int64) * DIM
    to_gate = to_value + OUTPUTS * DIM

    squares = tl.zeros((BLOCK,), tl.float32)
    values = tl.zeros((BLOCK,), tl.float32)
    gates = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, DIM, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        own = tl.load(x + feature, mask=feature < DIM, other=0.0).to(tl.float32)
        if NORMS:
            squares += own * own
            own *= tl.load(gain + feature, mask=feature < DIM, other=0.0).to(tl.float32)
        values += own * tl.load(to_value + feature, mask=feature < DIM, other=0.0).to(tl.float32)
        if GATED:
            gates += own * tl.load(to_gate + feature, mask=feature < DIM, other=0.0).to(tl.float32)

    inverse = 1.0
    if NORMS:
        inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / DIM + eps)
    value = tl.sum(values, axis=0) * inverse
    gate = tl.sum(gates, axis=0) * inverse
    if HAS_BIAS:
        value += tl.load(bias + row).to(tl.float32)
        if GATED:
            gate += tl.load(bias + OUTPUTS + row).to(tl.float32)
    if GATED:
        value *= gate * tl.sigmoid(gate)
    tl.store(out + entry * OUTPUTS + row, value)

    if NORMS:
        if row == 0:
            for start in tl.static_range(0, DIM, BLOCK):
                feature = start + tl.arange(0, BLOCK)
                own = tl.load(x + feature, mask=feature < DIM, other=0.0).to(tl.float32) * inverse
                own *= tl.load(gain + feature, mask=feature < DIM, other=0.0).to(tl.float32)
                tl.store(normed + entry * DIM + feature, own, mask=feature < DIM)


def token_linear(
    x: Tensor,  # b 1 d
    weight: Tensor,  # e d
    bias: Tensor | None,  # e
    norm: tuple[Tensor, float | None] | None,  # d
    gated: bool,
) -> tuple[Tensor, Tensor]:  # b 1 e or b 1 e/2, b 1 d
    batch, _, dim = x.shape
    outputs = len(weight) // 2 if gated else len(weight)
    gain, eps = (x, 0.0) if norm is None else norm
    x = contiguous_inside(x, 1)
    out = x.new_empty(batch, 1, outputs)
    normed = x if norm is None else x.new_empty(x.shape)
    if not batch:
        return out, normed

    with torch.cuda.device_of(x):
        _kernel[(outputs, batch)](
            x=x, weight=weight.contiguous(), bias=x if bias is None else bias.contiguous(), gain=gain.contiguous(),
            out=out, normed=normed, stride_b=x.stride(0), eps=torch.finfo(torch.float32).eps if eps is None else eps,
            OUTPUTS=outputs, DIM=dim, BLOCK=min(BLOCK, triton.next_power_of_2(dim)),
            NORMS=norm is not None, HAS_BIAS=bias is not None, GATED=gated, num_warps=1,
        )  # fmt: skip
    return out, normed
