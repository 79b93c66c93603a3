"""Kernels of norm and gate of heads. They read the rows of a head one below the other, as the memory leaves them, and
write tokens with heads side by side, as the projection that combines them expects."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import contiguous_inside, named_strides, own_rows, whole_rows
from titans_pytorch.ops.head_norm.triton import EPS


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    x, gamma, logits, own_head, row, n, eps, x_batch, x_head, x_row, l_batch, l_row, heads, dim,
    NORM: tl.constexpr, PER_FEATURE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Rows of a head divided by their length, the inverse of the length, 1 + γ, and gates."""
    batch, head = (own_head // heads).to(tl.int64), (own_head % heads).to(tl.int64)
    feature = tl.arange(0, DIM)
    inside = (row < n)[:, None] & (feature < dim)[None, :]
    from_x = x + batch * x_batch + head * x_head + row[:, None] * x_row + feature[None, :]
    own = tl.load(from_x, mask=inside, other=0.0).to(tl.float32)
    inverse, gain = 1.0, 1.0
    if NORM:
        inverse = (1.0 / tl.sqrt(tl.sum(own * own, axis=1) / dim + eps))[:, None]
        gain += tl.load(gamma + head * dim + feature, mask=feature < dim, other=0.0).to(tl.float32)[None, :]
        own *= inverse
    from_logits = logits + batch * l_batch + row[:, None] * l_row
    if PER_FEATURE:
        gate = tl.load(from_logits + head * dim + feature[None, :], mask=inside, other=0.0)
    else:
        gate = tl.load(from_logits + head, mask=(row < n)[:, None], other=0.0)
    to_heads = ((batch * n + row[:, None]) * heads + head) * dim + feature[None, :]
    return own, inverse, gain, tl.sigmoid(gate.to(tl.float32)), feature, inside, to_heads


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, gamma, logits, out,
    heads, n, eps, x_batch, x_head, x_row, l_batch, l_row,
    dim: tl.constexpr, NORM: tl.constexpr, PER_FEATURE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    own_head, row = own_rows(n, ROWS)
    own, _, gain, gate, _, inside, to_heads = _load(
        x, gamma, logits, own_head, row, n, eps, x_batch, x_head, x_row, l_batch, l_row, heads, dim,
        NORM, PER_FEATURE, DIM,
    )  # fmt: skip
    tl.store(out + to_heads, own * gain * gate, mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_out, x, gamma, logits, d_x, d_gamma, d_logits,
    heads, n, eps, x_batch, x_head, x_row, l_batch, l_row,
    dim: tl.constexpr, NORM: tl.constexpr, PER_FEATURE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    own_head, row = own_rows(n, ROWS)
    own, inverse, gain, gate, feature, inside, to_heads = _load(
        x, gamma, logits, own_head, row, n, eps, x_batch, x_head, x_row, l_batch, l_row, heads, dim,
        NORM, PER_FEATURE, DIM,
    )  # fmt: skip
    d_gated = tl.load(d_out + to_heads, mask=inside, other=0.0).to(tl.float32)
    d_logit = d_gated * own * gain * gate * (1.0 - gate)
    if PER_FEATURE:
        tl.store(d_logits + to_heads, d_logit, mask=inside)
    else:
        batch, head = (own_head // heads).to(tl.int64), (own_head % heads).to(tl.int64)
        of_rows = tl.sum(tl.where(inside, d_logit, 0.0), axis=1)
        tl.store(d_logits + (batch * n + row) * heads + head, of_rows, mask=row < n)
    d_own = d_gated * gate
    if NORM:
        to_gamma = d_gamma + tl.program_id(0).to(tl.int64) * dim + feature
        tl.store(to_gamma, tl.sum(d_own * own, axis=0), mask=feature < dim)
        d_own *= gain
        d_own = inverse * (d_own - own * (tl.sum(d_own * own, axis=1) / dim)[:, None])
    to_x = d_x + (own_head.to(tl.int64) * n + row[:, None]) * dim + feature[None, :]
    tl.store(to_x, d_own, mask=inside)


def _outputs(x: Tensor, gamma: Tensor | None, logits: Tensor, dtype: torch.dtype) -> Tensor:
    batch, heads, n, dim = x.shape
    return x.new_empty(batch, n, heads * dim, dtype=dtype)


def _arguments(x: Tensor, gamma: Tensor | None, logits: Tensor) -> tuple[int, dict[str, Any]]:
    """Number of blocks of rows in a head, one for each program, and the arguments of both kernels."""
    x, logits = contiguous_inside(x, 1), contiguous_inside(logits, 1)
    batch, heads, n, dim = x.shape
    arguments = dict(
        x=x, **named_strides('x', x, 'batch head row'), logits=logits, **named_strides('l', logits, 'batch row'),
        gamma=x.new_empty(0) if gamma is None else gamma.contiguous(), NORM=gamma is not None,
        PER_FEATURE=logits.shape[-1] != heads, heads=heads, n=n, eps=EPS, dim=dim, **whole_rows(n, dim),
    )  # fmt: skip
    return triton.cdiv(n, arguments['ROWS']), arguments


def _forward(x: Tensor, gamma: Tensor | None, logits: Tensor, dtype: torch.dtype) -> Tensor:  # b h n d, h 1 d, b n hg
    out = _outputs(x, gamma, logits, dtype)
    blocks, arguments = _arguments(x, gamma, logits)
    _forward_kernel[(len(x) * x.shape[1] * blocks,)](**arguments, out=out)
    return out


def _backward(
    d_out: Tensor, x: Tensor, gamma: Tensor | None, logits: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    blocks, arguments = _arguments(x, gamma, logits)
    batch, heads, _, dim = x.shape
    d_x, d_logits = x.new_empty(x.shape), logits.new_empty(logits.shape)
    d_gamma = x.new_empty(*(0,) if gamma is None else (batch, heads, blocks, dim), dtype=torch.float32)
    _backward_kernel[(batch * heads * blocks,)](
        **arguments, d_out=d_out.contiguous(), d_x=d_x, d_gamma=d_gamma, d_logits=d_logits
    )  # fmt: skip
    return d_x, None if gamma is None else d_gamma.sum(dim=2).sum(dim=0).unsqueeze(1).to(gamma.dtype), d_logits


gated_heads = register_kernel('gated_heads', _forward, _backward, outputs=_outputs)
