"""Kernels of the short convolution. They read tokens with heads side by side, as a projection leaves them, and write
the rows of a head one below the other, as the memory expects: a convolution, an activation, a norm and three copies in
one pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import contiguous_inside, named_strides, own_rows, taken_by, whole_rows


@triton.jit
def _convolved(  # type: ignore[no-untyped-def]
    x, weight, n, groups, x_batch, x_row,
    dim: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Σ_j w_j x_{t+j} for a program's outputs t, zero where there are none; indices of the outputs, and of each x_t."""
    own, row = own_rows(n, ROWS)
    batch, group = (own // groups).to(tl.int64), (own % groups).to(tl.int64)
    feature = tl.arange(0, DIM)
    with_feature = feature < dim
    inside = (row < n)[:, None] & with_feature[None, :]
    from_x = x + batch * x_batch + row[:, None] * x_row + (group * dim + feature)[None, :]
    total = tl.zeros((ROWS, DIM), tl.float32)
    for j in tl.static_range(WIDTH):
        w = tl.load(weight + (group * dim + feature) * WIDTH + j, mask=with_feature, other=0.0).to(tl.float32)
        total += w[None, :] * tl.load(from_x + j * x_row, mask=inside, other=0.0).to(tl.float32)
    return total, batch, group, row, feature, inside, from_x


@triton.jit
def _inverse_length(y):  # type: ignore[no-untyped-def]
    """The factor that scales each row to length 1, as in `norms.l2_norm`; and whether it depends on the row."""
    squared = tl.sum(y * y, axis=1)
    inverse = tl.where(squared == 0.0, 0.0, 1.0 / tl.sqrt(tl.maximum(squared, 1e-24)))
    return inverse[:, None], (squared > 1e-24)[:, None]


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, weight, out,
    n, groups, per_token, x_batch, x_row,
    dim: tl.constexpr, WIDTH: tl.constexpr, NORMALIZE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    convolved, batch, group, row, feature, inside, _ = _convolved(
        x, weight, n, groups, x_batch, x_row, dim, WIDTH, DIM, ROWS
    )  # fmt: skip
    y = convolved * tl.sigmoid(convolved)
    if NORMALIZE:
        inverse, _ = _inverse_length(y)
        y *= inverse
    first = (batch * groups + group // per_token * per_token) * n + group % per_token
    tl.store(out + (first + row * per_token)[:, None] * dim + feature[None, :], y, mask=inside)


@triton.jit
def _activation_backward_kernel(  # type: ignore[no-untyped-def]
    d_out, x, weight, d_convolved, d_weight,
    n, groups, per_token, x_batch, x_row, d_batch, d_head, d_row,
    dim: tl.constexpr, WIDTH: tl.constexpr, NORMALIZE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Go back through norm and activation, and to the weights; each program has a part of their gradient."""
    convolved, batch, group, row, feature, inside, from_x = _convolved(
        x, weight, n, groups, x_batch, x_row, dim, WIDTH, DIM, ROWS
    )  # fmt: skip
    from_d = d_out + batch * d_batch + group // per_token * d_head + feature[None, :]
    from_d += (row * per_token + group % per_token)[:, None] * d_row
    d_y = tl.load(from_d, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(convolved)
    if NORMALIZE:
        y = convolved * sigmoid
        inverse, varies = _inverse_length(y)
        y *= inverse
        along = tl.where(varies, tl.sum(d_y * y, axis=1)[:, None], 0.0)
        d_y = inverse * (d_y - along * y)
    d_own = d_y * sigmoid * (1.0 + convolved * (1.0 - sigmoid))
    tl.store(d_convolved + ((batch * n + row[:, None]) * groups + group) * dim + feature[None, :], d_own, mask=inside)
    to_weight = d_weight + (tl.program_id(0).to(tl.int64) * dim + feature) * WIDTH
    for j in tl.static_range(WIDTH):
        given = tl.load(from_x + j * x_row, mask=inside, other=0.0).to(tl.float32)
        tl.store(to_weight + j, tl.sum(given * d_own, axis=0), mask=feature < dim)


@triton.jit
def _convolution_backward_kernel(  # type: ignore[no-untyped-def]
    d_convolved, weight, d_x,
    n, groups, dim: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Token t is part of outputs t − j: its gradient is Σ_j w_j d_{t−j}."""
    tokens = n + WIDTH - 1
    own, row = own_rows(tokens, ROWS)
    batch, group = (own // groups).to(tl.int64), (own % groups).to(tl.int64)
    feature = tl.arange(0, DIM)
    with_feature = feature < dim
    total = tl.zeros((ROWS, DIM), tl.float32)
    for j in tl.static_range(WIDTH):
        output = row - j
        w = tl.load(weight + (group * dim + feature) * WIDTH + j, mask=with_feature, other=0.0).to(tl.float32)
        from_d = d_convolved + ((batch * n + output[:, None]) * groups + group) * dim + feature[None, :]
        inside = ((output >= 0) & (output < n))[:, None] & with_feature[None, :]
        total += w[None, :] * tl.load(from_d, mask=inside, other=0.0).to(tl.float32)
    to_x = d_x + ((batch * tokens + row[:, None]) * groups + group) * dim + feature[None, :]
    tl.store(to_x, total, mask=(row < tokens)[:, None] & with_feature[None, :])


def _outputs(x: Tensor, weight: Tensor, heads: int, per_token: int, normalize: bool) -> Tensor:
    n = x.shape[1] - weight.shape[-1] + 1
    return x.new_empty(x.shape[0], heads, n * per_token, x.shape[2] // (heads * per_token))


def _arguments(x: Tensor, weight: Tensor, heads: int, per_token: int, normalize: bool) -> tuple[int, dict[str, Any]]:
    """Number of blocks of outputs in a group, one for each program, and the arguments of all kernels."""
    x = contiguous_inside(x, 1)
    groups, width = heads * per_token, weight.shape[-1]
    n, dim = x.shape[1] - width + 1, x.shape[2] // groups
    arguments = dict(
        x=x, **named_strides('x', x, 'batch row'), weight=weight.contiguous(), n=n, groups=groups,
        per_token=per_token, dim=dim, WIDTH=width, NORMALIZE=normalize, **whole_rows(n, dim),
    )  # fmt: skip
    return triton.cdiv(n, arguments['ROWS']), arguments


def _forward(x: Tensor, weight: Tensor, heads: int, per_token: int, normalize: bool) -> Tensor:  # b t hud, hud 1 k
    out = _outputs(x, weight, heads, per_token, normalize)
    blocks, arguments = _arguments(x, weight, heads, per_token, normalize)
    _forward_kernel[(len(x) * heads * per_token * blocks,)](**arguments, out=out)
    return out


def _backward(
    d_out: Tensor, x: Tensor, weight: Tensor, heads: int, per_token: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    blocks, arguments = _arguments(x, weight, heads, per_token, normalize)
    groups, dim, width = heads * per_token, arguments['dim'], weight.shape[-1]
    d_out = contiguous_inside(d_out, 1)
    d_x, d_convolved = x.new_empty(x.shape), x.new_empty(len(x), arguments['n'], x.shape[2])
    d_weight = x.new_empty(len(x), groups, blocks, dim, width, dtype=torch.float32)
    strides = named_strides('d', d_out, 'batch head row')
    _activation_backward_kernel[(len(x) * groups * blocks,)](
        **arguments, **strides, d_out=d_out, d_convolved=d_convolved, d_weight=d_weight
    )  # fmt: skip
    arguments = taken_by(_convolution_backward_kernel, arguments) | dict(num_warps=arguments['num_warps'])
    blocks_of_tokens = triton.cdiv(x.shape[1], arguments['ROWS'])
    _convolution_backward_kernel[(len(x) * groups * blocks_of_tokens,)](**arguments, d_convolved=d_convolved, d_x=d_x)
    return d_x, d_weight.sum(dim=2).sum(dim=0).view(weight.shape).to(weight.dtype)


short_convolution = register_kernel('short_convolution', _forward, _backward, outputs=_outputs)
