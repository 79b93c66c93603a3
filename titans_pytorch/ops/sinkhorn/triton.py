"""Sinkhorn kernels: the whole iteration on small matrices, on chip.

Each program owns a block of matrices, laid out (i, j, n) with the matrices last, so that a thread can hold whole
matrices and sum them alone. The backward kernel runs the forward again, storing all sums, and undoes the divisions by
multiplying.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import divide_by_sums, divide_by_sums_backward

# entries owned by a program: 16 per thread
TILE = 512
WARPS = 1


@triton.jit
def _entries(matrices, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row, column and matrix of each entry (i, j, n) of a program's block, and a mask of those that exist.

    Indices beyond the last one are clamped to it, so that no address is out of bounds and no maximum changes.
    """
    row = tl.arange(0, PADDED)
    matrix = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < SIZE)[:, None, None] & (row < SIZE)[None, :, None] & (matrix < matrices)[None, None, :]
    row, matrix = tl.minimum(row, SIZE - 1), tl.minimum(matrix, matrices - 1)
    return row[:, None, None], row[None, :, None], matrix[None, None, :], inside


@triton.jit
def _stored_sums(sums, iters, PADDED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Addresses of the sums of columns and of rows in a program's first iteration; a step is 2 · PADDED · BLOCK."""
    sums += tl.program_id(0).to(tl.int64) * iters * 2 * PADDED * BLOCK + tl.arange(0, BLOCK)[None, None, :] * PADDED
    row = tl.arange(0, PADDED)
    return sums + row[None, :, None], sums + PADDED * BLOCK + row[:, None, None]


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    log_alpha, out, sums,
    matrices, iters, stride_n, stride_i, stride_j,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, STORE_SUMS: tl.constexpr,
):  # fmt: skip
    i, j, n, inside = _entries(matrices, SIZE, PADDED, BLOCK)
    column_sums, row_sums = _stored_sums(sums, iters, PADDED, BLOCK)

    x = tl.load(log_alpha + n * stride_n + i * stride_i + j * stride_j)
    x = tl.where(inside, tl.exp(x - tl.max(x, axis=0, keep_dims=True)), 0.0)
    for step in range(iters):
        x, columns = divide_by_sums(x, 0, EPS)
        x, rows = divide_by_sums(x, 1, EPS)
        if STORE_SUMS:
            tl.store(column_sums + step * 2 * PADDED * BLOCK, columns)
            tl.store(row_sums + step * 2 * PADDED * BLOCK, rows)
    tl.store(out + (n * SIZE + i) * SIZE + j, x, mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_out, out, sums, d_log_alpha,
    matrices, iters, stride_n, stride_i, stride_j,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    i, j, n, inside = _entries(matrices, SIZE, PADDED, BLOCK)
    column_sums, row_sums = _stored_sums(sums, iters, PADDED, BLOCK)

    x = tl.where(inside, tl.load(out + (n * SIZE + i) * SIZE + j), 0.0)
    d_log = x * tl.load(d_out + n * stride_n + i * stride_i + j * stride_j)
    for back in range(iters):
        step = iters - 1 - back
        rows = tl.load(row_sums + step * 2 * PADDED * BLOCK)
        d_log, x = divide_by_sums_backward(d_log, x, rows, 1, EPS)
        columns = tl.load(column_sums + step * 2 * PADDED * BLOCK)
        d_log, x = divide_by_sums_backward(d_log, x, columns, 0, EPS)
    tl.store(d_log_alpha + (n * SIZE + i) * SIZE + j, d_log, mask=inside)


def _forward(log_alpha: Tensor, iters: int, eps: float) -> Tensor:  # … s s
    out = _outputs(log_alpha)
    _launch(_forward_kernel, log_alpha, iters, eps, log_alpha=log_alpha, out=out, sums=out, STORE_SUMS=False)
    return out


def _backward(d_out: Tensor, log_alpha: Tensor, iters: int, eps: float) -> list[Tensor]:
    programs, padded, block = _tiling(log_alpha)
    out, d_log_alpha = log_alpha.new_empty(log_alpha.shape), log_alpha.new_empty(log_alpha.shape)
    sums = log_alpha.new_empty(programs, iters, 2, block, padded)
    _launch(_forward_kernel, log_alpha, iters, eps, log_alpha=log_alpha, out=out, sums=sums, STORE_SUMS=True)
    _launch(_backward_kernel, d_out, iters, eps, d_out=d_out, out=out, sums=sums, d_log_alpha=d_log_alpha)
    return [d_log_alpha]


def _outputs(log_alpha: Tensor, *settings: Any) -> Tensor:
    return log_alpha.new_empty(log_alpha.shape)


sinkhorn = register_kernel('sinkhorn', _forward, _backward, outputs=_outputs)


def _launch(kernel: Any, strided: Tensor, iters: int, eps: float, **arguments: Any) -> None:
    """Launch a kernel. `strided`, one of its arguments, may be any view (…, s, s), such as a slice of a tensor."""
    programs, padded, block = _tiling(strided)
    if programs == 0:
        return
    size = strided.shape[-1]
    flat = strided.reshape(-1, size, size)
    stride_n, stride_i, stride_j = flat.stride()
    arguments = {name: flat if argument is strided else argument for name, argument in arguments.items()}
    kernel[(programs,)](
        **arguments, matrices=len(flat), iters=iters, stride_n=stride_n, stride_i=stride_i, stride_j=stride_j,
        SIZE=size, PADDED=padded, BLOCK=block, EPS=eps, num_warps=WARPS,
    )  # fmt: skip


def _tiling(matrices: Tensor) -> tuple[int, int, int]:
    """Number of programs, the power of two that holds a matrix's rows, matrices per program."""
    padded = triton.next_power_of_2(matrices.shape[-1])
    block = TILE // padded**2
    return triton.cdiv(matrices.shape[:-2].numel(), block), padded, block
