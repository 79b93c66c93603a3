"""Kernels of retrieval over a sequence.

Forward, a program owns some query rows of a block of chunks. Their scores with the stored rows of earlier chunks, of
which one tile is on chip at a time, are written to memory for the program to read again, as is each block of hidden
features. Backward, one kernel owns query rows (whole chunks or parts of one), a second owns stored rows, and a third
owns hidden features of an initial state. Sums over pairs of chunks are formed tile by tile, in a fixed order.

With G the gradient of x W_i, P = x Xᵀ and D = G Δᵀ, both for each row and stored row, the gradients of a matrix are

    x: Σ_k c_k · G initial_kᵀ + (D ∘ coefficients) X    initial_k: Σ_i c[i, k] · xᵀ G    c_k: ⟨x initial_k, G⟩
    X: (D ∘ coefficients)ᵀ x    Δ: (P ∘ coefficients)ᵀ G    coefficients: Σ over rows of D ∘ P

with c the initial coefficients. A barrier separates a program's reads from its own earlier writes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import (
    contiguous_inside,
    gelu_derivative,
    multiply_add,
    named_strides,
    normal_cdf,
    product_precision,
    project_out,
    standardize,
    taken_by,
    tile_size,
)
from titans_pytorch.ops.inner_gradient.triton import block_of_rows, sum_rows_of_chunks


class Tiles(NamedTuple):
    """How a kernel splits its work."""

    rows: int
    """Query rows at a time."""
    stored: int
    """Stored rows at a time."""
    units: int
    """Hidden features at a time."""
    warps: int
    stages: int = 2

    def options(self) -> dict[str, Any]:
        return {'num_warps': self.warps, 'num_stages': self.stages}


# for each kernel, in the precision of tensor cores and in full float32, where products take twice the registers. With
# fewer than 64 rows, Triton uses the older tensor-core instructions, which can read matrices in either orientation
FORWARD = (Tiles(64, 64, 64, 4, 3), Tiles(32, 32, 32, 4))
QUERIES = (Tiles(64, 64, 32, 4, 3), Tiles(32, 32, 32, 4))
STORED = (Tiles(32, 64, 64, 4), Tiles(32, 32, 32, 4))
INITIAL = (Tiles(32, 64, 64, 4, 3), Tiles(32, 32, 32, 4))
# if there would be fewer programs of 64 rows than this, each gets 32
ENOUGH_PROGRAMS = 256


@triton.jit
def _within(index, size, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """True where an index is below `size`; True everywhere if blocks are WHOLE, so that the compiler drops the mask."""
    if WHOLE:
        within = tl.full(index.shape, 1, tl.int1)
    else:
        within = index < size
    return within


@triton.jit
def _own_rows(  # type: ignore[no-untyped-def]
    block, parts, chunks, rows: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr
):
    """Rows of a block of whole chunks, or of part of a chunk: their chunks, offsets and masks."""
    index = tl.arange(0, CHUNKS * ROWS)
    if ROWS == rows:
        # written so that the compiler sees that the offsets are consecutive
        offset = block * (CHUNKS * ROWS) + index
        chunk, valid = offset // rows, _within(offset, chunks * rows, WHOLE)
    else:
        chunk = (block // parts) * CHUNKS + index // ROWS
        row = (block % parts) * ROWS + index % ROWS
        offset, valid = chunk * rows + row, _within(chunk, chunks, WHOLE) & _within(row, rows, WHOLE)
    return chunk, offset, valid


@triton.jit
def _sum_rows_of_pairs(  # type: ignore[no-untyped-def]
    of_rows, CHUNKS: tl.constexpr, ROWS: tl.constexpr, STORED_CHUNKS: tl.constexpr, STORED_ROWS: tl.constexpr
):
    """Sums over all pairs of rows for each pair of chunks."""
    summed = of_rows
    if STORED_ROWS > 1:
        summed = tl.sum(tl.reshape(summed, (CHUNKS * ROWS, STORED_CHUNKS, STORED_ROWS)), axis=2)
    return sum_rows_of_chunks(summed, CHUNKS, ROWS, STORED_CHUNKS)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    queries, coefficients, initial_coefficients,
    first_initial, first_inputs, first_deltas, last_initial, last_inputs, last_deltas, gamma,
    out, product, hidden, activations, first_scores, last_scores,
    blocks, chunk_blocks, chunks, eps,
    query_head, query_block, query_chunk, query_row,
    coefficient_head, coefficient_block, coefficient_chunk, coefficient_other,
    initial_head, initial_block, initial_chunk, initial_state,
    first_initial_head, first_initial_block, first_initial_state, first_input_head, first_input_block, first_input_row,
    first_delta_head, first_delta_block, first_delta_row,
    last_initial_head, last_initial_block, last_initial_state, last_input_head, last_input_block, last_input_row,
    last_delta_head, last_delta_block, last_delta_row,
    gamma_head, gamma_block, gamma_chunk,
    dim: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, stored: tl.constexpr,
    STATES: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, STORED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program % blocks
    head_block = (program // blocks).to(tl.int64)
    head, chunk_block = head_block // chunk_blocks, head_block % chunk_blocks
    offset = block * ROWS + tl.arange(0, ROWS)
    chunk, valid = offset // rows, _within(offset, chunks * rows, WHOLE)
    feature = tl.arange(0, DIM)
    has_feature = _within(feature, dim, dim == DIM)
    inside = valid[:, None] & has_feature[None, :]
    start, longest = head_block * chunks * rows, chunks * stored
    features = offset[:, None] * dim + feature[None, :]

    queries += head * query_head + chunk_block * query_block
    coefficients += head * coefficient_head + chunk_block * coefficient_block + chunk[:, None] * coefficient_chunk
    initial_coefficients += head * initial_head + chunk_block * initial_block
    initial_coefficients += chunk * initial_chunk
    first_initial += head * first_initial_head + chunk_block * first_initial_block
    first_inputs += head * first_input_head + chunk_block * first_input_block
    first_deltas += head * first_delta_head + chunk_block * first_delta_block
    last_initial += head * last_initial_head + chunk_block * last_initial_block
    last_inputs += head * last_input_head + chunk_block * last_input_block
    last_deltas += head * last_delta_head + chunk_block * last_delta_block
    gamma += head * gamma_head + chunk_block * gamma_block
    hidden += start * width
    activations += start * width
    first_scores += start * longest
    last_scores += start * longest

    # blocks of stored rows that begin before the last chunk of these queries
    last = tl.minimum((block + 1) * ROWS, chunks * rows) - 1
    num_tiles = tl.cdiv((last // rows) * stored, STORED)
    from_queries = queries + (chunk * query_chunk + (offset % rows) * query_row)[:, None] + feature[None, :]
    q = tl.load(from_queries, mask=inside, other=0.0).to(OPERAND)
    nothing = tl.zeros((ROWS, STORED), tl.float32)
    y = tl.zeros((ROWS, DIM), tl.float32)

    if HIDDEN:
        for other in range(0, num_tiles):
            index = other * STORED + tl.arange(0, STORED)
            stored_valid = _within(index, longest, WHOLE)
            pair = valid[:, None] & stored_valid[None, :]
            below = pair & ((index // stored)[None, :] < chunk[:, None])
            # the right operand is loaded transposed, with rows across
            from_inputs = first_inputs + index[None, :] * first_input_row + feature[:, None]
            x = tl.load(from_inputs, mask=stored_valid[None, :] & has_feature[:, None], other=0.0)
            s = multiply_add(nothing, q, x, PRECISION, OPERAND)
            s *= tl.load(coefficients + (index // stored)[None, :] * coefficient_other, mask=below, other=0.0)
            tl.store(first_scores + offset[:, None] * longest + index[None, :], s, mask=pair)
        tl.debug_barrier()

        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            has_unit = _within(unit, width, width % BLOCK == 0)
            present = valid[:, None] & has_unit[None, :]
            h = tl.zeros((ROWS, BLOCK), tl.float32)
            for k in range(0, STATES):
                from_initial = first_initial + k * first_initial_state + feature[:, None] * width + unit[None, :]
                w = tl.load(from_initial, mask=has_feature[:, None] & has_unit[None, :], other=0.0)
                coefficient = tl.load(initial_coefficients + k * initial_state, mask=valid, other=0.0)[:, None]
                h += coefficient * multiply_add(tl.zeros((ROWS, BLOCK), tl.float32), q, w, PRECISION, OPERAND)
            for other in range(0, num_tiles):
                index = other * STORED + tl.arange(0, STORED)
                stored_valid = _within(index, longest, WHOLE)
                pair = valid[:, None] & stored_valid[None, :]
                s = tl.load(first_scores + offset[:, None] * longest + index[None, :], mask=pair, other=0.0)
                from_deltas = first_deltas + index[:, None] * first_delta_row + unit[None, :]
                delta = tl.load(from_deltas, mask=stored_valid[:, None] & has_unit[None, :], other=0.0)
                h = multiply_add(h, s, delta, PRECISION, OPERAND)
            units = offset[:, None] * width + unit[None, :]
            tl.store(hidden + units, h, mask=present)
            a = (h * normal_cdf(h)).to(OPERAND)
            tl.store(activations + units, a, mask=present)
            for k in range(0, STATES):
                from_initial = last_initial + k * last_initial_state + unit[:, None] * dim + feature[None, :]
                w = tl.load(from_initial, mask=has_unit[:, None] & has_feature[None, :], other=0.0)
                coefficient = tl.load(initial_coefficients + k * initial_state, mask=valid, other=0.0)[:, None]
                y += coefficient * multiply_add(tl.zeros((ROWS, DIM), tl.float32), a, w, PRECISION, OPERAND)
        tl.debug_barrier()
    else:
        for k in range(0, STATES):
            from_initial = last_initial + k * last_initial_state + feature[:, None] * dim + feature[None, :]
            w = tl.load(from_initial, mask=has_feature[:, None] & has_feature[None, :], other=0.0)
            coefficient = tl.load(initial_coefficients + k * initial_state, mask=valid, other=0.0)[:, None]
            y += coefficient * multiply_add(tl.zeros((ROWS, DIM), tl.float32), q, w, PRECISION, OPERAND)

    for other in range(0, num_tiles):
        index = other * STORED + tl.arange(0, STORED)
        stored_valid = _within(index, longest, WHOLE)
        pair = valid[:, None] & stored_valid[None, :]
        below = pair & ((index // stored)[None, :] < chunk[:, None])
        s = nothing
        if HIDDEN:
            for first_unit in range(0, width, BLOCK):
                unit = first_unit + tl.arange(0, BLOCK)
                has_unit = _within(unit, width, width % BLOCK == 0)
                present = valid[:, None] & has_unit[None, :]
                a = tl.load(activations + offset[:, None] * width + unit[None, :], mask=present, other=0.0)
                from_inputs = last_inputs + index[None, :] * last_input_row + unit[:, None]
                x = tl.load(from_inputs, mask=stored_valid[None, :] & has_unit[:, None], other=0.0)
                s = multiply_add(s, a, x, PRECISION, OPERAND)
        else:
            from_inputs = last_inputs + index[None, :] * last_input_row + feature[:, None]
            x = tl.load(from_inputs, mask=stored_valid[None, :] & has_feature[:, None], other=0.0)
            s = multiply_add(s, q, x, PRECISION, OPERAND)
        tl.store(last_scores + offset[:, None] * longest + index[None, :], s, mask=pair)
        s *= tl.load(coefficients + (index // stored)[None, :] * coefficient_other, mask=below, other=0.0)
        from_deltas = last_deltas + index[:, None] * last_delta_row + feature[None, :]
        delta = tl.load(from_deltas, mask=stored_valid[:, None] & has_feature[None, :], other=0.0)
        y = multiply_add(y, s, delta, PRECISION, OPERAND)

    if NORM:
        tl.store(product + start * dim + features, y, mask=inside)
        normal, _ = standardize(y, inside, eps, dim)
        gain = 1.0 + tl.load(gamma + (chunk * gamma_chunk)[:, None] + feature[None, :], mask=inside, other=0.0)
        y = normal * gain + tl.load(from_queries, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start * dim + features, y, mask=inside)


@triton.jit
def _queries_kernel(  # type: ignore[no-untyped-def]
    d_out, product, hidden, last_scores,
    queries, coefficients, initial_coefficients,
    first_initial, first_inputs, first_deltas, last_initial, last_inputs, last_deltas, gamma,
    d_queries, d_coefficients, d_initial_coefficients, d_gamma,
    d_product, d_hidden, activations, d_first_scores, d_last_scores,
    blocks, parts, stored_parts, chunk_blocks, chunks, eps,
    query_head, query_block, query_chunk, query_row,
    coefficient_head, coefficient_block, coefficient_chunk, coefficient_other,
    initial_head, initial_block, initial_chunk, initial_state,
    first_initial_head, first_initial_block, first_initial_state, first_input_head, first_input_block, first_input_row,
    first_delta_head, first_delta_block, first_delta_row,
    last_initial_head, last_initial_block, last_initial_state, last_input_head, last_input_block, last_input_row,
    last_delta_head, last_delta_block, last_delta_row,
    gamma_head, gamma_block, gamma_chunk,
    dim: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, stored: tl.constexpr,
    STATES: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, STORED_CHUNKS: tl.constexpr, STORED_ROWS: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, of both coefficients and of γ. For the kernels that follow, also the gradients of the
    products y and h and of the mixed scores, and a."""
    OWN: tl.constexpr = CHUNKS * ROWS
    OTHERS: tl.constexpr = STORED_CHUNKS * STORED_ROWS
    program = tl.program_id(0)
    block = program % blocks
    head_block = (program // blocks).to(tl.int64)
    head, chunk_block = head_block // chunk_blocks, head_block % chunk_blocks
    chunk, offset, valid = _own_rows(block, parts, chunks, rows, CHUNKS, ROWS, WHOLE)
    own_chunk = (block // parts) * CHUNKS + tl.arange(0, CHUNKS)
    feature = tl.arange(0, DIM)
    has_feature = _within(feature, dim, dim == DIM)
    inside = valid[:, None] & has_feature[None, :]
    start, longest = head_block * chunks * rows, chunks * stored
    features = offset[:, None] * dim + feature[None, :]

    queries += head * query_head + chunk_block * query_block
    coefficients += head * coefficient_head + chunk_block * coefficient_block + chunk[:, None] * coefficient_chunk
    initial_coefficients += head * initial_head + chunk_block * initial_block
    initial_coefficients += chunk * initial_chunk
    first_initial += head * first_initial_head + chunk_block * first_initial_block
    first_inputs += head * first_input_head + chunk_block * first_input_block
    first_deltas += head * first_delta_head + chunk_block * first_delta_block
    last_initial += head * last_initial_head + chunk_block * last_initial_block
    last_inputs += head * last_input_head + chunk_block * last_input_block
    last_deltas += head * last_delta_head + chunk_block * last_delta_block
    gamma += head * gamma_head + chunk_block * gamma_block
    hidden += start * width
    d_hidden += start * width
    activations += start * width
    last_scores += start * longest
    d_first_scores += start * longest
    d_last_scores += start * longest
    # each pair of parts has its own matrix
    d_coefficients += (head_block * parts + block % parts) * stored_parts * chunks * chunks

    last = tl.minimum((block // parts + 1) * CHUNKS, chunks) - 1
    num_tiles = tl.cdiv(last, STORED_CHUNKS) * stored_parts
    from_queries = queries + (chunk * query_chunk + (offset - chunk * rows) * query_row)[:, None] + feature[None, :]
    d_q = tl.zeros((OWN, DIM), tl.float32)
    d_y = tl.load(d_out + start * dim + features, mask=inside, other=0.0).to(tl.float32)

    # out = x̂ ∘ (1 + γ) + q, x̂ = (y − mean y) · r
    if NORM:
        y = tl.load(product + start * dim + features, mask=inside, other=0.0)
        normal, inverse = standardize(y, inside, eps, dim)
        of_gamma = sum_rows_of_chunks(d_y * normal, CHUNKS, ROWS, DIM)
        of_part = ((head_block * parts + block % parts) * chunks + own_chunk)[:, None]
        to_gamma = d_gamma + of_part * dim + feature[None, :]
        tl.store(to_gamma, of_gamma, mask=(own_chunk < chunks)[:, None] & has_feature[None, :])
        d_q = d_y
        gain = 1.0 + tl.load(gamma + (chunk * gamma_chunk)[:, None] + feature[None, :], mask=inside, other=0.0)
        d_y = inverse * project_out(d_y * gain, normal, inside, dim)
    d_y = d_y.to(OPERAND)
    tl.store(d_product + start * dim + features, d_y, mask=inside)

    q = tl.load(from_queries, mask=inside, other=0.0).to(tl.float32)
    state = tl.arange(0, PADDED)[None, :]
    of_initial_coefficients = tl.zeros((OWN, PADDED), tl.float32)
    nothing = tl.zeros((OWN, OTHERS), tl.float32)

    # D = G Δᵀ of the last matrix
    for other in range(0, num_tiles):
        stored_chunk, index, stored_valid = _own_rows(
            other, stored_parts, chunks, stored, STORED_CHUNKS, STORED_ROWS, WHOLE
        )
        pair = valid[:, None] & stored_valid[None, :]
        below = pair & (stored_chunk[None, :] < chunk[:, None])
        from_deltas = last_deltas + index[None, :] * last_delta_row + feature[:, None]
        delta = tl.load(from_deltas, mask=stored_valid[None, :] & has_feature[:, None], other=0.0)
        of_scores = multiply_add(nothing, d_y, delta, PRECISION, OPERAND)
        scores = offset[:, None] * longest + index[None, :]
        p = tl.load(last_scores + scores, mask=below, other=0.0).to(tl.float32)
        of_coefficients = _sum_rows_of_pairs(of_scores * p, CHUNKS, ROWS, STORED_CHUNKS, STORED_ROWS)
        other_chunk = (other // stored_parts) * STORED_CHUNKS + tl.arange(0, STORED_CHUNKS)
        pair_of_chunks = own_chunk[:, None] * chunks + other_chunk[None, :]
        to_coefficients = d_coefficients + (other % stored_parts) * chunks * chunks + pair_of_chunks
        tl.store(to_coefficients, of_coefficients, mask=(own_chunk < chunks)[:, None] & (other_chunk < chunks)[None, :])
        of_scores *= tl.load(coefficients + stored_chunk[None, :] * coefficient_other, mask=below, other=0.0)
        tl.store(d_last_scores + scores, of_scores, mask=pair)
        if not HIDDEN:
            from_inputs = last_inputs + index[:, None] * last_input_row + feature[None, :]
            x = tl.load(from_inputs, mask=stored_valid[:, None] & has_feature[None, :], other=0.0)
            d_q = multiply_add(d_q, of_scores, x, PRECISION, OPERAND)

    if HIDDEN:
        tl.debug_barrier()
        upcoming = block_of_rows(hidden, offset * width, 1, 0, valid, width, BLOCK)
        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            has_unit = _within(unit, width, width % BLOCK == 0)
            units, present = offset[:, None] * width + unit[None, :], valid[:, None] & has_unit[None, :]
            d_a = tl.zeros((OWN, BLOCK), tl.float32)
            for other in range(0, num_tiles):
                _, index, stored_valid = _own_rows(
                    other, stored_parts, chunks, stored, STORED_CHUNKS, STORED_ROWS, WHOLE
                )
                pair = valid[:, None] & stored_valid[None, :]
                g = tl.load(d_last_scores + offset[:, None] * longest + index[None, :], mask=pair, other=0.0)
                from_inputs = last_inputs + index[:, None] * last_input_row + unit[None, :]
                x = tl.load(from_inputs, mask=stored_valid[:, None] & has_unit[None, :], other=0.0)
                d_a = multiply_add(d_a, g, x, PRECISION, OPERAND)
            h = upcoming.to(tl.float32)
            upcoming = block_of_rows(hidden, offset * width, 1, first_unit + BLOCK, valid, width, BLOCK)
            a = h * normal_cdf(h)
            tl.store(activations + units, a, mask=present)
            for k in range(0, STATES):
                from_initial = last_initial + k * last_initial_state + unit[None, :] * dim + feature[:, None]
                w = tl.load(from_initial, mask=has_unit[None, :] & has_feature[:, None], other=0.0)
                through = multiply_add(tl.zeros((OWN, BLOCK), tl.float32), d_y, w, PRECISION, OPERAND)
                of_initial_coefficients += tl.where(state == k, tl.sum(through * a, axis=1)[:, None], 0.0)
                d_a += tl.load(initial_coefficients + k * initial_state, mask=valid, other=0.0)[:, None] * through
            of_h = (d_a * gelu_derivative(h)).to(OPERAND)
            tl.store(d_hidden + units, of_h, mask=present)
            for k in range(0, STATES):
                from_initial = first_initial + k * first_initial_state + feature[None, :] * width + unit[:, None]
                w = tl.load(from_initial, mask=has_feature[None, :] & has_unit[:, None], other=0.0)
                through = multiply_add(tl.zeros((OWN, DIM), tl.float32), of_h, w, PRECISION, OPERAND)
                of_initial_coefficients += tl.where(state == k, tl.sum(through * q, axis=1)[:, None], 0.0)
                d_q += tl.load(initial_coefficients + k * initial_state, mask=valid, other=0.0)[:, None] * through
        tl.debug_barrier()

        # D and P of the first matrix
        for other in range(0, num_tiles):
            stored_chunk, index, stored_valid = _own_rows(
                other, stored_parts, chunks, stored, STORED_CHUNKS, STORED_ROWS, WHOLE
            )
            pair = valid[:, None] & stored_valid[None, :]
            below = pair & (stored_chunk[None, :] < chunk[:, None])
            of_scores = nothing
            for first_unit in range(0, width, BLOCK):
                unit = first_unit + tl.arange(0, BLOCK)
                has_unit = _within(unit, width, width % BLOCK == 0)
                units, present = offset[:, None] * width + unit[None, :], valid[:, None] & has_unit[None, :]
                of_h = tl.load(d_hidden + units, mask=present, other=0.0)
                from_deltas = first_deltas + index[None, :] * first_delta_row + unit[:, None]
                delta = tl.load(from_deltas, mask=stored_valid[None, :] & has_unit[:, None], other=0.0)
                of_scores = multiply_add(of_scores, of_h, delta, PRECISION, OPERAND)
            from_inputs = first_inputs + index[None, :] * first_input_row + feature[:, None]
            x = tl.load(from_inputs, mask=stored_valid[None, :] & has_feature[:, None], other=0.0)
            p = tl.where(below, multiply_add(nothing, q, x, PRECISION, OPERAND), 0.0)
            of_coefficients = _sum_rows_of_pairs(of_scores * p, CHUNKS, ROWS, STORED_CHUNKS, STORED_ROWS)
            other_chunk = (other // stored_parts) * STORED_CHUNKS + tl.arange(0, STORED_CHUNKS)
            pair_of_chunks = own_chunk[:, None] * chunks + other_chunk[None, :]
            to_coefficients = (other % stored_parts) * chunks * chunks + pair_of_chunks
            both = (own_chunk < chunks)[:, None] & (other_chunk < chunks)[None, :]
            # added to that of the last matrix
            of_coefficients += tl.load(d_coefficients + to_coefficients, mask=both, other=0.0)
            tl.store(d_coefficients + to_coefficients, of_coefficients, mask=both)
            of_scores *= tl.load(coefficients + stored_chunk[None, :] * coefficient_other, mask=below, other=0.0)
            tl.store(d_first_scores + offset[:, None] * longest + index[None, :], of_scores, mask=pair)
            from_inputs = first_inputs + index[:, None] * first_input_row + feature[None, :]
            x = tl.load(from_inputs, mask=stored_valid[:, None] & has_feature[None, :], other=0.0)
            d_q = multiply_add(d_q, of_scores, x, PRECISION, OPERAND)
    else:
        for k in range(0, STATES):
            from_initial = last_initial + k * last_initial_state + feature[None, :] * dim + feature[:, None]
            w = tl.load(from_initial, mask=has_feature[:, None] & has_feature[None, :], other=0.0)
            through = multiply_add(tl.zeros((OWN, DIM), tl.float32), d_y, w, PRECISION, OPERAND)
            of_initial_coefficients += tl.where(state == k, tl.sum(through * q, axis=1)[:, None], 0.0)
            d_q += tl.load(initial_coefficients + k * initial_state, mask=valid, other=0.0)[:, None] * through

    tl.store(d_queries + start * dim + features, d_q, mask=inside)
    of_part = ((head_block * parts + block % parts) * chunks + own_chunk)[:, None]
    to_initial_coefficients = d_initial_coefficients + of_part * STATES + state
    summed = sum_rows_of_chunks(of_initial_coefficients, CHUNKS, ROWS, PADDED)
    tl.store(to_initial_coefficients, summed, mask=(own_chunk < chunks)[:, None] & (state < STATES))


@triton.jit
def _stored_kernel(  # type: ignore[no-untyped-def]
    queries, coefficients, d_product, d_hidden, activations, first_scores, last_scores, d_first_scores, d_last_scores,
    d_first_inputs, d_first_deltas, d_last_inputs, d_last_deltas,
    blocks, pieces, chunk_blocks, chunks,
    query_head, query_block, query_chunk, query_row,
    coefficient_head, coefficient_block, coefficient_chunk, coefficient_other,
    dim: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, stored: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, STORED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Gradients of stored rows, which are sums over the rows of later chunks. Each program owns some hidden features of
    a block's last inputs and first deltas, except the last program, which owns the first inputs and the last deltas."""
    program = tl.program_id(0)
    piece, block = program % pieces, program // pieces % blocks
    head_block = (program // (pieces * blocks)).to(tl.int64)
    head, chunk_block = head_block // chunk_blocks, head_block % chunk_blocks
    index = block * STORED + tl.arange(0, STORED)
    stored_chunk, stored_valid = index // stored, _within(index, chunks * stored, WHOLE)
    start, longest, end = head_block * chunks * rows, chunks * stored, chunks * rows
    feature = tl.arange(0, DIM)
    has_feature = _within(feature, dim, dim == DIM)
    coefficients += head * coefficient_head + chunk_block * coefficient_block
    queries += head * query_head + chunk_block * query_block
    d_product += start * dim
    d_hidden += start * width
    activations += start * width
    first_scores += start * longest
    last_scores += start * longest
    d_first_scores += start * longest
    d_last_scores += start * longest
    d_first_inputs += head_block * longest * dim
    d_first_deltas += head_block * longest * width
    d_last_inputs += head_block * longest * width
    d_last_deltas += head_block * longest * dim
    # start with the block that contains the chunk after the first of these rows
    first_row = (block * STORED // stored + 1) * rows // ROWS * ROWS

    if HIDDEN and piece < pieces - 1:
        unit = piece * BLOCK + tl.arange(0, BLOCK)
        has_unit = _within(unit, width, width % BLOCK == 0)
        of_inputs = tl.zeros((STORED, BLOCK), tl.float32)
        of_first_deltas = tl.zeros((STORED, BLOCK), tl.float32)
        for at in range(first_row, end, ROWS):
            offset = at + tl.arange(0, ROWS)
            # the left operand is loaded transposed
            valid = _within(offset, end, WHOLE)
            below = stored_valid[:, None] & valid[None, :] & (stored_chunk[:, None] < (offset // rows)[None, :])
            scores = offset[None, :] * longest + index[:, None]
            present = valid[:, None] & has_unit[None, :]
            units = offset[:, None] * width + unit[None, :]
            g = tl.load(d_last_scores + scores, mask=below, other=0.0)
            a = tl.load(activations + units, mask=present, other=0.0)
            of_inputs = multiply_add(of_inputs, g, a, PRECISION, OPERAND)
            s = tl.load(first_scores + scores, mask=below, other=0.0)
            of_h = tl.load(d_hidden + units, mask=present, other=0.0)
            of_first_deltas = multiply_add(of_first_deltas, s, of_h, PRECISION, OPERAND)
        to_units, in_block = index[:, None] * width + unit[None, :], stored_valid[:, None] & has_unit[None, :]
        tl.store(d_last_inputs + to_units, of_inputs, mask=in_block)
        tl.store(d_first_deltas + to_units, of_first_deltas, mask=in_block)
    else:
        of_rows = tl.zeros((STORED, DIM), tl.float32)
        of_last_deltas = tl.zeros((STORED, DIM), tl.float32)
        for at in range(first_row, end, ROWS):
            offset = at + tl.arange(0, ROWS)
            chunk, row, valid = offset // rows, offset % rows, _within(offset, end, WHOLE)
            below = stored_valid[:, None] & valid[None, :] & (stored_chunk[:, None] < chunk[None, :])
            scores = offset[None, :] * longest + index[:, None]
            inside = valid[:, None] & has_feature[None, :]
            features = offset[:, None] * dim + feature[None, :]
            s = tl.load(last_scores + scores, mask=below, other=0.0).to(tl.float32)
            from_coefficients = coefficients + chunk[None, :] * coefficient_chunk
            s *= tl.load(from_coefficients + stored_chunk[:, None] * coefficient_other, mask=below, other=0.0)
            d_y = tl.load(d_product + features, mask=inside, other=0.0)
            of_last_deltas = multiply_add(of_last_deltas, s, d_y, PRECISION, OPERAND)
            if HIDDEN:
                g = tl.load(d_first_scores + scores, mask=below, other=0.0)
            else:
                g = tl.load(d_last_scores + scores, mask=below, other=0.0)
            from_queries = queries + (chunk * query_chunk + row * query_row)[:, None] + feature[None, :]
            q = tl.load(from_queries, mask=inside, other=0.0)
            of_rows = multiply_add(of_rows, g, q, PRECISION, OPERAND)
        to_features, both = index[:, None] * dim + feature[None, :], stored_valid[:, None] & has_feature[None, :]
        tl.store(d_last_deltas + to_features, of_last_deltas, mask=both)
        if HIDDEN:
            tl.store(d_first_inputs + to_features, of_rows, mask=both)
        else:
            tl.store(d_last_inputs + to_features, of_rows, mask=both)


@triton.jit
def _initial_kernel(  # type: ignore[no-untyped-def]
    queries, initial_coefficients, d_product, d_hidden, activations, d_first_initial, d_last_initial,
    blocks, chunk_blocks, chunks,
    query_head, query_block, query_chunk, query_row,
    initial_head, initial_block, initial_chunk, initial_state,
    dim: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, STATES: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Gradients of initial states. A program owns a block of hidden features of one state: columns of the first matrix,
    transposed, and rows of the last."""
    program = tl.program_id(0)
    # programs that read the same rows are next to each other
    k, block = program % STATES, program // STATES % blocks
    head_block = (program // (STATES * blocks)).to(tl.int64)
    head, chunk_block = head_block // chunk_blocks, head_block % chunk_blocks
    unit = block * BLOCK + tl.arange(0, BLOCK)
    has_unit = _within(unit, width, width % BLOCK == 0)
    feature = tl.arange(0, DIM)
    has_feature = _within(feature, dim, dim == DIM)
    start = head_block * chunks * rows
    queries += head * query_head + chunk_block * query_block
    initial_coefficients += head * initial_head + chunk_block * initial_block
    initial_coefficients += k * initial_state
    d_product += start * dim
    d_hidden += start * width
    activations += start * width
    d_first_initial += (head_block * STATES + k) * dim * width
    d_last_initial += (head_block * STATES + k) * dim * width

    of_first = tl.zeros((BLOCK, DIM), tl.float32)
    of_last = tl.zeros((BLOCK, DIM), tl.float32)
    for at in range(0, chunks * rows, ROWS):
        offset = at + tl.arange(0, ROWS)
        chunk, row, valid = offset // rows, offset % rows, _within(offset, chunks * rows, WHOLE)
        inside = valid[:, None] & has_feature[None, :]
        across = valid[None, :] & has_unit[:, None]
        coefficient = tl.load(initial_coefficients + chunk * initial_chunk, mask=valid, other=0.0)[:, None]
        d_y = tl.load(d_product + offset[:, None] * dim + feature[None, :], mask=inside, other=0.0)
        from_queries = queries + chunk * query_chunk + row * query_row
        if HIDDEN:
            units = offset[None, :] * width + unit[:, None]
            a = tl.load(activations + units, mask=across, other=0.0)
            of_h = tl.load(d_hidden + units, mask=across, other=0.0)
            q = tl.load(from_queries[:, None] + feature[None, :], mask=inside, other=0.0)
            of_first = multiply_add(of_first, of_h, coefficient * q.to(tl.float32), PRECISION, OPERAND)
        else:
            a = tl.load(from_queries[None, :] + unit[:, None], mask=across, other=0.0)
        of_last = multiply_add(of_last, a, coefficient * d_y.to(tl.float32), PRECISION, OPERAND)

    both = has_unit[:, None] & has_feature[None, :]
    tl.store(d_last_initial + unit[:, None] * dim + feature[None, :], of_last, mask=both)
    if HIDDEN:
        tl.store(d_first_initial + feature[None, :] * width + unit[:, None], of_first, mask=both)


def _outputs(
    queries: Tensor,
    coefficients: Tensor,
    initial_coefficients: Tensor,
    first_initial: Tensor | None,
    first_inputs: Tensor | None,
    first_deltas: Tensor | None,
    last_initial: Tensor,
    last_inputs: Tensor,
    last_deltas: Tensor,
    gamma: Tensor | None,
    eps: float,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads, blocks, steps, rows, dim = queries.shape
    stored, width = last_inputs.shape[2:]

    def of_rows(columns: int, absent: bool, dtype: torch.dtype = operands) -> Tensor:
        return queries.new_empty((0,) if absent else (heads, blocks, steps * rows, columns), dtype=dtype)

    return (
        queries.new_empty(queries.shape, dtype=operands if gamma is None else torch.float32),
        of_rows(dim, gamma is None, torch.float32),
        of_rows(width, first_initial is None),
        of_rows(stored, first_initial is None),
        of_rows(stored, False),
    )


def _forward(
    queries: Tensor,  # bh r n c d
    coefficients: Tensor,  # bh r n n
    initial_coefficients: Tensor,  # bh r n k
    first_initial: Tensor | None,  # bh r k d e
    first_inputs: Tensor | None,  # bh r t d
    first_deltas: Tensor | None,  # bh r t e
    last_initial: Tensor,  # bh r k e d
    last_inputs: Tensor,  # bh r t e
    last_deltas: Tensor,  # bh r t d
    gamma: Tensor | None,  # bh r n d
    eps: float,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The retrieved rows (bh, r, n, c, d); y, absent without the norm; h; scores of the first matrix, times their
    coefficients, and of the last, without them. Scores of stored rows that no row of the same tile reads are
    arbitrary."""
    first, last = (first_initial, first_inputs, first_deltas), (last_initial, last_inputs, last_deltas)
    given = (queries, coefficients, initial_coefficients, *first, *last, gamma)
    out, product, hidden, first_scores, last_scores = _outputs(*given, eps, operands)
    sizes = _Sizes.of(queries, last_inputs)
    tiles = _tiles(FORWARD, sizes, operands)
    rows, stored = min(tiles.rows, tile_size(sizes.rows)), min(tiles.stored, tile_size(sizes.stored))
    blocks = triton.cdiv(sizes.rows, rows)
    _forward_kernel[(sizes.head_blocks * blocks,)](
        **_arguments(*given), **_constants(sizes, initial_coefficients, first_initial, gamma, operands),
        out=out, product=product, hidden=hidden, activations=hidden.new_empty(hidden.shape),
        first_scores=first_scores, last_scores=last_scores,
        blocks=blocks, chunk_blocks=sizes.chunk_blocks, chunks=sizes.chunks, eps=eps,
        ROWS=rows, STORED=stored, BLOCK=min(tiles.units, tile_size(sizes.width)),
        WHOLE=sizes.rows % rows == 0 and sizes.stored % stored == 0, **tiles.options(),
    )  # fmt: skip
    return out, product, hidden, first_scores, last_scores


def _backward(
    d_out: Tensor,  # bh r n c d
    product: Tensor,
    hidden: Tensor,
    first_scores: Tensor,
    last_scores: Tensor,
    queries: Tensor,
    coefficients: Tensor,
    initial_coefficients: Tensor,
    first_initial: Tensor | None,
    first_inputs: Tensor | None,
    first_deltas: Tensor | None,
    last_initial: Tensor,
    last_inputs: Tensor,
    last_deltas: Tensor,
    gamma: Tensor | None,
    eps: float,
    operands: torch.dtype,
) -> list[Tensor | None]:
    first, last = (first_initial, first_inputs, first_deltas), (last_initial, last_inputs, last_deltas)
    given = (queries, coefficients, initial_coefficients, *first, *last, gamma)
    arguments, sizes = _arguments(*given), _Sizes.of(queries, last_inputs)
    constants = _constants(sizes, initial_coefficients, first_initial, gamma, operands)
    d_out, has_first, states = d_out.contiguous(), first_initial is not None, constants['STATES']
    d_queries, d_last_inputs, d_last_deltas, d_last_initial = (
        t.new_empty(t.shape) for t in (queries, last_inputs, last_deltas, last_initial)
    )
    d_first = [None if t is None else t.new_empty(t.shape) for t in first]
    absent = d_out.new_empty(0)
    d_first_initial, d_first_inputs, d_first_deltas = (absent if t is None else t for t in d_first)
    d_hidden, activations = (hidden.new_empty(hidden.shape) for _ in range(2))
    d_first_scores, d_last_scores = (scores.new_empty(scores.shape) for scores in (first_scores, last_scores))
    d_product = last_scores.new_empty(*queries.shape[:2], sizes.rows, sizes.dim)

    tiles = _tiles(QUERIES, sizes, operands)
    # a program owns whole chunks or part of one
    of_chunk, stored_of_chunk = constants['rows'], constants['stored']
    own, others = min(_power(of_chunk), tiles.rows), min(_power(stored_of_chunk), tiles.stored)
    own_chunks, other_chunks = (
        max(16 // part, min(_power(sizes.chunks), at_a_time // part), 1)
        for part, at_a_time in ((own, tiles.rows), (others, tiles.stored))
    )
    parts, stored_parts = triton.cdiv(of_chunk, own), triton.cdiv(stored_of_chunk, others)
    lead = queries.shape[:2]
    # zeros, because no program visits some pairs of chunks
    d_coefficients = coefficients.new_zeros(*lead, parts * stored_parts, sizes.chunks, sizes.chunks)
    d_initial_coefficients = initial_coefficients.new_empty(*lead, parts, sizes.chunks, states)
    d_gamma = initial_coefficients.new_empty((0,) if gamma is None else (*lead, parts, sizes.chunks, sizes.dim))
    blocks = triton.cdiv(sizes.chunks, own_chunks) * parts
    whole = sizes.chunks % own_chunks == 0 and sizes.chunks % other_chunks == 0
    _queries_kernel[(sizes.head_blocks * blocks,)](
        **arguments, **constants, d_out=d_out, product=product, hidden=hidden, last_scores=last_scores,
        d_queries=d_queries, d_coefficients=d_coefficients, d_initial_coefficients=d_initial_coefficients,
        d_gamma=d_gamma, d_product=d_product, d_hidden=d_hidden, activations=activations,
        d_first_scores=d_first_scores, d_last_scores=d_last_scores,
        blocks=blocks, parts=parts, stored_parts=stored_parts,
        chunk_blocks=sizes.chunk_blocks, chunks=sizes.chunks, eps=eps,
        PADDED=_power(states), CHUNKS=own_chunks, ROWS=own, STORED_CHUNKS=other_chunks, STORED_ROWS=others,
        WHOLE=whole and of_chunk % own == 0 and stored_of_chunk % others == 0,
        BLOCK=min(tiles.units, tile_size(sizes.width)), **tiles.options(),
    )  # fmt: skip

    tiles = _tiles(STORED, sizes, operands)
    rows, at_a_time = min(tiles.rows, tile_size(sizes.rows)), min(tiles.stored, tile_size(sizes.stored))
    units = min(tiles.units, tile_size(sizes.width))
    blocks, pieces = triton.cdiv(sizes.stored, at_a_time), (triton.cdiv(sizes.width, units) if has_first else 0) + 1
    _stored_kernel[(sizes.head_blocks * blocks * pieces,)](
        **taken_by(_stored_kernel, arguments | constants), d_product=d_product, d_hidden=d_hidden,
        activations=activations, first_scores=first_scores, last_scores=last_scores,
        d_first_scores=d_first_scores, d_last_scores=d_last_scores,
        d_first_inputs=d_first_inputs, d_first_deltas=d_first_deltas,
        d_last_inputs=d_last_inputs, d_last_deltas=d_last_deltas,
        blocks=blocks, pieces=pieces, chunk_blocks=sizes.chunk_blocks, chunks=sizes.chunks,
        ROWS=rows, STORED=at_a_time, BLOCK=units,
        WHOLE=sizes.rows % rows == 0 and sizes.stored % at_a_time == 0, **tiles.options(),
    )  # fmt: skip

    tiles = _tiles(INITIAL, sizes, operands)
    rows, units = min(tiles.rows, tile_size(sizes.rows)), min(tiles.units, tile_size(sizes.width))
    blocks = triton.cdiv(sizes.width, units)
    _initial_kernel[(sizes.head_blocks * states * blocks,)](
        **taken_by(_initial_kernel, arguments | constants), d_product=d_product, d_hidden=d_hidden,
        activations=activations, d_first_initial=d_first_initial, d_last_initial=d_last_initial,
        blocks=blocks, chunk_blocks=sizes.chunk_blocks, chunks=sizes.chunks,
        ROWS=rows, BLOCK=units, WHOLE=sizes.rows % rows == 0, **tiles.options(),
    )  # fmt: skip

    return [
        d_queries,
        _sum_parts(d_coefficients),
        _sum_parts(d_initial_coefficients),
        *d_first,
        d_last_initial,
        d_last_inputs,
        d_last_deltas,
        None if gamma is None else _sum_parts(d_gamma),
    ]


retrieve_sequence = register_kernel(
    'retrieve_sequence',
    _forward,
    _backward,
    outputs=_outputs,
    saved=(1, 2, 3, 4),
    not_differentiable=(1, 2, 3, 4),
    materialize_grads=False,
)


class _Sizes(NamedTuple):
    head_blocks: int
    """Number of blocks of chunks in all heads."""
    chunk_blocks: int
    chunks: int
    rows: int
    """Number of query rows in a block of chunks."""
    stored: int
    """Number of stored rows in a block of chunks."""
    dim: int
    width: int

    @classmethod
    def of(cls, queries: Tensor, last_inputs: Tensor) -> _Sizes:
        heads, blocks, chunks, rows, dim = queries.shape
        stored, width = last_inputs.shape[2:]
        return cls(heads * blocks, blocks, chunks, chunks * rows, stored, dim, width)


def _arguments(
    queries: Tensor,
    coefficients: Tensor,
    initial_coefficients: Tensor,
    first_initial: Tensor | None,
    first_inputs: Tensor | None,
    first_deltas: Tensor | None,
    last_initial: Tensor,
    last_inputs: Tensor,
    last_deltas: Tensor,
    gamma: Tensor | None,
) -> dict[str, Any]:
    """Tensors and their strides. Heads and blocks of chunks may be any views, but rows are contiguous."""
    tensors: dict[str, tuple[Tensor | None, int, str, str]] = {
        'queries': (queries, 1, 'query', 'head block chunk row'),
        'coefficients': (coefficients, 0, 'coefficient', 'head block chunk other'),
        'initial_coefficients': (initial_coefficients, 0, 'initial', 'head block chunk state'),
        'first_initial': (first_initial, 2, 'first_initial', 'head block state'),
        'first_inputs': (first_inputs, 1, 'first_input', 'head block row'),
        'first_deltas': (first_deltas, 1, 'first_delta', 'head block row'),
        'last_initial': (last_initial, 2, 'last_initial', 'head block state'),
        'last_inputs': (last_inputs, 1, 'last_input', 'head block row'),
        'last_deltas': (last_deltas, 1, 'last_delta', 'head block row'),
        'gamma': (gamma, 1, 'gamma', 'head block chunk'),
    }
    arguments: dict[str, Any] = {}
    for name, (t, contiguous, prefix, axes) in tensors.items():
        t = t if t is None or not contiguous else contiguous_inside(t, contiguous)
        arguments |= {name: coefficients.new_empty(0) if t is None else t, **named_strides(prefix, t, axes)}
    return arguments


def _constants(
    sizes: _Sizes,
    initial_coefficients: Tensor,
    first_initial: Tensor | None,
    gamma: Tensor | None,
    operands: torch.dtype,
) -> dict[str, Any]:
    """Constants of all kernels; rows are counted per chunk."""
    return dict(
        dim=sizes.dim, width=sizes.width, rows=sizes.rows // sizes.chunks, stored=sizes.stored // sizes.chunks,
        STATES=initial_coefficients.shape[-1], HIDDEN=first_initial is not None, NORM=gamma is not None,
        DIM=tile_size(sizes.dim), **product_precision(operands),
    )  # fmt: skip


def _tiles(both: tuple[Tiles, Tiles], sizes: _Sizes, operands: torch.dtype) -> Tiles:
    """Tiles for full float32 or not, with as many rows as leave enough programs, and smaller if rows are wide."""
    tiles = both[operands == torch.float32]
    if sizes.head_blocks * triton.cdiv(sizes.rows, tiles.rows) < ENOUGH_PROGRAMS:
        tiles = tiles._replace(rows=min(tiles.rows, 32))
    if tile_size(sizes.dim) > 64:
        # without a third stage, for which compute capability 8.6 and 8.9 have too little memory
        tiles = tiles._replace(units=min(tiles.units, 32), warps=8, stages=2)
    return tiles


def _sum_parts(parts: Tensor) -> Tensor:
    # most often there is only one
    return parts.squeeze(2) if parts.shape[2] == 1 else parts.sum(dim=2)


def _power(size: int) -> int:
    return triton.next_power_of_2(size)
