"""Queries through a memory MLP whose matrices change over time, and the way back.

Forward, a program owns some query rows of a run. Their scores with the stored rows of earlier chunks, a tile of which
is on chip at a time, go to memory for it to read again, and so does each block of hidden features. Backward, one kernel
owns query rows, whole chunks or parts of one; a second one owns stored rows, and a third a start's hidden features.
What two chunks have to do with each other is summed tile by tile, in one order. The equations, and the plain twin, are
in `titans_pytorch.ops.retrieve_sequence`.

Where a program reads what it wrote itself, a barrier stands between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._triton import TRITON_DTYPES, contiguous_inside, multiply_add, tile_size
from titans_pytorch.ops.inner_gradient.triton import _below, _density, _normalised, _tangent


class Tiles(NamedTuple):
    """How a kernel is cut."""

    rows: int
    """Of queries, at a time."""
    stored: int
    """Stored rows at a time."""
    units: int
    """Hidden features at a time."""
    warps: int
    stages: int = 2
    registers: int | None = None
    """Of a thread, at most, so that a multiprocessor holds several programs."""

    def options(self) -> dict[str, Any]:
        return {'num_warps': self.warps, 'num_stages': self.stages, 'maxnreg': self.registers}


# of each kernel, in the tensor cores' precision and in float32 in full: there products take twice the registers, and
# with fewer than 64 rows Triton takes the tensor cores' older instructions, which read matrices either way round
FORWARD = (Tiles(64, 64, 64, 4), Tiles(32, 32, 32, 4))
QUERIES = (Tiles(64, 64, 32, 4), Tiles(32, 32, 32, 4))
STORED = (Tiles(32, 64, 64, 4), Tiles(32, 32, 32, 4))
STARTS = (Tiles(32, 64, 64, 4, 3), Tiles(32, 32, 32, 4))
# where there would be fewer programs of 64 rows than these, each gets 32
ENOUGH_PROGRAMS = 256


@triton.jit
def _within(index, size, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether each is below `size`. Where blocks are WHOLE the compiler knows, and leaves the question out."""
    if WHOLE:
        known = tl.full(index.shape, 1, tl.int1)
    else:
        known = index < size
    return known


@triton.jit
def _own_rows(  # type: ignore[no-untyped-def]
    block, parts, chunks, rows: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr
):
    """A block of whole chunks, or of a part of one: of each row its chunk, place, and whether it is there."""
    index = tl.arange(0, CHUNKS * ROWS)
    if ROWS == rows:
        # so that the compiler sees that they follow one another
        place = block * (CHUNKS * ROWS) + index
        chunk, there = place // rows, _within(place, chunks * rows, WHOLE)
    else:
        chunk = (block // parts) * CHUNKS + index // ROWS
        row = (block % parts) * ROWS + index % ROWS
        place, there = chunk * rows + row, _within(chunk, chunks, WHOLE) & _within(row, rows, WHOLE)
    return chunk, place, there


@triton.jit
def _of_chunks(of_rows, CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums over the rows of each chunk of a block."""
    summed = of_rows
    if ROWS > 1:
        summed = tl.sum(tl.reshape(of_rows, (CHUNKS, ROWS, COLUMNS)), axis=1)
    return summed


@triton.jit
def _of_pairs(  # type: ignore[no-untyped-def]
    of_rows, CHUNKS: tl.constexpr, ROWS: tl.constexpr, STORED_CHUNKS: tl.constexpr, STORED_ROWS: tl.constexpr
):
    """Sums over all pairs of rows of each pair of chunks."""
    summed = of_rows
    if STORED_ROWS > 1:
        summed = tl.sum(tl.reshape(summed, (CHUNKS * ROWS, STORED_CHUNKS, STORED_ROWS)), axis=2)
    return _of_chunks(summed, CHUNKS, ROWS, STORED_CHUNKS)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    queries, mix, shares, first_starts, first_inputs, first_errors, last_starts, last_inputs, last_errors, gamma,
    out, product, hidden, activations, first_scores, last_scores,
    blocks, runs, chunks, eps,
    query_head, query_run, query_chunk, query_row, mix_head, mix_run, mix_chunk, mix_other,
    share_head, share_run, share_chunk, share_start,
    first_start_head, first_start_run, first_start, first_input_head, first_input_run, first_input_row,
    first_error_head, first_error_run, first_error_row,
    last_start_head, last_start_run, last_start, last_input_head, last_input_run, last_input_row,
    last_error_head, last_error_run, last_error_row,
    gamma_head, gamma_run, gamma_chunk,
    dim: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, stored: tl.constexpr,
    COUNT: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, STORED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program % blocks
    lane = (program // blocks).to(tl.int64)
    head, run = lane // runs, lane % runs
    place = block * ROWS + tl.arange(0, ROWS)
    chunk, there = place // rows, _within(place, chunks * rows, WHOLE)
    feature = tl.arange(0, DIM)
    known = _within(feature, dim, dim == DIM)
    inside = there[:, None] & known[None, :]
    start, longest = lane * chunks * rows, chunks * stored
    features = place[:, None] * dim + feature[None, :]

    queries += head * query_head + run * query_run
    mix += head * mix_head + run * mix_run + chunk[:, None] * mix_chunk
    shares += head * share_head + run * share_run + chunk * share_chunk
    first_starts += head * first_start_head + run * first_start_run
    first_inputs += head * first_input_head + run * first_input_run
    first_errors += head * first_error_head + run * first_error_run
    last_starts += head * last_start_head + run * last_start_run
    last_inputs += head * last_input_head + run * last_input_run
    last_errors += head * last_error_head + run * last_error_run
    gamma += head * gamma_head + run * gamma_run
    hidden += start * width
    activations += start * width
    first_scores += start * longest
    last_scores += start * longest

    # blocks of stored rows that begin before the last chunk of these
    last = tl.minimum((block + 1) * ROWS, chunks * rows) - 1
    reach = tl.cdiv((last // rows) * stored, STORED)
    from_queries = queries + (chunk * query_chunk + (place % rows) * query_row)[:, None] + feature[None, :]
    q = tl.load(from_queries, mask=inside, other=0.0).to(OPERAND)
    nothing = tl.zeros((ROWS, STORED), tl.float32)
    y = tl.zeros((ROWS, DIM), tl.float32)

    if HIDDEN:
        for other in range(0, reach):
            index = other * STORED + tl.arange(0, STORED)
            theirs = _within(index, longest, WHOLE)
            pair = there[:, None] & theirs[None, :]
            below = pair & ((index // stored)[None, :] < chunk[:, None])
            # what stands on the right is loaded turned, rows across
            from_inputs = first_inputs + index[None, :] * first_input_row + feature[:, None]
            x = tl.load(from_inputs, mask=theirs[None, :] & known[:, None], other=0.0)
            s = multiply_add(nothing, q, x, PRECISION, OPERAND)
            s *= tl.load(mix + (index // stored)[None, :] * mix_other, mask=below, other=0.0)
            tl.store(first_scores + place[:, None] * longest + index[None, :], s, mask=pair)
        tl.debug_barrier()

        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            used = _within(unit, width, width % BLOCK == 0)
            present = there[:, None] & used[None, :]
            h = tl.zeros((ROWS, BLOCK), tl.float32)
            for k in range(0, COUNT):
                from_start = first_starts + k * first_start + feature[:, None] * width + unit[None, :]
                w = tl.load(from_start, mask=known[:, None] & used[None, :], other=0.0)
                share = tl.load(shares + k * share_start, mask=there, other=0.0)[:, None]
                h += share * multiply_add(tl.zeros((ROWS, BLOCK), tl.float32), q, w, PRECISION, OPERAND)
            for other in range(0, reach):
                index = other * STORED + tl.arange(0, STORED)
                theirs = _within(index, longest, WHOLE)
                pair = there[:, None] & theirs[None, :]
                s = tl.load(first_scores + place[:, None] * longest + index[None, :], mask=pair, other=0.0)
                from_errors = first_errors + index[:, None] * first_error_row + unit[None, :]
                delta = tl.load(from_errors, mask=theirs[:, None] & used[None, :], other=0.0)
                h = multiply_add(h, s, delta, PRECISION, OPERAND)
            units = place[:, None] * width + unit[None, :]
            tl.store(hidden + units, h, mask=present)
            a = (h * _below(h)).to(OPERAND)
            tl.store(activations + units, a, mask=present)
            for k in range(0, COUNT):
                from_start = last_starts + k * last_start + unit[:, None] * dim + feature[None, :]
                w = tl.load(from_start, mask=used[:, None] & known[None, :], other=0.0)
                share = tl.load(shares + k * share_start, mask=there, other=0.0)[:, None]
                y += share * multiply_add(tl.zeros((ROWS, DIM), tl.float32), a, w, PRECISION, OPERAND)
        tl.debug_barrier()
    else:
        for k in range(0, COUNT):
            from_start = last_starts + k * last_start + feature[:, None] * dim + feature[None, :]
            w = tl.load(from_start, mask=known[:, None] & known[None, :], other=0.0)
            share = tl.load(shares + k * share_start, mask=there, other=0.0)[:, None]
            y += share * multiply_add(tl.zeros((ROWS, DIM), tl.float32), q, w, PRECISION, OPERAND)

    for other in range(0, reach):
        index = other * STORED + tl.arange(0, STORED)
        theirs = _within(index, longest, WHOLE)
        pair = there[:, None] & theirs[None, :]
        below = pair & ((index // stored)[None, :] < chunk[:, None])
        s = nothing
        if HIDDEN:
            for first_unit in range(0, width, BLOCK):
                unit = first_unit + tl.arange(0, BLOCK)
                used = _within(unit, width, width % BLOCK == 0)
                present = there[:, None] & used[None, :]
                a = tl.load(activations + place[:, None] * width + unit[None, :], mask=present, other=0.0)
                from_inputs = last_inputs + index[None, :] * last_input_row + unit[:, None]
                x = tl.load(from_inputs, mask=theirs[None, :] & used[:, None], other=0.0)
                s = multiply_add(s, a, x, PRECISION, OPERAND)
        else:
            from_inputs = last_inputs + index[None, :] * last_input_row + feature[:, None]
            x = tl.load(from_inputs, mask=theirs[None, :] & known[:, None], other=0.0)
            s = multiply_add(s, q, x, PRECISION, OPERAND)
        tl.store(last_scores + place[:, None] * longest + index[None, :], s, mask=pair)
        s *= tl.load(mix + (index // stored)[None, :] * mix_other, mask=below, other=0.0)
        from_errors = last_errors + index[:, None] * last_error_row + feature[None, :]
        delta = tl.load(from_errors, mask=theirs[:, None] & known[None, :], other=0.0)
        y = multiply_add(y, s, delta, PRECISION, OPERAND)

    if NORM:
        tl.store(product + start * dim + features, y, mask=inside)
        normal, _ = _normalised(y, inside, eps, dim)
        gain = 1.0 + tl.load(gamma + (chunk * gamma_chunk)[:, None] + feature[None, :], mask=inside, other=0.0)
        y = normal * gain + tl.load(from_queries, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start * dim + features, y, mask=inside)


@triton.jit
def _queries_kernel(  # type: ignore[no-untyped-def]
    d_out, product, hidden, last_scores,
    queries, mix, shares, first_starts, first_inputs, first_errors, last_starts, last_inputs, last_errors, gamma,
    d_queries, d_mix, d_shares, d_gamma, d_product, d_hidden, activations, d_first_scores, d_last_scores,
    blocks, parts, stored_parts, runs, chunks, eps,
    query_head, query_run, query_chunk, query_row, mix_head, mix_run, mix_chunk, mix_other,
    share_head, share_run, share_chunk, share_start,
    first_start_head, first_start_run, first_start, first_input_head, first_input_run, first_input_row,
    first_error_head, first_error_run, first_error_row,
    last_start_head, last_start_run, last_start, last_input_head, last_input_run, last_input_row,
    last_error_head, last_error_run, last_error_row,
    gamma_head, gamma_run, gamma_chunk,
    dim: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, stored: tl.constexpr,
    COUNT: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, STORED_CHUNKS: tl.constexpr, STORED_ROWS: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, shares, mix and γ; and for the kernels to come those of the products y and h, and of the
    scores, mixed, and a."""
    OWN: tl.constexpr = CHUNKS * ROWS
    OTHERS: tl.constexpr = STORED_CHUNKS * STORED_ROWS
    program = tl.program_id(0)
    block = program % blocks
    lane = (program // blocks).to(tl.int64)
    head, run = lane // runs, lane % runs
    chunk, place, there = _own_rows(block, parts, chunks, rows, CHUNKS, ROWS, WHOLE)
    own_chunk = (block // parts) * CHUNKS + tl.arange(0, CHUNKS)
    feature = tl.arange(0, DIM)
    known = _within(feature, dim, dim == DIM)
    inside = there[:, None] & known[None, :]
    start, longest = lane * chunks * rows, chunks * stored
    features = place[:, None] * dim + feature[None, :]

    queries += head * query_head + run * query_run
    mix += head * mix_head + run * mix_run + chunk[:, None] * mix_chunk
    shares += head * share_head + run * share_run + chunk * share_chunk
    first_starts += head * first_start_head + run * first_start_run
    first_inputs += head * first_input_head + run * first_input_run
    first_errors += head * first_error_head + run * first_error_run
    last_starts += head * last_start_head + run * last_start_run
    last_inputs += head * last_input_head + run * last_input_run
    last_errors += head * last_error_head + run * last_error_run
    gamma += head * gamma_head + run * gamma_run
    hidden += start * width
    d_hidden += start * width
    activations += start * width
    last_scores += start * longest
    d_first_scores += start * longest
    d_last_scores += start * longest
    # a pair of parts has a matrix of its own
    d_mix += (lane * parts + block % parts) * stored_parts * chunks * chunks

    last = tl.minimum((block // parts + 1) * CHUNKS, chunks) - 1
    reach = tl.cdiv(last, STORED_CHUNKS) * stored_parts
    from_queries = queries + (chunk * query_chunk + (place - chunk * rows) * query_row)[:, None] + feature[None, :]
    d_q = tl.zeros((OWN, DIM), tl.float32)
    d_y = tl.load(d_out + start * dim + features, mask=inside, other=0.0).to(tl.float32)

    # out = x̂ ∘ (1 + γ) + q, x̂ = (y − mean y) · r
    if NORM:
        y = tl.load(product + start * dim + features, mask=inside, other=0.0)
        normal, inverse = _normalised(y, inside, eps, dim)
        of_gamma = _of_chunks(d_y * normal, CHUNKS, ROWS, DIM)
        to_gamma = d_gamma + ((lane * parts + block % parts) * chunks + own_chunk)[:, None] * dim + feature[None, :]
        tl.store(to_gamma, of_gamma, mask=(own_chunk < chunks)[:, None] & known[None, :])
        d_q = d_y
        gain = 1.0 + tl.load(gamma + (chunk * gamma_chunk)[:, None] + feature[None, :], mask=inside, other=0.0)
        d_y = inverse * _tangent(d_y * gain, normal, inside, dim)
    d_y = d_y.to(OPERAND)
    tl.store(d_product + start * dim + features, d_y, mask=inside)

    q = tl.load(from_queries, mask=inside, other=0.0).to(tl.float32)
    state = tl.arange(0, PADDED)[None, :]
    of_shares = tl.zeros((OWN, PADDED), tl.float32)
    nothing = tl.zeros((OWN, OTHERS), tl.float32)

    # D = G Δᵀ, of the last matrix
    for other in range(0, reach):
        their_chunk, index, theirs = _own_rows(other, stored_parts, chunks, stored, STORED_CHUNKS, STORED_ROWS, WHOLE)
        pair = there[:, None] & theirs[None, :]
        below = pair & (their_chunk[None, :] < chunk[:, None])
        from_errors = last_errors + index[None, :] * last_error_row + feature[:, None]
        delta = tl.load(from_errors, mask=theirs[None, :] & known[:, None], other=0.0)
        of_scores = multiply_add(nothing, d_y, delta, PRECISION, OPERAND)
        scores = place[:, None] * longest + index[None, :]
        p = tl.load(last_scores + scores, mask=below, other=0.0).to(tl.float32)
        of_mix = _of_pairs(of_scores * p, CHUNKS, ROWS, STORED_CHUNKS, STORED_ROWS)
        other_chunk = (other // stored_parts) * STORED_CHUNKS + tl.arange(0, STORED_CHUNKS)
        to_mix = d_mix + (other % stored_parts) * chunks * chunks + own_chunk[:, None] * chunks + other_chunk[None, :]
        tl.store(to_mix, of_mix, mask=(own_chunk < chunks)[:, None] & (other_chunk < chunks)[None, :])
        of_scores *= tl.load(mix + their_chunk[None, :] * mix_other, mask=below, other=0.0)
        tl.store(d_last_scores + scores, of_scores, mask=pair)
        if not HIDDEN:
            from_inputs = last_inputs + index[:, None] * last_input_row + feature[None, :]
            x = tl.load(from_inputs, mask=theirs[:, None] & known[None, :], other=0.0)
            d_q = multiply_add(d_q, of_scores, x, PRECISION, OPERAND)

    if HIDDEN:
        tl.debug_barrier()
        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            used = _within(unit, width, width % BLOCK == 0)
            units, present = place[:, None] * width + unit[None, :], there[:, None] & used[None, :]
            d_a = tl.zeros((OWN, BLOCK), tl.float32)
            for other in range(0, reach):
                _, index, theirs = _own_rows(other, stored_parts, chunks, stored, STORED_CHUNKS, STORED_ROWS, WHOLE)
                pair = there[:, None] & theirs[None, :]
                g = tl.load(d_last_scores + place[:, None] * longest + index[None, :], mask=pair, other=0.0)
                from_inputs = last_inputs + index[:, None] * last_input_row + unit[None, :]
                x = tl.load(from_inputs, mask=theirs[:, None] & used[None, :], other=0.0)
                d_a = multiply_add(d_a, g, x, PRECISION, OPERAND)
            h = tl.load(hidden + units, mask=present, other=0.0).to(tl.float32)
            a = h * _below(h)
            tl.store(activations + units, a, mask=present)
            for k in range(0, COUNT):
                from_start = last_starts + k * last_start + unit[None, :] * dim + feature[:, None]
                w = tl.load(from_start, mask=used[None, :] & known[:, None], other=0.0)
                through = multiply_add(tl.zeros((OWN, BLOCK), tl.float32), d_y, w, PRECISION, OPERAND)
                of_shares += tl.where(state == k, tl.sum(through * a, axis=1)[:, None], 0.0)
                d_a += tl.load(shares + k * share_start, mask=there, other=0.0)[:, None] * through
            # gelu′ = Φ + h φ
            of_h = (d_a * (_below(h) + h * _density(h))).to(OPERAND)
            tl.store(d_hidden + units, of_h, mask=present)
            for k in range(0, COUNT):
                from_start = first_starts + k * first_start + feature[None, :] * width + unit[:, None]
                w = tl.load(from_start, mask=known[None, :] & used[:, None], other=0.0)
                through = multiply_add(tl.zeros((OWN, DIM), tl.float32), of_h, w, PRECISION, OPERAND)
                of_shares += tl.where(state == k, tl.sum(through * q, axis=1)[:, None], 0.0)
                d_q += tl.load(shares + k * share_start, mask=there, other=0.0)[:, None] * through
        tl.debug_barrier()

        # D and P of the first matrix
        for other in range(0, reach):
            their_chunk, index, theirs = _own_rows(
                other, stored_parts, chunks, stored, STORED_CHUNKS, STORED_ROWS, WHOLE
            )
            pair = there[:, None] & theirs[None, :]
            below = pair & (their_chunk[None, :] < chunk[:, None])
            of_scores = nothing
            for first_unit in range(0, width, BLOCK):
                unit = first_unit + tl.arange(0, BLOCK)
                used = _within(unit, width, width % BLOCK == 0)
                units, present = place[:, None] * width + unit[None, :], there[:, None] & used[None, :]
                of_h = tl.load(d_hidden + units, mask=present, other=0.0)
                from_errors = first_errors + index[None, :] * first_error_row + unit[:, None]
                delta = tl.load(from_errors, mask=theirs[None, :] & used[:, None], other=0.0)
                of_scores = multiply_add(of_scores, of_h, delta, PRECISION, OPERAND)
            from_inputs = first_inputs + index[None, :] * first_input_row + feature[:, None]
            x = tl.load(from_inputs, mask=theirs[None, :] & known[:, None], other=0.0)
            p = tl.where(below, multiply_add(nothing, q, x, PRECISION, OPERAND), 0.0)
            of_mix = _of_pairs(of_scores * p, CHUNKS, ROWS, STORED_CHUNKS, STORED_ROWS)
            other_chunk = (other // stored_parts) * STORED_CHUNKS + tl.arange(0, STORED_CHUNKS)
            to_mix = (other % stored_parts) * chunks * chunks + own_chunk[:, None] * chunks + other_chunk[None, :]
            both = (own_chunk < chunks)[:, None] & (other_chunk < chunks)[None, :]
            # what is there is of the last matrix
            of_mix += tl.load(d_mix + to_mix, mask=both, other=0.0)
            tl.store(d_mix + to_mix, of_mix, mask=both)
            of_scores *= tl.load(mix + their_chunk[None, :] * mix_other, mask=below, other=0.0)
            tl.store(d_first_scores + place[:, None] * longest + index[None, :], of_scores, mask=pair)
            from_inputs = first_inputs + index[:, None] * first_input_row + feature[None, :]
            x = tl.load(from_inputs, mask=theirs[:, None] & known[None, :], other=0.0)
            d_q = multiply_add(d_q, of_scores, x, PRECISION, OPERAND)
    else:
        for k in range(0, COUNT):
            from_start = last_starts + k * last_start + feature[None, :] * dim + feature[:, None]
            w = tl.load(from_start, mask=known[:, None] & known[None, :], other=0.0)
            through = multiply_add(tl.zeros((OWN, DIM), tl.float32), d_y, w, PRECISION, OPERAND)
            of_shares += tl.where(state == k, tl.sum(through * q, axis=1)[:, None], 0.0)
            d_q += tl.load(shares + k * share_start, mask=there, other=0.0)[:, None] * through

    tl.store(d_queries + start * dim + features, d_q, mask=inside)
    to_shares = d_shares + ((lane * parts + block % parts) * chunks + own_chunk)[:, None] * COUNT + state
    summed = _of_chunks(of_shares, CHUNKS, ROWS, PADDED)
    tl.store(to_shares, summed, mask=(own_chunk < chunks)[:, None] & (state < COUNT))


@triton.jit
def _stored_kernel(  # type: ignore[no-untyped-def]
    queries, mix, d_product, d_hidden, activations, first_scores, last_scores, d_first_scores, d_last_scores,
    d_first_inputs, d_first_errors, d_last_inputs, d_last_errors,
    blocks, pieces, runs, chunks,
    query_head, query_run, query_chunk, query_row, mix_head, mix_run, mix_chunk, mix_other,
    dim: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, stored: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, STORED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Gradients of stored rows, sums over the rows of later chunks. Of a block of them a program owns some hidden
    features of the last inputs and the first errors; or, the last program, the first inputs and the last errors."""
    program = tl.program_id(0)
    piece, block = program % pieces, program // pieces % blocks
    lane = (program // (pieces * blocks)).to(tl.int64)
    head, run = lane // runs, lane % runs
    index = block * STORED + tl.arange(0, STORED)
    their_chunk, theirs = index // stored, _within(index, chunks * stored, WHOLE)
    start, longest, end = lane * chunks * rows, chunks * stored, chunks * rows
    feature = tl.arange(0, DIM)
    known = _within(feature, dim, dim == DIM)
    mix += head * mix_head + run * mix_run
    queries += head * query_head + run * query_run
    d_product += start * dim
    d_hidden += start * width
    activations += start * width
    first_scores += start * longest
    last_scores += start * longest
    d_first_scores += start * longest
    d_last_scores += start * longest
    d_first_inputs += lane * longest * dim
    d_first_errors += lane * longest * width
    d_last_inputs += lane * longest * width
    d_last_errors += lane * longest * dim
    # from the block on in which the chunk after the first of these begins
    first_row = (block * STORED // stored + 1) * rows // ROWS * ROWS

    if HIDDEN and piece < pieces - 1:
        unit = piece * BLOCK + tl.arange(0, BLOCK)
        used = _within(unit, width, width % BLOCK == 0)
        of_inputs = tl.zeros((STORED, BLOCK), tl.float32)
        of_errors = tl.zeros((STORED, BLOCK), tl.float32)
        for at in range(first_row, end, ROWS):
            place = at + tl.arange(0, ROWS)
            # what stands on the left is loaded turned
            there = _within(place, end, WHOLE)
            below = theirs[:, None] & there[None, :] & (their_chunk[:, None] < (place // rows)[None, :])
            scores = place[None, :] * longest + index[:, None]
            present = there[:, None] & used[None, :]
            units = place[:, None] * width + unit[None, :]
            g = tl.load(d_last_scores + scores, mask=below, other=0.0)
            a = tl.load(activations + units, mask=present, other=0.0)
            of_inputs = multiply_add(of_inputs, g, a, PRECISION, OPERAND)
            s = tl.load(first_scores + scores, mask=below, other=0.0)
            of_h = tl.load(d_hidden + units, mask=present, other=0.0)
            of_errors = multiply_add(of_errors, s, of_h, PRECISION, OPERAND)
        to_units, in_block = index[:, None] * width + unit[None, :], theirs[:, None] & used[None, :]
        tl.store(d_last_inputs + to_units, of_inputs, mask=in_block)
        tl.store(d_first_errors + to_units, of_errors, mask=in_block)
    else:
        of_rows = tl.zeros((STORED, DIM), tl.float32)
        of_deltas = tl.zeros((STORED, DIM), tl.float32)
        for at in range(first_row, end, ROWS):
            place = at + tl.arange(0, ROWS)
            chunk, row, there = place // rows, place % rows, _within(place, end, WHOLE)
            below = theirs[:, None] & there[None, :] & (their_chunk[:, None] < chunk[None, :])
            scores = place[None, :] * longest + index[:, None]
            inside = there[:, None] & known[None, :]
            features = place[:, None] * dim + feature[None, :]
            s = tl.load(last_scores + scores, mask=below, other=0.0).to(tl.float32)
            s *= tl.load(mix + chunk[None, :] * mix_chunk + their_chunk[:, None] * mix_other, mask=below, other=0.0)
            d_y = tl.load(d_product + features, mask=inside, other=0.0)
            of_deltas = multiply_add(of_deltas, s, d_y, PRECISION, OPERAND)
            if HIDDEN:
                g = tl.load(d_first_scores + scores, mask=below, other=0.0)
            else:
                g = tl.load(d_last_scores + scores, mask=below, other=0.0)
            from_queries = queries + (chunk * query_chunk + row * query_row)[:, None] + feature[None, :]
            q = tl.load(from_queries, mask=inside, other=0.0)
            of_rows = multiply_add(of_rows, g, q, PRECISION, OPERAND)
        to_features, both = index[:, None] * dim + feature[None, :], theirs[:, None] & known[None, :]
        tl.store(d_last_errors + to_features, of_deltas, mask=both)
        if HIDDEN:
            tl.store(d_first_inputs + to_features, of_rows, mask=both)
        else:
            tl.store(d_last_inputs + to_features, of_rows, mask=both)


@triton.jit
def _starts_kernel(  # type: ignore[no-untyped-def]
    queries, shares, d_product, d_hidden, activations, d_first_starts, d_last_starts,
    blocks, runs, chunks,
    query_head, query_run, query_chunk, query_row, share_head, share_run, share_chunk, share_start,
    dim: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, COUNT: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Gradients of starts. A program owns a block of hidden features of one: columns of that of the first matrix,
    which lie down, and rows of that of the last."""
    program = tl.program_id(0)
    # those that read the same rows are neighbours
    k, block = program % COUNT, program // COUNT % blocks
    lane = (program // (COUNT * blocks)).to(tl.int64)
    head, run = lane // runs, lane % runs
    unit = block * BLOCK + tl.arange(0, BLOCK)
    used = _within(unit, width, width % BLOCK == 0)
    feature = tl.arange(0, DIM)
    known = _within(feature, dim, dim == DIM)
    start = lane * chunks * rows
    queries += head * query_head + run * query_run
    shares += head * share_head + run * share_run + k * share_start
    d_product += start * dim
    d_hidden += start * width
    activations += start * width
    d_first_starts += (lane * COUNT + k) * dim * width
    d_last_starts += (lane * COUNT + k) * dim * width

    of_first = tl.zeros((BLOCK, DIM), tl.float32)
    of_last = tl.zeros((BLOCK, DIM), tl.float32)
    for at in range(0, chunks * rows, ROWS):
        place = at + tl.arange(0, ROWS)
        chunk, row, there = place // rows, place % rows, _within(place, chunks * rows, WHOLE)
        inside = there[:, None] & known[None, :]
        across = there[None, :] & used[:, None]
        share = tl.load(shares + chunk * share_chunk, mask=there, other=0.0)[:, None]
        d_y = tl.load(d_product + place[:, None] * dim + feature[None, :], mask=inside, other=0.0)
        from_queries = queries + chunk * query_chunk + row * query_row
        if HIDDEN:
            units = place[None, :] * width + unit[:, None]
            a = tl.load(activations + units, mask=across, other=0.0)
            of_h = tl.load(d_hidden + units, mask=across, other=0.0)
            q = tl.load(from_queries[:, None] + feature[None, :], mask=inside, other=0.0)
            of_first = multiply_add(of_first, of_h, share * q.to(tl.float32), PRECISION, OPERAND)
        else:
            a = tl.load(from_queries[None, :] + unit[:, None], mask=across, other=0.0)
        of_last = multiply_add(of_last, a, share * d_y.to(tl.float32), PRECISION, OPERAND)

    both = used[:, None] & known[None, :]
    tl.store(d_last_starts + unit[:, None] * dim + feature[None, :], of_last, mask=both)
    if HIDDEN:
        tl.store(d_first_starts + feature[None, :] * width + unit[:, None], of_first, mask=both)


def forward(
    queries: Tensor,  # bh r n c d
    mix: Tensor,  # bh r n n
    shares: Tensor,  # bh r n k
    first_starts: Tensor | None,  # bh r k d e
    first_inputs: Tensor | None,  # bh r t d
    first_errors: Tensor | None,  # bh r t e
    last_starts: Tensor,  # bh r k e d
    last_inputs: Tensor,  # bh r t e
    last_errors: Tensor,  # bh r t d
    gamma: Tensor | None,  # bh r n d
    eps: float,
    operands: torch.dtype,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What is retrieved (bh, r, n, c, d); y, h, and the scores of the first matrix, mixed, and of the last."""
    first = (first_starts, first_inputs, first_errors)
    call = _Call.of(operands, precision, queries, mix, shares, *first, last_starts, last_inputs, last_errors, gamma)
    tiles, constants = call.tiles(FORWARD), call.constants
    of_run, hidden = (*queries.shape[:2], call.rows), constants['HIDDEN']
    out = queries.new_empty(queries.shape, dtype=operands if gamma is None else torch.float32)
    product = queries.new_empty((0,) if gamma is None else (*of_run, call.dim), dtype=torch.float32)

    def of_rows(columns: int, absent: bool) -> Tensor:
        return queries.new_empty((0,) if absent else (*of_run, columns), dtype=operands)

    h, activations = (of_rows(call.width, not hidden) for _ in range(2))
    first_scores, last_scores = of_rows(call.stored, not hidden), of_rows(call.stored, False)
    rows, stored = min(tiles.rows, tile_size(call.rows)), min(tiles.stored, tile_size(call.stored))
    blocks = triton.cdiv(call.rows, rows)
    with torch.cuda.device_of(queries):
        _forward_kernel[(call.lanes * blocks,)](
            *call.tensors, out, product, h, activations, first_scores, last_scores,
            blocks, call.runs, call.chunks, eps, *call.strides, **constants,
            ROWS=rows, STORED=stored, BLOCK=min(tiles.units, tile_size(call.width)),
            WHOLE=_divides(rows, call.rows) and _divides(stored, call.stored), **tiles.options(),
        )  # fmt: skip
    return out, product, h, first_scores, last_scores


def backward(
    d_out: Tensor,  # bh r n c d
    queries: Tensor,  # bh r n c d
    mix: Tensor,  # bh r n n
    shares: Tensor,  # bh r n k
    first_starts: Tensor | None,  # bh r k d e
    first_inputs: Tensor | None,  # bh r t d
    first_errors: Tensor | None,  # bh r t e
    last_starts: Tensor,  # bh r k e d
    last_inputs: Tensor,  # bh r t e
    last_errors: Tensor,  # bh r t d
    gamma: Tensor | None,  # bh r n d
    product: Tensor,
    hidden: Tensor,
    first_scores: Tensor,
    last_scores: Tensor,
    eps: float,
    operands: torch.dtype,
    precision: str,
) -> list[Tensor]:
    """The gradient of each tensor from `queries` to `gamma`; of no size for what is absent."""
    first = (first_starts, first_inputs, first_errors)
    given: tuple[Any, ...] = (queries, mix, shares, *first, last_starts, last_inputs, last_errors, gamma)
    call = _Call.of(operands, precision, *given)
    constants, has_first, count = call.constants, call.constants['HIDDEN'], call.constants['COUNT']
    d_out = d_out.contiguous()
    d_given = [d_out.new_empty(0) if t is None else t.new_empty(t.shape) for t in given]
    d_queries, _, _, d_first_starts, d_first_inputs, d_first_errors, d_last_starts, d_last_inputs, d_last_errors, _ = (
        d_given
    )
    d_hidden, activations = (hidden.new_empty(hidden.shape) for _ in range(2))
    d_first_scores, d_last_scores = (scores.new_empty(scores.shape) for scores in (first_scores, last_scores))
    d_product = last_scores.new_empty(*queries.shape[:2], call.rows, call.dim)

    tiles = call.tiles(QUERIES)
    # chunks are whole, or in parts
    own = min(_power(constants['rows']), tiles.rows)
    others = min(_power(constants['stored']), tiles.stored)
    most = _power(call.chunks)
    own_chunks, other_chunks = (
        max(16 // of_chunk, min(most, at_a_time // of_chunk), 1)
        for of_chunk, at_a_time in ((own, tiles.rows), (others, tiles.stored))
    )
    parts, stored_parts = triton.cdiv(constants['rows'], own), triton.cdiv(constants['stored'], others)
    lead = queries.shape[:2]
    # of pairs of chunks that no program looks at there is none
    d_mix = mix.new_zeros(*lead, parts * stored_parts, call.chunks, call.chunks)
    d_shares = shares.new_empty(*lead, parts, call.chunks, count)
    d_gamma = shares.new_empty((0,) if gamma is None else (*lead, parts, call.chunks, call.dim))
    blocks = triton.cdiv(call.chunks, own_chunks) * parts
    with torch.cuda.device_of(queries):
        _queries_kernel[(call.lanes * blocks,)](
            d_out, product, hidden, last_scores, *call.tensors,
            d_queries, d_mix, d_shares, d_gamma, d_product, d_hidden, activations, d_first_scores, d_last_scores,
            blocks, parts, stored_parts, call.runs, call.chunks, eps, *call.strides, **constants,
            PADDED=_power(count), CHUNKS=own_chunks, ROWS=own, STORED_CHUNKS=other_chunks, STORED_ROWS=others,
            WHOLE=_divides(own_chunks, call.chunks) and _divides(other_chunks, call.chunks)
            and _divides(own, constants['rows']) and _divides(others, constants['stored']),
            BLOCK=min(tiles.units, tile_size(call.width)), **tiles.options(),
        )  # fmt: skip

    for_stored = {name: value for name, value in constants.items() if name not in ('COUNT', 'NORM')}
    tiles = call.tiles(STORED)
    rows = min(tiles.rows, tile_size(call.rows))
    at_a_time, block = min(tiles.stored, tile_size(call.stored)), min(tiles.units, tile_size(call.width))
    blocks, pieces = triton.cdiv(call.stored, at_a_time), (triton.cdiv(call.width, block) if has_first else 0) + 1
    with torch.cuda.device_of(queries):
        _stored_kernel[(call.lanes * blocks * pieces,)](
            call.tensors[0], mix, d_product, d_hidden, activations,
            first_scores, last_scores, d_first_scores, d_last_scores,
            d_first_inputs, d_first_errors, d_last_inputs, d_last_errors,
            blocks, pieces, call.runs, call.chunks, *call.strides[:8], **for_stored,
            ROWS=rows, STORED=at_a_time, BLOCK=block,
            WHOLE=_divides(rows, call.rows) and _divides(at_a_time, call.stored), **tiles.options(),
        )  # fmt: skip

    for_starts = {name: value for name, value in constants.items() if name not in ('stored', 'NORM')}
    tiles = call.tiles(STARTS)
    rows = min(tiles.rows, tile_size(call.rows))
    block = min(tiles.units, tile_size(call.width))
    blocks = triton.cdiv(call.width, block)
    with torch.cuda.device_of(queries):
        _starts_kernel[(call.lanes * count * blocks,)](
            call.tensors[0], shares, d_product, d_hidden, activations, d_first_starts, d_last_starts,
            blocks, call.runs, call.chunks, *call.strides[:4], *call.strides[8:12], **for_starts,
            ROWS=rows, BLOCK=block, WHOLE=_divides(rows, call.rows), **tiles.options(),
        )  # fmt: skip

    d_mix, d_shares = _summed(d_mix), _summed(d_shares)
    d_gamma = d_gamma if gamma is None else _summed(d_gamma)
    of_first = (d_first_starts, d_first_inputs, d_first_errors)
    return [d_queries, d_mix, d_shares, *of_first, d_last_starts, d_last_inputs, d_last_errors, d_gamma]


class _Call(NamedTuple):
    """What the kernels are launched with."""

    tensors: tuple[Tensor, ...]
    strides: tuple[int, ...]
    constants: dict[str, Any]
    lanes: int
    """Runs of all heads."""
    runs: int
    chunks: int
    rows: int
    """Of queries in a run."""
    stored: int
    """Stored rows in a run."""
    dim: int
    width: int

    @classmethod
    def of(
        cls,
        operands: torch.dtype,
        precision: str,
        queries: Tensor,
        mix: Tensor,
        shares: Tensor,
        first_starts: Tensor | None,
        first_inputs: Tensor | None,
        first_errors: Tensor | None,
        last_starts: Tensor,
        last_inputs: Tensor,
        last_errors: Tensor,
        gamma: Tensor | None,
    ) -> _Call:
        heads, runs, chunks, rows, dim = queries.shape
        stored, width = last_inputs.shape[2:]
        # runs and heads may be cut out of anything, but not what a kernel reads in one piece
        queries = contiguous_inside(queries, 1)
        of_first = ((first_starts, 2), (first_inputs, 1), (first_errors, 1))
        of_last = ((last_starts, 2), (last_inputs, 1), (last_errors, 1))
        others = [None if t is None else contiguous_inside(t, axes) for t, axes in (*of_first, *of_last, (gamma, 1))]
        absent = mix.new_empty(0)

        strides = [*queries.stride()[:4], *mix.stride(), *shares.stride()]
        for t in others:
            strides += (0, 0, 0) if t is None else t.stride()[:3]
        tensors = (queries, mix, shares, *(absent if t is None else t for t in others))
        constants = {
            'dim': dim,
            'width': width,
            'rows': rows,
            'stored': stored // chunks,
            'COUNT': shares.shape[-1],
            'HIDDEN': first_starts is not None,
            'NORM': gamma is not None,
            'DIM': tile_size(dim),
            'PRECISION': precision,
            'OPERAND': TRITON_DTYPES[operands],
        }
        return cls(tensors, tuple(strides), constants, heads * runs, runs, chunks, chunks * rows, stored, dim, width)

    def tiles(self, both: tuple[Tiles, Tiles]) -> Tiles:
        """In float32 in full, or not; of as many rows as leave enough programs, and of less where rows are wide."""
        in_full = self.constants['PRECISION'] == 'tf32x3' and self.constants['OPERAND'] == tl.float32
        tiles = both[in_full]
        if self.lanes * triton.cdiv(self.rows, tiles.rows) < ENOUGH_PROGRAMS:
            tiles = tiles._replace(rows=min(tiles.rows, 32))
        if self.constants['DIM'] > 64:
            tiles = tiles._replace(units=min(tiles.units, 32), warps=8, registers=None)
        return tiles


def _summed(of_parts: Tensor) -> Tensor:
    # most often there is one
    return of_parts.squeeze(2) if of_parts.shape[2] == 1 else of_parts.sum(dim=2)


def _divides(part: int, whole: int) -> bool:
    return whole % part == 0


def _power(size: int) -> int:
    return triton.next_power_of_2(size)
