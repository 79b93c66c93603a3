"""Kernels of the scan over memory batches of a memory MLP.

A block of memory batches takes two launches forward and four backward. The first stores its memory batches, one after
another. Several programs share a head of a sequence: a memory batch is a chain of products of its rows with each
matrix, forward and back. Most of these phases are cut into tiles of 64 columns, which the programs share, and between
phases the programs of a head wait for each other. The data they exchange seldom leaves the GPU's cache. Within the
block, weights are factored. The second launch computes the states after the block, all tiles of all matrices at once.

The backward pass goes from the last block to the first and updates the gradient G of the states after each block in
place. A block takes launches from G to its rows, through its memory batches, to the coefficients of earlier rows, and
to G before it. The gradient of the coefficients of a block's initial states does not depend on G, so it has a launch of
its own for all blocks.

Where programs cannot wait for each other, in Triton's interpreter, every phase is a launch of its own.

Rows of all matrices have the same length, that of the longest, so that one loop serves all matrices. For matrix l they
are X_l (`inputs`), the products h_l (`pre`), g_l with Δ_l = g_l ∘ gelu′(h_l) (`back`), Δ_l (`raw`), and what is stored,
Δ_l or its proximal step (`deltas`). The gradient of any of these is named after it, with the prefix `of_`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import (
    contiguous_inside,
    gelu_derivative,
    gelu_second_derivative,
    invert,
    multiply_add,
    named_strides,
    normal_cdf,
    product_precision,
    taken_by,
    tile_size,
)
from titans_pytorch.ops._triton_cooperative import COUNTER_STRIDE, heads_together, new_counters, wait_for_all
from titans_pytorch.ops.deep_memory_scan.triton_proximal import (
    curvatures,
    shares,
    through_system,
    through_vector_steps,
    vector_steps,
)
from titans_pytorch.ops.inner_gradient.triton import gradient_of_product, gradient_of_product_backward, gradient_terms

# columns of a tile, features summed over at a time, and most programs per head
BLOCK, DEPTH, MOST_PROGRAMS = 64, 64, 4
WARPS = 4


# tiles of rows and of matrices


@triton.jit
def _rows(start, offsets, valid, first, limit, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """COLUMNS features of each row, beginning with feature `first`."""
    column = first + tl.arange(0, COLUMNS)
    inside = valid[:, None] & (column < limit)[None, :]
    return tl.load(start + offsets[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(start, offsets, valid, first, limit, rows, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    column = first + tl.arange(0, COLUMNS)
    inside = valid[:, None] & (column < limit)[None, :]
    tl.store(start + offsets[:, None] + column[None, :], rows, mask=inside)


@triton.jit
def _tile(first_row, first_column, height, width, DOWN: tl.constexpr, ACROSS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets of a tile in a matrix, and which of them are inside the matrix."""
    row, column = first_row + tl.arange(0, DOWN), first_column + tl.arange(0, ACROSS)
    return row[:, None] * width + column[None, :], (row < height)[:, None] & (column < width)[None, :]


@triton.jit
def _shape(  # type: ignore[no-untyped-def]
    l, MATRICES: tl.constexpr, dim: tl.constexpr, width: tl.constexpr, STATES: tl.constexpr
):
    """Height and width of matrix l, and the number of entries in all states of the matrices before it."""
    height, columns = tl.where(l == 0, dim, width), tl.where(l == MATRICES - 1, dim, width)
    return height, columns, tl.where(l == 0, 0, STATES * (dim * width + (l - 1) * width * width))


@triton.jit
def _load_mix(coefficients, STATES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Coefficients of the weights and of the momentum."""
    of_weights = tl.load(coefficients)
    of_momentum = of_weights
    if STATES > 1:
        of_momentum = tl.load(coefficients + 1)
    return of_weights, of_momentum


@triton.jit
def _load_states(states, size, offset, inside, STATES: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of the weights and of the momentum, or of their coefficients, `size` entries apart."""
    w = tl.load(states + offset, mask=inside, other=0.0).to(tl.float32)
    momentum = w
    if STATES > 1:
        momentum = tl.load(states + size + offset, mask=inside, other=0.0).to(tl.float32)
    return w, momentum


@triton.jit
def _store_states(states, w, momentum, size, offset, inside, STATES: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(states + offset, w, mask=inside)
    if STATES > 1:
        tl.store(states + size + offset, momentum, mask=inside)


@triton.jit
def _combined(w, momentum, mix, STATES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights and momentum, or products with them, combined with the coefficients `mix`."""
    of_weights, of_momentum = mix
    w *= of_weights
    if STATES > 1:
        w += of_momentum * momentum
    return w


@triton.jit
def _through_last_transposed(  # type: ignore[no-untyped-def]
    rows, states, mix, unit, height, width, STATES: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Multiply whole rows by BLOCK rows, from `unit` on, of a combination of states."""
    offset, inside = _tile(unit, 0, height, width, BLOCK, DIM)
    w, momentum = _load_states(states, height * width, offset, inside, STATES)
    by_weights = multiply_add(tl.zeros((rows.shape[0], BLOCK), tl.float32), rows, tl.trans(w), PRECISION, OPERAND)
    by_momentum = by_weights
    if STATES > 1:
        by_momentum = tl.zeros((rows.shape[0], BLOCK), tl.float32)
        by_momentum = multiply_add(by_momentum, rows, tl.trans(momentum), PRECISION, OPERAND)
    return _combined(by_weights, by_momentum, mix, STATES)


@triton.jit
def _through(  # type: ignore[no-untyped-def]
    start, offsets, valid, others, in_others, with_others, states, mix, column, height, width,
    STATES: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Multiply ROWS rows by COUNT others, and by COLUMNS columns, from `column` on, of a combination of states."""
    match, by_weights = tl.zeros((ROWS, COUNT), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    by_momentum = by_weights
    for first in range(0, height, DEPTH):
        x = _rows(start, offsets, valid, first, height, DEPTH)
        other = _rows(others, in_others, with_others, first, height, DEPTH)
        offset, inside = _tile(first, column, height, width, DEPTH, COLUMNS)
        w, momentum = _load_states(states, height * width, offset, inside, STATES)
        match = multiply_add(match, x, tl.trans(other), PRECISION, OPERAND)
        by_weights = multiply_add(by_weights, x, w, PRECISION, OPERAND)
        if STATES > 1:
            by_momentum = multiply_add(by_momentum, x, momentum, PRECISION, OPERAND)
    return match, _combined(by_weights, by_momentum, mix, STATES)


@triton.jit
def _through_transposed(  # type: ignore[no-untyped-def]
    start, offsets, valid, others, in_others, with_others, states, mix, row, height, width,
    STATES: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, ACROSS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Multiply ROWS rows by COUNT others, and by ACROSS rows, from `row` on, of a combination of states."""
    match, by_weights = tl.zeros((ROWS, COUNT), tl.float32), tl.zeros((ROWS, ACROSS), tl.float32)
    by_momentum = by_weights
    for first in range(0, width, DEPTH):
        x = _rows(start, offsets, valid, first, width, DEPTH)
        other = _rows(others, in_others, with_others, first, width, DEPTH)
        offset, inside = _tile(row, first, height, width, ACROSS, DEPTH)
        w, momentum = _load_states(states, height * width, offset, inside, STATES)
        match = multiply_add(match, x, tl.trans(other), PRECISION, OPERAND)
        by_weights = multiply_add(by_weights, x, tl.trans(w), PRECISION, OPERAND)
        if STATES > 1:
            by_momentum = multiply_add(by_momentum, x, tl.trans(momentum), PRECISION, OPERAND)
    return match, _combined(by_weights, by_momentum, mix, STATES)


@triton.jit
def _row_products(  # type: ignore[no-untyped-def]
    start, offsets, valid, limit,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Products of rows with one another."""
    total = tl.zeros((ROWS, ROWS), tl.float32)
    for first in range(0, limit, DEPTH):
        x = _rows(start, offsets, valid, first, limit, DEPTH)
        total = multiply_add(total, x, tl.trans(x), PRECISION, OPERAND)
    return total


@triton.jit
def _through_gelu(  # type: ignore[no-untyped-def]
    d_x, pre, back, in_batch, d_raw, in_kept, valid, unit, width, BLOCK: tl.constexpr
):
    """The gradient of a tile of products h, from those of gelu(h) and of Δ = g ∘ gelu′(h)."""
    h = _rows(pre, in_batch, valid, unit, width, BLOCK)
    g = _rows(back, in_batch, valid, unit, width, BLOCK)
    d_delta = _rows(d_raw, in_kept, valid, unit, width, BLOCK)
    return d_x * gelu_derivative(h) + d_delta * g * gelu_second_derivative(h)


@triton.jit
def _add_products(  # type: ignore[no-untyped-def]
    l, rows, offsets, valid, scores, others, second_scores, second_others, coefficients, with_scores,
    in_others, with_others, first, limit,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Add (scores ∘ coefficients)ᵀ · others to COLUMNS features of rows, and the same product of the second scores and
    the second others, which the first matrix lacks."""
    total = _rows(rows, offsets, valid, first, limit, COLUMNS)
    match = tl.load(scores, mask=with_scores, other=0.0).to(tl.float32)
    other = _rows(others, in_others, with_others, first, limit, COLUMNS)
    with_second = tl.where(with_scores, l, 0) > 0  # Triton's interpreter takes no `&` with a scalar as a mask
    second_match = tl.load(second_scores, mask=with_second, other=0.0).to(tl.float32)
    second = _rows(second_others, in_others, with_others, first, tl.where(l > 0, limit, 0), COLUMNS)
    total = multiply_add(total, tl.trans(match * coefficients), other, PRECISION, OPERAND)
    total = multiply_add(total, tl.trans(second_match * coefficients), second, PRECISION, OPERAND)
    _store_rows(rows, offsets, valid, first, limit, total, COLUMNS)


@triton.jit
def _dot(a, b):  # type: ignore[no-untyped-def]
    return tl.sum(tl.sum(a * b, axis=1), axis=0)


@triton.jit(do_not_specialize=['block', 'blocks', 'first_batch', 'last_batch'])
def _batches_kernel(  # type: ignore[no-untyped-def]
    keys, values, step_sizes, steps, initial_steps, initial, gamma_states, inputs, deltas, of_gamma, losses,
    raw, pre, back, products, scores, back_scores, inverses, row_products, norms, counters,
    block, blocks, first_batch, last_batch, heads, per_block, per_batch, rows, layer, eps, num_steps,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
    dim: tl.constexpr, width: tl.constexpr, MATRICES: tl.constexpr, NORM: tl.constexpr,
    STATES: tl.constexpr, PROXIMAL: tl.constexpr, SAVES: tl.constexpr, PHASE: tl.constexpr, WAITS: tl.constexpr,
    COUNTER_STRIDE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Store memory batches `first_batch` to `last_batch` of a block, one after another."""
    program = tl.program_id(0)
    part, groups = program % PARTS, tl.num_programs(0) // PARTS
    size: tl.constexpr = 2 * dim * width + (MATRICES - 2) * width * width
    wide: tl.constexpr = width if width > dim else dim
    layer = tl.cast(layer, tl.int64)
    feature, index, place = tl.arange(0, DIM), tl.arange(0, ROWS), tl.arange(0, COUNT)
    stored, in_block = per_batch * rows, per_block * rows
    valid, chunk, row = index < stored, index // rows, index % rows
    with_feature = feature < dim
    inside = valid[:, None] & with_feature[None, :]
    in_batch, in_outputs, in_all = index * wide, index * dim, place * wide
    together, entry = tl.where(chunk[:, None] == chunk[None, :], 1.0, 0.0), index[:, None] * ROWS + index[None, :]
    to_scores = index[:, None] * COUNT + place[None, :]
    nothing = tl.zeros((ROWS, BLOCK), tl.float32)

    for head_index in range(program // PARTS, heads, groups):
        head = tl.cast(head_index, tl.int64)
        counter, met = counters + head * COUNTER_STRIDE, 0
        own = head * blocks + block
        all_inputs, all_deltas = inputs + own * in_block * wide, deltas + own * in_block * wide
        own_initial = initial + own * STATES * size
        for batch in range(first_batch, last_batch):
            # for this memory batch: its first chunk in its block, its rows, and coefficients of the weights before it
            start = batch * per_batch
            first_row = own * in_block + start * rows
            own_inputs, own_deltas = inputs + first_row * wide, deltas + first_row * wide
            own_raw, own_pre, own_back = raw + first_row * wide, pre + first_row * wide, back + first_row * wide
            offset = tl.cast(block * per_block + start + chunk, tl.int64)
            to_steps = offset * step_chunk + row * step_row
            theta = tl.load(step_sizes + head * step_head + to_steps, mask=valid, other=0.0).to(tl.float32)
            earlier = place < start * rows
            from_steps = steps + (own * per_block + start) * per_block
            of_earlier = tl.load(from_steps + place // rows, mask=earlier, other=0.0)[None, :]
            mix = _load_mix(initial_steps + (own * per_block + start) * STATES, STATES)
            own_scores = scores + (own * (per_block // per_batch) + batch) * MATRICES * ROWS * COUNT + to_scores
            own_back_scores = back_scores + to_scores
            own_back_scores += (own * (per_block // per_batch) + batch) * (MATRICES - 1) * ROWS * COUNT

            # compute X of each matrix
            for l in range(MATRICES - 1):
                if (PHASE < 0) | (PHASE == l):
                    height, columns, before = _shape(l, MATRICES, dim, width, STATES)
                    to_layer = l * layer
                    for column in range(part * BLOCK, columns, PARTS * BLOCK):
                        stored_deltas = _rows(all_deltas + to_layer, in_all, earlier, column, columns, BLOCK)
                        match, h = _through(
                            own_inputs + to_layer, in_batch, valid, all_inputs + to_layer, in_all, earlier,
                            own_initial + before, mix, column, height, columns,
                            STATES, ROWS, COUNT, BLOCK, DEPTH, PRECISION, OPERAND,
                        )  # fmt: skip
                        if SAVES:
                            if column == 0:
                                tl.store(own_scores + l * ROWS * COUNT, match)
                        h = multiply_add(h, match * of_earlier, stored_deltas, PRECISION, OPERAND)
                        _store_rows(own_pre + to_layer, in_batch, valid, column, columns, h, BLOCK)
                        a = h * normal_cdf(h)
                        _store_rows(own_inputs + to_layer + layer, in_batch, valid, column, columns, a, BLOCK)
                met += 1
                wait_for_all(counter, met * PARTS, WAITS)

            # the loss, computed by every program, and Δ of each matrix from the last to the first
            if (PHASE < 0) | (PHASE == MATRICES - 1):
                to_layer = (MATRICES - 1) * layer
                from_last = own_initial + STATES * (size - width * dim)
                last_stored = _rows(all_deltas + to_layer, in_all, earlier, 0, dim, DIM)
                k = _rows(keys + head * key_head, offset * key_chunk + row * key_row, valid, 0, dim, DIM)
                v = _rows(values + head * value_head, offset * value_chunk + row * value_row, valid, 0, dim, DIM)
                match, y = _through(
                    own_inputs + to_layer, in_batch, valid, all_inputs + to_layer, in_all, earlier,
                    from_last, mix, 0, width, dim, STATES, ROWS, COUNT, DIM, DEPTH, PRECISION, OPERAND,
                )  # fmt: skip
                y = multiply_add(y, match * of_earlier, last_stored, PRECISION, OPERAND)
                gain = 1.0
                if NORM:
                    own_gamma = gamma_states + (head * (blocks + 1) + block) * STATES * dim
                    gamma, gamma_momentum = _load_states(own_gamma, dim, feature, with_feature, STATES)
                    gamma = _combined(gamma, gamma_momentum, mix, STATES)
                    gamma_updates = _rows(of_gamma + own * in_block * dim, place * dim, earlier, 0, dim, DIM)
                    gamma += tl.sum(tl.trans(of_earlier) * gamma_updates, axis=0)
                    gain += gamma[None, :]
                difference, delta, gamma_update = gradient_of_product(
                    y, k, v, theta[:, None], gain, inside, eps, dim, NORM
                )  # fmt: skip
                back_match = tl.zeros((ROWS, COUNT), tl.float32)
                back_match = multiply_add(back_match, delta, tl.trans(last_stored), PRECISION, OPERAND)
                if part == 0:
                    loss = tl.sum(difference * difference, axis=1) / dim
                    tl.store(losses + first_row + index, loss, mask=valid)
                    _store_rows(products + first_row * dim, in_outputs, valid, 0, dim, y, DIM)
                    _store_rows(own_raw + to_layer, in_batch, valid, 0, dim, delta, DIM)
                if part == 1 % PARTS:
                    if NORM:
                        _store_rows(of_gamma + first_row * dim, in_outputs, valid, 0, dim, gamma_update, DIM)
                if part == PARTS - 1:
                    if SAVES:
                        tl.store(own_scores + (MATRICES - 1) * ROWS * COUNT, match)
                        tl.store(own_back_scores + (MATRICES - 2) * ROWS * COUNT, back_match)
                for unit in range(part * BLOCK, width, PARTS * BLOCK):
                    x = _rows(all_inputs + to_layer, in_all, earlier, unit, width, BLOCK)
                    h = _rows(own_pre + to_layer - layer, in_batch, valid, unit, width, BLOCK)
                    g = _through_last_transposed(
                        delta, from_last, mix, unit, width, dim, STATES, BLOCK, DIM, PRECISION, OPERAND
                    )  # fmt: skip
                    g = multiply_add(g, back_match * of_earlier, x, PRECISION, OPERAND)
                    _store_rows(own_back + to_layer - layer, in_batch, valid, unit, width, g, BLOCK)
                    g *= gelu_derivative(h)
                    _store_rows(own_raw + to_layer - layer, in_batch, valid, unit, width, g, BLOCK)
            met += 1
            wait_for_all(counter, met * PARTS, WAITS)
            for up in range(MATRICES - 2):
                if (PHASE < 0) | (PHASE == MATRICES + up):
                    l = MATRICES - 2 - up
                    to_layer = l * layer
                    height, columns, before = _shape(l, MATRICES, dim, width, STATES)
                    for unit in range(part * BLOCK, height, PARTS * BLOCK):
                        x = _rows(all_inputs + to_layer, in_all, earlier, unit, height, BLOCK)
                        h = _rows(own_pre + to_layer - layer, in_batch, valid, unit, height, BLOCK)
                        match, g = _through_transposed(
                            own_raw + to_layer, in_batch, valid, all_deltas + to_layer, in_all, earlier,
                            own_initial + before, mix, unit, height, columns,
                            STATES, ROWS, COUNT, BLOCK, DEPTH, PRECISION, OPERAND,
                        )  # fmt: skip
                        if SAVES:
                            if unit == 0:
                                tl.store(own_back_scores + (l - 1) * ROWS * COUNT, match)
                        g = multiply_add(g, match * of_earlier, x, PRECISION, OPERAND)
                        _store_rows(own_back + to_layer - layer, in_batch, valid, unit, height, g, BLOCK)
                        g *= gelu_derivative(h)
                        _store_rows(own_raw + to_layer - layer, in_batch, valid, unit, height, g, BLOCK)
                met += 1
                wait_for_all(counter, met * PARTS, WAITS)

            # proximal steps; a program solves the systems of whole matrices
            if PROXIMAL:
                if (PHASE < 0) | (PHASE == 2 * MATRICES - 2):
                    weighted = theta * tl.load(losses + first_row + index, mask=valid, other=0.0)
                    for l in range(part, MATRICES, PARTS):
                        height, columns, before = _shape(l, MATRICES, dim, width, STATES)
                        to_system = (own * (per_block // per_batch) + batch) * MATRICES + l
                        matches = together * _row_products(
                            own_inputs + l * layer, in_batch, valid, height, ROWS, DEPTH, PRECISION, OPERAND
                        )  # fmt: skip
                        norm = tl.zeros((ROWS,), tl.float32)
                        for first in range(0, columns, DEPTH):
                            d = _rows(own_raw + l * layer, in_batch, valid, first, columns, DEPTH)
                            norm += tl.sum(d * d, axis=1)
                        c, _, _ = curvatures(norm, weighted, num_steps)
                        share = shares(matches, c, ROWS)
                        system = tl.where(index[:, None] == index[None, :], 1.0, 0.0) + (share * c)[:, None] * matches
                        inverse = invert(system, stored, ROWS)
                        if SAVES:
                            tl.store(row_products + to_system * ROWS * ROWS + entry, matches)
                            tl.store(norms + to_system * ROWS + index, norm)
                            tl.store(inverses + to_system * ROWS * ROWS + entry, inverse)
                        for column in range(0, columns, BLOCK):
                            d = _rows(own_raw + l * layer, in_batch, valid, column, columns, BLOCK)
                            d = multiply_add(nothing, inverse, share[:, None] * d, PRECISION, tl.float32)
                            _store_rows(own_deltas + l * layer, in_batch, valid, column, columns, d, BLOCK)
                    if NORM:
                        if part == PARTS - 1:
                            own_gamma_updates = of_gamma + first_row * dim
                            of_rows = _rows(own_gamma_updates, in_outputs, valid, 0, dim, DIM)
                            _, divisor, _, _ = vector_steps(
                                of_rows, weighted, together, num_steps, PRECISION, ROWS, DIM
                            )  # fmt: skip
                            _store_rows(own_gamma_updates, in_outputs, valid, 0, dim, of_rows / divisor[:, None], DIM)
                met += 1
                wait_for_all(counter, met * PARTS, WAITS)


@triton.jit(do_not_specialize=['block', 'blocks'])
def _states_kernel(  # type: ignore[no-untyped-def]
    final, initial_final, states, initial, gamma_states, inputs, deltas, of_gamma,
    block, blocks, per_block, rows, layer,
    dim: tl.constexpr, width: tl.constexpr, MATRICES: tl.constexpr, NORM: tl.constexpr, STATES: tl.constexpr,
    COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Compute the states after a block; each program owns a tile of one matrix."""
    head, l, tile = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1), tl.program_id(2)
    size: tl.constexpr = 2 * dim * width + (MATRICES - 2) * width * width
    wide: tl.constexpr = width if width > dim else dim
    layer = tl.cast(layer, tl.int64)
    feature, place = tl.arange(0, DIM), tl.arange(0, COUNT)
    in_block, own = per_block * rows, head * blocks + block
    with_feature, present, in_all = feature < dim, place < in_block, place * wide
    height, columns, before = _shape(l, MATRICES, dim, width, STATES)
    entries = height * columns
    all_inputs, all_deltas = inputs + own * in_block * wide, deltas + own * in_block * wide
    own_states, own_mix = states + head * STATES * size, initial_final + own * STATES * STATES
    own_final = final + own * STATES * per_block
    of_weights, of_momentum = _load_states(own_final, per_block, place // rows, present, STATES)
    kept, added = _load_mix(own_mix, STATES)
    returned, kept_momentum = _load_mix(own_mix + (STATES - 1) * STATES, STATES)

    across = tl.cdiv(columns, BLOCK)
    to_row, to_column = tile // across * BLOCK, tile % across * BLOCK
    if to_row < height:
        x = _rows(all_inputs + l * layer, in_all, present, to_row, height, BLOCK)
        d = _rows(all_deltas + l * layer, in_all, present, to_column, columns, BLOCK)
        to_tile, in_tile = _tile(to_row, to_column, height, columns, BLOCK, BLOCK)
        to_tile += before
        w, momentum = _load_states(own_states, entries, to_tile, in_tile, STATES)
        after = kept * w
        if STATES > 1:
            after += added * momentum
            momentum = returned * w + kept_momentum * momentum
            momentum = multiply_add(momentum, tl.trans(x * of_momentum[:, None]), d, PRECISION, OPERAND)
        after = multiply_add(after, tl.trans(x * of_weights[:, None]), d, PRECISION, OPERAND)
        _store_states(own_states, after, momentum, entries, to_tile, in_tile, STATES)
        if block + 1 < blocks:
            _store_states(initial + (own + 1) * STATES * size, after, momentum, entries, to_tile, in_tile, STATES)
    if NORM:
        if (l == 0) & (tile == 0):
            gamma_updates = _rows(of_gamma + own * in_block * dim, place * dim, present, 0, dim, DIM)
            own_gamma = gamma_states + (head * (blocks + 1) + block) * STATES * dim
            gamma, gamma_momentum = _load_states(own_gamma, dim, feature, with_feature, STATES)
            gamma_after = kept * gamma + tl.sum(of_weights[:, None] * gamma_updates, axis=0)
            if STATES > 1:
                gamma_after += added * gamma_momentum
                gamma_momentum = returned * gamma + kept_momentum * gamma_momentum
                gamma_momentum += tl.sum(of_momentum[:, None] * gamma_updates, axis=0)
            to_after = own_gamma + STATES * dim
            _store_states(to_after, gamma_after, gamma_momentum, dim, feature, with_feature, STATES)


@triton.jit(do_not_specialize=['block', 'blocks', 'first_batch', 'last_batch'])
def _batches_backward_kernel(  # type: ignore[no-untyped-def]
    keys, values, step_sizes, steps, initial_steps, initial, gamma_states, inputs, deltas, of_gamma, losses,
    raw, pre, back, products, scores, back_scores, inverses, row_products, norms, d_losses,
    of_inputs, of_deltas, of_raw, of_back, of_pre, of_scores, of_back_scores, of_gamma_updates, of_weighted, of_gains,
    d_keys, d_values, d_step_sizes, counters,
    block, blocks, first_batch, last_batch, heads, per_block, per_batch, rows, layer, eps, num_steps,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
    dim: tl.constexpr, width: tl.constexpr, MATRICES: tl.constexpr, NORM: tl.constexpr, STATES: tl.constexpr,
    PROXIMAL: tl.constexpr, OF_LOSSES: tl.constexpr, PHASE: tl.constexpr, WAITS: tl.constexpr,
    COUNTER_STRIDE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Go back through a block's memory batches, `first_batch` to `last_batch` counted from the end."""
    program = tl.program_id(0)
    part, groups = program % PARTS, tl.num_programs(0) // PARTS
    size: tl.constexpr = 2 * dim * width + (MATRICES - 2) * width * width
    wide: tl.constexpr = width if width > dim else dim
    # per matrix: entries of the rows kept for a block, and of products of a memory batch's rows with those of the block
    kept: tl.constexpr = COUNT * wide
    of_match: tl.constexpr = ROWS * COUNT
    layer = tl.cast(layer, tl.int64)
    feature, index, place = tl.arange(0, DIM), tl.arange(0, ROWS), tl.arange(0, COUNT)
    stored, in_block, batches = per_batch * rows, per_block * rows, per_block // per_batch
    valid, chunk, row = index < stored, index // rows, index % rows
    with_feature, present = feature < dim, place < in_block
    inside = valid[:, None] & with_feature[None, :]
    in_batch, in_outputs, in_all = index * wide, index * dim, place * wide
    together, entry = tl.where(chunk[:, None] == chunk[None, :], 1.0, 0.0), index[:, None] * ROWS + index[None, :]
    to_match = index[:, None] * COUNT + place[None, :]
    # the block's rows, as rows of their memory batches
    batch_of_place, in_match = place // stored, place % stored * COUNT
    # While the last program goes back to the keys of a memory batch, the others, which may be none, share the beginning
    # of the one before it.
    sharing: tl.constexpr = PARTS - 1 if PARTS > 1 else 1
    # tiles of Δ of all matrices; those of X are `across` for each matrix but the first
    across: tl.constexpr = (width + BLOCK - 1) // BLOCK
    tiles: tl.constexpr = (MATRICES - 1) * across + (dim + BLOCK - 1) // BLOCK
    first_tile = part if part < sharing else tiles
    nothing = tl.zeros((ROWS, BLOCK), tl.float32)

    for head_index in range(program // PARTS, heads, groups):
        head = tl.cast(head_index, tl.int64)
        counter, met = counters + head * COUNTER_STRIDE, 0
        to_kept = head * MATRICES * kept
        head_of_inputs, head_of_deltas, head_of_raw = of_inputs + to_kept, of_deltas + to_kept, of_raw + to_kept
        head_of_scores = of_scores + head * batches * MATRICES * of_match
        head_of_back_scores = of_back_scores + head * batches * MATRICES * of_match
        head_of_gamma_updates = of_gamma_updates + head * COUNT * dim
        own = head * blocks + block
        to_rows = own * in_block * wide
        all_inputs, all_deltas, all_raw = inputs + to_rows, deltas + to_rows, raw + to_rows
        all_of_back, all_of_pre = of_back + to_rows, of_pre + to_rows
        own_initial = initial + own * STATES * size
        own_gamma = gamma_states + (head * (blocks + 1) + block) * STATES * dim

        for batch_step in range(first_batch, last_batch):
            batch = batches - 1 - batch_step
            start = batch * per_batch
            first_row, in_kept = own * in_block + start * rows, (start * rows + index) * wide
            own_inputs, own_deltas = inputs + first_row * wide, deltas + first_row * wide
            own_raw, own_pre, own_back = raw + first_row * wide, pre + first_row * wide, back + first_row * wide
            own_of_back, own_of_pre = of_back + first_row * wide, of_pre + first_row * wide
            offset = tl.cast(block * per_block + start + chunk, tl.int64)
            to_steps = offset * step_chunk + row * step_row
            theta = tl.load(step_sizes + head * step_head + to_steps, mask=valid, other=0.0).to(tl.float32)
            earlier = place < start * rows
            from_steps = steps + (own * per_block + start) * per_block
            of_earlier = tl.load(from_steps + place // rows, mask=earlier, other=0.0)[None, :]
            mix = _load_mix(initial_steps + (own * per_block + start) * STATES, STATES)
            own_of_scores = head_of_scores + batch * MATRICES * of_match + to_match
            own_of_back_scores = head_of_back_scores + batch * MATRICES * of_match + to_match

            # gradients from the weights before later memory batches, which contain these rows
            later = present & (batch_of_place > batch)
            in_later = later[:, None] & valid[None, :]
            to_later = (own * per_block + batch_of_place * per_batch) * per_block
            of_later = tl.load(steps + to_later[:, None] + (start + chunk)[None, :], mask=in_later, other=0.0)
            # offsets of products of rows of later memory batches with those of this one, and of gradients of products,
            # for the first matrix; those with g begin with the second matrix
            in_one = in_match[:, None] + (start * rows + index)[None, :]
            in_scores = in_one + (batch_of_place * MATRICES * of_match)[:, None]
            saved_batch = (own * batches + batch_of_place)[:, None]
            saved_scores = in_one + saved_batch * MATRICES * of_match
            saved_back_scores = in_one + (saved_batch * (MATRICES - 1) - 1) * of_match
            if (PHASE < 0) | (PHASE == 0):
                if batch + 1 < batches:
                    for tile in range(first_tile, tiles, sharing):
                        l = tl.minimum(tile // across, MATRICES - 1)
                        column, columns = (tile - l * across) * BLOCK, tl.where(l < MATRICES - 1, width, dim)
                        _add_products(
                            l, head_of_deltas + l * kept, in_kept, valid,
                            scores + l * of_match + saved_scores, all_of_pre + l * layer,
                            head_of_back_scores + l * of_match + in_scores, all_raw + l * layer,
                            of_later, in_later, in_all, later, column, columns,
                            BLOCK, PRECISION, OPERAND,
                        )  # fmt: skip
                    for tile in range(first_tile, (MATRICES - 1) * across, sharing):
                        l = 1 + tile // across
                        _add_products(
                            l, head_of_inputs + l * kept, in_kept, valid,
                            head_of_scores + l * of_match + in_scores, all_inputs + l * layer,
                            back_scores + l * of_match + saved_back_scores, all_of_back + (l - 1) * layer,
                            of_later, in_later, in_all, later, tile % across * BLOCK, width,
                            BLOCK, PRECISION, OPERAND,
                        )  # fmt: skip
                if not PROXIMAL:
                    # each program goes on with the tiles of the first Δ that it has just stored
                    tl.debug_barrier()
                    for column in range(first_tile * BLOCK, width, sharing * BLOCK):
                        d_g = _rows(head_of_raw, in_kept, valid, column, width, BLOCK)
                        d_g *= gelu_derivative(_rows(own_pre, in_batch, valid, column, width, BLOCK))
                        _store_rows(own_of_back, in_batch, valid, column, width, d_g, BLOCK)
            met += 1
            wait_for_all(counter, met * PARTS, WAITS)

            # back through proximal steps
            if PROXIMAL:
                if (PHASE < 0) | (PHASE == 1):
                    loss = tl.load(losses + first_row + index, mask=valid, other=0.0)
                    d_weighted = tl.zeros((ROWS,), tl.float32)
                    for l in range(MATRICES):
                        height, columns, before = _shape(l, MATRICES, dim, width, STATES)
                        to_system = (own * batches + batch) * MATRICES + l
                        inverse = tl.trans(tl.load(inverses + to_system * ROWS * ROWS + entry))
                        matches = tl.load(row_products + to_system * ROWS * ROWS + entry)
                        c, of_norm, of_loss = curvatures(
                            tl.load(norms + to_system * ROWS + index), theta * loss, num_steps
                        )  # fmt: skip
                        share = shares(matches, c, ROWS)
                        of_solution = tl.zeros((ROWS, ROWS), tl.float32)
                        for first in range(0, columns, BLOCK):
                            dual = _rows(head_of_deltas + l * kept, in_kept, valid, first, columns, BLOCK)
                            dual = multiply_add(nothing, inverse, dual, PRECISION, tl.float32)
                            d = _rows(own_deltas + l * layer, in_batch, valid, first, columns, BLOCK)
                            of_solution = multiply_add(of_solution, dual, tl.trans(d), PRECISION, tl.float32)
                        d_c, d_matches = through_system(of_solution, matches, together, c, share, ROWS)
                        d_weighted += d_c * of_loss
                        for column in range((part + l) % PARTS * BLOCK, columns, PARTS * BLOCK):
                            dual = _rows(head_of_deltas + l * kept, in_kept, valid, column, columns, BLOCK)
                            dual = share[:, None] * multiply_add(nothing, inverse, dual, PRECISION, tl.float32)
                            d = _rows(own_raw + l * layer, in_batch, valid, column, columns, BLOCK)
                            dual += 2 * (d_c * of_norm)[:, None] * d
                            _store_rows(head_of_raw + l * kept, in_kept, valid, column, columns, dual, BLOCK)
                            if l == 0:
                                h = _rows(own_pre, in_batch, valid, column, columns, BLOCK)
                                dual *= gelu_derivative(h)
                                _store_rows(own_of_back, in_batch, valid, column, columns, dual, BLOCK)
                        for unit in range((part + l) % PARTS * BLOCK, height, PARTS * BLOCK):
                            d_x = _rows(head_of_inputs + l * kept, in_kept, valid, unit, height, BLOCK)
                            x = _rows(own_inputs + l * layer, in_batch, valid, unit, height, BLOCK)
                            d_x = multiply_add(d_x, d_matches, x, PRECISION, OPERAND)
                            _store_rows(head_of_inputs + l * kept, in_kept, valid, unit, height, d_x, BLOCK)
                    if part == 0:
                        tl.store(of_weighted + head * ROWS + index, d_weighted)
                met += 1
                wait_for_all(counter, met * PARTS, WAITS)

            # back through g = Δ Wᵀ, from the first Δ to the last
            for l in range(1, MATRICES - 1):
                if (PHASE < 0) | (PHASE == l + 1):
                    height, columns, before = _shape(l, MATRICES, dim, width, STATES)
                    for column in range(part * BLOCK, columns, PARTS * BLOCK):
                        of_delta = _rows(head_of_raw + l * kept, in_kept, valid, column, columns, BLOCK)
                        d = _rows(all_deltas + l * layer, in_all, earlier, column, columns, BLOCK)
                        h = _rows(own_pre + l * layer, in_batch, valid, column, columns, BLOCK)
                        d_match, d_delta = _through(
                            own_of_back + (l - 1) * layer, in_batch, valid, all_inputs + l * layer, in_all, earlier,
                            own_initial + before, mix, column, height, columns,
                            STATES, ROWS, COUNT, BLOCK, DEPTH, PRECISION, OPERAND,
                        )  # fmt: skip
                        if column == 0:
                            tl.store(own_of_back_scores + l * of_match, d_match)
                        d_delta = multiply_add(d_delta + of_delta, d_match * of_earlier, d, PRECISION, OPERAND)
                        _store_rows(head_of_raw + l * kept, in_kept, valid, column, columns, d_delta, BLOCK)
                        d_delta *= gelu_derivative(h)
                        _store_rows(own_of_back + l * layer, in_batch, valid, column, columns, d_delta, BLOCK)
                met += 1
                wait_for_all(counter, met * PARTS, WAITS)

            # back through the loss, in every program, and to each product from the last to the first
            if (PHASE < 0) | (PHASE == MATRICES):
                to_layer, to_last = (MATRICES - 1) * layer, (MATRICES - 1) * kept
                from_last = own_initial + STATES * (size - width * dim)
                last_stored = _rows(all_deltas + to_layer, in_all, earlier, 0, dim, DIM)
                of_delta = _rows(head_of_raw + to_last, in_kept, valid, 0, dim, DIM)
                y = _rows(products + first_row * dim, in_outputs, valid, 0, dim, DIM)
                key = _rows(keys + head * key_head, offset * key_chunk + row * key_row, valid, 0, dim, DIM)
                v = _rows(values + head * value_head, offset * value_chunk + row * value_row, valid, 0, dim, DIM)
                loss = tl.load(losses + first_row + index, mask=valid, other=0.0)
                d_match, d_delta = _through(
                    own_of_back + to_layer - layer, in_batch, valid, all_inputs + to_layer, in_all, earlier,
                    from_last, mix, 0, width, dim, STATES, ROWS, COUNT, DIM, DEPTH, PRECISION, OPERAND,
                )  # fmt: skip
                of_delta = multiply_add(of_delta + d_delta, d_match * of_earlier, last_stored, PRECISION, OPERAND)
                gain, d_gamma_update, d_loss, d_weighted = 1.0, 0.0, 0.0, 0.0
                if PROXIMAL:
                    d_weighted = tl.load(of_weighted + head * ROWS + index)
                if NORM:
                    gamma, gamma_momentum = _load_states(own_gamma, dim, feature, with_feature, STATES)
                    gamma = _combined(gamma, gamma_momentum, mix, STATES)
                    gamma_updates = _rows(of_gamma + own * in_block * dim, place * dim, earlier, 0, dim, DIM)
                    gamma += tl.sum(tl.trans(of_earlier) * gamma_updates, axis=0)
                    gain += gamma[None, :]
                    d_gamma_update = _rows(head_of_gamma_updates, (start * rows + index) * dim, valid, 0, dim, DIM)
                    if PROXIMAL:
                        _, _, gamma_update = gradient_of_product(
                            y, key, v, theta[:, None], gain, inside, eps, dim, NORM
                        )
                        d_gamma_update, of_vector = through_vector_steps(
                            d_gamma_update, gamma_update, theta * loss, together, num_steps, PRECISION, ROWS, DIM
                        )
                        d_weighted += of_vector
                if OF_LOSSES:
                    d_loss = tl.load(d_losses + first_row + index, mask=valid, other=0.0)[:, None]
                if PROXIMAL:
                    d_loss += (d_weighted * theta)[:, None]
                terms = gradient_terms(y, key, v, theta[:, None], gain, inside, eps, dim, NORM)
                d_theta, d_prediction, d_key, d_product, gain_rows = gradient_of_product_backward(
                    terms, theta[:, None], gain, of_delta, d_gamma_update, d_loss, inside, dim, NORM
                )
                if PROXIMAL:
                    d_theta += d_weighted * loss
                of_match_of_last = tl.zeros((ROWS, COUNT), tl.float32)
                of_match_of_last = multiply_add(
                    of_match_of_last, d_product, tl.trans(last_stored), PRECISION, OPERAND
                )  # fmt: skip
                if part == 0:
                    tl.store(d_step_sizes + first_row + index, d_theta, mask=valid)
                    _store_rows(d_values + first_row * dim, in_outputs, valid, 0, dim, -d_prediction, DIM)
                    _store_rows(d_keys + first_row * dim, in_outputs, valid, 0, dim, d_key, DIM)
                    _store_rows(own_of_pre + to_layer, in_batch, valid, 0, dim, d_product, DIM)
                if part == 1 % PARTS:
                    tl.store(own_of_back_scores + (MATRICES - 1) * of_match, d_match)
                    tl.store(own_of_scores + (MATRICES - 1) * of_match, of_match_of_last)
                if part == PARTS - 1:
                    if NORM:
                        # γ before the memory batch is a combination of states and of earlier gamma_updates
                        d_gain = tl.sum(gain_rows, axis=0)
                        to_gain = of_gains + (own * batches + batch) * dim + feature
                        tl.store(to_gain, d_gain, mask=with_feature)
                        d_gamma_updates = _rows(head_of_gamma_updates, place * dim, earlier, 0, dim, DIM)
                        d_gamma_updates += tl.trans(of_earlier) * d_gain[None, :]
                        _store_rows(head_of_gamma_updates, place * dim, earlier, 0, dim, d_gamma_updates, DIM)
                for unit in range(part * BLOCK, width, PARTS * BLOCK):
                    d_x = _rows(head_of_inputs + to_last, in_kept, valid, unit, width, BLOCK)
                    x = _rows(all_inputs + to_layer, in_all, earlier, unit, width, BLOCK)
                    d_x += _through_last_transposed(
                        d_product, from_last, mix, unit, width, dim, STATES, BLOCK, DIM, PRECISION, OPERAND
                    )  # fmt: skip
                    d_x = multiply_add(d_x, of_match_of_last * of_earlier, x, PRECISION, OPERAND)
                    d_h = _through_gelu(
                        d_x, own_pre + to_layer - layer, own_back + to_layer - layer, in_batch,
                        head_of_raw + to_last - kept, in_kept, valid, unit, width, BLOCK,
                    )  # fmt: skip
                    _store_rows(own_of_pre + to_layer - layer, in_batch, valid, unit, width, d_h, BLOCK)
            met += 1
            wait_for_all(counter, met * PARTS, WAITS)
            for down in range(MATRICES - 2):
                if (PHASE < 0) | (PHASE == MATRICES + 1 + down):
                    l = MATRICES - 2 - down
                    height, columns, before = _shape(l, MATRICES, dim, width, STATES)
                    for unit in range(part * BLOCK, height, PARTS * BLOCK):
                        of_x = _rows(head_of_inputs + l * kept, in_kept, valid, unit, height, BLOCK)
                        x = _rows(all_inputs + l * layer, in_all, earlier, unit, height, BLOCK)
                        d_match, d_x = _through_transposed(
                            own_of_pre + l * layer, in_batch, valid, all_deltas + l * layer, in_all, earlier,
                            own_initial + before, mix, unit, height, columns,
                            STATES, ROWS, COUNT, BLOCK, DEPTH, PRECISION, OPERAND,
                        )  # fmt: skip
                        if unit == 0:
                            tl.store(own_of_scores + l * of_match, d_match)
                        d_x = multiply_add(d_x + of_x, d_match * of_earlier, x, PRECISION, OPERAND)
                        d_h = _through_gelu(
                            d_x, own_pre + (l - 1) * layer, own_back + (l - 1) * layer, in_batch,
                            head_of_raw + (l - 1) * kept, in_kept, valid, unit, height, BLOCK,
                        )  # fmt: skip
                        _store_rows(own_of_pre + (l - 1) * layer, in_batch, valid, unit, height, d_h, BLOCK)
                met += 1
                wait_for_all(counter, met * PARTS, WAITS)

            # to the keys, also through later memory batches; no other program waits for this
            if (PHASE < 0) | (PHASE == 2 * MATRICES):
                if part == PARTS - 1:
                    for column in range(0, dim, BLOCK):
                        of_k = _rows(head_of_inputs, in_kept, valid, column, dim, BLOCK)
                        of_k += _rows(d_keys + first_row * dim, in_outputs, valid, column, dim, BLOCK)
                        x = _rows(all_inputs, in_all, earlier, column, dim, BLOCK)
                        d_match, d_k = _through_transposed(
                            own_of_pre, in_batch, valid, all_deltas, in_all, earlier,
                            own_initial, mix, column, dim, width,
                            STATES, ROWS, COUNT, BLOCK, DEPTH, PRECISION, OPERAND,
                        )  # fmt: skip
                        if column == 0:
                            tl.store(own_of_scores, d_match)
                        d_k = multiply_add(d_k + of_k, d_match * of_earlier, x, PRECISION, OPERAND)
                        if batch + 1 < batches:
                            later_x = _rows(all_inputs, in_all, later, column, dim, BLOCK)
                            match = of_later * tl.load(head_of_scores + in_scores, mask=in_later, other=0.0)
                            d_k = multiply_add(d_k, tl.trans(match), later_x, PRECISION, OPERAND)
                        _store_rows(d_keys + first_row * dim, in_outputs, valid, column, dim, d_k, BLOCK)


@triton.jit(do_not_specialize=['block', 'blocks'])
def _steps_backward_kernel(  # type: ignore[no-untyped-def]
    of_gamma, scores, back_scores, of_scores, of_back_scores, of_gains, d_steps,
    block, blocks, per_block, per_batch, rows,
    dim: tl.constexpr, MATRICES: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of the coefficients of earlier rows in the weights before a memory batch of a block. A program has
    their share through the products with one matrix, those on the way back through it, or γ."""
    head, batch, which = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1), tl.program_id(2)
    batches, own = per_block // per_batch, head * blocks + block
    index, place, feature = tl.arange(0, ROWS), tl.arange(0, COUNT), tl.arange(0, DIM)
    to_match = index[:, None] * COUNT + place[None, :]
    saved, current = own * batches + batch, head * batches + batch
    of_steps = tl.zeros((COUNT,), tl.float32)
    if which < MATRICES:
        match = tl.load(scores + (saved * MATRICES + which) * ROWS * COUNT + to_match).to(tl.float32)
        d_match = tl.load(of_scores + (current * MATRICES + which) * ROWS * COUNT + to_match)
        of_steps += tl.sum(match * d_match, axis=0)
    elif which > MATRICES:
        l = which - MATRICES
        match = tl.load(back_scores + (saved * (MATRICES - 1) + l - 1) * ROWS * COUNT + to_match).to(tl.float32)
        d_match = tl.load(of_back_scores + (current * MATRICES + l) * ROWS * COUNT + to_match)
        of_steps += tl.sum(match * d_match, axis=0)
    elif NORM:
        earlier = place < batch * per_batch * rows
        gamma_updates = _rows(of_gamma + own * per_block * rows * dim, place * dim, earlier, 0, dim, DIM)
        d_gain = tl.load(of_gains + saved * dim + feature, mask=feature < dim, other=0.0)
        of_steps += tl.sum(gamma_updates * d_gain[None, :], axis=1)
    tl.store(d_steps + (saved * 2 * MATRICES + which) * COUNT + place, of_steps)


@triton.jit(do_not_specialize=['block', 'blocks'])
def _through_final_kernel(  # type: ignore[no-untyped-def]
    final, inputs, deltas, of_gamma, d_inputs, d_deltas, d_of_gamma, g_low, g_gamma,
    of_inputs, of_deltas, of_gamma_updates, d_final, block, blocks, per_block, rows, layer,
    dim: tl.constexpr, width: tl.constexpr, MATRICES: tl.constexpr, NORM: tl.constexpr, STATES: tl.constexpr,
    OF_INPUTS: tl.constexpr, OF_DELTAS: tl.constexpr, OF_GAMMA: tl.constexpr,
    COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Gradients of X and Δ for all rows of a block, through the states after it; a program owns 64 columns of each."""
    head, l, tile = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1), tl.program_id(2)
    size: tl.constexpr = 2 * dim * width + (MATRICES - 2) * width * width
    wide: tl.constexpr = width if width > dim else dim
    layer = tl.cast(layer, tl.int64)
    feature, place = tl.arange(0, DIM), tl.arange(0, COUNT)
    in_block, own = per_block * rows, head * blocks + block
    with_feature, present, in_all = feature < dim, place < in_block, place * wide
    height, columns, before = _shape(l, MATRICES, dim, width, STATES)
    entries = height * columns
    to_rows, kept = own * in_block * wide, (head * MATRICES + l) * COUNT * wide
    all_inputs, all_deltas = inputs + to_rows + l * layer, deltas + to_rows + l * layer
    own_g = g_low + head * STATES * size + before
    own_final = final + own * STATES * per_block
    to_weights, to_momentum = _load_states(own_final, per_block, place // rows, present, STATES)
    d_to_weights, d_to_momentum = tl.zeros((COUNT,), tl.float32), tl.zeros((COUNT,), tl.float32)
    nothing, column = tl.zeros((COUNT, BLOCK), tl.float32), tile * BLOCK

    if column < columns:
        of_w, of_s = nothing, nothing
        for first in range(0, height, DEPTH):
            x = _rows(all_inputs, in_all, present, first, height, DEPTH)
            to_tile, in_tile = _tile(first, column, height, columns, DEPTH, BLOCK)
            g, t = _load_states(own_g, entries, to_tile, in_tile, STATES)
            of_w = multiply_add(of_w, x, g, PRECISION, OPERAND)
            if STATES > 1:
                of_s = multiply_add(of_s, x, t, PRECISION, OPERAND)
        d = _rows(all_deltas, in_all, present, column, columns, BLOCK)
        d_to_weights += tl.sum(of_w * d, axis=1)
        d_delta = to_weights[:, None] * of_w
        if STATES > 1:
            d_to_momentum += tl.sum(of_s * d, axis=1)
            d_delta += to_momentum[:, None] * of_s
        if OF_DELTAS:
            d_delta += _rows(d_deltas + to_rows + l * layer, in_all, present, column, columns, BLOCK)
        _store_rows(of_deltas + kept, in_all, place < COUNT, column, columns, d_delta, BLOCK)
    if column < height:
        d_x = nothing
        for first in range(0, columns, DEPTH):
            d = _rows(all_deltas, in_all, present, first, columns, DEPTH)
            to_tile, in_tile = _tile(column, first, height, columns, BLOCK, DEPTH)
            g, t = _load_states(own_g, entries, to_tile, in_tile, STATES)
            d_x = multiply_add(d_x, d * to_weights[:, None], tl.trans(g), PRECISION, OPERAND)
            if STATES > 1:
                d_x = multiply_add(d_x, d * to_momentum[:, None], tl.trans(t), PRECISION, OPERAND)
        if OF_INPUTS:
            if l > 0:
                d_x += _rows(d_inputs + to_rows + l * layer, in_all, present, column, height, BLOCK)
        _store_rows(of_inputs + kept, in_all, place < COUNT, column, height, d_x, BLOCK)
    if NORM:
        if (l == 0) & (tile == 0):
            gamma_updates = _rows(of_gamma + own * in_block * dim, place * dim, present, 0, dim, DIM)
            g_w, g_s = _load_states(g_gamma + head * STATES * dim, dim, feature, with_feature, STATES)
            d_to_weights += tl.sum(gamma_updates * g_w[None, :], axis=1)
            d_gamma_updates = to_weights[:, None] * g_w[None, :]
            if STATES > 1:
                d_to_momentum += tl.sum(gamma_updates * g_s[None, :], axis=1)
                d_gamma_updates += to_momentum[:, None] * g_s[None, :]
            if OF_GAMMA:
                d_gamma_updates += _rows(d_of_gamma + own * in_block * dim, place * dim, present, 0, dim, DIM)
            _store_rows(of_gamma_updates + head * COUNT * dim, place * dim, place < COUNT, 0, dim, d_gamma_updates, DIM)
    program = (own * MATRICES + l) * tl.num_programs(2) + tile
    to_final = d_final + program * STATES * in_block
    _store_states(to_final, d_to_weights, d_to_momentum, in_block, place, present, STATES)


@triton.jit(do_not_specialize=['block', 'blocks'])
def _states_backward_kernel(  # type: ignore[no-untyped-def]
    initial_steps, initial_final, initial, gamma_states, inputs, raw, of_back, of_pre, of_gains,
    d_gamma_states, d_initial, g_states, g_low, g_gamma, d_initial_final,
    block, blocks, per_block, per_batch, rows, layer,
    dim: tl.constexpr, width: tl.constexpr, MATRICES: tl.constexpr, NORM: tl.constexpr, STATES: tl.constexpr,
    OF_INITIAL: tl.constexpr, OF_GAMMA_STATES: tl.constexpr,
    COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """G before a block, from G after it and the gradients of its products; a program owns a tile of one matrix."""
    head, l, tile = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1), tl.program_id(2)
    size: tl.constexpr = 2 * dim * width + (MATRICES - 2) * width * width
    wide: tl.constexpr = width if width > dim else dim
    layer = tl.cast(layer, tl.int64)
    feature, place = tl.arange(0, DIM), tl.arange(0, COUNT)
    in_block, own = per_block * rows, head * blocks + block
    with_feature, present, in_all = feature < dim, place < in_block, place * wide
    height, columns, before = _shape(l, MATRICES, dim, width, STATES)
    entries = height * columns
    to_rows, own_initial = own * in_block * wide, initial + own * STATES * size
    own_g, own_g_low = g_states + head * STATES * size, g_low + head * STATES * size
    # for each row, the coefficients of its memory batch
    to_batch = (own * per_block + place // rows // per_batch * per_batch) * STATES
    of_weights, of_momentum = _load_states(initial_steps, 1, to_batch, present, STATES)
    own_mix = initial_final + own * STATES * STATES
    kept, added = _load_mix(own_mix, STATES)
    returned, kept_momentum = _load_mix(own_mix + (STATES - 1) * STATES, STATES)
    d_kept, d_added, d_returned, d_kept_momentum = 0.0, 0.0, 0.0, 0.0

    across = tl.cdiv(columns, BLOCK)
    to_row, to_column = tile // across * BLOCK, tile % across * BLOCK
    if to_row < height:
        to_tile, in_tile = _tile(to_row, to_column, height, columns, BLOCK, BLOCK)
        to_tile += before
        g, t = _load_states(own_g, entries, to_tile, in_tile, STATES)
        w, momentum = _load_states(own_initial, entries, to_tile, in_tile, STATES)
        d_kept += _dot(g, w)
        d_w = kept * g
        d_s = d_w
        if STATES > 1:
            d_added += _dot(g, momentum)
            d_returned += _dot(t, w)
            d_kept_momentum += _dot(t, momentum)
            d_w += returned * t
            d_s = added * g + kept_momentum * t
        x = _rows(inputs + to_rows + l * layer, in_all, present, to_row, height, BLOCK)
        d_h = _rows(of_pre + to_rows + l * layer, in_all, present, to_column, columns, BLOCK)
        d_w = multiply_add(d_w, tl.trans(x * of_weights[:, None]), d_h, PRECISION, OPERAND)
        if STATES > 1:
            d_s = multiply_add(d_s, tl.trans(x * of_momentum[:, None]), d_h, PRECISION, OPERAND)
        if l > 0:
            d_g = _rows(of_back + to_rows + (l - 1) * layer, in_all, present, to_row, height, BLOCK)
            d = _rows(raw + to_rows + l * layer, in_all, present, to_column, columns, BLOCK)
            d_w = multiply_add(d_w, tl.trans(d_g * of_weights[:, None]), d, PRECISION, OPERAND)
            if STATES > 1:
                d_s = multiply_add(d_s, tl.trans(d_g * of_momentum[:, None]), d, PRECISION, OPERAND)
        if OF_INITIAL:
            given, given_momentum = _load_states(d_initial + own * STATES * size, entries, to_tile, in_tile, STATES)
            d_w += given
            d_s += given_momentum
        _store_states(own_g, d_w, d_s, entries, to_tile, in_tile, STATES)
        _store_states(own_g_low, d_w, d_s, entries, to_tile, in_tile, STATES)
    if NORM:
        if (l == 0) & (tile == 0):
            own_gamma = gamma_states + (head * (blocks + 1) + block) * STATES * dim
            own_g_gamma = g_gamma + head * STATES * dim
            g_w, g_s = _load_states(own_g_gamma, dim, feature, with_feature, STATES)
            gamma_w, gamma_s = _load_states(own_gamma, dim, feature, with_feature, STATES)
            d_kept += tl.sum(g_w * gamma_w, axis=0)
            d_gamma, d_gamma_s = kept * g_w, kept * g_w
            if STATES > 1:
                d_added += tl.sum(g_w * gamma_s, axis=0)
                d_returned += tl.sum(g_s * gamma_w, axis=0)
                d_kept_momentum += tl.sum(g_s * gamma_s, axis=0)
                d_gamma += returned * g_s
                d_gamma_s = added * g_w + kept_momentum * g_s
            batches = per_block // per_batch
            for batch in range(batches):
                gain = tl.load(of_gains + (own * batches + batch) * dim + feature, mask=with_feature, other=0.0)
                of_batch = initial_steps + (own * per_block + batch * per_batch) * STATES
                share, share_of_momentum = _load_mix(of_batch, STATES)
                d_gamma += share * gain
                d_gamma_s += share_of_momentum * gain
            if OF_GAMMA_STATES:
                to_given = d_gamma_states + (head * (blocks + 1) + block) * STATES * dim
                given_w, given_s = _load_states(to_given, dim, feature, with_feature, STATES)
                d_gamma += given_w
                d_gamma_s += given_s
            _store_states(own_g_gamma, d_gamma, d_gamma_s, dim, feature, with_feature, STATES)
    to_mix = d_initial_final + ((own * MATRICES + l) * tl.num_programs(2) + tile) * 4
    tl.store(to_mix, d_kept)
    tl.store(to_mix + 1, d_added)
    tl.store(to_mix + 2, d_returned)
    tl.store(to_mix + 3, d_kept_momentum)


@triton.jit
def _initial_steps_kernel(  # type: ignore[no-untyped-def]
    initial, inputs, raw, of_back, of_pre, d_initial_steps, layer, in_block,
    dim: tl.constexpr, width: tl.constexpr, MATRICES: tl.constexpr, STATES: tl.constexpr, PARTS: tl.constexpr,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """For each row, the gradient of the coefficients of the states before its block in the row's products."""
    program = tl.program_id(0)
    part, own = program % PARTS, tl.cast(program // PARTS, tl.int64)
    size: tl.constexpr = 2 * dim * width + (MATRICES - 2) * width * width
    wide: tl.constexpr = width if width > dim else dim
    layer = tl.cast(layer, tl.int64)
    place = tl.arange(0, COUNT)
    present, in_all, to_rows = place < in_block, place * wide, own * in_block * wide
    nothing = tl.zeros((COUNT, BLOCK), tl.float32)
    of_weights, of_momentum = tl.zeros((COUNT,), tl.float32), tl.zeros((COUNT,), tl.float32)
    for l in range(MATRICES):
        height, columns, before = _shape(l, MATRICES, dim, width, STATES)
        entries = height * columns
        states = initial + own * STATES * size + before
        for column in range((part + l) % PARTS * BLOCK, columns, PARTS * BLOCK):
            of_w, of_s = nothing, nothing
            for first in range(0, height, DEPTH):
                x = _rows(inputs + to_rows + l * layer, in_all, present, first, height, DEPTH)
                to_tile, in_tile = _tile(first, column, height, columns, DEPTH, BLOCK)
                w, momentum = _load_states(states, entries, to_tile, in_tile, STATES)
                of_w = multiply_add(of_w, x, w, PRECISION, OPERAND)
                if STATES > 1:
                    of_s = multiply_add(of_s, x, momentum, PRECISION, OPERAND)
            d_h = _rows(of_pre + to_rows + l * layer, in_all, present, column, columns, BLOCK)
            of_weights += tl.sum(of_w * d_h, axis=1)
            of_momentum += tl.sum(of_s * d_h, axis=1)
        if l > 0:
            for unit in range((part + l) % PARTS * BLOCK, height, PARTS * BLOCK):
                of_w, of_s = nothing, nothing
                for first in range(0, columns, DEPTH):
                    d = _rows(raw + to_rows + l * layer, in_all, present, first, columns, DEPTH)
                    to_tile, in_tile = _tile(unit, first, height, columns, BLOCK, DEPTH)
                    w, momentum = _load_states(states, entries, to_tile, in_tile, STATES)
                    of_w = multiply_add(of_w, d, tl.trans(w), PRECISION, OPERAND)
                    if STATES > 1:
                        of_s = multiply_add(of_s, d, tl.trans(momentum), PRECISION, OPERAND)
                d_g = _rows(of_back + to_rows + (l - 1) * layer, in_all, present, unit, height, BLOCK)
                of_weights += tl.sum(of_w * d_g, axis=1)
                of_momentum += tl.sum(of_s * d_g, axis=1)
    to_steps = d_initial_steps + (own * PARTS + part) * STATES * in_block
    _store_states(to_steps, of_weights, of_momentum, in_block, place, present, STATES)


OUTPUTS = (
    'final_states', 'gamma_states', 'initial', 'inputs', 'deltas', 'of_gamma', 'losses',
    'raw', 'pre', 'back', 'products', 'scores', 'back_scores', 'inverses', 'row_products', 'norms',
)  # fmt: skip
NOT_DIFFERENTIABLE = (*range(7, 16),)


def _outputs(
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    states: Tensor,
    gamma: Tensor | None,
    steps: Tensor,
    initial_steps: Tensor,
    final: Tensor,
    initial_final: Tensor,
    width: int,
    matrices: int,
    chunks_per_batch: int,
    saves: bool,
    eps: float,
    num_proximal_steps: int | None,
    operands: torch.dtype,
) -> tuple[Tensor, ...]:
    """Outputs named in `OUTPUTS`: states after the last block, all matrices in one tensor; states of γ before each
    block and after the last; states before each block, in the precision of products; for each matrix, the rows it was
    applied to and the stored negative gradients of their products; the negative gradient of γ for each row; losses.
    Then what the backward pass needs: the negative gradients themselves, products before gelu, gradients before gelu′,
    the last products, products of each memory batch's rows with those of the block, forward and back, and, for proximal
    steps, the inverse of each system, products of rows, and squared norms of gradients."""
    heads, blocks, chunks, count = initial_steps.shape
    rows, dim = keys.shape[2:]
    batches, wide = chunks // chunks_per_batch, max(dim, width)
    in_block, on_chip, in_tile = chunks * rows, tile_size(chunks_per_batch * rows), tile_size(chunks * rows)
    new, proximal = states.new_empty, num_proximal_steps is not None

    def of_gamma(*shape: int) -> Tensor:
        return new(shape if gamma is not None else (0,))

    def of_rows(layers: int) -> Tensor:
        return new(layers, heads, blocks, in_block, wide, dtype=operands)

    def saved(layers: int, *axes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return new((heads, blocks, batches, layers, *axes) if saves else (0,), dtype=dtype)

    def of_steps(*axes: int) -> Tensor:
        return saved(matrices, *axes) if proximal else new(0)

    return (
        new(states.shape), of_gamma(heads, blocks + 1, count, dim),
        new(heads, blocks, *states.shape[1:], dtype=operands),
        of_rows(matrices), of_rows(matrices), of_gamma(heads, blocks, in_block, dim), new(heads, blocks, chunks, rows),
        of_rows(matrices) if proximal else new(0, dtype=operands), of_rows(matrices - 1), of_rows(matrices - 1),
        new(heads, blocks, in_block, dim),
        saved(matrices, on_chip, in_tile, dtype=operands), saved(matrices - 1, on_chip, in_tile, dtype=operands),
        of_steps(on_chip, on_chip), of_steps(on_chip, on_chip), of_steps(on_chip),
    )  # fmt: skip


def _forward(
    keys: Tensor,  # bh r·n m d
    values: Tensor,  # bh r·n m d
    step_sizes: Tensor,  # bh r·n m
    states: Tensor,  # bh, entries of all states of the first matrix and so on
    gamma: Tensor | None,  # bh k d
    steps: Tensor,  # bh r n n
    initial_steps: Tensor,  # bh r n k
    final: Tensor,  # bh r k n
    initial_final: Tensor,  # bh r k k
    width: int,
    matrices: int,
    chunks_per_batch: int,
    saves: bool,
    eps: float,
    num_proximal_steps: int | None,
    operands: torch.dtype,
) -> list[Tensor]:
    given = (keys, values, step_sizes, states, gamma, steps, initial_steps, final, initial_final)
    settings = (width, matrices, chunks_per_batch, saves, eps, num_proximal_steps, operands)
    outputs = _outputs(*given, *settings)
    final_states, *others = outputs
    named = dict(zip(OUTPUTS[1:], others))
    dim, blocks = keys.shape[3], steps.shape[1]
    # states before the first block, and inputs of the first matrix
    final_states.copy_(states)
    named['initial'][:, 0] = states
    named['inputs'][0, ..., :dim] = keys.reshape(named['inputs'].shape[1:-1] + (dim,))
    if gamma is not None:
        named['gamma_states'][:, 0] = gamma
    if num_proximal_steps is None:
        named['raw'] = named['deltas']
    coefficients, sizes = (steps, initial_steps, final, initial_final), (width, matrices, chunks_per_batch)
    arguments = _arguments(keys, values, step_sizes, *coefficients, *sizes, eps, num_proximal_steps, operands)
    arguments |= named | dict(states=final_states, NORM=gamma is not None, SAVES=saves)
    store_batches = _over_batches(_batches_kernel, arguments, 2 * matrices - 1)
    states_after = _over_matrices(_states_kernel, arguments, _num_tiles(arguments) ** 2)
    for block in range(blocks):
        store_batches(block)
        states_after(block)
    return [*outputs]


def _backward(
    d_outputs: list[Tensor | None],
    gamma_states: Tensor,
    initial: Tensor,
    inputs: Tensor,
    deltas: Tensor,
    of_gamma: Tensor,
    losses: Tensor,
    raw: Tensor,
    pre: Tensor,
    back: Tensor,
    products: Tensor,
    scores: Tensor,
    back_scores: Tensor,
    inverses: Tensor,
    row_products: Tensor,
    norms: Tensor,
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    states: Tensor,
    gamma: Tensor | None,
    steps: Tensor,
    initial_steps: Tensor,
    final: Tensor,
    initial_final: Tensor,
    width: int,
    matrices: int,
    chunks_per_batch: int,
    saves: bool,
    eps: float,
    num_proximal_steps: int | None,
    operands: torch.dtype,
) -> tuple[Tensor | None, ...]:
    incoming = dict(zip(OUTPUTS, d_outputs))
    heads, blocks, chunks, count = initial_steps.shape
    rows, dim = keys.shape[2:]
    batches, proximal = chunks // chunks_per_batch, num_proximal_steps is not None
    new, absent = states.new_empty, states.new_empty(0)
    coefficients, sizes = (steps, initial_steps, final, initial_final), (width, matrices, chunks_per_batch)
    arguments = _arguments(keys, values, step_sizes, *coefficients, *sizes, eps, num_proximal_steps, operands)
    parts, tiles = arguments['PARTS'], _num_tiles(arguments)
    on_chip, in_tile = arguments['ROWS'], arguments['COUNT']
    for name, flag in (
        ('gamma_states', 'OF_GAMMA_STATES'), ('initial', 'OF_INITIAL'), ('inputs', 'OF_INPUTS'),
        ('deltas', 'OF_DELTAS'), ('of_gamma', 'OF_GAMMA'), ('losses', 'OF_LOSSES'),
    ):  # fmt: skip
        d = incoming[name]
        given = d is not None and d.numel() > 0
        arguments |= {f'd_{name}': d.contiguous() if given else absent, flag: given}  # type: ignore[union-attr]

    # G, also in the precision of products
    d_final_states, d_gamma_states = incoming['final_states'], incoming['gamma_states']
    g_states = torch.zeros_like(states) if d_final_states is None else d_final_states.contiguous().clone()
    g_gamma = absent
    if gamma is not None:
        g_gamma = torch.zeros_like(gamma) if d_gamma_states is None else d_gamma_states[:, -1].contiguous().clone()
    of_block = (heads, matrices, in_tile, max(dim, width))
    of_deltas, of_scores = new(of_block), (heads, batches, matrices, on_chip, in_tile)
    results = dict(
        d_keys=new(heads, blocks * chunks, rows, dim),
        d_values=new(values.shape),
        d_step_sizes=new(step_sizes.shape),
        d_steps=new(heads, blocks, batches, 2 * matrices, in_tile),
        d_final=new(heads, blocks, matrices * tiles, count, chunks * rows),
        d_initial_final=new(heads, blocks, matrices * tiles**2, 2, 2),
    )
    # gradients of g and of products
    of_back, of_pre = back.new_empty(back.shape), back.new_empty(inputs.shape)
    arguments |= results | dict(
        gamma_states=gamma_states, initial=initial, inputs=inputs, deltas=deltas, of_gamma=of_gamma, losses=losses,
        raw=raw if proximal else deltas, pre=pre, back=back, products=products, scores=scores,
        back_scores=back_scores, inverses=inverses, row_products=row_products, norms=norms,
        g_states=g_states, g_low=g_states.to(operands, copy=True), g_gamma=g_gamma,
        of_inputs=new(of_block), of_deltas=of_deltas, of_raw=new(of_block) if proximal else of_deltas,
        of_back=of_back, of_pre=of_pre, of_scores=new(of_scores), of_back_scores=new(of_scores),
        of_gamma_updates=new(heads, in_tile, dim), of_weighted=new(heads, on_chip),
        of_gains=new(heads, blocks, batches, dim),
        NORM=gamma is not None,
    )  # fmt: skip
    through_final = _over_matrices(_through_final_kernel, arguments, tiles)
    through_batches = _over_batches(_batches_backward_kernel, arguments, 2 * matrices + 1)
    of_through_steps = _taken_by(_steps_backward_kernel, arguments)
    states_before = _over_matrices(_states_backward_kernel, arguments, tiles**2)
    for block in reversed(range(blocks)):
        through_final(block)
        through_batches(block)
        _steps_backward_kernel[(heads, batches, 2 * matrices)](block=block, **of_through_steps)
        states_before(block)
    d_initial_steps = new(heads, blocks, parts, count, chunks * rows)
    own = arguments | dict(d_initial_steps=d_initial_steps, in_block=chunks * rows)
    _initial_steps_kernel[(heads * blocks * parts,)](**_taken_by(_initial_steps_kernel, own))

    # a memory batch's first chunk has the coefficients of the weights at which its gradients are taken
    of_steps, of_initial_steps = torch.zeros_like(steps), torch.zeros_like(initial_steps)
    of_rows = results['d_steps'].sum(dim=3)[..., : chunks * rows]
    of_steps[:, :, ::chunks_per_batch] = of_rows.unflatten(-1, (chunks, rows)).sum(dim=-1)
    of_batches = d_initial_steps.sum(dim=2).unflatten(-1, (batches, -1)).sum(dim=-1).mT
    if gamma is not None:
        of_batches = of_batches + arguments['of_gains'] @ gamma_states[:, :-1].mT
    of_initial_steps[:, :, ::chunks_per_batch] = of_batches
    return (
        results['d_keys'].to(keys.dtype),
        results['d_values'].to(values.dtype),
        results['d_step_sizes'].to(step_sizes.dtype),
        g_states,
        None if gamma is None else g_gamma,
        of_steps,
        of_initial_steps,
        results['d_final'].sum(dim=2).unflatten(-1, (chunks, rows)).sum(dim=-1),
        results['d_initial_final'].sum(dim=2)[..., :count, :count],
    )


deep_memory_scan = register_kernel(
    'deep_memory_scan',
    _forward,
    _backward,
    outputs=lambda *arguments: [*_outputs(*arguments)],
    saved=(*range(1, 16),),
    not_differentiable=NOT_DIFFERENTIABLE,
    # later layers may use only some of the outputs
    materialize_grads=False,
)


def _arguments(
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    steps: Tensor,
    initial_steps: Tensor,
    final: Tensor,
    initial_final: Tensor,
    width: int,
    matrices: int,
    chunks_per_batch: int,
    eps: float,
    num_proximal_steps: int | None,
    operands: torch.dtype,
) -> dict[str, Any]:
    """Arguments that the kernels share."""
    keys, values = contiguous_inside(keys, 1), contiguous_inside(values, 1)
    heads, blocks, chunks, count = initial_steps.shape
    rows, dim = keys.shape[2:]
    return dict(
        keys=keys, **named_strides('key', keys, 'head chunk row'),
        values=values, **named_strides('value', values, 'head chunk row'),
        step_sizes=step_sizes, **named_strides('step', step_sizes, 'head chunk row'),
        steps=steps.contiguous(), initial_steps=initial_steps.contiguous(),
        final=final.contiguous(), initial_final=initial_final.contiguous(),
        blocks=blocks, heads=heads, per_block=chunks, per_batch=chunks_per_batch, rows=rows,
        layer=heads * blocks * chunks * rows * max(dim, width), eps=eps,
        num_steps=float(num_proximal_steps or 0), PROXIMAL=num_proximal_steps is not None,
        dim=dim, width=width, MATRICES=matrices, STATES=count, COUNTER_STRIDE=COUNTER_STRIDE,
        PARTS=min(MOST_PROGRAMS, triton.cdiv(width, BLOCK)),
        ROWS=tile_size(chunks_per_batch * rows), COUNT=tile_size(chunks * rows), DIM=tile_size(dim),
        BLOCK=BLOCK, DEPTH=DEPTH, num_warps=WARPS,
        # stages of a loop over features: two programs must fit on a multiprocessor, also with systems of proximal steps
        num_stages=2 if operands == torch.float32 or num_proximal_steps is not None else 3,
        **product_precision(operands),
    )  # fmt: skip


def _num_tiles(arguments: dict[str, Any]) -> int:
    """Number of tiles along the longest side of a matrix."""
    return triton.cdiv(max(arguments['dim'], arguments['width']), BLOCK)


def _taken_by(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return taken_by(kernel, arguments) | {name: arguments[name] for name in ('num_warps', 'num_stages')}


def _over_matrices(kernel: Any, arguments: dict[str, Any], programs: int) -> Callable[[int], None]:
    """A function that launches a kernel for a block, with `programs` programs per matrix of a head."""
    own, grid = _taken_by(kernel, arguments), (arguments['heads'], arguments['MATRICES'], programs)
    return lambda block: kernel[grid](block=block, **own)


def _over_batches(kernel: Any, arguments: dict[str, Any], phases: int) -> Callable[[int], None]:
    """A function that launches a kernel for a block's memory batches, phase by phase if programs cannot wait."""
    own, heads, parts = _taken_by(kernel, arguments), arguments['heads'], arguments['PARTS']
    batches, device = arguments['per_block'] // arguments['per_batch'], arguments['keys'].device
    waits = parts > 1 and device.type == 'cuda'
    counters = new_counters(arguments['blocks'] * heads * waits, device).view(arguments['blocks'], -1)
    own |= dict(WAITS=waits)
    if parts > 1 and not waits:

        def launch(block: int) -> None:
            for batch, phase in product(range(batches), range(phases)):
                one = dict(block=block, first_batch=batch, last_batch=batch + 1, PHASE=phase, counters=counters[block])
                kernel[(heads * parts,)](**own, **one)

        return launch

    own |= dict(first_batch=0, last_batch=batches, PHASE=-1)
    groups = heads
    if waits:
        own |= dict(launch_cooperative_grid=True)
        groups = heads_together(kernel, own | dict(block=0, counters=counters[0]), heads, parts, device)
    return lambda block: kernel[(groups * parts,)](block=block, counters=counters[block], **own)
