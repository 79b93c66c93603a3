"""Kernels of the scan over blocks of a linear memory.

With G = K Kᵀ and P = (I + (A ∘ G) diag(β))⁻¹, the errors of a block are E = P (V − Σ_k a_k ∘ K state_k), and Δ = β E.
The β (`strengths`) are limited if steps are proximal. P does not depend on states, so a single launch computes it for
all blocks. Only the scan itself goes from block to block, in programs that each keep some columns of all states on
chip: forward, and from the last block to the first for the gradients of states and values. The remaining gradients are
again a single launch for all blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import (
    ENOUGH_PROGRAMS,
    EXACT,
    contiguous_inside,
    eliminate,
    multiply_add,
    named_strides,
    taken_by,
    tile_size,
)
from titans_pytorch.ops.proximal_steps import LARGEST

# rows and columns of the systems that are solved by elimination before they are combined
SMALL = 16
# columns of the states that a program has on chip. Scans use half as many if there would be fewer programs than
# `ENOUGH_PROGRAMS`, and in float32, where full products take more registers and shared memory
MOST_COLUMNS = 32
WARPS = 4
# for the last pass, where more stages would need more shared memory than some GPUs have
GRADIENTS = dict(num_warps=8, num_stages=2)


@triton.jit
def _rows_of_block(block, chunks, rows, key_chunk, key_row, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Chunk of each row in its block, its offset from the head's first row, and whether it exists."""
    index = tl.arange(0, ROWS)
    chunk = index // rows
    offset = (tl.cast(block, tl.int64) * chunks + chunk) * key_chunk + index % rows * key_row
    return chunk, offset, index < chunks * rows


@triton.jit
def _load_coefficients_of_rows(  # type: ignore[no-untyped-def]
    steps, chunk, base, valid, chunks, own_coefficient, ROWS: tl.constexpr
):  # fmt: skip
    """A: the coefficient of each row's update (across) in the base weights of each row (down). It is zero unless the
    update is earlier; for updates of the same chunk it is `own_coefficient`."""
    both = valid[:, None] & valid[None, :]
    present = both & (chunk[None, :] < base[:, None])
    earlier = tl.load(steps + base[:, None] * chunks + chunk[None, :], mask=present, other=0.0)
    return tl.where(both & (chunk[None, :] == chunk[:, None]), own_coefficient, earlier)


@triton.jit
def _inverse(x, count, ROWS: tl.constexpr, SMALL: tl.constexpr):  # type: ignore[no-untyped-def]
    """(I + x)⁻¹ for an x that is strictly lower triangular except for its diagonal blocks of SMALL rows.

    Rows and columns of x beyond the first `count` are zero.
    """
    SIDE: tl.constexpr = ROWS // SMALL
    index = tl.arange(0, ROWS)
    in_block = index[:, None] // SMALL == index[None, :] // SMALL
    small = tl.sum(tl.reshape(tl.where(in_block, x, 0.0), (SIDE, SMALL, SIDE, SMALL)), axis=2)
    row = tl.arange(0, SMALL)
    identity = tl.zeros((SIDE, SMALL, SMALL), tl.float32) + tl.where(row[:, None] == row[None, :], 1.0, 0.0)[None, :, :]
    solved = eliminate(small + identity, 0, tl.minimum(count, SMALL))
    side = tl.arange(0, SIDE)
    apart = tl.where((side[:, None] == side[None, :])[:, None, :, None], solved[:, :, None, :], 0.0)
    inverse = tl.reshape(apart, (ROWS, ROWS))
    if SIDE > 1:
        # I + x = D (I + y) with y = D⁻¹ (x − its diagonal blocks), and y to the power SIDE is 0, so that
        # (I + x)⁻¹ = (I + y²) (I − y) D⁻¹
        tl.static_assert(SIDE <= 4)
        nothing = tl.zeros((ROWS, ROWS), tl.float32)
        y = multiply_add(nothing, inverse, tl.where(in_block, 0.0, x), EXACT, tl.float32)
        inverse = multiply_add(inverse, -y, inverse, EXACT, tl.float32)
        if SIDE > 2:
            squared = multiply_add(nothing, y, y, EXACT, tl.float32)
            inverse = multiply_add(inverse, squared, inverse, EXACT, tl.float32)
    return inverse


@triton.jit
def _inverse_kernel(  # type: ignore[no-untyped-def]
    keys, step_sizes, steps, inverses, strengths,
    blocks, chunks, rows, per_batch, own_coefficient, scale, largest,
    key_head, key_chunk, key_row, step_head, step_chunk, step_row,
    dim: tl.constexpr, PROXIMAL: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64)
    head, block = own // blocks, own % blocks
    feature, index = tl.arange(0, DIM), tl.arange(0, ROWS)
    chunk, to_keys, valid = _rows_of_block(block, chunks, rows, key_chunk, key_row, ROWS)
    _, to_steps, _ = _rows_of_block(block, chunks, rows, step_chunk, step_row, ROWS)
    from_keys = keys + head * key_head + to_keys[:, None] + feature[None, :]
    key = tl.load(from_keys, mask=valid[:, None] & (feature < dim)[None, :], other=0.0).to(tl.float32)
    beta = scale * tl.load(step_sizes + head * step_head + to_steps, mask=valid, other=0.0).to(tl.float32)
    base = chunk // per_batch * per_batch
    coefficients = _load_coefficients_of_rows(
        steps + own * chunks * chunks, chunk, base, valid, chunks, own_coefficient, ROWS
    )  # fmt: skip
    gram = multiply_add(tl.zeros((ROWS, ROWS), tl.float32), key, tl.trans(key), EXACT, tl.float32)
    if PROXIMAL:
        beta *= largest / tl.maximum(own_coefficient * beta * tl.sum(key * key, axis=1), largest)
    inverse = _inverse(coefficients * gram * beta[None, :], chunks * rows, ROWS, SMALL)
    tl.store(inverses + own * ROWS * ROWS + index[:, None] * ROWS + index[None, :], inverse)
    tl.store(strengths + own * ROWS + index, beta)


@triton.jit
def _columns_of_states(  # type: ignore[no-untyped-def]
    part, dim: tl.constexpr, width: tl.constexpr, STATES: tl.constexpr, PADDED: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Offsets of a program's columns of all states, side by side, and whether they exist."""
    feature, entry = tl.arange(0, DIM)[:, None], tl.arange(0, PADDED * WIDTH)[None, :]
    state, column = entry // WIDTH, part * WIDTH + entry % WIDTH
    inside = (feature < dim) & (state < STATES) & (column < width)
    return (state * dim + feature) * width + column, inside


@triton.jit
def _load_for_states(first, inside, by_state, STATES: tl.constexpr, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Coefficients of each row for each state, (rows, PADDED), given pointers to each row's first coefficient."""
    state = tl.arange(0, PADDED)
    entry = first[:, None] + state[None, :] * by_state
    return tl.load(entry, mask=inside[:, None] & (state < STATES)[None, :], other=0.0)


@triton.jit
def _combined(x, coefficients):  # type: ignore[no-untyped-def]
    """Σ_k coefficients[row, k] · x_k, where the states x are side by side."""
    ROWS: tl.constexpr = x.shape[0]
    PADDED: tl.constexpr = coefficients.shape[1]
    return tl.sum(tl.reshape(x, (ROWS, PADDED, x.shape[1] // PADDED)) * coefficients[:, :, None], axis=1)


@triton.jit
def _side_by_side(x, coefficients):  # type: ignore[no-untyped-def]
    """coefficients[row, k] · x for all states k."""
    ROWS: tl.constexpr = x.shape[0]
    PADDED: tl.constexpr = coefficients.shape[1]
    return tl.reshape(coefficients[:, :, None] * x[:, None, :], (ROWS, PADDED * x.shape[1]))


@triton.jit
def _mixed(states, mix, by_result, by_given, STATES: tl.constexpr, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ_i mix[k, i] · state_i for all states k, side by side."""
    DIM: tl.constexpr = states.shape[0]
    WIDTH: tl.constexpr = states.shape[1] // PADDED
    each, state = tl.reshape(states, (DIM, PADDED, WIDTH)), tl.arange(0, PADDED)[None, :, None]
    total = tl.zeros((DIM, PADDED, WIDTH), tl.float32)
    for i in tl.static_range(STATES):
        of_results = tl.zeros((1, PADDED, 1), tl.float32)
        # loaded as scalars, because a loaded tensor would impose its layout on the states
        for k in tl.static_range(STATES):
            of_results = tl.where(state == k, tl.load(mix + k * by_result + i * by_given), of_results)
        total += of_results * tl.sum(tl.where(state == i, each, 0.0), axis=1)[:, None, :]
    return tl.reshape(total, (DIM, PADDED * WIDTH))


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    keys, values, inverses, strengths, initial_steps, final_coefficients, initial_final, states,
    initial, final, deltas, errors,
    blocks, chunks, rows, per_batch, parts,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row,
    dim: tl.constexpr, width: tl.constexpr, STATES: tl.constexpr, PADDED: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, SOLVED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head, part = (program // parts).to(tl.int64), program % parts
    column, index, feature = part * WIDTH + tl.arange(0, WIDTH), tl.arange(0, ROWS), tl.arange(0, DIM)
    with_column, with_feature = column < width, feature < dim
    to_states, inside = _columns_of_states(part, dim, width, STATES, PADDED, DIM, WIDTH)
    size: tl.constexpr = STATES * dim * width

    w = tl.load(states + head * size + to_states, mask=inside, other=0.0)
    for block in range(blocks):
        own = head * blocks + block
        tl.store(initial + own * size + to_states, w, mask=inside)
        chunk, to_keys, valid = _rows_of_block(block, chunks, rows, key_chunk, key_row, ROWS)
        _, to_values, _ = _rows_of_block(block, chunks, rows, value_chunk, value_row, ROWS)
        present = valid[:, None] & with_column[None, :]
        from_keys = keys + head * key_head + to_keys[:, None] + feature[None, :]
        key = tl.load(from_keys, mask=valid[:, None] & with_feature[None, :], other=0.0).to(tl.float32)
        from_values = values + head * value_head + to_values[:, None] + column[None, :]
        value = tl.load(from_values, mask=present, other=0.0).to(tl.float32)
        inverse = tl.load(inverses + own * ROWS * ROWS + index[:, None] * ROWS + index[None, :])
        beta = tl.load(strengths + own * ROWS + index)
        base = own * chunks + chunk // per_batch * per_batch
        at_base = _load_for_states(initial_steps + base * STATES, valid, 1, STATES, PADDED)
        at_final = _load_for_states(final_coefficients + own * STATES * chunks + chunk, valid, chunks, STATES, PADDED)

        value -= _combined(tl.dot(key, w, input_precision=PRECISION), at_base)
        error = tl.dot(inverse, value, input_precision=SOLVED)
        delta = beta[:, None] * error
        to_rows = (own * chunks * rows + index)[:, None] * width + column[None, :]
        tl.store(errors + to_rows, error, mask=present)
        tl.store(deltas + to_rows, delta, mask=present)
        w = _mixed(w, initial_final + own * STATES * STATES, STATES, 1, STATES, PADDED)
        w = tl.dot(tl.trans(key), _side_by_side(delta, at_final), w, input_precision=PRECISION)
    tl.store(final + head * size + to_states, w, mask=inside)


@triton.jit
def _backward_scan_kernel(  # type: ignore[no-untyped-def]
    d_initial, d_final, d_deltas, d_errors,
    keys, inverses, strengths, initial_steps, final_coefficients, initial_final,
    d_after, d_values, d_states,
    blocks, chunks, rows, per_batch, parts,
    key_head, key_chunk, key_row,
    dim: tl.constexpr, width: tl.constexpr, STATES: tl.constexpr, PADDED: tl.constexpr,
    OF_INITIAL: tl.constexpr, OF_FINAL: tl.constexpr, OF_DELTAS: tl.constexpr, OF_ERRORS: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, SOLVED: tl.constexpr,
):  # fmt: skip
    """Gradients of the states after each block, of the values, and of the states before the first block."""
    program = tl.program_id(0)
    head, part = (program // parts).to(tl.int64), program % parts
    column, index, feature = part * WIDTH + tl.arange(0, WIDTH), tl.arange(0, ROWS), tl.arange(0, DIM)
    with_column, with_feature = column < width, feature < dim
    to_states, inside = _columns_of_states(part, dim, width, STATES, PADDED, DIM, WIDTH)
    size: tl.constexpr = STATES * dim * width

    d_w = tl.zeros((DIM, PADDED * WIDTH), tl.float32)
    if OF_FINAL:
        d_w = tl.load(d_final + head * size + to_states, mask=inside, other=0.0)
    for from_last in range(blocks):
        block = blocks - 1 - from_last
        own = head * blocks + block
        tl.store(d_after + own * size + to_states, d_w, mask=inside)
        chunk, to_keys, valid = _rows_of_block(block, chunks, rows, key_chunk, key_row, ROWS)
        present = valid[:, None] & with_column[None, :]
        from_keys = keys + head * key_head + to_keys[:, None] + feature[None, :]
        key = tl.load(from_keys, mask=valid[:, None] & with_feature[None, :], other=0.0).to(tl.float32)
        # loaded transposed
        inverse = tl.load(inverses + own * ROWS * ROWS + index[None, :] * ROWS + index[:, None])
        beta = tl.load(strengths + own * ROWS + index)
        base = own * chunks + chunk // per_batch * per_batch
        at_base = _load_for_states(initial_steps + base * STATES, valid, 1, STATES, PADDED)
        at_final = _load_for_states(final_coefficients + own * STATES * chunks + chunk, valid, chunks, STATES, PADDED)
        to_rows = (own * chunks * rows + index)[:, None] * width + column[None, :]

        d_delta = _combined(tl.dot(key, d_w, input_precision=PRECISION), at_final)
        if OF_DELTAS:
            d_delta += tl.load(d_deltas + to_rows, mask=present, other=0.0).to(tl.float32)
        d_error = beta[:, None] * d_delta
        if OF_ERRORS:
            d_error += tl.load(d_errors + to_rows, mask=present, other=0.0)
        d_value = tl.dot(inverse, d_error, input_precision=SOLVED)
        tl.store(d_values + to_rows, d_value, mask=present)
        d_w = _mixed(d_w, initial_final + own * STATES * STATES, 1, STATES, STATES, PADDED)
        if OF_INITIAL:
            d_w += tl.load(d_initial + own * size + to_states, mask=inside, other=0.0)
        d_w = tl.dot(tl.trans(key), _side_by_side(-d_value, at_base), d_w, input_precision=PRECISION)
    tl.store(d_states + head * size + to_states, d_w, mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_deltas, d_after, d_values,
    keys, steps, initial_steps, final_coefficients, initial, errors, strengths,
    d_keys, d_step_sizes, d_coefficients, d_at_base, d_at_final, d_initial_final,
    blocks, chunks, rows, per_batch, own_coefficient, scale, largest,
    key_head, key_chunk, key_row,
    dim: tl.constexpr, width: tl.constexpr, STATES: tl.constexpr, OF_DELTAS: tl.constexpr, PROXIMAL: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All other gradients; those of coefficients are still per row."""
    own = tl.program_id(0).to(tl.int64)
    head, block = own // blocks, own % blocks
    feature, index = tl.arange(0, DIM), tl.arange(0, ROWS)
    with_feature = feature < dim
    chunk, to_keys, valid = _rows_of_block(block, chunks, rows, key_chunk, key_row, ROWS)
    base = chunk // per_batch * per_batch
    with_key = valid[:, None] & with_feature[None, :]
    from_keys = keys + head * key_head + to_keys[:, None] + feature[None, :]
    key = tl.load(from_keys, mask=with_key, other=0.0).to(tl.float32)
    beta = tl.load(strengths + own * ROWS + index)
    of_state: tl.constexpr = dim * width
    first_row = own * chunks * rows
    own_row = (first_row + index)[:, None] * width

    # −dV Eᵀ is the gradient of the system (A ∘ G) diag(β)
    nothing = tl.zeros((ROWS, ROWS), tl.float32)
    d_system, d_beta = nothing, tl.zeros((ROWS,), tl.float32)
    for first_column in range(0, width, WIDTH):
        column = first_column + tl.arange(0, WIDTH)[None, :]
        present = valid[:, None] & (column < width)
        error = tl.load(errors + own_row + column, mask=present, other=0.0)
        d_value = tl.load(d_values + own_row + column, mask=present, other=0.0)
        d_system = multiply_add(d_system, -d_value, tl.trans(error), PRECISION, tl.float32)
        if OF_DELTAS:
            d_delta = tl.load(d_deltas + own_row + column, mask=present, other=0.0).to(tl.float32)
            d_beta += tl.sum(d_delta * error, axis=1)
    coefficients = _load_coefficients_of_rows(
        steps + own * chunks * chunks, chunk, base, valid, chunks, own_coefficient, ROWS
    )  # fmt: skip
    gram = multiply_add(nothing, key, tl.trans(key), PRECISION, tl.float32)
    d_beta += tl.sum(coefficients * gram * d_system, axis=0)
    d_weighted = d_system * beta[None, :]
    to_pairs = (first_row + index)[:, None] * (chunks * rows) + index[None, :]
    tl.store(d_coefficients + to_pairs, d_weighted * gram, mask=valid[:, None] & valid[None, :])
    d_gram = d_weighted * coefficients
    no_keys = tl.zeros((ROWS, DIM), tl.float32)
    d_key = multiply_add(no_keys, d_gram + tl.trans(d_gram), key, PRECISION, tl.float32)

    for k in tl.static_range(STATES):
        of_final, of_base = no_keys, no_keys
        for first_column in range(0, width, WIDTH):
            column = first_column + tl.arange(0, WIDTH)[None, :]
            present, inside = valid[:, None] & (column < width), with_feature[:, None] & (column < width)
            error = tl.load(errors + own_row + column, mask=present, other=0.0)
            d_value = tl.load(d_values + own_row + column, mask=present, other=0.0)
            to_state = (own * STATES + k) * of_state + feature[:, None] * width + column
            d_w = tl.load(d_after + to_state, mask=inside, other=0.0)
            w = tl.load(initial + to_state, mask=inside, other=0.0)
            of_final = multiply_add(of_final, error, tl.trans(d_w), PRECISION, tl.float32)
            of_base = multiply_add(of_base, d_value, tl.trans(w), PRECISION, tl.float32)
        at_final = tl.load(final_coefficients + (own * STATES + k) * chunks + chunk, mask=valid, other=0.0)
        at_base = tl.load(initial_steps + (own * chunks + base) * STATES + k, mask=valid, other=0.0)
        # the gradient of β · at_final
        d_weight = tl.sum(key * of_final, axis=1)
        d_beta += at_final * d_weight
        d_key += (at_final * beta)[:, None] * of_final - at_base[:, None] * of_base
        to_states = (first_row + index) * STATES + k
        tl.store(d_at_final + to_states, beta * d_weight, mask=valid)
        tl.store(d_at_base + to_states, -tl.sum(key * of_base, axis=1), mask=valid)

    # each feature's contribution to the gradient of the mixture of states
    for k in tl.static_range(STATES):
        for i in tl.static_range(STATES):
            total = tl.zeros((DIM,), tl.float32)
            for first_column in range(0, width, WIDTH):
                column = first_column + tl.arange(0, WIDTH)[None, :]
                inside = with_feature[:, None] & (column < width)
                to_state = feature[:, None] * width + column
                d_w = tl.load(d_after + (own * STATES + k) * of_state + to_state, mask=inside, other=0.0)
                w = tl.load(initial + (own * STATES + i) * of_state + to_state, mask=inside, other=0.0)
                total += tl.sum(d_w * w, axis=1)
            to_pair = (own * STATES * STATES + k * STATES + i) * dim + feature
            tl.store(d_initial_final + to_pair, total, mask=with_feature)

    if PROXIMAL:
        # where β is limited to largest / (own_coefficient · k²), it does not depend on the step size. The margin allows
        # for squares that were summed in another order when the limit was applied
        squared = tl.sum(key * key, axis=1)
        limited = own_coefficient * beta * squared > largest * (1 - 1e-6)
        d_key -= tl.where(limited, 2.0 * beta * d_beta / tl.where(limited, squared, 1.0), 0.0)[:, None] * key
        d_beta = tl.where(limited, 0.0, d_beta)
    tl.store(d_keys + (first_row + index)[:, None] * dim + feature[None, :], d_key, mask=with_key)
    tl.store(d_step_sizes + first_row + index, scale * d_beta, mask=valid)


def _outputs(
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    states: Tensor,
    steps: Tensor,
    initial_steps: Tensor,
    final: Tensor,
    initial_final: Tensor,
    chunks_per_batch: int,
    own_coefficient: int,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads, blocks, chunks, _ = steps.shape
    rows, width = chunks * keys.shape[2], values.shape[-1]
    padded = tile_size(rows)
    return (
        states.new_empty(heads, blocks, *states.shape[1:]),
        states.new_empty(states.shape),
        states.new_empty(heads, blocks, rows, width, dtype=operands),
        states.new_empty(heads, blocks, rows, width),
        states.new_empty(heads, blocks, padded, padded),
        states.new_empty(heads, blocks, padded),
    )


def _columns(heads: int, width: int, operands: torch.dtype) -> int:
    """Number of columns of the states that each program of a scan owns."""
    many = heads * triton.cdiv(width, MOST_COLUMNS) >= ENOUGH_PROGRAMS
    return min(tile_size(width), MOST_COLUMNS if many and operands != torch.float32 else MOST_COLUMNS // 2)


def _arguments(
    keys: Tensor,
    step_sizes: Tensor,
    steps: Tensor,
    states: Tensor,
    chunks_per_batch: int,
    own_coefficient: int,
    operands: torch.dtype,
) -> dict[str, Any]:
    """Arguments of all kernels."""
    keys = contiguous_inside(keys, 1)
    _, blocks, chunks, _ = steps.shape
    heads, count, dim, width = states.shape
    rows = keys.shape[2]
    columns, on_chip = _columns(heads, width, operands), tile_size(chunks * rows)
    precision = EXACT.value if operands == torch.float32 else 'tf32'
    return dict(
        keys=keys, **named_strides('key', keys, 'head chunk row'),
        step_sizes=step_sizes, **named_strides('step', step_sizes, 'head chunk row'),
        blocks=blocks, chunks=chunks, rows=rows, per_batch=chunks_per_batch, parts=triton.cdiv(width, columns),
        own_coefficient=float(own_coefficient), PROXIMAL=own_coefficient != 0, scale=2.0 / width, largest=LARGEST,
        dim=dim, width=width, STATES=count, PADDED=triton.next_power_of_2(count),
        DIM=tile_size(dim), ROWS=on_chip, WIDTH=columns,
        # proximal steps fill the system within each chunk, so a diagonal block must hold whole chunks
        SMALL=SMALL if own_coefficient == 0 or SMALL % rows == 0 else on_chip,
        # of all products except those that form the inverse, where rounding errors are amplified; large proximal steps
        # amplify them in products with the inverse too
        PRECISION=precision, SOLVED=EXACT.value if own_coefficient else precision,
    )  # fmt: skip


def _launch(kernel: Any, grid: int, arguments: dict[str, Any], num_warps: int = WARPS, **options: int) -> None:
    kernel[(grid,)](**taken_by(kernel, arguments), num_warps=num_warps, **options)


def _forward(
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    states: Tensor,
    steps: Tensor,
    initial_steps: Tensor,
    final: Tensor,
    initial_final: Tensor,
    chunks_per_batch: int,
    own_coefficient: int,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = keys, values, step_sizes, states, steps, initial_steps, final, initial_final
    outputs = _outputs(*given, chunks_per_batch, own_coefficient, operands)
    names = ('initial', 'final', 'deltas', 'errors', 'inverses', 'strengths')
    values = contiguous_inside(values, 1)
    arguments = _arguments(keys, step_sizes, steps, states, chunks_per_batch, own_coefficient, operands) | dict(
        zip(names, outputs),
        values=values, **named_strides('value', values, 'head chunk row'), states=states.contiguous(),
        steps=steps.contiguous(), initial_steps=initial_steps.contiguous(),
        final_coefficients=final.contiguous(), initial_final=initial_final.contiguous(),
    )  # fmt: skip
    heads, blocks = steps.shape[:2]
    _launch(_inverse_kernel, heads * blocks, arguments)
    _launch(_forward_kernel, heads * arguments['parts'], arguments)
    return outputs


def _backward(
    d_initial: Tensor | None,
    d_final: Tensor | None,
    d_deltas: Tensor | None,
    d_errors: Tensor | None,
    initial: Tensor,
    errors: Tensor,
    inverses: Tensor,
    strengths: Tensor,
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    states: Tensor,
    steps: Tensor,
    initial_steps: Tensor,
    final: Tensor,
    initial_final: Tensor,
    chunks_per_batch: int,
    own_coefficient: int,
    operands: torch.dtype,
) -> tuple[Tensor, ...]:
    heads, blocks, chunks, _ = steps.shape
    rows, count, dim = keys.shape[2], *states.shape[1:3]
    of_rows = (heads, blocks, chunks * rows)
    incoming = {
        'd_initial': ('OF_INITIAL', d_initial),
        'd_final': ('OF_FINAL', d_final),
        'd_deltas': ('OF_DELTAS', d_deltas),
        'd_errors': ('OF_ERRORS', d_errors),
    }
    results = {
        'd_after': states.new_empty(initial.shape),
        'd_states': states.new_empty(states.shape),
        'd_keys': states.new_empty(*keys.shape[:-1], dim),
        'd_values': states.new_empty(values.shape),
        'd_step_sizes': states.new_empty(step_sizes.shape),
        'd_coefficients': states.new_empty(*of_rows, chunks * rows),
        'd_at_base': states.new_empty(*of_rows, count),
        'd_at_final': states.new_empty(*of_rows, count),
        'd_initial_final': states.new_empty(*initial_final.shape, dim),
    }
    arguments = (
        _arguments(keys, step_sizes, steps, states, chunks_per_batch, own_coefficient, operands)
        | {name: states.new_empty(0) if d is None else d.contiguous() for name, (_, d) in incoming.items()}
        | {flag: d is not None for flag, d in incoming.values()}
        | results
        | dict(
            initial=initial, errors=errors, inverses=inverses, strengths=strengths,
            steps=steps.contiguous(), initial_steps=initial_steps.contiguous(),
            final_coefficients=final.contiguous(), initial_final=initial_final.contiguous(),
        )
    )  # fmt: skip
    _launch(_backward_scan_kernel, heads * arguments['parts'], arguments)
    columns = min(tile_size(values.shape[-1]), MOST_COLUMNS)
    _launch(_backward_kernel, heads * blocks, arguments | dict(WIDTH=columns), **GRADIENTS)

    # sum rows over chunks, and, for base weights, move the result to the first chunk of each memory batch
    def sum_over_rows(gradient: Tensor, dim: int) -> Tensor:
        return gradient.unflatten(dim, (chunks, rows)).sum(dim=dim + 1)

    def at_first_chunk(gradient: Tensor) -> Tensor:
        batches = gradient.unflatten(2, (-1, chunks_per_batch))
        first = batches.sum(dim=3, keepdim=True)
        return torch.nn.functional.pad(first, (0, 0, 0, chunks_per_batch - 1)).flatten(2, 3)

    d_steps, d_initial_steps = results['d_coefficients'], results['d_at_base']
    if rows > 1:
        d_steps = sum_over_rows(sum_over_rows(d_steps, 3), 2)
        d_initial_steps = sum_over_rows(d_initial_steps, 2)
    if chunks_per_batch > 1:
        d_steps, d_initial_steps = at_first_chunk(d_steps), at_first_chunk(d_initial_steps)
    return (
        results['d_keys'].to(keys.dtype),
        results['d_values'].to(values.dtype),
        results['d_step_sizes'].to(step_sizes.dtype),
        results['d_states'],
        d_steps,
        d_initial_steps,
        sum_over_rows(results['d_at_final'], 2).mT.contiguous(),
        results['d_initial_final'].sum(dim=-1),
    )


linear_memory_scan = register_kernel(
    'linear_memory_scan',
    _forward,
    _backward,
    outputs=_outputs,
    saved=(0, 3, 4, 5),
    not_differentiable=(4, 5),
    # only surprises use the errors
    materialize_grads=False,
)
