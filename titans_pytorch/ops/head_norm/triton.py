"""Kernels of the norm of heads. They read rows with heads side by side, as a projection leaves them, and write the rows
of a head one below the other, as the memory expects: a norm and two copies in one pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import contiguous_inside, named_strides, own_rows, whole_rows

EPS = torch.finfo(torch.float32).eps


@triton.jit
def _load_rows(  # type: ignore[no-untyped-def]
    x, own_head, row, n, x_batch, x_row, x_head, heads, dim, DIM: tl.constexpr
):  # fmt: skip
    """Rows of a head, their features, and which of these exist."""
    batch, head = (own_head // heads).to(tl.int64), (own_head % heads).to(tl.int64)
    feature = tl.arange(0, DIM)
    inside = (row < n)[:, None] & (feature < dim)[None, :]
    offset = batch * x_batch + row[:, None] * x_row + head * x_head + feature[None, :]
    own = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    return own, feature, inside


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, gamma, out,
    heads, n, eps, x_batch, x_row, x_head,
    dim: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    own_head, row = own_rows(n, ROWS)
    own, feature, inside = _load_rows(x, own_head, row, n, x_batch, x_row, x_head, heads, dim, DIM)
    gain = 1.0 + tl.load(gamma + (own_head % heads) * dim + feature, mask=feature < dim, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(own * own, axis=1) / dim + eps)
    to_out = out + own_head.to(tl.int64) * n * dim + row[:, None] * dim + feature[None, :]
    tl.store(to_out, own * inverse[:, None] * gain[None, :], mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_out, x, gamma, d_x, d_gamma,
    heads, n, eps, x_batch, x_row, x_head, d_batch, d_head, d_row,
    dim: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    own_head, row = own_rows(n, ROWS)
    own, feature, inside = _load_rows(x, own_head, row, n, x_batch, x_row, x_head, heads, dim, DIM)
    batch, head = (own_head // heads).to(tl.int64), (own_head % heads).to(tl.int64)
    gain = 1.0 + tl.load(gamma + head * dim + feature, mask=feature < dim, other=0.0).to(tl.float32)
    inverse = (1.0 / tl.sqrt(tl.sum(own * own, axis=1) / dim + eps))[:, None]
    from_d = d_out + batch * d_batch + head * d_head + row[:, None] * d_row + feature[None, :]
    d_own = tl.load(from_d, mask=inside, other=0.0).to(tl.float32)
    own *= inverse
    to_gamma = d_gamma + tl.program_id(0).to(tl.int64) * dim + feature
    tl.store(to_gamma, tl.sum(d_own * own, axis=0), mask=feature < dim)
    d_own *= gain[None, :]
    d_own = inverse * (d_own - own * (tl.sum(d_own * own, axis=1) / dim)[:, None])
    to_x = d_x + ((batch * n + row[:, None]) * heads + head) * dim + feature[None, :]
    tl.store(to_x, d_own, mask=inside)


def _outputs(x: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    batch, n, heads, dim = x.shape
    return x.new_empty(batch, heads, n, dim, dtype=dtype)


def _arguments(x: Tensor, gamma: Tensor) -> tuple[int, dict[str, Any]]:
    """Number of blocks of rows in a head, one for each program, and the arguments of both kernels."""
    x = contiguous_inside(x, 1)
    batch, n, heads, dim = x.shape
    arguments = dict(
        x=x, **named_strides('x', x, 'batch row head'), gamma=gamma.contiguous(), heads=heads, n=n, eps=EPS,
        dim=dim, **whole_rows(n, dim),
    )  # fmt: skip
    return triton.cdiv(n, arguments['ROWS']), arguments


def _forward(x: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:  # b n h d, h 1 d
    out = _outputs(x, gamma, dtype)
    blocks, arguments = _arguments(x, gamma)
    _forward_kernel[(len(x) * x.shape[2] * blocks,)](**arguments, out=out)
    return out


def _backward(d_out: Tensor, x: Tensor, gamma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    blocks, arguments = _arguments(x, gamma)
    batch, _, heads, dim = x.shape
    d_out = contiguous_inside(d_out, 1)
    d_x = x.new_empty(x.shape)
    d_gamma = x.new_empty(batch, heads, blocks, dim, dtype=torch.float32)
    strides = named_strides('d', d_out, 'batch head row')
    _backward_kernel[(batch * heads * blocks,)](**arguments, **strides, d_out=d_out, d_x=d_x, d_gamma=d_gamma)
    # summing over both axes at once would launch only two programs, which take 20 µs for 32,768 tokens
    return d_x, d_gamma.sum(dim=2).sum(dim=0).unsqueeze(1).to(gamma.dtype)


head_norm = register_kernel('head_norm', _forward, _backward, outputs=_outputs)
