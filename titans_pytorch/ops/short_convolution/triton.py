"""Kernels of the short convolution. They read tokens with heads side by side, as a projection leaves them, and write
the rows of a head one below the other, as the memory takes them: a convolution, an activation, a norm and three copies
in one pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import contiguous_inside, named_strides

# entries of a program, forward and backward
ENTRIES, GRADIENT_ENTRIES = 4096, 2048


@triton.jit
def _convolved(  # type: ignore[no-untyped-def]
    x, weight, row, n, x_row, feature, with_feature, WIDTH: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """Σ_j w_j x_{t+j} for the outputs t in `row`, zero for those that do not exist."""
    inside = ((row >= 0) & (row < n))[:, None] & with_feature[None, :]
    total = tl.zeros((ROWS, DIM), tl.float32)
    for j in tl.static_range(WIDTH):
        w = tl.load(weight + feature * WIDTH + j, mask=with_feature, other=0.0).to(tl.float32)
        given = tl.load(x + (row + j)[:, None] * x_row + feature[None, :], mask=inside, other=0.0)
        total += w[None, :] * given.to(tl.float32)
    return total, inside


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
    batch, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    row, feature = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    with_feature = feature < dim
    own_x, own_weight = x + batch * x_batch + group * dim, weight + group * dim * WIDTH
    convolved, inside = _convolved(own_x, own_weight, row, n, x_row, feature, with_feature, WIDTH, ROWS, DIM)
    y = convolved * tl.sigmoid(convolved)
    if NORMALIZE:
        inverse, _ = _inverse_length(y)
        y *= inverse
    first = (batch * groups + group // per_token * per_token) * n + group % per_token
    tl.store(out + (first + row * per_token)[:, None] * dim + feature[None, :], y, mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_out, x, weight, d_x, d_weight,
    n, groups, per_token, x_batch, x_row, d_batch, d_head, d_row,
    dim: tl.constexpr, WIDTH: tl.constexpr, NORMALIZE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of x in a program. Token t of x takes part in the outputs t − k + 1 to t, which are computed again."""
    batch, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    row, feature = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    with_feature = feature < dim
    own_x, own_weight = x + batch * x_batch + group * dim, weight + group * dim * WIDTH
    own_d = d_out + batch * d_batch + group // per_token * d_head + group % per_token * d_row
    own_d_weight = d_weight + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * dim * WIDTH
    d_own = tl.zeros((ROWS, DIM), tl.float32)
    for j in tl.static_range(WIDTH):
        output = row - j
        convolved, inside = _convolved(own_x, own_weight, output, n, x_row, feature, with_feature, WIDTH, ROWS, DIM)
        from_d = own_d + output[:, None] * per_token * d_row + feature[None, :]
        d_y = tl.load(from_d, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(convolved)
        if NORMALIZE:
            y = convolved * sigmoid
            inverse, varies = _inverse_length(y)
            y *= inverse
            along = tl.where(varies, tl.sum(d_y * y, axis=1)[:, None], 0.0)
            d_y = inverse * (d_y - along * y)
        d_convolved = d_y * sigmoid * (1.0 + convolved * (1.0 - sigmoid))
        w = tl.load(own_weight + feature * WIDTH + j, mask=with_feature, other=0.0).to(tl.float32)
        d_own += w[None, :] * d_convolved
        if j == 0:
            # every output is in one program here
            for i in tl.static_range(WIDTH):
                from_x = own_x + (output + i)[:, None] * x_row + feature[None, :]
                given = tl.load(from_x, mask=inside, other=0.0).to(tl.float32)
                of_weight = tl.sum(given * d_convolved, axis=0)
                tl.store(own_d_weight + feature * WIDTH + i, of_weight, mask=with_feature)
    tokens = n + WIDTH - 1
    to_x = d_x + (batch * tokens + row)[:, None] * groups * dim + group * dim + feature[None, :]
    tl.store(to_x, d_own, mask=(row < tokens)[:, None] & with_feature[None, :])


def _outputs(x: Tensor, weight: Tensor, heads: int, per_token: int, normalize: bool) -> Tensor:
    n = x.shape[1] - weight.shape[-1] + 1
    return x.new_empty(x.shape[0], heads, n * per_token, x.shape[2] // (heads * per_token))


def _arguments(
    x: Tensor, weight: Tensor, heads: int, per_token: int, normalize: bool, rows: int, entries: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid over so many rows, and what both kernels take."""
    x = contiguous_inside(x, 1)
    groups, width = heads * per_token, weight.shape[-1]
    dim = x.shape[2] // groups
    padded = triton.next_power_of_2(dim)
    in_program = max(1, min(entries // padded, triton.next_power_of_2(rows)))
    arguments = dict(
        x=x, **named_strides('x', x, 'batch row'), weight=weight.contiguous(), n=x.shape[1] - width + 1,
        groups=groups, per_token=per_token, dim=dim, WIDTH=width, NORMALIZE=normalize, DIM=padded, ROWS=in_program,
        num_warps=4,
    )  # fmt: skip
    return (len(x) * groups, triton.cdiv(rows, in_program)), arguments


def _forward(x: Tensor, weight: Tensor, heads: int, per_token: int, normalize: bool) -> Tensor:  # b t hud, hud 1 k
    out = _outputs(x, weight, heads, per_token, normalize)
    grid, arguments = _arguments(x, weight, heads, per_token, normalize, x.shape[1] - weight.shape[-1] + 1, ENTRIES)
    _forward_kernel[grid](**arguments, out=out)
    return out


def _backward(
    d_out: Tensor, x: Tensor, weight: Tensor, heads: int, per_token: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    grid, arguments = _arguments(x, weight, heads, per_token, normalize, x.shape[1], GRADIENT_ENTRIES)
    d_out = contiguous_inside(d_out, 1)
    d_x = x.new_empty(x.shape)
    d_weight = x.new_empty(len(x), weight.shape[0] // arguments['dim'], grid[1], arguments['dim'], weight.shape[-1],
                           dtype=torch.float32)  # fmt: skip
    strides = named_strides('d', d_out, 'batch head row')
    _backward_kernel[grid](**arguments, **strides, d_out=d_out, d_x=d_x, d_weight=d_weight)
    return d_x, d_weight.sum(dim=(0, 2)).view(weight.shape).to(weight.dtype)


short_convolution = register_kernel('short_convolution', _forward, _backward, outputs=_outputs)
