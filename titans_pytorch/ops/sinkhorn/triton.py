"""The columns and the rows of small matrices divided by their sums, in turn: the whole loop on chip.

Each program owns a block of matrices, laid out (i, j, n) with the matrices last, so that a thread can hold whole ones
and sum them alone. The backward has the forward note all sums, and undoes the divisions by multiplying. The plain
twins, and the equations, are in `titans_pytorch.ops.sinkhorn`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# entries a program owns: 16 a thread
TILE = 512
# rows of the largest matrix that is served: it must fit a program
LARGEST = 16
WARPS = 1


@triton.jit
def _places(matrices, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row, column and matrix of each entry (i, j, n) of a program's block, and which entries there are.

    Places outside name the last one inside: no address is out of bounds, and no maximum changes.
    """
    row = tl.arange(0, PADDED)
    matrix = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < SIZE)[:, None, None] & (row < SIZE)[None, :, None] & (matrix < matrices)[None, None, :]
    row, matrix = tl.minimum(row, SIZE - 1), tl.minimum(matrix, matrices - 1)
    return row[:, None, None], row[None, :, None], matrix[None, None, :], inside


@triton.jit
def _notes(sums, iters, PADDED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a program notes the sums of columns and of rows in its first iteration; a step is 2 · PADDED · BLOCK."""
    sums += tl.program_id(0).to(tl.int64) * iters * 2 * PADDED * BLOCK + tl.arange(0, BLOCK)[None, None, :] * PADDED
    row = tl.arange(0, PADDED)
    return sums + row[None, :, None], sums + PADDED * BLOCK + row[:, None, None]


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    log_alpha, out, sums,
    matrices, iters, stride_n, stride_i, stride_j,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, NOTE: tl.constexpr,
):  # fmt: skip
    i, j, n, inside = _places(matrices, SIZE, PADDED, BLOCK)
    of_columns, of_rows = _notes(sums, iters, PADDED, BLOCK)

    x = tl.load(log_alpha + n * stride_n + i * stride_i + j * stride_j)
    x = tl.where(inside, tl.exp(x - tl.max(x, axis=0, keep_dims=True)), 0.0)
    for step in range(iters):
        # a comparison, not a maximum, lets NaN through
        columns = tl.sum(x, axis=0, keep_dims=True)
        x *= 1.0 / tl.where(columns < EPS, EPS, columns)
        rows = tl.sum(x, axis=1, keep_dims=True)
        x *= 1.0 / tl.where(rows < EPS, EPS, rows)
        if NOTE:
            tl.store(of_columns + step * 2 * PADDED * BLOCK, columns)
            tl.store(of_rows + step * 2 * PADDED * BLOCK, rows)
    tl.store(out + (n * SIZE + i) * SIZE + j, x, mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_out, out, sums, d_log_alpha,
    matrices, iters, stride_n, stride_i, stride_j,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    i, j, n, inside = _places(matrices, SIZE, PADDED, BLOCK)
    of_columns, of_rows = _notes(sums, iters, PADDED, BLOCK)

    x = tl.where(inside, tl.load(out + (n * SIZE + i) * SIZE + j), 0.0)
    d_log = x * tl.load(d_out + n * stride_n + i * stride_i + j * stride_j)
    for back in range(iters):
        step = iters - 1 - back
        rows = tl.load(of_rows + step * 2 * PADDED * BLOCK)
        d_log -= x * tl.where(rows < EPS, 0.0, tl.sum(d_log, axis=1, keep_dims=True))
        x *= tl.where(rows < EPS, EPS, rows)
        columns = tl.load(of_columns + step * 2 * PADDED * BLOCK)
        d_log -= x * tl.where(columns < EPS, 0.0, tl.sum(d_log, axis=0, keep_dims=True))
        x *= tl.where(columns < EPS, EPS, columns)
    tl.store(d_log_alpha + (n * SIZE + i) * SIZE + j, d_log, mask=inside)


def forward(log_alpha: Tensor, iters: int, eps: float) -> Tensor:  # … s s
    """The normalised matrices."""
    out = log_alpha.new_empty(log_alpha.shape)
    _launch(_forward_kernel, log_alpha, out, out, iters=iters, eps=eps, NOTE=False)
    return out


def backward(d_out: Tensor, log_alpha: Tensor, iters: int, eps: float) -> Tensor:  # … s s
    """The gradient of `log_alpha`, given that of the normalised matrices."""
    programs, padded, block = _tiling(log_alpha)
    out, d_log_alpha = log_alpha.new_empty(log_alpha.shape), log_alpha.new_empty(log_alpha.shape)
    sums = log_alpha.new_empty(programs, iters, 2, block, padded)
    _launch(_forward_kernel, log_alpha, out, sums, iters=iters, eps=eps, NOTE=True)
    _launch(_backward_kernel, d_out, out, sums, d_log_alpha, iters=iters, eps=eps)
    return d_log_alpha


def _launch(kernel: Any, strided: Tensor, *contiguous: Tensor, iters: int, eps: float, **constants: bool) -> None:
    """`strided` may be any view of … s s: hyper-connections cut theirs out of a larger tensor."""
    programs, padded, block = _tiling(strided)
    size = strided.shape[-1]
    flat = strided.reshape(-1, size, size)
    if programs == 0:
        return
    with torch.cuda.device_of(strided):
        kernel[(programs,)](
            flat, *contiguous, flat.shape[0], iters, *flat.stride(),
            SIZE=size, PADDED=padded, BLOCK=block, EPS=eps, num_warps=WARPS, **constants,
        )  # fmt: skip


def _tiling(matrices: Tensor) -> tuple[int, int, int]:
    """Number of programs, the power of two that holds a matrix's rows, matrices per program."""
    padded = triton.next_power_of_2(matrices.shape[-1])
    block = TILE // padded**2
    return triton.cdiv(matrices.shape[:-2].numel(), block), padded, block
