"""Memory batches in a row, stored in a memory MLP: one launch forward, one backward.

A lane is one head of one sequence; nothing goes from lane to lane. PROGRAMS of them share a lane. For each memory batch
there are two phases: of rows, which takes what `record` does, and of states, which takes what `ends` does; between
them the programs of a lane wait for each other, so that all must be on the GPU at once: a cooperative launch. States
and rows travel through global memory, and seldom leave its cache. The backward walks from the last memory batch to
the first, with the gradient G of the states after each in place. Equations and plain twins are in
`titans_pytorch.ops.memory_batch_scan`.

Every phase of every memory batch can be launched on its own as well: so several programs of a lane are tested where
there is no GPU and programs cannot wait.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._triton import TRITON_DTYPES, contiguous_inside, multiply_add, select, tile_size
from titans_pytorch.ops.final_state.triton import _four
from titans_pytorch.ops.inner_gradient.triton import (
    _backward_of_rows,
    _forward_of_rows,
    _outer_products,
    _rows_of,
    _sum_of_chunks,
    _summed,
)

# at most, programs of a multiprocessor, where that many fit, and of a lane: more find too little to do in a phase
OF_A_MULTIPROCESSOR, MOST_PROGRAMS = 2, 16
# rows of a block of the first phase, forward and backward; in float32 in full, products take twice the registers
MOST_ROWS, MOST_ROWS_IN_FULL = (32, 32), (16, 16)
# entries and columns, forward and backward, of the block of a matrix that is on chip at a time
BLOCK, MOST_COLUMNS, MOST_COLUMNS_IN_FULL = 4096, (64, 32), (64, 64)
# of each state, what is made at a time, forward, and the rows that are read at a time for it
STATE_BLOCK, STATE_BLOCK_IN_FULL, STATE_ROWS = (64, 64), (32, 64), 32
# hidden features whose states' gradients are made at a time, and the rows that are read at a time for it
UNITS, UNIT_ROWS = 64, 32
# forward and backward
WARPS, STAGES = (4, 4), (1, 2)
# entries of a state that are copied at a time
COPIED = 2048
# of a multiprocessor
REGISTERS = 2**16
# counters of lanes lie in lines of their own
COUNTER_STRIDE = 32


@triton.jit
def _meet(counter, target, MEETS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Waits until all programs of a lane are here, `target` arrivals since the launch; all they wrote can be read."""
    tl.debug_barrier()
    if MEETS:
        tl.atomic_add(counter, 1, sem='release', scope='gpu')
        arrived = tl.atomic_add(counter, 0, sem='acquire', scope='gpu')
        while arrived < target:
            arrived = tl.atomic_add(counter, 0, sem='acquire', scope='gpu')
        tl.debug_barrier()


@triton.jit
def _copy(  # type: ignore[no-untyped-def]
    start_0, start_1, start_2, start_3, head_0, head_1, head_2, head_3, starts, lane, part, programs,
    SIZE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The states at the start, to where each memory batch looks for them."""
    for k in tl.static_range(STATES):
        start = select(k, start_0, start_1, start_2, start_3) + lane * select(k, head_0, head_1, head_2, head_3)
        for first_entry in range(part * BLOCK, SIZE, programs * BLOCK):
            entry = first_entry + tl.arange(0, BLOCK)
            own = tl.load(start + entry, mask=entry < SIZE, other=0.0)
            tl.store(starts + k * SIZE + entry, own, mask=entry < SIZE)


@triton.jit
def _advance(  # type: ignore[no-untyped-def]
    inputs, input_chunk, input_row, errors, error_chunk, error_row, end, mix, starts, after, ended, more,
    first_tile, programs, chunks, rows,
    dim: tl.constexpr, width: tl.constexpr, STATES: tl.constexpr, PADDED: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Tiles of all states of a matrix after a memory batch, to `after` if there is one more of these, else to `ended`.
    The states' tiles lie one below the other, so that rows are read once for all."""
    across: tl.constexpr = (width + WIDTH - 1) // WIDTH
    tiles: tl.constexpr = (dim + DIM - 1) // DIM * across
    entry = tl.arange(0, PADDED * DIM)
    state = entry // DIM
    for tile in range(first_tile, tiles, programs):
        own_in = (tile // across) * DIM + entry % DIM
        own_out = (tile % across) * WIDTH + tl.arange(0, WIDTH)
        with_in, with_out = (state < STATES) & (own_in < dim), own_out < width
        place = own_in[:, None] * width + own_out[None, :]
        inside = with_in[:, None] & with_out[None, :]
        total = tl.zeros((PADDED * DIM, WIDTH), tl.float32)
        for first_row in range(0, chunks * rows, ROWS):
            index = first_row + tl.arange(0, ROWS)
            chunk, row, there = index // rows, index % rows, index < chunks * rows
            present = with_in[:, None] & there[None, :]
            share = tl.load(end + state[:, None] * chunks + chunk[None, :], mask=present, other=0.0)
            # loaded as it stands in the product, rows across
            from_inputs = inputs + (chunk * input_chunk + row * input_row)[None, :] + own_in[:, None]
            x = tl.load(from_inputs, mask=present, other=0.0).to(tl.float32)
            from_errors = errors + (chunk * error_chunk + row * error_row)[:, None] + own_out[None, :]
            delta = tl.load(from_errors, mask=there[:, None] & with_out[None, :], other=0.0)
            total = multiply_add(total, x * share, delta, PRECISION, OPERAND)
        for i in tl.static_range(STATES):
            of_start = tl.load(mix + state * STATES + i, mask=state < STATES, other=0.0)
            total += of_start[:, None] * tl.load(starts + i * dim * width + place, mask=inside, other=0.0)
        place += (state * dim * width)[:, None]
        if more:
            tl.store(after + place, total, mask=inside)
        else:
            tl.store(ended + place, total, mask=inside)


@triton.jit
def _advance_gamma(  # type: ignore[no-untyped-def]
    of_gamma, end, mix, starts, after, ended, more, chunks, parts, feature, dim: tl.constexpr,
    STATES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The same for γ, whose descents come in parts of a chunk."""
    with_dim = feature < dim
    for k in tl.static_range(STATES):
        total = tl.zeros((DIM,), tl.float32)
        for first_row in range(0, chunks * parts, 16):
            row = first_row + tl.arange(0, 16)
            share = tl.load(end + k * chunks + row // parts, mask=row < chunks * parts, other=0.0)
            inside = (row < chunks * parts)[:, None] & with_dim[None, :]
            own = tl.load(of_gamma + row[:, None] * dim + feature[None, :], mask=inside, other=0.0)
            total += tl.sum(share[:, None] * own, axis=0)
        for i in tl.static_range(STATES):
            of_start = tl.load(mix + k * STATES + i)
            total += of_start * tl.load(starts + i * dim + feature, mask=with_dim, other=0.0)
        if more:
            tl.store(after + k * dim + feature, total, mask=with_dim)
        else:
            tl.store(ended + k * dim + feature, total, mask=with_dim)


@triton.jit(do_not_specialize=['first_batch', 'last_batch', 'batches'])
def _forward_kernel(  # type: ignore[no-untyped-def]
    keys, values, step_sizes, end, end_starts,
    first_0, first_1, first_2, first_3, last_0, last_1, last_2, last_3, gamma_0, gamma_1, gamma_2, gamma_3,
    first_starts, last_starts, gamma_starts, first_end, last_end, gamma_end,
    hidden, hidden_errors, errors, of_gamma, losses, counters,
    first_batch, last_batch, batches, programs, blocks, parts, chunks, rows, eps,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
    first_head_0, first_head_1, first_head_2, first_head_3, last_head_0, last_head_1, last_head_2, last_head_3,
    gamma_head_0, gamma_head_1, gamma_head_2, gamma_head_3,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr,
    STATES: tl.constexpr, PADDED: tl.constexpr,
    START_PHASE: tl.constexpr, ROWS_PHASE: tl.constexpr, STATES_PHASE: tl.constexpr, MEETS: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    STATE_DIM: tl.constexpr, STATE_WIDTH: tl.constexpr, TURNED_DIM: tl.constexpr, TURNED_WIDTH: tl.constexpr,
    STATE_ROWS: tl.constexpr, COPIED: tl.constexpr, COUNTER_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    lane, part = (program // programs).to(tl.int64), program % programs
    counter = counters + lane * COUNTER_STRIDE
    feature = tl.arange(0, DIM)

    if START_PHASE:
        of_lane = lane * batches * STATES
        if HIDDEN:
            _copy(
                first_0, first_1, first_2, first_3, first_head_0, first_head_1, first_head_2, first_head_3,
                first_starts + of_lane * dim * width, lane, part, programs, dim * width, STATES, COPIED,
            )  # fmt: skip
        _copy(
            last_0, last_1, last_2, last_3, last_head_0, last_head_1, last_head_2, last_head_3,
            last_starts + of_lane * width * dim, lane, part, programs, width * dim, STATES, COPIED,
        )  # fmt: skip
        if NORM:
            _copy(
                gamma_0, gamma_1, gamma_2, gamma_3, gamma_head_0, gamma_head_1, gamma_head_2, gamma_head_3,
                gamma_starts + of_lane * dim, lane, part, programs, dim, STATES, COPIED,
            )  # fmt: skip
        _meet(counter, programs, MEETS)

    for batch in range(first_batch, last_batch):
        # where the memory batch lies among those of all lanes, and its rows
        own = lane * batches + batch
        start = own * chunks * rows
        own_keys = keys + lane * key_head + tl.cast(batch, tl.int64) * chunks * key_chunk
        at_first, at_last = first_starts + own * STATES * dim * width, last_starts + own * STATES * width * dim
        at_gamma = gamma_starts + own * STATES * dim
        own_gamma = of_gamma + own * chunks * parts * dim

        if ROWS_PHASE:
            own_values = values + lane * value_head + tl.cast(batch, tl.int64) * chunks * value_chunk
            own_steps = step_sizes + lane * step_head + tl.cast(batch, tl.int64) * chunks * step_chunk
            # nothing is added to any
            w_first, w_last, w_gamma = (at_first, at_first, 0.0), (at_last, at_last, 0.0), (at_gamma, at_gamma, 0.0)
            for block in range(part, blocks, programs):
                chunk, row, there = _rows_of(block, parts, chunks, rows, CHUNKS, ROWS)
                of_rows = _forward_of_rows(
                    own_keys, chunk * key_chunk + row * key_row, own_values, chunk * value_chunk + row * value_row,
                    own_steps, chunk * step_chunk + row * step_row, w_first, w_last, w_gamma,
                    hidden + start * width, hidden_errors + start * width, errors + start * dim, losses + start,
                    chunk * rows + row, there, feature, eps,
                    dim, width, HIDDEN, NORM, False, False, CHUNKS * ROWS, DIM, BLOCK, PRECISION, OPERAND,
                )  # fmt: skip
                if NORM:
                    of_chunks = _sum_of_chunks(of_rows, CHUNKS, ROWS, DIM)
                    summed = (block // parts) * CHUNKS + tl.arange(0, CHUNKS)
                    to_chunks = own_gamma + (summed * parts + block % parts)[:, None] * dim + feature[None, :]
                    tl.store(to_chunks, of_chunks, mask=(summed < chunks)[:, None] & (feature < dim)[None, :])
            _meet(counter, (2 * (batch - first_batch) + 2) * programs, MEETS)

        if STATES_PHASE:
            own_end, own_mix = end + own * STATES * chunks, end_starts + own * STATES * STATES
            more = batch + 1 < batches
            tiles: tl.constexpr = (dim + STATE_DIM - 1) // STATE_DIM * ((width + STATE_WIDTH - 1) // STATE_WIDTH)
            turned: tl.constexpr = (width + TURNED_DIM - 1) // TURNED_DIM * ((dim + TURNED_WIDTH - 1) // TURNED_WIDTH)
            if HIDDEN:
                _advance(
                    own_keys, key_chunk, key_row, hidden_errors + start * width, rows * width, width,
                    own_end, own_mix, at_first, at_first + STATES * dim * width,
                    first_end + lane * STATES * dim * width, more, part, programs, chunks, rows,
                    dim, width, STATES, PADDED, STATE_DIM, STATE_WIDTH, STATE_ROWS, PRECISION, OPERAND,
                )  # fmt: skip
                # tiles go on in turn
                _advance(
                    hidden + start * width, rows * width, width, errors + start * dim, rows * dim, dim,
                    own_end, own_mix, at_last, at_last + STATES * width * dim,
                    last_end + lane * STATES * width * dim, more, (part + programs - tiles % programs) % programs,
                    programs, chunks, rows,
                    width, dim, STATES, PADDED, TURNED_DIM, TURNED_WIDTH, STATE_ROWS, PRECISION, OPERAND,
                )  # fmt: skip
            else:
                _advance(
                    own_keys, key_chunk, key_row, errors + start * dim, rows * dim, dim,
                    own_end, own_mix, at_last, at_last + STATES * width * dim,
                    last_end + lane * STATES * width * dim, more, part, programs, chunks, rows,
                    width, dim, STATES, PADDED, TURNED_DIM, TURNED_WIDTH, STATE_ROWS, PRECISION, OPERAND,
                )  # fmt: skip
            if NORM:
                if part == (tiles * HIDDEN + turned) % programs:
                    _advance_gamma(
                        own_gamma, own_end, own_mix, at_gamma, at_gamma + STATES * dim,
                        gamma_end + lane * STATES * dim, more, chunks, parts, feature, dim, STATES, DIM,
                    )  # fmt: skip
            if more:
                _meet(counter, (2 * (batch - first_batch) + 3) * programs, MEETS)


@triton.jit
def _through(  # type: ignore[no-untyped-def]
    x, others, d_others, given, given_place, given_unit, states, end, of_shares, chunk, chunks,
    row_place, there, feature,
    dim: tl.constexpr, width: tl.constexpr, stride: tl.constexpr, other_stride: tl.constexpr, GIVEN: tl.constexpr,
    STATES: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """The way back through a matrix' states. Of X and Δ the shorter rows, x, are on chip whole, the others in blocks;
    G is turned so that it leads from the shorter to the others. Writes the gradient of the others, with what is given
    of it; returns that of x, and that of each row's shares."""
    nothing = tl.zeros((ROWS, BLOCK), tl.float32)
    state = tl.arange(0, PADDED)[None, :]
    d_x = tl.zeros((ROWS, DIM), tl.float32)
    for first_unit in range(0, width, BLOCK):
        unit = first_unit + tl.arange(0, BLOCK)
        units, present = row_place[:, None] * width + unit[None, :], there[:, None] & (unit < width)[None, :]
        y = tl.load(others + units, mask=present, other=0.0).to(tl.float32)
        if GIVEN:
            from_given = given + given_place[:, None] + (unit * given_unit)[None, :]
            d_y = tl.load(from_given, mask=present, other=0.0).to(tl.float32)
        else:
            d_y = nothing
        place = feature[:, None] * stride + unit[None, :] * other_stride
        inside = (feature < dim)[:, None] & (unit < width)[None, :]
        for k in tl.static_range(STATES):
            # state = Σ share · xᵀ y: of y Σ share · x G, of x Σ share · y Gᵀ, and of the share x G ∘ y
            g = tl.load(states + k * dim * width + place, mask=inside, other=0.0).to(OPERAND)
            share = tl.load(end + k * chunks + chunk, mask=there, other=0.0)[:, None]
            product = multiply_add(nothing, x, g, PRECISION, OPERAND)
            of_shares += tl.where(state == k, tl.sum(product * y, axis=1)[:, None], 0.0)
            d_y += share * product
            d_x = multiply_add(d_x, share * y, tl.trans(g), PRECISION, OPERAND)
        tl.store(d_others + units, d_y, mask=present)
    return d_x, of_shares


@triton.jit
def _retreat(  # type: ignore[no-untyped-def]
    states, starts, given, mix, d_mix, slot, slots, place, present, d_weight,
    SIZE: tl.constexpr, STATES: tl.constexpr, PADDED: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """A tile of G, in place: from after a memory batch to before it. A part of the gradient of `mix` goes to `slot`."""
    state = tl.arange(0, PADDED)
    there = (state < STATES)[:, None, None] & present[None, :, :]
    g = tl.load(states + (state * SIZE)[:, None, None] + place[None, :, :], mask=there, other=0.0)
    # what one thread has yet to read, another may write
    tl.debug_barrier()
    for i in tl.static_range(STATES):
        of_start = tl.load(mix + state * STATES + i, mask=state < STATES, other=0.0)
        d_start = tl.sum(of_start[:, None, None] * g, axis=0)
        if i == 0:
            # the weights that gradients were taken at
            d_start += d_weight
        if GIVEN:
            d_start += tl.load(given + i * SIZE + place, mask=present, other=0.0)
        start = tl.load(starts + i * SIZE + place, mask=present, other=0.0)
        of_mix = tl.sum(tl.sum(g * start[None, :, :], axis=2), axis=1)
        tl.store(d_mix + (state * STATES + i) * slots + slot, of_mix, mask=state < STATES)
        tl.store(states + i * SIZE + place, d_start, mask=present)


@triton.jit(do_not_specialize=['first_batch', 'last_batch', 'batches'])
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_first_starts, d_last_starts, d_gamma_starts, d_first, d_last, d_gamma,
    d_hidden, d_hidden_errors, d_errors, d_descent, d_losses,
    keys, values, step_sizes, end, end_starts, first_starts, last_starts, gamma_starts,
    hidden, hidden_errors, errors, descent, d_keys, d_values, d_step_sizes, d_end, d_mix,
    to_hidden, to_hidden_errors, to_errors, to_descent, of_products, of_y, of_h, of_gamma, counters,
    first_batch, last_batch, batches, programs, blocks, parts, steps, chunks, rows, eps,
    d_hidden_head, d_hidden_batch, d_hidden_row, d_hidden_unit,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr,
    STATES: tl.constexpr, PADDED: tl.constexpr,
    FIRST_STARTS: tl.constexpr, LAST_STARTS: tl.constexpr, GAMMA_STARTS: tl.constexpr, OF_HIDDEN: tl.constexpr,
    OF_HIDDEN_ERRORS: tl.constexpr, OF_ERRORS: tl.constexpr, OF_DESCENT: tl.constexpr, LOSSES: tl.constexpr,
    ROWS_PHASE: tl.constexpr, STATES_PHASE: tl.constexpr, MEETS: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    UNITS: tl.constexpr, UNIT_ROWS: tl.constexpr, COUNTER_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Memory batches first to last of those from the end on. A lane keeps the rows of one memory batch: the gradients
    that reach the network's products (to_…), and what the gradients of its weights are made of (of_…)."""
    program = tl.program_id(0)
    lane, part = (program // programs).to(tl.int64), program % programs
    counter = counters + lane * COUNTER_STRIDE
    feature = tl.arange(0, DIM)
    kept = lane * chunks * rows
    to_hidden += kept * width
    to_hidden_errors += kept * width
    to_errors += kept * dim
    to_descent += kept * dim
    of_products += kept * width
    of_y += kept * dim
    of_h += kept * width
    of_gamma += lane * blocks * dim
    d_first += lane * STATES * dim * width
    d_last += lane * STATES * width * dim
    d_gamma += lane * STATES * dim

    for step in range(first_batch, last_batch):
        batch = batches - 1 - step
        own = lane * batches + batch
        start = own * chunks * rows
        own_keys = keys + lane * key_head + tl.cast(batch, tl.int64) * chunks * key_chunk
        at_first, at_last = first_starts + own * STATES * dim * width, last_starts + own * STATES * width * dim
        at_gamma = gamma_starts + own * STATES * dim
        own_hidden, own_hidden_errors, own_errors = hidden, hidden_errors, errors + start * dim
        if HIDDEN:
            own_hidden += start * width
            own_hidden_errors += start * width

        if ROWS_PHASE:
            own_end = end + own * STATES * chunks
            own_values = values + lane * value_head + tl.cast(batch, tl.int64) * chunks * value_chunk
            own_steps = step_sizes + lane * step_head + tl.cast(batch, tl.int64) * chunks * step_chunk
            # often the gradient of what was transposed
            given_hidden = d_hidden + lane * d_hidden_head + tl.cast(batch, tl.int64) * d_hidden_batch
            w_first, w_last, w_gamma = (at_first, at_first, 0.0), (at_last, at_last, 0.0), (at_gamma, at_gamma, 0.0)
            state = tl.arange(0, PADDED)[None, :]
            for block in range(part, blocks, programs):
                chunk, row, there = _rows_of(block, parts, chunks, rows, CHUNKS, ROWS)
                inside = there[:, None] & (feature < dim)[None, :]
                row_place = chunk * rows + row
                features = row_place[:, None] * dim + feature[None, :]
                of_shares = tl.zeros((CHUNKS * ROWS, PADDED), tl.float32)

                # through the states, to X and Δ of each matrix
                key_place = chunk * key_chunk + row * key_row
                k = tl.load(own_keys + key_place[:, None] + feature[None, :], mask=inside, other=0.0).to(tl.float32)
                if HIDDEN:
                    delta = tl.load(own_errors + features, mask=inside, other=0.0).to(tl.float32)
                    d_delta, of_shares = _through(
                        delta, own_hidden, to_hidden, given_hidden, row_place * d_hidden_row, d_hidden_unit,
                        d_last, own_end, of_shares, chunk, chunks, row_place, there, feature,
                        dim, width, 1, dim, OF_HIDDEN, STATES, PADDED, CHUNKS * ROWS, DIM, BLOCK, PRECISION, OPERAND,
                    )  # fmt: skip
                    if OF_ERRORS:
                        given = tl.load(d_errors + start * dim + features, mask=inside, other=0.0)
                        d_delta += given.to(tl.float32)
                    tl.store(to_errors + features, d_delta, mask=inside)
                    d_k, of_shares = _through(
                        k, own_hidden_errors, to_hidden_errors, d_hidden_errors + start * width, row_place * width, 1,
                        d_first, own_end, of_shares, chunk, chunks, row_place, there, feature,
                        dim, width, width, 1, OF_HIDDEN_ERRORS,
                        STATES, PADDED, CHUNKS * ROWS, DIM, BLOCK, PRECISION, OPERAND,
                    )  # fmt: skip
                else:
                    d_k, of_shares = _through(
                        k, own_errors, to_errors, d_errors + start * dim, row_place * dim, 1,
                        d_last, own_end, of_shares, chunk, chunks, row_place, there, feature,
                        dim, dim, dim, 1, OF_ERRORS,
                        STATES, PADDED, CHUNKS * ROWS, DIM, BLOCK, PRECISION, OPERAND,
                    )  # fmt: skip
                if NORM:
                    # a chunk's descent of γ, with its first row
                    from_chunks = own * chunks * dim + chunk[:, None] * dim + feature[None, :]
                    of_chunk = tl.load(descent + from_chunks, mask=inside & (row == 0)[:, None], other=0.0)
                    d_chunk = tl.zeros((CHUNKS * ROWS, DIM), tl.float32)
                    if OF_DESCENT:
                        d_chunk = tl.load(d_descent + from_chunks, mask=inside, other=0.0)
                    for i in tl.static_range(STATES):
                        g = tl.load(d_gamma + i * dim + feature, mask=feature < dim, other=0.0)[None, :]
                        d_chunk += tl.load(own_end + i * chunks + chunk, mask=there, other=0.0)[:, None] * g
                        of_shares += tl.where(state == i, tl.sum(of_chunk * g, axis=1)[:, None], 0.0)
                    tl.store(to_descent + features, d_chunk, mask=inside)
                of_chunks = _sum_of_chunks(of_shares, CHUNKS, ROWS, PADDED)
                summed = (block // parts) * CHUNKS + tl.arange(0, CHUNKS)
                to_chunks = (own * STATES + state) * chunks * parts + (summed * parts + block % parts)[:, None]
                tl.store(d_end + to_chunks, of_chunks, mask=(summed < chunks)[:, None] & (state < STATES))

                # and through the network. What one thread wrote, others read
                tl.debug_barrier()
                of_keys, of_block = _backward_of_rows(
                    to_hidden, row_place * width, 1, to_hidden_errors, to_errors, to_descent, row_place,
                    d_losses + start, own_keys, key_place, own_values, chunk * value_chunk + row * value_row,
                    own_steps, chunk * step_chunk + row * step_row, w_first, w_last, w_gamma,
                    d_values + start * dim, d_step_sizes + start, of_products, of_y, of_h, row_place, there, feature,
                    eps, dim, width, HIDDEN, NORM, LOSSES, False, False, CHUNKS * ROWS, DIM, BLOCK, PRECISION, OPERAND,
                )  # fmt: skip
                tl.store(d_keys + start * dim + features, d_k + of_keys, mask=inside)
                if NORM:
                    tl.store(of_gamma + block * dim + feature, of_block, mask=feature < dim)
            _meet(counter, (2 * (step - first_batch) + 1) * programs, MEETS)

        if STATES_PHASE:
            own_mix = end_starts + own * STATES * STATES
            unit_blocks: tl.constexpr = (width + UNITS - 1) // UNITS
            slots: tl.constexpr = unit_blocks * (1 + HIDDEN) + NORM
            own_slots = d_mix + own * STATES * STATES * slots
            for block in range(part, unit_blocks, programs):
                unit = block * UNITS + tl.arange(0, UNITS)
                present = (unit < width)[:, None] & (feature < dim)[None, :]
                of_first, of_last = _outer_products(
                    own_keys, own_hidden, own_errors, of_products, of_y, of_h, 0, chunks * rows, steps, unit, feature,
                    rows, key_chunk, key_row, dim, width, HIDDEN, UNITS, UNIT_ROWS, DIM, PRECISION, OPERAND,
                )  # fmt: skip
                _retreat(
                    d_last, at_last, d_last_starts + own * STATES * width * dim, own_mix, own_slots, block, slots,
                    unit[:, None] * dim + feature[None, :], present, of_last,
                    width * dim, STATES, PADDED, LAST_STARTS,
                )  # fmt: skip
                if HIDDEN:
                    _retreat(
                        d_first, at_first, d_first_starts + own * STATES * dim * width, own_mix, own_slots,
                        unit_blocks + block, slots, feature[None, :] * width + unit[:, None], present, of_first,
                        dim * width, STATES, PADDED, FIRST_STARTS,
                    )  # fmt: skip
            if NORM:
                if part == unit_blocks % programs:
                    of_weight = _summed(of_gamma, blocks, feature, dim, DIM)
                    _retreat(
                        d_gamma, at_gamma, d_gamma_starts + own * STATES * dim, own_mix, own_slots, slots - 1, slots,
                        feature[None, :], (feature < dim)[None, :], of_weight[None, :],
                        dim, STATES, PADDED, GAMMA_STARTS,
                    )  # fmt: skip
            if step + 1 < batches:
                _meet(counter, (2 * (step - first_batch) + 2) * programs, MEETS)


def forward(
    keys: Tensor,  # bh r·n m d
    values: Tensor,  # bh r·n m d
    step_sizes: Tensor,  # bh r·n m
    first: list[Tensor],  # k of bh d e, or none
    last: list[Tensor],  # k of bh e d
    gamma: list[Tensor],  # k of bh d, or none
    end: Tensor,  # bh r k n
    end_starts: Tensor,  # bh r k k
    eps: float,
    operands: torch.dtype,
    precision: str,
) -> tuple[Tensor, ...]:
    """States before each memory batch, and after the last; what rows leave; descents of γ and losses."""
    width = last[0].shape[1]
    call = _Call.of(keys, values, step_sizes, end, end_starts, width, bool(first), bool(gamma), operands, precision, 0)
    heads, batches, count, chunks = end.shape
    rows, dim = keys.shape[2:]
    absent = end.new_empty(0)
    first, last = ([contiguous_inside(t, 2) for t in states] for states in (first, last))
    starts = first, last, [contiguous_inside(t, 1) for t in gamma]
    before, ended = (
        [end.new_empty((*axes, count, *own[0].shape[1:]) if own else (0,)) for own in starts]
        for axes in ((heads, batches), (heads,))
    )
    hidden, hidden_errors, errors = (
        keys.new_empty((heads, batches, chunks * rows, features) if features else (0,), dtype=operands)
        for features in (width * bool(first), width * bool(first), dim)
    )
    of_gamma = end.new_empty((heads, batches, chunks, call.parts, dim) if gamma else (0,))
    losses = end.new_empty(heads, batches, chunks, rows)
    largest = STATE_BLOCK_IN_FULL if call.in_full else STATE_BLOCK
    own_in, own_out = (min(tile_size(size), most) for size, most in zip((dim, width), largest))
    turned_in, turned_out = (min(tile_size(size), most) for size, most in zip((width, dim), largest))
    given = [own or [absent] for own in starts]
    call.launch(
        _forward_kernel,
        (
            *call.tensors, *(t for own in given for t in _four(own)),
            *before, *ended, hidden, hidden_errors, errors, of_gamma, losses,
        ),
        (call.blocks, call.parts, chunks, rows, eps, *call.strides, *(n for own in given for n in _four(_heads(own)))),
        {
            'STATE_DIM': own_in,
            'STATE_WIDTH': own_out,
            'TURNED_DIM': turned_in,
            'TURNED_WIDTH': turned_out,
            'STATE_ROWS': STATE_ROWS,
            'COPIED': COPIED,
        },
        starts=True,
    )  # fmt: skip
    if gamma:
        of_gamma = of_gamma.sum(dim=3) if call.parts > 1 else of_gamma.view(heads, batches, chunks, dim)
    return *before, *ended, hidden, hidden_errors, errors, of_gamma, losses


def backward(
    d_outputs: tuple[Tensor | None, ...],
    keys: Tensor,  # bh r·n m d
    values: Tensor,  # bh r·n m d
    step_sizes: Tensor,  # bh r·n m
    end: Tensor,  # bh r k n
    end_starts: Tensor,  # bh r k k
    starts: tuple[Tensor, ...],  # bh r k ·
    hidden: Tensor,  # bh r t e
    hidden_errors: Tensor,  # bh r t e
    errors: Tensor,  # bh r t d
    descent: Tensor,  # bh r n d
    eps: float,
    operands: torch.dtype,
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of rows, of each parameter's states at the start (bh, k, ·), of `end` and of `end_starts`."""
    width, with_first, with_gamma = starts[1].shape[3], starts[0].numel() > 0, starts[2].numel() > 0
    call = _Call.of(keys, values, step_sizes, end, end_starts, width, with_first, with_gamma, operands, precision, 1)
    heads, batches, count, chunks = end.shape
    rows, dim = keys.shape[2:]
    absent = end.new_empty(0)
    d_starts, d_ends, (d_hidden, *d_rows) = d_outputs[:3], d_outputs[3:6], d_outputs[6:]
    # G, which comes to be the gradient of the states at the start
    states = [
        end.new_zeros((heads, *own.shape[2:]) if own.numel() else (0,))
        if d is None
        else d.clone(memory_format=torch.contiguous_format)
        for own, d in zip(starts, d_ends)
    ]
    d_keys, d_values, d_step_sizes = (t.new_empty(t.shape) for t in (keys, values, step_sizes))
    d_end = end.new_empty(*end.shape, call.parts)
    units = min(UNITS, tile_size(width), BLOCK // tile_size(dim))
    slots = triton.cdiv(width, units) * (1 + with_first) + with_gamma
    d_mix = end.new_empty(*end_starts.shape, slots)

    def kept(features: int, dtype: torch.dtype = operands) -> Tensor:
        """Rows of one memory batch of each lane."""
        return keys.new_empty((heads, chunks * rows, features) if features else (0,), dtype=dtype)

    e = width * with_first
    given = [absent if d is None else d.contiguous() for d in (*d_starts, *d_rows)]
    call.launch(
        _backward_kernel,
        (
            *given[:3], *states, absent if d_hidden is None else d_hidden, *given[3:], *call.tensors, *starts,
            hidden, hidden_errors, errors, descent, d_keys, d_values, d_step_sizes, d_end, d_mix,
            kept(e), kept(e), kept(dim), kept(dim * with_gamma, end.dtype), kept(e), kept(dim), kept(e),
            end.new_empty((heads, call.blocks, dim) if with_gamma else (0,)),
        ),
        (
            call.blocks, call.parts, triton.cdiv(chunks * rows, UNIT_ROWS), chunks, rows, eps,
            *((0,) * 4 if d_hidden is None else d_hidden.stride()), *call.strides,
        ),
        {
            **dict(zip(('FIRST_STARTS', 'LAST_STARTS', 'GAMMA_STARTS'), (d is not None for d in d_starts))),
            'OF_HIDDEN': d_hidden is not None,
            **dict(zip(('OF_HIDDEN_ERRORS', 'OF_ERRORS', 'OF_DESCENT', 'LOSSES'), (d is not None for d in d_rows))),
            'UNITS': units,
            'UNIT_ROWS': UNIT_ROWS,
        },
    )  # fmt: skip
    d_shares = d_end.sum(dim=-1) if call.parts > 1 else d_end.view(end.shape)
    return d_keys, d_values, d_step_sizes, *states, d_shares, d_mix.sum(dim=-1)


def _programs(lanes: int, rows: Tensor) -> tuple[int, bool]:
    """Of a lane, and whether all phases are one launch."""
    if not rows.is_cuda:
        return 1, True
    fit = torch.cuda.get_device_properties(rows.device).multi_processor_count * OF_A_MULTIPROCESSOR
    return max(1, min(fit // lanes, MOST_PROGRAMS)), True


class _Call(NamedTuple):
    """What both kernels are launched with."""

    tensors: tuple[Tensor, ...]
    batches: int
    programs: int
    together: bool
    in_full: bool
    blocks: int
    parts: int
    strides: tuple[int, ...]
    constants: dict[str, Any]

    @classmethod
    def of(
        cls,
        keys: Tensor,
        values: Tensor,
        step_sizes: Tensor,
        end: Tensor,
        end_starts: Tensor,
        width: int,
        with_first: bool,
        with_gamma: bool,
        operands: torch.dtype,
        precision: str,
        back: int,
    ) -> _Call:
        keys, values = (contiguous_inside(t, 1) for t in (keys, values))
        lanes, batches, count, chunks = end.shape
        rows, dim = keys.shape[2:]
        programs, together = _programs(lanes, keys)
        in_full = precision == 'tf32x3' and operands == torch.float32
        padded = tile_size(dim)
        # a block of rows for each program, if there are so many
        own, most = 16, (MOST_ROWS_IN_FULL if in_full else MOST_ROWS)[back]
        while own < most and own * programs < chunks * rows:
            own *= 2
        columns = (MOST_COLUMNS_IN_FULL if in_full else MOST_COLUMNS)[back]
        of_chunk = min(triton.next_power_of_2(rows), own)
        parts = triton.cdiv(rows, of_chunk)
        constants = {
            'dim': dim,
            'width': width,
            'HIDDEN': with_first,
            'NORM': with_gamma,
            'STATES': count,
            'PADDED': triton.next_power_of_2(count),
            'CHUNKS': own // of_chunk,
            'ROWS': of_chunk,
            'DIM': padded,
            'BLOCK': min(tile_size(width), columns, BLOCK // padded, max(32, padded)),
            'COUNTER_STRIDE': COUNTER_STRIDE,
            'PRECISION': precision,
            'OPERAND': TRITON_DTYPES[operands],
            'num_warps': WARPS[back],
            # one, where two take more memory than a multiprocessor of compute capability 8.6 has
            'num_stages': 1 if in_full and padded > 64 else STAGES[back],
        }
        return cls(
            (keys, values, step_sizes, end.contiguous(), end_starts.contiguous()),
            batches,
            programs,
            together,
            in_full,
            triton.cdiv(chunks, own // of_chunk) * parts,
            parts,
            (*keys.stride()[:3], *values.stride()[:3], *step_sizes.stride()),
            constants,
        )

    def launch(
        self,
        kernel: Any,
        tensors: tuple[Tensor, ...],
        numbers: tuple[Any, ...],
        constants: dict[str, Any],
        starts: bool = False,
    ) -> None:
        """All phases of all memory batches, in one launch or in one each; `starts`: and one before them all."""
        keys = self.tensors[0]
        lanes = len(keys)

        def phases(
            first_batch: int, last_batch: int, start: bool, of_rows: bool, of_states: bool, meets: bool = False
        ) -> None:
            own = {'ROWS_PHASE': of_rows, 'STATES_PHASE': of_states, 'MEETS': meets}
            own |= {'START_PHASE': start} if starts else {}
            given = {**self.constants, **constants, **own}
            programs, options = self.programs, {}
            if meets:
                # those that wait for each other must all be there
                counters = torch.zeros(lanes * COUNTER_STRIDE, dtype=torch.int32, device=keys.device)
                args = (*tensors, counters, first_batch, last_batch, self.batches, programs, *numbers)
                programs = min(programs, _resident(kernel, args, given, keys.device) // lanes)
                options = {'launch_cooperative_grid': True}
            else:
                counters = keys.new_empty(0, dtype=torch.int32)
            args = (*tensors, counters, first_batch, last_batch, self.batches, programs, *numbers)
            kernel[(lanes * programs,)](*args, **given, **options)

        with torch.cuda.device_of(keys):
            if self.together:
                phases(0, self.batches, True, True, True, meets=self.programs > 1)
                return
            if starts:
                phases(0, 0, True, False, False)
            for batch in range(self.batches):
                phases(batch, batch + 1, False, True, False)
                phases(batch, batch + 1, False, False, True)


# by what kernels are compiled for, but for numbers: they hardly change registers or memory, and with four warps two
# programs fit whatever the registers
_RESIDENT: dict[Any, int] = {}


def _resident(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], device: torch.device) -> int:
    """Programs of a kernel that the GPU holds at a time."""
    dtypes = tuple(arg.dtype for arg in args if isinstance(arg, Tensor))
    key = kernel, device, dtypes, tuple(constants.items())
    if key not in _RESIDENT:
        compiled = kernel.warmup(*args, grid=(1,), launch_cooperative_grid=True, **constants)
        compiled._init_handles()
        gpu = torch.cuda.get_device_properties(device)
        warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
        # a warp gets registers by 256, and each program a KiB of shared memory for the system
        by_registers = REGISTERS // (warps * 256 * triton.cdiv(compiled.n_regs * 32, 256))
        by_memory = gpu.shared_memory_per_multiprocessor // (triton.cdiv(shared, 1024) * 1024 + 1024)
        by_threads = gpu.max_threads_per_multi_processor // (32 * warps)
        _RESIDENT[key] = max(1, min(by_registers, by_memory, by_threads)) * gpu.multi_processor_count
    return _RESIDENT[key]


def _heads(few: list[Tensor]) -> list[int]:
    return [t.stride(0) for t in few]
