"""Kernel that ends a chunk in decoding under spectral norm, in one launch.

A program owns one matrix of a head, transposed (`flip`) if necessary so that it has no more rows than columns, as
Newton–Schulz requires; of two matrices (d, e) and (e, d), exactly one is transposed. γ goes with the last matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._triton import (
    contiguous_inside,
    let_next_begin,
    overlapping,
    taken_by,
    tile_size,
    wait_for_inputs,
)
from titans_pytorch.ops.newton_schulz.triton import iterate, pytorch_precision, warps_of


@triton.jit
def _first_or_last(which, first, last):  # type: ignore[no-untyped-def]
    """One of two tensors, chosen by a number that is known only at run time."""
    chosen = first
    if which == 1:
        chosen = last
    return chosen


@triton.jit
def _read(matrix, flip, rows: tl.constexpr, columns: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A matrix (rows, columns), or with `flip` a matrix (columns, rows), read along its own rows."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if flip:
        offset = column[:, None] * rows + row[None, :]
        x = tl.trans(tl.load(matrix + offset, mask=tl.trans(inside), other=0.0))
    else:
        x = tl.load(matrix + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    return x


@triton.jit
def _write(matrix, x, flip, rows: tl.constexpr, columns: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Inverse of `_read`."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if flip:
        offset = column[:, None] * rows + row[None, :]
        tl.store(matrix + offset, tl.trans(x), mask=tl.trans(inside))
    else:
        tl.store(matrix + row[:, None] * columns + column[None, :], x, mask=inside)


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    left_first, right_first, left_last, right_last, of_gamma,
    weights_first, weights_last, weights_gamma, momentum_first, momentum_last, momentum_gamma,
    new_weights_first, new_weights_last, new_weights_gamma,
    decay_logits, momentum_logits, scales,
    decay_stride, momentum_stride, scale_stride, scale_first, scale_last, scale_gamma, chunk_rows, steps, eps, a, b, c,
    rows: tl.constexpr, columns: tl.constexpr, dim: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, FLIPPED: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    let_next_begin(START)
    wait_for_inputs(START)
    head = tl.program_id(0).to(tl.int64)
    # 1 for the last matrix, which may be the only one
    which = tl.program_id(1) + 2 - tl.num_programs(1)
    flip = which == FLIPPED
    start = head * rows * columns

    kept = tl.sigmoid(-tl.load(decay_logits + head * decay_stride).to(tl.float32))
    gate = 0.0
    if momentum_logits is not None:
        gate = tl.sigmoid(tl.load(momentum_logits + head * momentum_stride).to(tl.float32))

    # XᵀΔ, or ΔᵀX if the matrix is transposed
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    left = _first_or_last(which, left_first, left_last) + head * chunk_rows * rows + row
    right = _first_or_last(which, right_first, right_last) + head * chunk_rows * columns + column
    update = tl.zeros((ROWS, COLUMNS), tl.float32)
    for index in range(chunk_rows):
        own = tl.load(left + index * rows, mask=row < rows, other=0.0).to(tl.float32)
        other = tl.load(right + index * columns, mask=column < columns, other=0.0).to(tl.float32)
        update += own[:, None] * other[None, :]
    if scales is not None:
        update *= tl.load(scales + head * scale_stride + tl.where(which == 1, scale_last, scale_first)).to(tl.float32)
    if momentum_logits is not None:
        momentum = _first_or_last(which, momentum_first, momentum_last) + start
        update += gate * _read(momentum, flip, rows, columns, ROWS, COLUMNS)
        tl.debug_barrier()  # other threads may still be reading what is overwritten next
        _write(momentum, update, flip, rows, columns, ROWS, COLUMNS)

    x = update / tl.maximum(tl.sqrt(tl.sum(tl.sum(update * update, axis=1), axis=0)), eps)
    zeros = tl.zeros((ROWS, ROWS), tl.float32)
    for _ in range(steps):
        x = iterate(x, a, b, c, zeros, PRECISION, OPERAND)
    x += kept * _read(_first_or_last(which, weights_first, weights_last) + start, flip, rows, columns, ROWS, COLUMNS)
    new_weights = _first_or_last(which, new_weights_first, new_weights_last) + start
    _write(new_weights, x, flip, rows, columns, ROWS, COLUMNS)

    if weights_gamma is not None:
        if which == 1:
            inside = tl.arange(0, DIM) < dim
            feature = head * dim + tl.arange(0, DIM)
            step = tl.load(of_gamma + feature, mask=inside, other=0.0).to(tl.float32)
            if scales is not None:
                step *= tl.load(scales + head * scale_stride + scale_gamma).to(tl.float32)
            if momentum_logits is not None:
                step += gate * tl.load(momentum_gamma + feature, mask=inside, other=0.0)
                tl.store(momentum_gamma + feature, step, mask=inside)
            tl.store(
                new_weights_gamma + feature,
                step + kept * tl.load(weights_gamma + feature, mask=inside, other=0.0),
                mask=inside,
            )


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def spectral_update(
    inputs: list[Tensor],  # bh m d, bh m e; or one, bh m d
    deltas: list[Tensor],  # bh m e, bh m d
    of_gamma: Tensor | None,  # bh d
    weights: list[Tensor],  # bh d e, bh e d, bh d
    momentum: list[Tensor],  # the same, or empty
    decay_logits: Tensor,  # bh
    momentum_logits: Tensor | None,  # bh
    scales: Tensor | None,  # bh w
    scale_indices: list[int],  # of the weights, in `scales`
    steps: int,  # of Newton–Schulz
    eps: float,
    a: float,
    b: float,
    c: float,
    operands: torch.dtype,
) -> list[Tensor]:
    """The weights."""
    number, (heads, chunk_rows, dim) = len(inputs), inputs[0].shape
    width = weights[number - 1].shape[1]
    rows, columns = sorted((dim, width))
    # the first matrix is (dim, width), the last (width, dim)
    flipped = 1 if dim == rows else 0
    lefts, rights = ([t.contiguous() for t in own] for own in (inputs, deltas))
    for index in range(number):
        if index - number + 2 == flipped:
            lefts[index], rights[index] = rights[index], lefts[index]
    of_gamma = None if of_gamma is None else of_gamma.contiguous()
    scales = None if scales is None else contiguous_inside(scales, 1)
    new_weights = [w.new_empty(w.shape) for w in weights]

    def slots(name: str, given: list[Any]) -> dict[str, Any]:
        """Arguments of the first matrix, of the last (possibly the same one), and of γ; absent ones are `None`."""
        first, last, gamma = (given[0], given[number - 1], [*given, None][number]) if given else (None,) * 3
        return {f'{name}_first': first, f'{name}_last': last, f'{name}_gamma': gamma}

    named: dict[str, list[Any]] = {
        'left': lefts, 'right': rights, 'scale': scale_indices,
        'weights': weights, 'momentum': momentum, 'new_weights': new_weights,
    }  # fmt: skip
    arguments = {key: value for name, own in named.items() for key, value in slots(name, own).items()}
    size = {'ROWS': tile_size(rows), 'COLUMNS': tile_size(columns)}
    with torch.cuda.device_of(inputs[0]):
        _kernel[(heads, number)](
            **taken_by(_kernel, arguments), of_gamma=of_gamma,
            decay_logits=decay_logits, momentum_logits=momentum_logits, scales=scales,
            decay_stride=decay_logits.stride(0), momentum_stride=_stride(momentum_logits), scale_stride=_stride(scales),
            chunk_rows=chunk_rows, steps=steps, eps=eps, a=a, b=b, c=c, rows=rows, columns=columns, dim=dim,
            **size, DIM=triton.next_power_of_2(dim), FLIPPED=flipped,
            **pytorch_precision(operands), **overlapping(inputs[0]),
            num_warps=warps_of(*size.values()), num_stages=1,
        )  # fmt: skip
    return new_weights
