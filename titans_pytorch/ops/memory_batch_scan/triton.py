"""Kernels of the scan over memory batches: one launch forward, one backward.

Several programs share a head of a sequence. Each memory batch has two phases: a phase of rows, which computes the inner
gradient, and a phase of states, which updates the states in place. Between phases the programs of a head wait for each
other, so all of them must be on the GPU at once, in a cooperative launch. States and rows pass through global memory
but seldom leave its cache. Products read a copy of the states in their own precision. The backward pass goes from the
last memory batch to the first and updates the gradient G of the states after each, and a copy of it, in place.

Every phase of every memory batch can also be launched on its own. That is how several programs per head are tested
without a GPU, where programs cannot wait.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import (
    contiguous_inside,
    multiply_add,
    named_strides,
    numbered,
    product_precision,
    select,
    sum_rows,
    tile_size,
)
from titans_pytorch.ops._triton_cooperative import COUNTER_STRIDE, new_counters, resident_programs, wait_for_all
from titans_pytorch.ops.inner_gradient.triton import (
    backward_of_rows,
    block_of_rows,
    forward_of_rows,
    outer_products,
    rows_of_block,
    sum_rows_of_chunks,
)

# whether programs of a head wait for each other on a GPU; otherwise each phase is a launch
PROGRAMS_WAIT = True
# most programs per multiprocessor, if that many fit, and per head: more would find too little to do in a phase
PROGRAMS_PER_MULTIPROCESSOR, MOST_PROGRAMS = 2, 16
# rows in a block of the first phase, forward and backward; in full float32, products take twice the registers
MOST_ROWS, MOST_ROWS_IN_FULL = (32, 32), (16, 16)
# entries and columns of the block of a matrix that is on chip at a time; forward and backward, entries of rows
BLOCK, MOST_COLUMNS, MOST_ENTRIES = 4096, 64, (2048, 1024)
# forward, the tile of each state that is computed at a time, and the rows that are read at a time for it
STATE_BLOCK, STATE_BLOCK_IN_FULL, STATE_ROWS = (64, 64), (32, 64), 32
# hidden features whose states' gradients are computed at a time, and the rows read at a time for them
UNITS, UNIT_ROWS = 32, 32
WARPS = 4
STAGES = 3
# entries of a state copied at a time
COPIED = 2048


@triton.jit
def _copy(  # type: ignore[no-untyped-def]
    state_0, state_1, state_2, state_3, head_0, head_1, head_2, head_3, states, initial, head, part, programs,
    SIZE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy initial states to where they are updated and to where the first memory batch reads them."""
    for k in tl.static_range(STATES):
        state = select(k, state_0, state_1, state_2, state_3) + head * select(k, head_0, head_1, head_2, head_3)
        for first_entry in range(part * BLOCK, SIZE, programs * BLOCK):
            entry = first_entry + tl.arange(0, BLOCK)
            own = tl.load(state + entry, mask=entry < SIZE, other=0.0)
            tl.store(states + k * SIZE + entry, own, mask=entry < SIZE)
            tl.store(initial + k * SIZE + entry, own, mask=entry < SIZE)


@triton.jit
def _load_states(states, offset, inside, size, STATES: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of each of up to four states, `size` entries apart; missing states repeat the first."""
    first = tl.load(states + offset, mask=inside, other=0.0)
    second, third, fourth = first, first, first
    if STATES > 1:
        second = tl.load(states + size + offset, mask=inside, other=0.0)
    if STATES > 2:
        third = tl.load(states + 2 * size + offset, mask=inside, other=0.0)
    if STATES > 3:
        fourth = tl.load(states + 3 * size + offset, mask=inside, other=0.0)
    return first, second, third, fourth


@triton.jit
def _load_mix(initial_coefficients, STATES: tl.constexpr):  # type: ignore[no-untyped-def]
    """For each state after a memory batch, the coefficients of the states before it."""
    of_first = _load_states(initial_coefficients, 0, True, 1, STATES)
    second, third, fourth = of_first, of_first, of_first
    if STATES > 1:
        second = _load_states(initial_coefficients + STATES, 0, True, 1, STATES)
    if STATES > 2:
        third = _load_states(initial_coefficients + 2 * STATES, 0, True, 1, STATES)
    if STATES > 3:
        fourth = _load_states(initial_coefficients + 3 * STATES, 0, True, 1, STATES)
    return of_first, second, third, fourth


@triton.jit
def _advance(  # type: ignore[no-untyped-def]
    inputs, input_chunk, input_row, deltas, delta_chunk, delta_row, coefficients, initial_coefficients,
    states, next_initial, more, first_tile, programs, chunks, rows,
    dim: tl.constexpr, width: tl.constexpr, STATES: tl.constexpr, PADDED: tl.constexpr, SCALAR: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Update tiles of all states of a matrix in place to those after a memory batch, and copy them if another memory
    batch follows. If rows share a coefficient, their product is formed only once; otherwise the states' tiles are
    stacked, so that rows are read once for all states."""
    across: tl.constexpr = (width + WIDTH - 1) // WIDTH
    tiles: tl.constexpr = (dim + DIM - 1) // DIM * across
    stacked: tl.constexpr = 1 if SCALAR else PADDED
    entry = tl.arange(0, stacked * DIM)
    state = entry // DIM
    for tile in range(first_tile, tiles, programs):
        own_in = (tile // across) * DIM + entry % DIM
        own_out = (tile % across) * WIDTH + tl.arange(0, WIDTH)
        with_in, with_out = (state < STATES) & (own_in < dim), own_out < width
        offset = own_in[:, None] * width + own_out[None, :]
        inside = with_in[:, None] & with_out[None, :]
        total = tl.zeros((stacked * DIM, WIDTH), tl.float32)
        # stacked states leave no registers for prefetching
        for first_row in tl.range(0, chunks * rows, ROWS, num_stages=2 if SCALAR else 1):
            index = first_row + tl.arange(0, ROWS)
            chunk, row, valid = index // rows, index % rows, index < chunks * rows
            present = with_in[:, None] & valid[None, :]
            # loaded in the orientation of the product, with rows across
            from_inputs = inputs + (chunk * input_chunk + row * input_row)[None, :] + own_in[:, None]
            x = tl.load(from_inputs, mask=present, other=0.0).to(tl.float32)
            if not SCALAR:
                x *= tl.load(coefficients + state[:, None] * chunks + chunk[None, :], mask=present, other=0.0)
            from_deltas = deltas + (chunk * delta_chunk + row * delta_row)[:, None] + own_out[None, :]
            delta = tl.load(from_deltas, mask=valid[:, None] & with_out[None, :], other=0.0)
            total = multiply_add(total, x, delta, PRECISION, OPERAND)
        if SCALAR:
            own = _load_states(states, offset, inside, dim * width, STATES)
            mix = _load_mix(initial_coefficients, STATES)
            # one thread may write what another has yet to read
            tl.debug_barrier()
            for k in tl.static_range(STATES):
                advanced = tl.load(coefficients + k) * total
                for i in tl.static_range(STATES):
                    advanced += mix[k][i] * own[i]
                tl.store(states + k * dim * width + offset, advanced, mask=inside)
                if more:
                    tl.store(next_initial + k * dim * width + offset, advanced, mask=inside)
        else:
            for i in tl.static_range(STATES):
                initial_coefficient = tl.load(initial_coefficients + state * STATES + i, mask=state < STATES, other=0.0)
                own = tl.load(states + i * dim * width + offset, mask=inside, other=0.0)
                total += initial_coefficient[:, None] * own
            tl.debug_barrier()
            offset += (state * dim * width)[:, None]
            tl.store(states + offset, total, mask=inside)
            if more:
                tl.store(next_initial + offset, total, mask=inside)


@triton.jit
def _advance_gamma(  # type: ignore[no-untyped-def]
    of_gamma, coefficients, initial_coefficients, initial, states, next_initial, more, chunks, parts, feature,
    dim: tl.constexpr, STATES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The same for γ; its negative gradients come in parts of a chunk."""
    with_dim = feature < dim
    for k in tl.static_range(STATES):
        total = tl.zeros((DIM,), tl.float32)
        for first_row in range(0, chunks * parts, 16):
            row = first_row + tl.arange(0, 16)
            coefficient = tl.load(coefficients + k * chunks + row // parts, mask=row < chunks * parts, other=0.0)
            inside = (row < chunks * parts)[:, None] & with_dim[None, :]
            own = tl.load(of_gamma + row[:, None] * dim + feature[None, :], mask=inside, other=0.0)
            total += tl.sum(coefficient[:, None] * own, axis=0)
        for i in tl.static_range(STATES):
            initial_coefficient = tl.load(initial_coefficients + k * STATES + i)
            total += initial_coefficient * tl.load(initial + i * dim + feature, mask=with_dim, other=0.0)
        tl.store(states + k * dim + feature, total, mask=with_dim)
        if more:
            tl.store(next_initial + k * dim + feature, total, mask=with_dim)


@triton.jit(do_not_specialize=['first_batch', 'last_batch', 'batches'])
def _forward_kernel(  # type: ignore[no-untyped-def]
    keys, values, step_sizes, coefficients, initial_coefficients,
    first_0, first_1, first_2, first_3, last_0, last_1, last_2, last_3, gamma_0, gamma_1, gamma_2, gamma_3,
    first_initial, last_initial, gamma_initial, first_final, last_final, gamma_final,
    hidden, hidden_deltas, deltas, of_gamma, losses, counters,
    first_batch, last_batch, batches, programs, blocks, parts, chunks, rows, eps,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
    first_head_0, first_head_1, first_head_2, first_head_3, last_head_0, last_head_1, last_head_2, last_head_3,
    gamma_head_0, gamma_head_1, gamma_head_2, gamma_head_3,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr,
    STATES: tl.constexpr, PADDED: tl.constexpr, SCALAR: tl.constexpr,
    INITIAL_PHASE: tl.constexpr, ROWS_PHASE: tl.constexpr, STATES_PHASE: tl.constexpr, WAITS: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    FIRST_DIM: tl.constexpr, FIRST_WIDTH: tl.constexpr, LAST_DIM: tl.constexpr, LAST_WIDTH: tl.constexpr,
    STATE_ROWS: tl.constexpr, COPIED: tl.constexpr, COUNTER_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head, part = (program // programs).to(tl.int64), program % programs
    counter = counters + head * COUNTER_STRIDE
    feature = tl.arange(0, DIM)

    if INITIAL_PHASE:
        of_head = head * batches * STATES
        if HIDDEN:
            _copy(
                first_0, first_1, first_2, first_3, first_head_0, first_head_1, first_head_2, first_head_3,
                first_final + head * STATES * dim * width, first_initial + of_head * dim * width,
                head, part, programs, dim * width, STATES, COPIED,
            )  # fmt: skip
        _copy(
            last_0, last_1, last_2, last_3, last_head_0, last_head_1, last_head_2, last_head_3,
            last_final + head * STATES * width * dim, last_initial + of_head * width * dim,
            head, part, programs, width * dim, STATES, COPIED,
        )  # fmt: skip
        if NORM:
            _copy(
                gamma_0, gamma_1, gamma_2, gamma_3, gamma_head_0, gamma_head_1, gamma_head_2, gamma_head_3,
                gamma_final + head * STATES * dim, gamma_initial + of_head * dim,
                head, part, programs, dim, STATES, COPIED,
            )  # fmt: skip
        wait_for_all(counter, programs, WAITS)

    for batch in range(first_batch, last_batch):
        # index of the memory batch among those of all heads, and of its first row
        own = head * batches + batch
        start = own * chunks * rows
        own_keys = keys + head * key_head + tl.cast(batch, tl.int64) * chunks * key_chunk
        at_first, at_last = first_initial + own * STATES * dim * width, last_initial + own * STATES * width * dim
        at_gamma = gamma_initial + own * STATES * dim
        own_gamma = of_gamma + own * chunks * parts * dim

        if ROWS_PHASE:
            own_values = values + head * value_head + tl.cast(batch, tl.int64) * chunks * value_chunk
            own_steps = step_sizes + head * step_head + tl.cast(batch, tl.int64) * chunks * step_chunk
            # there are no residual weights
            w_first, w_last, w_gamma = (at_first, at_first, 0.0), (at_last, at_last, 0.0), (at_gamma, at_gamma, 0.0)
            for block in range(part, blocks, programs):
                chunk, row, valid = rows_of_block(block, parts, chunks, rows, CHUNKS, ROWS)
                of_rows = forward_of_rows(
                    own_keys, chunk * key_chunk + row * key_row, own_values, chunk * value_chunk + row * value_row,
                    own_steps, chunk * step_chunk + row * step_row, w_first, w_last, w_gamma,
                    hidden + start * width, hidden_deltas + start * width, deltas + start * dim, losses + start,
                    chunk * rows + row, valid, feature, eps,
                    dim, width, HIDDEN, NORM, False, False, CHUNKS * ROWS, DIM, BLOCK, PRECISION, OPERAND,
                )  # fmt: skip
                if NORM:
                    of_chunks = sum_rows_of_chunks(of_rows, CHUNKS, ROWS, DIM)
                    summed = (block // parts) * CHUNKS + tl.arange(0, CHUNKS)
                    to_chunks = own_gamma + (summed * parts + block % parts)[:, None] * dim + feature[None, :]
                    tl.store(to_chunks, of_chunks, mask=(summed < chunks)[:, None] & (feature < dim)[None, :])
            wait_for_all(counter, (2 * (batch - first_batch) + 2) * programs, WAITS)

        if STATES_PHASE:
            own_coefficients = coefficients + own * STATES * chunks
            own_initial_coefficients = initial_coefficients + own * STATES * STATES
            more = batch + 1 < batches
            first_tiles: tl.constexpr = (dim + FIRST_DIM - 1) // FIRST_DIM * ((width + FIRST_WIDTH - 1) // FIRST_WIDTH)
            last_tiles: tl.constexpr = (width + LAST_DIM - 1) // LAST_DIM * ((dim + LAST_WIDTH - 1) // LAST_WIDTH)
            if HIDDEN:
                _advance(
                    own_keys, key_chunk, key_row, hidden_deltas + start * width, rows * width, width,
                    own_coefficients, own_initial_coefficients, first_final + head * STATES * dim * width,
                    at_first + STATES * dim * width, more, part, programs, chunks, rows,
                    dim, width, STATES, PADDED, SCALAR, FIRST_DIM, FIRST_WIDTH, STATE_ROWS, PRECISION, OPERAND,
                )  # fmt: skip
                # the programs take the tiles of both matrices in turn
                _advance(
                    hidden + start * width, rows * width, width, deltas + start * dim, rows * dim, dim,
                    own_coefficients, own_initial_coefficients, last_final + head * STATES * width * dim,
                    at_last + STATES * width * dim, more,
                    (part + programs - first_tiles % programs) % programs, programs, chunks, rows,
                    width, dim, STATES, PADDED, SCALAR, LAST_DIM, LAST_WIDTH, STATE_ROWS, PRECISION, OPERAND,
                )  # fmt: skip
            else:
                _advance(
                    own_keys, key_chunk, key_row, deltas + start * dim, rows * dim, dim,
                    own_coefficients, own_initial_coefficients, last_final + head * STATES * width * dim,
                    at_last + STATES * width * dim, more, part, programs, chunks, rows,
                    width, dim, STATES, PADDED, SCALAR, LAST_DIM, LAST_WIDTH, STATE_ROWS, PRECISION, OPERAND,
                )  # fmt: skip
            if NORM:
                if part == (first_tiles * HIDDEN + last_tiles) % programs:
                    _advance_gamma(
                        own_gamma, own_coefficients, own_initial_coefficients, at_gamma,
                        gamma_final + head * STATES * dim, at_gamma + STATES * dim,
                        more, chunks, parts, feature, dim, STATES, DIM,
                    )  # fmt: skip
            if more:
                wait_for_all(counter, (2 * (batch - first_batch) + 3) * programs, WAITS)


@triton.jit
def _replaced(four, index: tl.constexpr, value):  # type: ignore[no-untyped-def]
    """A tuple of four with one value replaced."""
    first, second, third, fourth = four
    if index == 0:
        first = value
    if index == 1:
        second = value
    if index == 2:
        third = value
    if index == 3:
        fourth = value
    return first, second, third, fourth


@triton.jit
def _backward_of_states(  # type: ignore[no-untyped-def]
    x, others, d_others, given, given_offset, given_unit, states, coefficients, of_coefficients, chunk, chunks,
    row_offset, valid, feature,
    dim: tl.constexpr, width: tl.constexpr, stride: tl.constexpr, other_stride: tl.constexpr, GIVEN: tl.constexpr,
    STATES: tl.constexpr, PADDED: tl.constexpr, SCALAR: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Go back through the states of a matrix. Of X and Δ, the shorter rows, x, are on chip whole, the others in blocks;
    G is read so that it maps the shorter ones to the others. Writes the gradient of the others, added to what is
    already given. Returns that of x and that of each row's coefficients; if these are `SCALAR`, that is, the same for
    all rows, they have no gradient."""
    nothing = tl.zeros((ROWS, BLOCK), tl.float32)
    d_x = tl.zeros((ROWS, DIM), tl.float32)
    of_states = d_x, d_x, d_x, d_x
    if SCALAR:
        c = _load_states(coefficients, 0, True, 1, STATES)
    else:
        c = _load_states(coefficients, chunk[:, None], valid[:, None], chunks, STATES)
    upcoming = 0.0
    if GIVEN:
        upcoming = block_of_rows(given, given_offset, given_unit, 0, valid, width, BLOCK)
    for first_unit in range(0, width, BLOCK):
        unit = first_unit + tl.arange(0, BLOCK)
        units, present = row_offset[:, None] * width + unit[None, :], valid[:, None] & (unit < width)[None, :]
        y = tl.load(others + units, mask=present, other=0.0).to(OPERAND)
        d_y = nothing
        if GIVEN:
            d_y += upcoming.to(tl.float32)  # type: ignore[attr-defined]
            upcoming = block_of_rows(given, given_offset, given_unit, first_unit + BLOCK, valid, width, BLOCK)
        offset = feature[:, None] * stride + unit[None, :] * other_stride
        inside = (feature < dim)[:, None] & (unit < width)[None, :]
        g = _load_states(states, offset, inside, dim * width, STATES)
        # state = Σ c · xᵀ y gives the gradients Σ c · x G for y, Σ c · y Gᵀ for x, and y Gᵀ ∘ x for c
        if SCALAR:
            together = tl.zeros((DIM, BLOCK), tl.float32)
            for k in tl.static_range(STATES):
                together += c[k] * g[k].to(tl.float32)
            together = together.to(OPERAND)
            d_y = multiply_add(d_y, x, together, PRECISION, OPERAND)
            d_x = multiply_add(d_x, y, tl.trans(together), PRECISION, OPERAND)
        else:
            for k in tl.static_range(STATES):
                d_y += c[k] * multiply_add(nothing, x, g[k], PRECISION, OPERAND)
                of_state = multiply_add(of_states[k], y, tl.trans(g[k]), PRECISION, OPERAND)
                of_states = _replaced(of_states, k, of_state)
        tl.store(d_others + units, d_y, mask=present)
    if not SCALAR:
        for k in tl.static_range(STATES):
            d_x += c[k] * of_states[k]
            of_coefficient = tl.sum(of_states[k] * x, axis=1)[:, None]
            of_coefficients += tl.where(tl.arange(0, PADDED)[None, :] == k, of_coefficient, 0.0)
    return d_x, of_coefficients


@triton.jit
def _step_back(  # type: ignore[no-untyped-def]
    states, copies, initial, given, initial_coefficients, d_initial_coefficients, slot, slots,
    offset, present, d_weight,
    SIZE: tl.constexpr, STATES: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Update a tile of G in place, from after a memory batch to before it, and copy it. A part of the gradient of
    `initial_coefficients` is written to `slot`."""
    # everything is read before threads wait for each other
    g, own = _load_states(states, offset, present, SIZE, STATES), _load_states(initial, offset, present, SIZE, STATES)
    mix = _load_mix(initial_coefficients, STATES)
    from_later = g
    if GIVEN:
        from_later = _load_states(given, offset, present, SIZE, STATES)
    # one thread may write what another has yet to read
    tl.debug_barrier()
    for i in tl.static_range(STATES):
        d_initial = tl.zeros_like(d_weight)
        if i == 0:
            # the gradient from where gradients were taken
            d_initial += d_weight
        if GIVEN:
            d_initial += from_later[i].to(tl.float32)
        for k in tl.static_range(STATES):
            d_initial += mix[k][i] * g[k]
        tl.store(states + i * SIZE + offset, d_initial, mask=present)
        tl.store(copies + i * SIZE + offset, d_initial, mask=present)
        # for each state after the memory batch, a sum over all entries
        products = tl.join(tl.join(g[0], g[2]), tl.join(g[1], g[3])) * own[i].to(tl.float32)[:, :, None, None]
        after = tl.arange(0, 4)
        to_slot = d_initial_coefficients + (after * STATES + i) * slots + slot
        tl.store(to_slot, tl.sum(products.reshape(d_weight.numel, 4), axis=0), mask=after < STATES)


@triton.jit(do_not_specialize=['first_batch', 'last_batch', 'batches'])
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_first_initial, d_last_initial, d_gamma_initial, d_first, d_last, d_gamma, first_copies, last_copies,
    d_hidden, d_hidden_deltas, d_deltas, d_gamma_gradient, d_losses,
    keys, values, step_sizes, coefficients, initial_coefficients, first_initial, last_initial, gamma_initial,
    hidden, hidden_deltas, deltas, gamma_gradient,
    d_keys, d_values, d_step_sizes, d_coefficients, d_initial_coefficients,
    to_hidden, to_hidden_deltas, to_deltas, to_gamma_gradient, of_products, of_y, of_h, of_gamma, counters,
    first_batch, last_batch, batches, programs, blocks, parts, steps, chunks, rows, eps,
    d_hidden_head, d_hidden_batch, d_hidden_row, d_hidden_unit,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr,
    STATES: tl.constexpr, PADDED: tl.constexpr, SCALAR: tl.constexpr,
    FIRST_INITIAL: tl.constexpr, LAST_INITIAL: tl.constexpr, GAMMA_INITIAL: tl.constexpr, OF_HIDDEN: tl.constexpr,
    OF_HIDDEN_DELTAS: tl.constexpr, OF_DELTAS: tl.constexpr, OF_GAMMA_GRADIENT: tl.constexpr, LOSSES: tl.constexpr,
    ROWS_PHASE: tl.constexpr, STATES_PHASE: tl.constexpr, WAITS: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    UNITS: tl.constexpr, UNIT_ROWS: tl.constexpr, COUNTER_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Memory batches in reverse, `first_batch` to `last_batch` counted from the end. A head keeps the rows of one
    memory batch: gradients that reach the network's products (to_…), and factors of its weights' gradients (of_…)."""
    program = tl.program_id(0)
    head, part = (program // programs).to(tl.int64), program % programs
    counter = counters + head * COUNTER_STRIDE
    feature = tl.arange(0, DIM)
    kept = head * chunks * rows
    to_hidden += kept * width
    to_hidden_deltas += kept * width
    to_deltas += kept * dim
    to_gamma_gradient += kept * dim
    of_products += kept * width
    of_y += kept * dim
    of_h += kept * width
    of_gamma += head * blocks * dim
    d_first += head * STATES * dim * width
    d_last += head * STATES * width * dim
    first_copies += head * STATES * dim * width
    last_copies += head * STATES * width * dim
    d_gamma += head * STATES * dim

    for step in range(first_batch, last_batch):
        batch = batches - 1 - step
        own = head * batches + batch
        start = own * chunks * rows
        own_keys = keys + head * key_head + tl.cast(batch, tl.int64) * chunks * key_chunk
        at_first, at_last = first_initial + own * STATES * dim * width, last_initial + own * STATES * width * dim
        at_gamma = gamma_initial + own * STATES * dim
        own_hidden, own_hidden_deltas, own_deltas = hidden, hidden_deltas, deltas + start * dim
        if HIDDEN:
            own_hidden += start * width
            own_hidden_deltas += start * width

        if ROWS_PHASE:
            own_coefficients = coefficients + own * STATES * chunks
            own_values = values + head * value_head + tl.cast(batch, tl.int64) * chunks * value_chunk
            own_steps = step_sizes + head * step_head + tl.cast(batch, tl.int64) * chunks * step_chunk
            # has strides, because it is often the gradient of a transposed tensor
            given_hidden = d_hidden + head * d_hidden_head + tl.cast(batch, tl.int64) * d_hidden_batch
            w_first, w_last, w_gamma = (at_first, at_first, 0.0), (at_last, at_last, 0.0), (at_gamma, at_gamma, 0.0)
            state = tl.arange(0, PADDED)[None, :]
            for block in range(part, blocks, programs):
                chunk, row, valid = rows_of_block(block, parts, chunks, rows, CHUNKS, ROWS)
                inside = valid[:, None] & (feature < dim)[None, :]
                row_offset = chunk * rows + row
                features = row_offset[:, None] * dim + feature[None, :]
                of_coefficients = tl.zeros((CHUNKS * ROWS, PADDED), tl.float32)

                # back through the states, to X and Δ of each matrix
                key_offset = chunk * key_chunk + row * key_row
                k = tl.load(own_keys + key_offset[:, None] + feature[None, :], mask=inside, other=0.0).to(tl.float32)
                if HIDDEN:
                    delta = tl.load(own_deltas + features, mask=inside, other=0.0).to(tl.float32)
                    d_delta, of_coefficients = _backward_of_states(
                        delta, own_hidden, to_hidden, given_hidden, row_offset * d_hidden_row, d_hidden_unit,
                        last_copies, own_coefficients, of_coefficients, chunk, chunks, row_offset, valid, feature,
                        dim, width, 1, dim, OF_HIDDEN,
                        STATES, PADDED, SCALAR, CHUNKS * ROWS, DIM, BLOCK, PRECISION, OPERAND,
                    )  # fmt: skip
                    if OF_DELTAS:
                        given = tl.load(d_deltas + start * dim + features, mask=inside, other=0.0)
                        d_delta += given.to(tl.float32)
                    tl.store(to_deltas + features, d_delta, mask=inside)
                    d_k, of_coefficients = _backward_of_states(
                        k, own_hidden_deltas, to_hidden_deltas, d_hidden_deltas + start * width, row_offset * width, 1,
                        first_copies, own_coefficients, of_coefficients, chunk, chunks, row_offset, valid, feature,
                        dim, width, width, 1, OF_HIDDEN_DELTAS,
                        STATES, PADDED, SCALAR, CHUNKS * ROWS, DIM, BLOCK, PRECISION, OPERAND,
                    )  # fmt: skip
                else:
                    d_k, of_coefficients = _backward_of_states(
                        k, own_deltas, to_deltas, d_deltas + start * dim, row_offset * dim, 1,
                        last_copies, own_coefficients, of_coefficients, chunk, chunks, row_offset, valid, feature,
                        dim, dim, dim, 1, OF_DELTAS,
                        STATES, PADDED, SCALAR, CHUNKS * ROWS, DIM, BLOCK, PRECISION, OPERAND,
                    )  # fmt: skip
                if NORM:
                    # a chunk's gradient goes with its first row
                    from_chunks = own * chunks * dim + chunk[:, None] * dim + feature[None, :]
                    of_chunk = tl.load(gamma_gradient + from_chunks, mask=inside & (row == 0)[:, None], other=0.0)
                    d_chunk = tl.zeros((CHUNKS * ROWS, DIM), tl.float32)
                    if OF_GAMMA_GRADIENT:
                        d_chunk = tl.load(d_gamma_gradient + from_chunks, mask=inside, other=0.0)
                    for i in tl.static_range(STATES):
                        g = tl.load(d_gamma + i * dim + feature, mask=feature < dim, other=0.0)[None, :]
                        d_chunk += tl.load(own_coefficients + i * chunks + chunk, mask=valid, other=0.0)[:, None] * g
                        of_coefficients += tl.where(state == i, tl.sum(of_chunk * g, axis=1)[:, None], 0.0)
                    tl.store(to_gamma_gradient + features, d_chunk, mask=inside)
                of_chunks = sum_rows_of_chunks(of_coefficients, CHUNKS, ROWS, PADDED)
                summed = (block // parts) * CHUNKS + tl.arange(0, CHUNKS)
                to_chunks = (own * STATES + state) * chunks * parts + (summed * parts + block % parts)[:, None]
                tl.store(d_coefficients + to_chunks, of_chunks, mask=(summed < chunks)[:, None] & (state < STATES))

                # and back through the network; a barrier, because threads read what others wrote
                tl.debug_barrier()
                of_keys, of_block = backward_of_rows(
                    to_hidden, row_offset * width, 1, to_hidden_deltas, to_deltas, to_gamma_gradient, row_offset,
                    d_losses + start, own_keys, key_offset, own_values, chunk * value_chunk + row * value_row,
                    own_steps, chunk * step_chunk + row * step_row, w_first, w_last, w_gamma,
                    d_values + start * dim, d_step_sizes + start, of_products, of_y, of_h, row_offset, valid, feature,
                    eps, dim, width, HIDDEN, NORM, LOSSES, False, False, CHUNKS * ROWS, DIM, BLOCK, PRECISION, OPERAND,
                )  # fmt: skip
                tl.store(d_keys + start * dim + features, d_k + of_keys, mask=inside)
                if NORM:
                    tl.store(of_gamma + block * dim + feature, of_block, mask=feature < dim)
            wait_for_all(counter, (2 * (step - first_batch) + 1) * programs, WAITS)

        if STATES_PHASE:
            own_initial_coefficients = initial_coefficients + own * STATES * STATES
            unit_blocks: tl.constexpr = (width + UNITS - 1) // UNITS
            slots: tl.constexpr = unit_blocks * (1 + HIDDEN) + NORM
            own_slots = d_initial_coefficients + own * STATES * STATES * slots
            for block in range(part, unit_blocks, programs):
                unit = block * UNITS + tl.arange(0, UNITS)
                present = (unit < width)[:, None] & (feature < dim)[None, :]
                of_first, of_last = outer_products(
                    own_keys, own_hidden, own_deltas, of_products, of_y, of_h, 0, chunks * rows, steps, unit, feature,
                    rows, key_chunk, key_row, dim, width, HIDDEN, UNITS, UNIT_ROWS, DIM, PRECISION, OPERAND,
                )  # fmt: skip
                _step_back(
                    d_last, last_copies, at_last, d_last_initial + own * STATES * width * dim, own_initial_coefficients,
                    own_slots, block, slots, unit[:, None] * dim + feature[None, :], present, of_last,
                    width * dim, STATES, LAST_INITIAL,
                )  # fmt: skip
                if HIDDEN:
                    _step_back(
                        d_first, first_copies, at_first, d_first_initial + own * STATES * dim * width,
                        own_initial_coefficients, own_slots, unit_blocks + block, slots,
                        feature[None, :] * width + unit[:, None], present, of_first,
                        dim * width, STATES, FIRST_INITIAL,
                    )  # fmt: skip
            if NORM:
                if part == unit_blocks % programs:
                    of_weight = sum_rows(of_gamma, blocks, feature, dim, DIM)
                    _step_back(
                        d_gamma, d_gamma, at_gamma, d_gamma_initial + own * STATES * dim, own_initial_coefficients,
                        own_slots, slots - 1, slots, feature[None, :], (feature < dim)[None, :], of_weight[None, :],
                        dim, STATES, GAMMA_INITIAL,
                    )  # fmt: skip
            if step + 1 < batches:
                wait_for_all(counter, (2 * (step - first_batch) + 2) * programs, WAITS)


def _outputs(
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    first: list[Tensor],
    last: list[Tensor],
    gamma: list[Tensor],
    coefficients: Tensor,
    initial_coefficients: Tensor,
    learns_coefficients: bool,
    eps: float,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `MemoryBatches`; absent ones are empty. `learns_coefficients`: whether the coefficients of updates
    get a gradient."""
    (heads, batches, count, chunks), (rows, dim) = coefficients.shape, keys.shape[2:]

    def states(own: list[Tensor], *axes: int, dtype: torch.dtype = coefficients.dtype) -> Tensor:
        return coefficients.new_empty((*axes, count, *own[0].shape[1:]) if own else (0,), dtype=dtype)

    def of_rows(features: int) -> Tensor:
        return keys.new_empty((heads, batches, chunks * rows, features) if features else (0,), dtype=operands)

    width = first[0].shape[2] if first else 0
    return (
        states(first, heads, batches, dtype=operands), states(last, heads, batches, dtype=operands),
        states(gamma, heads, batches),
        states(first, heads), states(last, heads), states(gamma, heads),
        of_rows(width), of_rows(width), of_rows(dim),
        coefficients.new_empty((heads, batches, chunks, dim) if gamma else (0,)),
        coefficients.new_empty(heads, batches, chunks, rows),
    )  # fmt: skip


def _forward(
    keys: Tensor,  # bh r·n m d
    values: Tensor,  # bh r·n m d
    step_sizes: Tensor,  # bh r·n m
    first: list[Tensor],  # k of bh d e, or none
    last: list[Tensor],  # k of bh e d
    gamma: list[Tensor],  # k of bh d, or none
    coefficients: Tensor,  # bh r k n
    initial_coefficients: Tensor,  # bh r k k
    learns_coefficients: bool,
    eps: float,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (keys, values, step_sizes, first, last, gamma, coefficients, initial_coefficients)
    outputs = _outputs(*given, learns_coefficients, eps, operands)
    names = [f'{name}_{when}' for when in ('initial', 'final') for name in ('first', 'last', 'gamma')]
    names += ['hidden', 'hidden_deltas', 'deltas', 'of_gamma', 'losses']
    arguments: dict[str, Any] = dict(zip(names, outputs))

    for name, states, contiguous in (('first', first, 2), ('last', last, 2), ('gamma', gamma, 1)):
        states = [contiguous_inside(t, contiguous) for t in states] or [coefficients.new_empty(0)]
        arguments |= numbered(name, states) | numbered(f'{name}_head', [t.stride(0) for t in states])
    (dim, width), in_full = (keys.shape[3], last[0].shape[1]), operands == torch.float32
    largest = STATE_BLOCK_IN_FULL if in_full else STATE_BLOCK
    for name, sizes in (('FIRST', (dim, width)), ('LAST', (width, dim))):
        tile = (min(tile_size(size), most) for size, most in zip(sizes, largest))
        arguments |= dict(zip((f'{name}_DIM', f'{name}_WIDTH'), tile))

    shared = _arguments(*given[:3], coefficients, initial_coefficients, width, bool(first), bool(gamma), operands, 0)
    of_gamma, parts = arguments['of_gamma'], shared['parts']
    arguments |= dict(eps=eps, STATE_ROWS=STATE_ROWS, COPIED=COPIED, SCALAR=coefficients.shape[3] == 1)
    if gamma and parts > 1:
        arguments['of_gamma'] = of_gamma.new_empty(*of_gamma.shape[:3], parts, dim)
    _launch(_forward_kernel, arguments | shared, copies=True)
    if gamma and parts > 1:
        outputs = (*outputs[:-2], arguments['of_gamma'].sum(dim=3), outputs[-1])
    return outputs


def _backward(
    d_first_initial: Tensor | None,
    d_last_initial: Tensor | None,
    d_gamma_initial: Tensor | None,
    d_first_final: Tensor | None,
    d_last_final: Tensor | None,
    d_gamma_final: Tensor | None,
    d_hidden: Tensor | None,
    d_hidden_deltas: Tensor | None,
    d_deltas: Tensor | None,
    d_gamma_gradient: Tensor | None,
    d_losses: Tensor | None,
    first_initial: Tensor,  # bh r k d e
    last_initial: Tensor,  # bh r k e d
    gamma_initial: Tensor,  # bh r k d
    hidden: Tensor,  # bh r t e
    hidden_deltas: Tensor,  # bh r t e
    deltas: Tensor,  # bh r t d
    gamma_gradient: Tensor,  # bh r n d
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    first: list[Tensor],
    last: list[Tensor],
    gamma: list[Tensor],
    coefficients: Tensor,
    initial_coefficients: Tensor,
    learns_coefficients: bool,
    eps: float,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    width = last[0].shape[1]
    shared = _arguments(
        keys, values, step_sizes, coefficients, initial_coefficients, width, bool(first), bool(gamma), operands, 1
    )
    heads, batches, count, chunks = coefficients.shape
    rows, dim = keys.shape[2:]
    absent = coefficients.new_empty(0)
    scalar = chunks == 1 and not learns_coefficients

    def final_gradient(states: list[Tensor], d_final: Tensor | None) -> Tensor:
        """G, which is turned into the gradient of the initial states."""
        if not states:
            return absent.new_empty(0)
        if d_final is None:
            return coefficients.new_zeros((heads, count, *states[0].shape[1:]))
        return d_final.clone(memory_format=torch.contiguous_format)

    d_first, d_last, d_gamma = (
        final_gradient(states, d_final)
        for states, d_final in ((first, d_first_final), (last, d_last_final), (gamma, d_gamma_final))
    )
    d_keys, d_values, d_step_sizes = (t.new_empty(t.shape) for t in (keys, values, step_sizes))
    d_coefficients = coefficients.new_empty(*coefficients.shape, shared['parts'])
    units = min(UNITS, tile_size(width), BLOCK // tile_size(dim))
    slots = triton.cdiv(width, units) * (1 + bool(first)) + bool(gamma)
    d_initial_coefficients = coefficients.new_empty(*initial_coefficients.shape, slots)

    def rows_of_batch(features: int, dtype: torch.dtype = operands) -> Tensor:
        """Rows for one memory batch of each head."""
        return keys.new_empty((heads, chunks * rows, features) if features else (0,), dtype=dtype)

    incoming = {
        'd_first_initial': ('FIRST_INITIAL', d_first_initial if first else None),
        'd_last_initial': ('LAST_INITIAL', d_last_initial),
        'd_gamma_initial': ('GAMMA_INITIAL', d_gamma_initial if gamma else None),
        'd_hidden_deltas': ('OF_HIDDEN_DELTAS', d_hidden_deltas if first else None),
        'd_deltas': ('OF_DELTAS', d_deltas),
        'd_gamma_gradient': ('OF_GAMMA_GRADIENT', d_gamma_gradient if gamma else None),
        'd_losses': ('LOSSES', d_losses),
    }
    arguments: dict[str, Any] = {name: absent if d is None else d.contiguous() for name, (_, d) in incoming.items()}
    arguments |= {flag: d is not None for flag, d in incoming.values()}
    # `d_hidden` is often the gradient of a transposed tensor
    d_hidden = d_hidden if first else None
    arguments |= named_strides('d_hidden', d_hidden, 'head batch row unit')
    hidden_width = width if first else 0
    _launch(
        _backward_kernel,
        arguments
        | shared
        | dict(
            d_hidden=absent if d_hidden is None else d_hidden, OF_HIDDEN=d_hidden is not None,
            d_first=d_first, d_last=d_last, d_gamma=d_gamma,
            # copies for products to read; in float32, these are the same memory
            first_copies=d_first.to(operands), last_copies=d_last.to(operands),
            first_initial=first_initial, last_initial=last_initial, gamma_initial=gamma_initial,
            hidden=hidden, hidden_deltas=hidden_deltas, deltas=deltas, gamma_gradient=gamma_gradient,
            d_keys=d_keys, d_values=d_values, d_step_sizes=d_step_sizes,
            d_coefficients=d_coefficients, d_initial_coefficients=d_initial_coefficients,
            to_hidden=rows_of_batch(hidden_width), to_hidden_deltas=rows_of_batch(hidden_width),
            to_deltas=rows_of_batch(dim), to_gamma_gradient=rows_of_batch(dim if gamma else 0, coefficients.dtype),
            of_products=rows_of_batch(hidden_width), of_y=rows_of_batch(dim), of_h=rows_of_batch(hidden_width),
            of_gamma=coefficients.new_empty((heads, shared['blocks'], dim) if gamma else (0,)),
            steps=triton.cdiv(chunks * rows, UNIT_ROWS), eps=eps, UNITS=units, UNIT_ROWS=UNIT_ROWS,
            SCALAR=scalar,
        ),
    )  # fmt: skip
    return (
        d_keys,
        d_values,
        d_step_sizes,
        # cloned, because gradients may not share memory
        [own.clone() for own in d_first.unbind(1)] if first else [],
        [own.clone() for own in d_last.unbind(1)],
        [own.clone() for own in d_gamma.unbind(1)] if gamma else [],
        torch.zeros_like(coefficients) if scalar else d_coefficients.sum(dim=-1),
        d_initial_coefficients.sum(dim=-1),
    )


memory_batch_scan = register_kernel(
    'memory_batch_scan',
    _forward,
    _backward,
    outputs=_outputs,
    saved=(0, 1, 2, 6, 7, 8, 9),
    # later layers may use only some of the outputs
    materialize_grads=False,
)


def _programs(heads: int, rows: Tensor) -> int:
    """Number of programs per head."""
    if not rows.is_cuda:
        return 1
    fit = torch.cuda.get_device_properties(rows.device).multi_processor_count * PROGRAMS_PER_MULTIPROCESSOR
    return max(1, min(fit // heads, MOST_PROGRAMS))


def _arguments(
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    coefficients: Tensor,
    initial_coefficients: Tensor,
    width: int,
    has_first: bool,
    has_gamma: bool,
    operands: torch.dtype,
    back: int,
) -> dict[str, Any]:
    """Arguments of both kernels, for the forward pass or, with `back`, the backward pass."""
    keys, values = contiguous_inside(keys, 1), contiguous_inside(values, 1)
    heads, batches, count, chunks = coefficients.shape
    rows, dim = keys.shape[2:]
    programs = _programs(heads, keys)
    in_full = operands == torch.float32
    padded = tile_size(dim)
    # one block of rows for each program, if there are that many
    own, most = 16, (MOST_ROWS_IN_FULL if in_full else MOST_ROWS)[back]
    while own < most and own * programs < chunks * rows:
        own *= 2
    columns = min(MOST_COLUMNS, MOST_ENTRIES[back] // own)
    of_chunk = min(triton.next_power_of_2(rows), own)
    parts = triton.cdiv(rows, of_chunk)
    # in float32, three stages of 64 features or two of 128 need more memory than compute capability 8.6 and 8.9 have
    stages = STAGES if not in_full else 2 if padded <= 64 else 1
    return dict(
        keys=keys, **named_strides('key', keys, 'head chunk row'),
        values=values, **named_strides('value', values, 'head chunk row'),
        step_sizes=step_sizes, **named_strides('step', step_sizes, 'head chunk row'),
        coefficients=coefficients.contiguous(), initial_coefficients=initial_coefficients.contiguous(),
        batches=batches, blocks=triton.cdiv(chunks, own // of_chunk) * parts, parts=parts, chunks=chunks, rows=rows,
        dim=dim, width=width, HIDDEN=has_first, NORM=has_gamma, STATES=count, PADDED=triton.next_power_of_2(count),
        CHUNKS=own // of_chunk, ROWS=of_chunk, DIM=padded,
        BLOCK=min(tile_size(width), columns, BLOCK // padded, max(32, padded)), COUNTER_STRIDE=COUNTER_STRIDE,
        **product_precision(operands), num_warps=WARPS, num_stages=stages,
    )  # fmt: skip


def _launch(kernel: Any, arguments: dict[str, Any], copies: bool = False) -> None:
    """Run all phases of all memory batches, in one launch or one each; with `copies`, also copy the initial states."""
    keys, batches = arguments['keys'], arguments['batches']
    heads = len(keys)
    programs = _programs(heads, keys)

    def phases(first_batch: int, last_batch: int, copy: bool, of_rows: bool, of_states: bool, waits: bool) -> None:
        own = dict(
            first_batch=first_batch, last_batch=last_batch,
            ROWS_PHASE=of_rows, STATES_PHASE=of_states, WAITS=waits, **({'INITIAL_PHASE': copy} if copies else {}),
            counters=new_counters(heads if waits else 0, keys.device),
        )  # fmt: skip
        in_grid, options = programs, {}
        if waits:
            # programs that wait for each other must all be on the GPU
            options = {'launch_cooperative_grid': True}
            most = resident_programs(kernel, arguments | own | options | {'programs': programs}, keys.device)
            in_grid = min(programs, most // heads)
        kernel[(heads * in_grid,)](**arguments, **own, **options, programs=in_grid)

    if programs == 1 or (keys.is_cuda and PROGRAMS_WAIT):
        phases(0, batches, True, True, True, waits=programs > 1)
        return
    if copies:
        phases(0, 0, True, False, False, waits=False)
    for batch in range(batches):
        phases(batch, batch + 1, False, True, False, waits=False)
        phases(batch, batch + 1, False, False, True, waits=False)
