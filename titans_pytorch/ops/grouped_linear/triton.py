"""Kernels of rows times the matrix of their group. A program owns a group and reads its matrix in blocks of columns."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import contiguous_inside, named_strides, tile_size

# entries in a block of a matrix, and most columns in it
BLOCK, MOST_COLUMNS = 8192, 128


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, weights, outputs,
    groups, rows, x_batch, x_group, x_row, weight_batch, weight_group,
    dim: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, group = program // groups, program % groups
    row, feature = tl.arange(0, ROWS)[:, None], tl.arange(0, DIM)
    x += batch * x_batch + group * x_group + row * x_row + feature[None, :]
    own = tl.load(x, mask=(row < rows) & (feature < dim)[None, :], other=0.0)
    weights += batch * weight_batch + group * weight_group + feature[:, None] * width
    outputs += (program * rows + row) * width
    for first in range(0, width, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :]
        w = tl.load(weights + column, mask=(feature < dim)[:, None] & (column < width), other=0.0)
        tl.store(outputs + column, tl.dot(own, w), mask=(row < rows) & (column < width))


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_outputs, x, weights, d_x, d_weights,
    groups, rows, x_batch, x_group, x_row, weight_batch, weight_group, d_batch, d_group, d_row,
    dim: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, group = program // groups, program % groups
    row, feature = tl.arange(0, ROWS)[:, None], tl.arange(0, DIM)
    inside = (row < rows) & (feature < dim)[None, :]
    own = tl.load(x + batch * x_batch + group * x_group + row * x_row + feature[None, :], mask=inside, other=0.0)
    across = tl.trans(own)
    in_weights = feature[:, None] * width
    weights += batch * weight_batch + group * weight_group + in_weights
    d_weights += program * (dim * width) + in_weights
    d_outputs += batch * d_batch + group * d_group + row * d_row
    of_x = tl.zeros((ROWS, DIM), tl.float32)
    for first in range(0, width, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :]
        present = (feature < dim)[:, None] & (column < width)
        w = tl.load(weights + column, mask=present, other=0.0)
        d_y = tl.load(d_outputs + column, mask=(row < rows) & (column < width), other=0.0)
        of_x = tl.dot(d_y, tl.trans(w), of_x)
        tl.store(d_weights + column, tl.dot(across, d_y), mask=present)
    tl.store(d_x + (program * rows + row) * dim + feature[None, :], of_x, mask=inside)


def _outputs(x: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:3], weights.shape[3])


def _forward(
    x: Tensor,  # b n c d
    weights: Tensor,  # b n d e
) -> Tensor:  # b n c e
    outputs = _outputs(x, weights)
    _forward_kernel[(x.shape[0] * x.shape[1],)](**_arguments(x, weights), outputs=outputs)
    return outputs


def _backward(d_outputs: Tensor, x: Tensor, weights: Tensor) -> list[Tensor]:
    d_x, d_weights = x.new_empty(x.shape), weights.new_empty(weights.shape)
    d_outputs = contiguous_inside(d_outputs, 1)
    _backward_kernel[(x.shape[0] * x.shape[1],)](
        **_arguments(x, weights), d_outputs=d_outputs, d_x=d_x, d_weights=d_weights,
        **named_strides('d', d_outputs, 'batch group row'),
    )  # fmt: skip
    return [d_x, d_weights]


grouped_linear = register_kernel('grouped_linear', _forward, _backward, outputs=_outputs)


def _arguments(x: Tensor, weights: Tensor) -> dict[str, Any]:
    x, weights = contiguous_inside(x, 1), contiguous_inside(weights, 2)
    _, groups, rows, dim = x.shape
    width, padded = weights.shape[3], tile_size(dim)
    columns = min(tile_size(width), MOST_COLUMNS, max(16, BLOCK // padded))
    return dict(
        x=x, weights=weights, groups=groups, rows=rows, **named_strides('x', x, 'batch group row'),
        **named_strides('weight', weights, 'batch group'), dim=dim, width=width,
        ROWS=tile_size(rows), DIM=padded, COLUMNS=columns, num_warps=4, num_stages=1,
    )  # fmt: skip
