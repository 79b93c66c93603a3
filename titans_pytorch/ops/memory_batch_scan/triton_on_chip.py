"""Kernels of the scan over memory batches that keep states on chip from the first memory batch to the last.

Programs share a head by hidden features: each owns the same columns of W₁ and rows of W₂, with their momentum. Only the
product with W₂ is a sum over all of them, so they synchronise once per memory batch, forward and backward: each writes
its part of the sum, waits for the others, adds up all parts and continues with the same numbers. States are written out
before each block of memory batches, for retrieval, and before each memory batch in the precision of products, for the
backward pass. That goes from the last memory batch to the first, with the gradient G of the states on chip.

Where programs cannot wait for each other, in Triton's interpreter, each phase between two such synchronisations is a
launch, and states stay in memory between launches.
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
    gelu_derivative,
    gelu_second_derivative,
    multiply_add,
    named_strides,
    normal_cdf,
    product_precision,
    tile_size,
)
from titans_pytorch.ops._triton_cooperative import (
    COUNTER_STRIDE,
    arrive,
    heads_together,
    new_counters,
    wait_for_arrivals,
)
from titans_pytorch.ops.inner_gradient.triton import gradient_of_product, gradient_of_product_backward, gradient_terms

# hidden features of a program
UNITS = 64
# warps of a program; fewer forward, in half precision, if a memory batch has at most 16 rows: two programs then share a
# multiprocessor, and one computes while the other waits
WARPS, WARPS_OF_FEW_ROWS = 8, 4


@triton.jit
def _load_matrix(states, size, offset, inside, MOMENTUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's part of a matrix and of its momentum."""
    w = tl.load(states + offset, mask=inside, other=0.0)
    momentum = w
    if MOMENTUM:
        momentum = tl.load(states + size + offset, mask=inside, other=0.0)
    return w, momentum


@triton.jit
def _store_matrix(states, w, momentum, size, offset, inside, MOMENTUM: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(states + offset, w, mask=inside)
    if MOMENTUM:
        tl.store(states + size + offset, momentum, mask=inside)


@triton.jit
def _load_mix(initial_coefficients, own, MOMENTUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Coefficients of the weights in the next weights, and of the momentum in the next weights and next momentum."""
    if MOMENTUM:
        start = initial_coefficients + own * 4
        mix = tl.load(start), tl.load(start + 1), tl.load(start + 3)
    else:
        weight = tl.load(initial_coefficients + own)
        mix = weight, weight, weight
    return mix


@triton.jit
def _load_coefficients(  # type: ignore[no-untyped-def]
    coefficients, own, chunk, valid, chunks, STATES: tl.constexpr, SCALAR: tl.constexpr
):  # fmt: skip
    """Coefficients of each row's update in the next weights and in the next momentum; scalars if all rows share
    them."""
    start = coefficients + own * STATES * chunks
    if SCALAR:
        of_weights = tl.load(start)
        of_momentum = of_weights
        if STATES > 1:
            of_momentum = tl.load(start + chunks)
    else:
        of_weights = tl.load(start + chunk, mask=valid, other=0.0)
        of_momentum = of_weights
        if STATES > 1:
            of_momentum = tl.load(start + chunks + chunk, mask=valid, other=0.0)
    return of_weights, of_momentum


@triton.jit
def _advance(  # type: ignore[no-untyped-def]
    w, momentum, x, delta, coefficients, mix,
    MOMENTUM: tl.constexpr, SCALAR: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """A matrix and its momentum after a memory batch with rows x and Δ."""
    of_weights, of_momentum = coefficients
    kept, added, kept_momentum = mix
    if SCALAR:
        update = multiply_add(tl.zeros_like(w), tl.trans(x.to(OPERAND)), delta, PRECISION, OPERAND)
        if MOMENTUM:
            w = kept * w + added * momentum + of_weights * update
            momentum = kept_momentum * momentum + of_momentum * update
        else:
            w = kept * w + of_weights * update
    else:
        if MOMENTUM:
            w = kept * w + added * momentum
            momentum = kept_momentum * momentum
            momentum = multiply_add(momentum, tl.trans(x * of_momentum[:, None]), delta, PRECISION, OPERAND)
        else:
            w = kept * w
        w = multiply_add(w, tl.trans(x * of_weights[:, None]), delta, PRECISION, OPERAND)
    return w, momentum


@triton.jit
def _sum_over_rows(rows, coefficient, SCALAR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of the rows times their coefficients."""
    if SCALAR:
        total = coefficient * tl.sum(rows, axis=0)
    else:
        total = tl.sum(coefficient[:, None] * rows, axis=0)
    return total


@triton.jit
def _store_part(parts, part, own, SIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write a program's part of a sum, (ROWS, WIDTH); each program has SIZE entries."""
    entry = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(parts + part * SIZE + entry, own)


@triton.jit
def _sum_of_parts(  # type: ignore[no-untyped-def]
    parts, COUNT: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    entry = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    # unrolled, so that loads overlap
    for part in tl.static_range(COUNT):
        # bypasses the first-level cache, because another multiprocessor wrote this
        total += tl.load(parts + part * SIZE + entry, cache_modifier='.cg')
    return total


@triton.jit(do_not_specialize=['first_batch', 'last_batch', 'batches'])
def _forward_kernel(  # type: ignore[no-untyped-def]
    keys, values, step_sizes, coefficients, initial_coefficients, first, last, gamma,
    first_initial, last_initial, gamma_initial, first_final, last_final, gamma_final,
    hidden, hidden_deltas, deltas, of_gamma, losses, first_saved, last_saved, gamma_saved, products, partial, counters,
    first_batch, last_batch, batches, batches_per_block, heads, chunks, rows, eps,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
    dim: tl.constexpr, width: tl.constexpr, NORM: tl.constexpr, STATES: tl.constexpr, MOMENTUM: tl.constexpr,
    SCALAR: tl.constexpr, SAVES: tl.constexpr,
    BEFORE_SUM: tl.constexpr, AFTER_SUM: tl.constexpr, WAITS: tl.constexpr,
    COUNTER_STRIDE: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, UNITS: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    part, groups = program % PARTS, tl.num_programs(0) // PARTS
    feature, unit, index = tl.arange(0, DIM), part * UNITS + tl.arange(0, UNITS), tl.arange(0, ROWS)
    with_feature, with_unit, valid = feature < dim, unit < width, index < chunks * rows
    chunk, row = index // rows, index % rows
    size: tl.constexpr = dim * width
    to_first, in_first = feature[:, None] * width + unit[None, :], with_feature[:, None] & with_unit[None, :]
    to_last, in_last = unit[:, None] * dim + feature[None, :], with_unit[:, None] & with_feature[None, :]
    inside, present = valid[:, None] & with_feature[None, :], valid[:, None] & with_unit[None, :]
    nothing = tl.zeros((ROWS, UNITS), tl.float32)

    for head_index in range(program // PARTS, heads, groups):
        head = tl.cast(head_index, tl.int64)
        counter = counters + head * COUNTER_STRIDE
        w_1, s_1 = _load_matrix(first + head * STATES * size, size, to_first, in_first, MOMENTUM)
        w_2, s_2 = _load_matrix(last + head * STATES * size, size, to_last, in_last, MOMENTUM)
        w_gamma, s_gamma = 0.0, 0.0
        if NORM:
            # every program keeps its own copy
            own_gamma = gamma + (head * PARTS + part) * STATES * dim
            w_gamma, s_gamma = _load_matrix(own_gamma, dim, feature, with_feature, MOMENTUM)

        for batch in range(first_batch, last_batch):
            own = head * batches + batch
            start = own * chunks * rows
            offset = tl.cast(batch * chunks + chunk, tl.int64)
            # everything is read before programs wait for each other
            from_keys = keys + head * key_head + (offset * key_chunk + row * key_row)[:, None] + feature[None, :]
            k = tl.load(from_keys, mask=inside, other=0.0).to(tl.float32)
            to_values = (offset * value_chunk + row * value_row)[:, None] + feature[None, :]
            v = tl.load(values + head * value_head + to_values, mask=inside, other=0.0).to(tl.float32)
            to_steps = offset * step_chunk + row * step_row
            theta = tl.load(step_sizes + head * step_head + to_steps, mask=valid, other=0.0).to(tl.float32)
            mix = _load_mix(initial_coefficients, own, MOMENTUM)
            of_chunks = _load_coefficients(coefficients, own, chunk, valid, chunks, STATES, SCALAR)
            h = multiply_add(nothing, k, w_1, PRECISION, OPERAND)
            a = h * normal_cdf(h)
            from_hidden = w_2.to(OPERAND)
            # two buffers in turn: by the time one is written again, all programs have read it
            parts_of_y = partial + (head * 2 + batch % 2) * PARTS * SIZE
            if BEFORE_SUM:
                y = multiply_add(tl.zeros((ROWS, DIM), tl.float32), a, from_hidden, PRECISION, OPERAND)
                _store_part(parts_of_y, part, y, SIZE, ROWS, DIM)
            arrive(counter, WAITS)
            # do whatever needs no sum while the others arrive
            if AFTER_SUM:
                if batch % batches_per_block == 0:
                    block = own // batches_per_block
                    _store_matrix(
                        first_initial + block * STATES * size, w_1, s_1, size, to_first, in_first, MOMENTUM
                    )  # fmt: skip
                    _store_matrix(last_initial + block * STATES * size, w_2, s_2, size, to_last, in_last, MOMENTUM)
                    if NORM:
                        to_block = gamma_initial + block * STATES * dim
                        if part == 0:
                            _store_matrix(to_block, w_gamma, s_gamma, dim, feature, with_feature, MOMENTUM)
                if SAVES:
                    saved = own * STATES * size
                    _store_matrix(first_saved + saved, w_1, s_1, size, to_first, in_first, MOMENTUM)
                    _store_matrix(last_saved + saved, w_2, s_2, size, to_last, in_last, MOMENTUM)
                    if NORM:
                        to_saved = gamma_saved + own * STATES * dim
                        if part == 0:
                            _store_matrix(to_saved, w_gamma, s_gamma, dim, feature, with_feature, MOMENTUM)
                tl.store(hidden + (start + index)[:, None] * width + unit[None, :], a, mask=present)
            wait_for_arrivals(counter, (batch - first_batch + 1) * PARTS, WAITS)

            if AFTER_SUM:
                y = _sum_of_parts(parts_of_y, PARTS, SIZE, ROWS, DIM)
                gain = 1.0
                if NORM:
                    gain += w_gamma[None, :]  # type: ignore[index]
                difference, delta, of_rows = gradient_of_product(y, k, v, theta[:, None], gain, inside, eps, dim, NORM)
                loss = tl.sum(difference * difference, axis=1) / dim
                g = multiply_add(nothing, delta, tl.trans(from_hidden), PRECISION, OPERAND)
                hidden_delta = g * gelu_derivative(h)
                to_rows = (start + index)[:, None] * dim + feature[None, :]
                if part == 0:
                    tl.store(losses + start + index, loss, mask=valid)
                    tl.store(deltas + to_rows, delta, mask=inside)
                    if SAVES:
                        tl.store(products + to_rows, y, mask=inside)
                    if NORM:
                        tl.store(of_gamma + to_rows, of_rows, mask=inside)
                tl.store(hidden_deltas + (start + index)[:, None] * width + unit[None, :], hidden_delta, mask=present)

                w_1, s_1 = _advance(w_1, s_1, k, hidden_delta, of_chunks, mix, MOMENTUM, SCALAR, PRECISION, OPERAND)
                w_2, s_2 = _advance(w_2, s_2, a, delta, of_chunks, mix, MOMENTUM, SCALAR, PRECISION, OPERAND)
                if NORM:
                    of_weights, of_momentum = of_chunks
                    kept, added, kept_momentum = mix
                    w_gamma = kept * w_gamma + _sum_over_rows(of_rows, of_weights, SCALAR)
                    if MOMENTUM:
                        w_gamma += added * s_gamma
                        s_gamma = kept_momentum * s_gamma + _sum_over_rows(of_rows, of_momentum, SCALAR)

        if AFTER_SUM:
            _store_matrix(first_final + head * STATES * size, w_1, s_1, size, to_first, in_first, MOMENTUM)
            _store_matrix(last_final + head * STATES * size, w_2, s_2, size, to_last, in_last, MOMENTUM)
            if NORM:
                to_final = gamma_final + (head * PARTS + part) * STATES * dim
                _store_matrix(to_final, w_gamma, s_gamma, dim, feature, with_feature, MOMENTUM)


@triton.jit
def _through_states(  # type: ignore[no-untyped-def]
    x, delta, g_weights, g_momentum, coefficients,
    MOMENTUM: tl.constexpr, SCALAR: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """state = Σ c · xᵀ δ gives the gradients Σ c · x G for δ, Σ c · δ Gᵀ for x, and x G ∘ δ for each row's c. If rows
    are `SCALAR`, they share one c, whose gradient is not needed, and Σ c · G is a single matrix."""
    of_weights, of_momentum = coefficients
    nothing, none = tl.zeros_like(delta), tl.zeros_like(x)
    d_of_weights = tl.zeros_like(of_weights)
    d_of_momentum = d_of_weights
    if SCALAR:
        together = of_weights * g_weights
        if MOMENTUM:
            together += of_momentum * g_momentum
        together = together.to(OPERAND)
        d_delta = multiply_add(nothing, x, together, PRECISION, OPERAND)
        d_x = multiply_add(none, delta, tl.trans(together), PRECISION, OPERAND)
    else:
        product = multiply_add(nothing, x, g_weights, PRECISION, OPERAND)
        d_of_weights = tl.sum(product * delta, axis=1)
        d_delta = of_weights[:, None] * product
        d_x = multiply_add(none, of_weights[:, None] * delta, tl.trans(g_weights), PRECISION, OPERAND)
        if MOMENTUM:
            product = multiply_add(nothing, x, g_momentum, PRECISION, OPERAND)
            d_of_momentum = tl.sum(product * delta, axis=1)
            d_delta += of_momentum[:, None] * product
            d_x = multiply_add(d_x, of_momentum[:, None] * delta, tl.trans(g_momentum), PRECISION, OPERAND)
    return d_x, d_delta, d_of_weights, d_of_momentum


@triton.jit
def _read_batch(  # type: ignore[no-untyped-def]
    batch, head, batches, chunks, rows, part, inputs, coefficients, outputs, saved, from_later, strides,
    dim: tl.constexpr, width: tl.constexpr, NORM: tl.constexpr, STATES: tl.constexpr, MOMENTUM: tl.constexpr,
    SCALAR: tl.constexpr, OF_HIDDEN: tl.constexpr, OF_HIDDEN_DELTAS: tl.constexpr, OF_DELTAS: tl.constexpr,
    OF_GAMMA: tl.constexpr, LOSSES: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """What the forward pass read and left for a memory batch, and the gradients that reach its outputs from later
    layers, or 0. Momentum is read separately, because nothing waits for it."""
    keys, values, step_sizes = inputs
    of_updates, of_states = coefficients
    hidden, hidden_deltas, deltas, products = outputs
    first_saved, last_saved, gamma_saved = saved
    d_hidden, d_hidden_deltas, d_deltas, d_of_gamma, d_losses = from_later
    (
        key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
        d_hidden_head, d_hidden_batch, d_hidden_row, d_hidden_unit,
    ) = strides  # fmt: skip
    feature, unit, index = tl.arange(0, DIM), part * UNITS + tl.arange(0, UNITS), tl.arange(0, ROWS)
    with_feature, with_unit, valid = feature < dim, unit < width, index < chunks * rows
    inside, present = valid[:, None] & with_feature[None, :], valid[:, None] & with_unit[None, :]
    own = head * batches + batch
    chunk, row, start = index // rows, index % rows, own * chunks * rows
    offset = tl.cast(batch * chunks + chunk, tl.int64)
    to_rows = (start + index)[:, None] * dim + feature[None, :]
    to_units = (start + index)[:, None] * width + unit[None, :]
    size: tl.constexpr = dim * width
    to_first, in_first = feature[:, None] * width + unit[None, :], with_feature[:, None] & with_unit[None, :]
    to_last, in_last = unit[:, None] * dim + feature[None, :], with_unit[:, None] & with_feature[None, :]

    from_keys = keys + head * key_head + (offset * key_chunk + row * key_row)[:, None] + feature[None, :]
    from_values = values + head * value_head + (offset * value_chunk + row * value_row)[:, None] + feature[None, :]
    from_steps = step_sizes + head * step_head + offset * step_chunk + row * step_row
    k, v = tl.load(from_keys, mask=inside, other=0.0), tl.load(from_values, mask=inside, other=0.0)
    theta = tl.load(from_steps, mask=valid, other=0.0)
    mix = _load_mix(of_states, own, MOMENTUM)
    of_chunks = _load_coefficients(of_updates, own, chunk, valid, chunks, STATES, SCALAR)
    w_1 = tl.load(first_saved + own * STATES * size + to_first, mask=in_first, other=0.0)
    w_2 = tl.load(last_saved + own * STATES * size + to_last, mask=in_last, other=0.0)
    w_gamma, s_gamma = 0.0, 0.0
    if NORM:
        w_gamma, s_gamma = _load_matrix(gamma_saved + own * STATES * dim, dim, feature, with_feature, MOMENTUM)
    a = tl.load(hidden + to_units, mask=present, other=0.0)
    hidden_delta = tl.load(hidden_deltas + to_units, mask=present, other=0.0)
    delta, y = tl.load(deltas + to_rows, mask=inside, other=0.0), tl.load(products + to_rows, mask=inside, other=0.0)
    of_a, of_hidden_delta, of_delta, of_gamma, of_loss = 0.0, 0.0, 0.0, 0.0, 0.0
    if OF_HIDDEN:
        from_hidden = d_hidden + head * d_hidden_head + tl.cast(batch, tl.int64) * d_hidden_batch
        from_hidden += (index * d_hidden_row)[:, None] + (unit * d_hidden_unit)[None, :]
        of_a = tl.load(from_hidden, mask=present, other=0.0)
    if OF_HIDDEN_DELTAS:
        of_hidden_delta = tl.load(d_hidden_deltas + to_units, mask=present, other=0.0)
    if OF_DELTAS:
        of_delta = tl.load(d_deltas + to_rows, mask=inside, other=0.0)
    if OF_GAMMA:
        of_gamma = tl.load(d_of_gamma + to_rows, mask=inside, other=0.0)
    if LOSSES:
        of_loss = tl.load(d_losses + start + index, mask=valid, other=0.0)
    return (
        (k, v, theta), (mix, of_chunks), (a, hidden_delta, delta, y), (w_1, w_2, w_gamma, s_gamma),
        (of_a, of_hidden_delta, of_delta, of_gamma, of_loss),
    )  # fmt: skip


@triton.jit
def _rows_of_both(x, y, OPERAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rows of x, then those of y."""
    both = tl.join(x.to(OPERAND), y.to(OPERAND))
    return tl.permute(both, (2, 0, 1)).reshape(2 * x.shape[0], x.shape[1])


@triton.jit
def _products_of_states(g_weights, g_momentum, w, s):  # type: ignore[no-untyped-def]
    """Each entry's part of the gradients of the three coefficients in `mix`, which are Σ G ∘ W, Σ G ∘ S and Σ T ∘ S,
    with the gradient T of the momentum; and a zero. Side by side, their sums take fewer barriers."""
    of_weights = tl.join(g_weights * w, g_momentum * s)
    products = tl.join(of_weights, tl.join(g_weights * s, tl.zeros_like(g_weights)))
    return products.reshape(g_weights.numel, 4)


@triton.jit
def _step_back(g_weights, g_momentum, mix, MOMENTUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """G before a memory batch from G after it, without what passes through gradients."""
    kept, added, kept_momentum = mix
    if MOMENTUM:
        g_momentum = added * g_weights + kept_momentum * g_momentum
    return kept * g_weights, g_momentum


@triton.jit(do_not_specialize=['first_batch', 'last_batch', 'batches'])
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_first_initial, d_last_initial, d_gamma_initial, d_first, d_last, d_gamma,
    d_hidden, d_hidden_deltas, d_deltas, d_of_gamma, d_losses,
    keys, values, step_sizes, coefficients, initial_coefficients,
    hidden, hidden_deltas, deltas, of_gamma, first_saved, last_saved, gamma_saved, products,
    d_keys, d_values, d_step_sizes, d_coefficients, d_initial_coefficients, partial, counters,
    first_batch, last_batch, batches, batches_per_block, heads, chunks, rows, eps,
    d_hidden_head, d_hidden_batch, d_hidden_row, d_hidden_unit,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
    dim: tl.constexpr, width: tl.constexpr, NORM: tl.constexpr, STATES: tl.constexpr, MOMENTUM: tl.constexpr,
    SCALAR: tl.constexpr, FIRST_INITIAL: tl.constexpr, LAST_INITIAL: tl.constexpr, GAMMA_INITIAL: tl.constexpr,
    OF_HIDDEN: tl.constexpr, OF_HIDDEN_DELTAS: tl.constexpr, OF_DELTAS: tl.constexpr, OF_GAMMA: tl.constexpr,
    LOSSES: tl.constexpr, BEFORE_SUM: tl.constexpr, AFTER_SUM: tl.constexpr, WAITS: tl.constexpr,
    COUNTER_STRIDE: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, UNITS: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Memory batches in reverse, `first_batch` to `last_batch` counted from the end."""
    program = tl.program_id(0)
    part, groups = program % PARTS, tl.num_programs(0) // PARTS
    feature, unit, index = tl.arange(0, DIM), part * UNITS + tl.arange(0, UNITS), tl.arange(0, ROWS)
    with_feature, with_unit, valid = feature < dim, unit < width, index < chunks * rows
    size: tl.constexpr = dim * width
    to_first, in_first = feature[:, None] * width + unit[None, :], with_feature[:, None] & with_unit[None, :]
    to_last, in_last = unit[:, None] * dim + feature[None, :], with_unit[:, None] & with_feature[None, :]
    inside = valid[:, None] & with_feature[None, :]
    nothing = tl.zeros((ROWS, UNITS), tl.float32)
    # selects one program's share of what all programs of a head compute identically
    is_first_part = tl.where(part == 0, 1.0, 0.0)
    inputs, both_coefficients = (keys, values, step_sizes), (coefficients, initial_coefficients)
    outputs, saved = (hidden, hidden_deltas, deltas, products), (first_saved, last_saved, gamma_saved)
    from_later = d_hidden, d_hidden_deltas, d_deltas, d_of_gamma, d_losses
    strides = (
        key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
        d_hidden_head, d_hidden_batch, d_hidden_row, d_hidden_unit,
    )  # fmt: skip

    for head_index in range(program // PARTS, heads, groups):
        head = tl.cast(head_index, tl.int64)
        counter = counters + head * COUNTER_STRIDE
        g_1, t_1 = _load_matrix(d_first + head * STATES * size, size, to_first, in_first, MOMENTUM)
        g_2, t_2 = _load_matrix(d_last + head * STATES * size, size, to_last, in_last, MOMENTUM)
        g_gamma, t_gamma = 0.0, 0.0
        if NORM:
            # every program keeps its own copy
            to_gamma = d_gamma + (head * PARTS + part) * STATES * dim
            g_gamma, t_gamma = _load_matrix(to_gamma, dim, feature, with_feature, MOMENTUM)

        upcoming = _read_batch(
            batches - 1 - first_batch, head, batches, chunks, rows, part,
            inputs, both_coefficients, outputs, saved, from_later, strides,
            dim, width, NORM, STATES, MOMENTUM, SCALAR, OF_HIDDEN, OF_HIDDEN_DELTAS, OF_DELTAS, OF_GAMMA, LOSSES,
            ROWS, DIM, UNITS,
        )  # fmt: skip
        for step in range(first_batch, last_batch):
            batch = batches - 1 - step
            own = head * batches + batch
            start = own * chunks * rows
            to_rows = (start + index)[:, None] * dim + feature[None, :]
            to_parts = own * PARTS + part
            own_inputs, own_coefficients, own_outputs, own_weights, given_gradients = upcoming
            k, v, theta = own_inputs
            mix, of_chunks = own_coefficients
            a, hidden_delta, delta, y = own_outputs
            w_1, w_2, w_gamma, s_gamma = own_weights
            given_of_a, given_of_hidden_delta, given_of_delta, d_of_rows, d_loss = given_gradients
            s_1, s_2 = w_1, w_2
            if MOMENTUM:
                s_1 = tl.load(first_saved + (own * STATES + 1) * size + to_first, mask=in_first, other=0.0)
                s_2 = tl.load(last_saved + (own * STATES + 1) * size + to_last, mask=in_last, other=0.0)
            k, v, theta = k.to(tl.float32), v.to(tl.float32), theta.to(tl.float32)[:, None]
            a, hidden_delta, delta = a.to(tl.float32), hidden_delta.to(tl.float32), delta.to(tl.float32)
            gain = 1.0
            if NORM:
                gain += w_gamma[None, :]
            if LOSSES:
                d_loss = d_loss[:, None]
            # for each matrix, back through the states to its X and Δ
            d_k, d_hidden_delta, of_first, of_first_momentum = _through_states(
                k, hidden_delta, g_1, t_1, of_chunks, MOMENTUM, SCALAR, PRECISION, OPERAND
            )  # fmt: skip
            d_a, d_delta, of_weights, of_momentum = _through_states(
                a, delta, g_2, t_2, of_chunks, MOMENTUM, SCALAR, PRECISION, OPERAND
            )  # fmt: skip
            of_weights += of_first
            of_momentum += of_first_momentum
            if OF_HIDDEN_DELTAS:
                d_hidden_delta += given_of_hidden_delta.to(tl.float32)
            # Δ₁ = g ∘ gelu′(h) with g = Δ₂ W₂ᵀ
            h = multiply_add(nothing, k, w_1, PRECISION, OPERAND)
            slope = gelu_derivative(h)
            d_g = d_hidden_delta * slope
            parts_of_delta = partial + (head * 2 + step % 2) * PARTS * SIZE
            if BEFORE_SUM:
                d_delta = multiply_add(d_delta, d_g, w_2, PRECISION, OPERAND)
                if OF_DELTAS:
                    d_delta += is_first_part * given_of_delta.to(tl.float32)
                _store_part(parts_of_delta, part, d_delta, SIZE, ROWS, DIM)
            arrive(counter, WAITS)
            # do whatever needs no sum while the others arrive
            if OF_HIDDEN:
                d_a += given_of_a.to(tl.float32)
            g = multiply_add(nothing, delta, tl.trans(w_2), PRECISION, OPERAND)
            of_mix = _products_of_states(g_1, t_1, w_1, s_1) + _products_of_states(g_2, t_2, w_2, s_2)
            d_mix = tl.sum(of_mix, axis=0)
            if NORM:
                weights_row, momentum_row = of_chunks
                if SCALAR:
                    d_of_rows += (weights_row * g_gamma)[None, :]  # type: ignore[index]
                    if MOMENTUM:
                        d_of_rows += (momentum_row * t_gamma)[None, :]  # type: ignore[index]
                else:
                    own_of_gamma = tl.load(of_gamma + to_rows, mask=inside, other=0.0)
                    d_of_rows += weights_row[:, None] * g_gamma[None, :]  # type: ignore[index]
                    of_weights += is_first_part * tl.sum(own_of_gamma * g_gamma[None, :], axis=1)  # type: ignore[index]
                    if MOMENTUM:
                        d_of_rows += momentum_row[:, None] * t_gamma[None, :]  # type: ignore[index]
                        of_momentum += is_first_part * tl.sum(own_of_gamma * t_gamma[None, :], axis=1)  # type: ignore[index]
                of_mix = _products_of_states(g_gamma, t_gamma, w_gamma, s_gamma)
                d_mix += is_first_part * tl.sum(of_mix, axis=0)
                g_gamma, t_gamma = _step_back(g_gamma, t_gamma, mix, MOMENTUM)
            g_1, t_1 = _step_back(g_1, t_1, mix, MOMENTUM)
            g_2, t_2 = _step_back(g_2, t_2, mix, MOMENTUM)
            terms = gradient_terms(y, k, v, theta, gain, inside, eps, dim, NORM)
            if AFTER_SUM:
                entry = tl.arange(0, 4)
                tl.store(d_initial_coefficients + to_parts * 3 + entry, d_mix, mask=entry < (3 if MOMENTUM else 1))
                if not SCALAR:
                    to_coefficients = d_coefficients + to_parts * STATES * chunks * rows + index
                    tl.store(to_coefficients, of_weights, mask=valid)
                    if MOMENTUM:
                        tl.store(to_coefficients + chunks * rows, of_momentum, mask=valid)
            if batch % batches_per_block == 0:
                block = own // batches_per_block
                if FIRST_INITIAL:
                    from_block = d_first_initial + block * STATES * size
                    d_w, d_s = _load_matrix(from_block, size, to_first, in_first, MOMENTUM)
                    g_1, t_1 = g_1 + d_w, t_1 + d_s
                if LAST_INITIAL:
                    from_block = d_last_initial + block * STATES * size
                    d_w, d_s = _load_matrix(from_block, size, to_last, in_last, MOMENTUM)
                    g_2, t_2 = g_2 + d_w, t_2 + d_s
                if GAMMA_INITIAL:
                    from_block = d_gamma_initial + block * STATES * dim
                    d_w, d_s = _load_matrix(from_block, dim, feature, with_feature, MOMENTUM)
                    g_gamma, t_gamma = g_gamma + d_w, t_gamma + d_s
            wait_for_arrivals(counter, (step - first_batch + 1) * PARTS, WAITS)

            if AFTER_SUM:
                d_delta = _sum_of_parts(parts_of_delta, PARTS, SIZE, ROWS, DIM)
                d_step, d_prediction, d_k_direct, d_product, gain_rows = gradient_of_product_backward(
                    terms, theta, gain, d_delta, d_of_rows, d_loss, inside, dim, NORM
                )
                # read for the next iteration now: a read that is needed at once takes as long as several products
                upcoming = _read_batch(
                    tl.maximum(batch - 1, 0), head, batches, chunks, rows, part,
                    inputs, both_coefficients, outputs, saved, from_later, strides,
                    dim, width, NORM, STATES, MOMENTUM, SCALAR, OF_HIDDEN, OF_HIDDEN_DELTAS, OF_DELTAS, OF_GAMMA,
                    LOSSES, ROWS, DIM, UNITS,
                )  # fmt: skip
                d_a = multiply_add(d_a, d_product, tl.trans(w_2), PRECISION, OPERAND)
                d_h = d_a * slope + g * d_hidden_delta * gelu_second_derivative(h)
                g_1 = multiply_add(g_1, tl.trans(k.to(OPERAND)), d_h, PRECISION, OPERAND)
                # as one product: with two in a row, Triton makes half of the warps repeat the work of the others
                x_of_both, y_of_both = _rows_of_both(a, d_g, OPERAND), _rows_of_both(d_product, delta, OPERAND)
                g_2 = multiply_add(g_2, tl.trans(x_of_both), y_of_both, PRECISION, OPERAND)
                if NORM:
                    g_gamma += tl.sum(gain_rows, axis=0)
                d_k = multiply_add(d_k, d_h, tl.trans(w_1), PRECISION, OPERAND)
                if part == 0:
                    tl.store(d_step_sizes + start + index, d_step, mask=valid)
                    tl.store(d_values + to_rows, -d_prediction, mask=inside)
                    d_k += d_k_direct
                to_keys = (to_parts * chunks * rows + index)[:, None] * dim + feature[None, :]
                tl.store(d_keys + to_keys, d_k, mask=inside)

        if AFTER_SUM:
            _store_matrix(d_first + head * STATES * size, g_1, t_1, size, to_first, in_first, MOMENTUM)
            _store_matrix(d_last + head * STATES * size, g_2, t_2, size, to_last, in_last, MOMENTUM)
            if NORM:
                to_gamma = d_gamma + (head * PARTS + part) * STATES * dim
                _store_matrix(to_gamma, g_gamma, t_gamma, dim, feature, with_feature, MOMENTUM)


# the phases of a memory batch, before and after programs synchronise
PHASES = ('BEFORE_SUM', 'AFTER_SUM')


def _outputs(
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    first: Tensor,
    last: Tensor,
    gamma: Tensor | None,
    coefficients: Tensor,
    initial_coefficients: Tensor,
    batches_per_block: int,
    saves: bool,
    learns_coefficients: bool,
    eps: float,
    operands: torch.dtype,
) -> tuple[Tensor, ...]:
    """The fields of `MemoryBatches`, with absent ones empty; if the call `saves` them for the backward pass, also the
    states before each memory batch and the products with W₂. `learns_coefficients`: whether the coefficients of updates
    get a gradient, which costs the backward pass four products of states per memory batch."""
    (heads, batches, count, chunks), (rows, dim) = coefficients.shape, keys.shape[2:]
    width = first.shape[3]
    blocks, stored = batches // batches_per_block, chunks * rows
    new = coefficients.new_empty

    def of_gamma(*shape: int) -> Tensor:
        return new(shape if gamma is not None else (0,))

    def saved(*shape: int, dtype: torch.dtype = operands) -> Tensor:
        return new(shape if saves else (0,), dtype=dtype)

    return (
        new(heads, blocks, count, dim, width, dtype=operands), new(heads, blocks, count, width, dim, dtype=operands),
        of_gamma(heads, blocks, count, dim), new(first.shape), new(last.shape), of_gamma(heads, count, dim),
        new(heads, batches, stored, width, dtype=operands), new(heads, batches, stored, width, dtype=operands),
        new(heads, batches, stored, dim, dtype=operands), of_gamma(heads, batches, stored, dim),
        new(heads, batches, chunks, rows),
        saved(heads, batches, count, dim, width), saved(heads, batches, count, width, dim),
        of_gamma(heads, batches, count, dim) if saves else new(0),
        saved(heads, batches, stored, dim, dtype=coefficients.dtype),
    )  # fmt: skip


OUTPUTS = (
    'first_initial', 'last_initial', 'gamma_initial', 'first_final', 'last_final', 'gamma_final',
    'hidden', 'hidden_deltas', 'deltas', 'of_gamma', 'losses',
    'first_saved', 'last_saved', 'gamma_saved', 'products',
)  # fmt: skip
# outputs that only the backward pass needs
FOR_BACKWARD = range(OUTPUTS.index('first_saved'), len(OUTPUTS))


def _forward(
    keys: Tensor,  # bh r·n m d
    values: Tensor,  # bh r·n m d
    step_sizes: Tensor,  # bh r·n m
    first: Tensor,  # bh k d e
    last: Tensor,  # bh k e d
    gamma: Tensor | None,  # bh k d
    coefficients: Tensor,  # bh r k n
    initial_coefficients: Tensor,  # bh r k k
    batches_per_block: int,
    saves: bool,
    learns_coefficients: bool,
    eps: float,
    operands: torch.dtype,
) -> list[Tensor]:
    given = (keys, values, step_sizes, first, last, gamma, coefficients, initial_coefficients)
    outputs = _outputs(*given, batches_per_block, saves, learns_coefficients, eps, operands)
    shared = _arguments(keys, values, step_sizes, first, coefficients, initial_coefficients, eps, operands)
    parts = shared['PARTS']
    arguments: dict[str, Any] = shared | dict(zip(OUTPUTS, outputs)) | dict(batches_per_block=batches_per_block)
    absent = coefficients.new_empty(0)
    states = dict(first=first.contiguous(), last=last.contiguous(), gamma=absent)
    if gamma is not None:
        # each program of a head keeps its own γ
        states['gamma'] = gamma.unsqueeze(1).expand(-1, parts, -1, -1).contiguous()
        arguments['gamma_final'] = torch.empty_like(states['gamma'])
    carried = {name: arguments[f'{name}_final'] for name in states}
    arguments |= dict(NORM=gamma is not None, SAVES=saves, SCALAR=coefficients.shape[3] == 1)
    if shared['ROWS'] == 16 and operands != torch.float32:
        arguments |= dict(num_warps=WARPS_OF_FEW_ROWS)
    _launch(_forward_kernel, arguments, states, carried)
    if gamma is not None:
        outputs[5].copy_(arguments['gamma_final'][:, 0])
    return [*outputs]


def _backward(
    d_outputs: list[Tensor | None],
    hidden: Tensor,
    hidden_deltas: Tensor,
    deltas: Tensor,
    of_gamma: Tensor,
    first_saved: Tensor,
    last_saved: Tensor,
    gamma_saved: Tensor,
    products: Tensor,
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    first: Tensor,
    last: Tensor,
    gamma: Tensor | None,
    coefficients: Tensor,
    initial_coefficients: Tensor,
    batches_per_block: int,
    saves: bool,
    learns_coefficients: bool,
    eps: float,
    operands: torch.dtype,
) -> tuple[Tensor | None, ...]:
    names = OUTPUTS[: FOR_BACKWARD.start]
    incoming = {name: d for name, d in zip(names, d_outputs) if gamma is not None or 'gamma' not in name}
    heads, batches, count, chunks = coefficients.shape
    rows, dim = keys.shape[2:]
    shared = _arguments(keys, values, step_sizes, first, coefficients, initial_coefficients, eps, operands)
    parts = shared['PARTS']
    absent = coefficients.new_empty(0)
    scalar = chunks == 1 and not learns_coefficients

    def final_gradient(name: str, shape: torch.Size) -> Tensor:
        """G, which is turned into the gradient of the initial states."""
        d_final = incoming.get(name)
        if d_final is None:
            return coefficients.new_zeros(shape)
        return d_final.clone(memory_format=torch.contiguous_format)

    d_first, d_last = final_gradient('first_final', first.shape), final_gradient('last_final', last.shape)
    d_gamma = absent
    if gamma is not None:
        d_gamma = final_gradient('gamma_final', gamma.shape).unsqueeze(1).repeat(1, parts, 1, 1)
    results = dict(
        d_keys=coefficients.new_empty(heads, batches, parts, chunks * rows, dim),
        d_values=coefficients.new_empty(values.shape),
        d_step_sizes=coefficients.new_empty(step_sizes.shape),
        d_coefficients=coefficients.new_empty(0 if scalar else heads, batches, parts, count, chunks * rows),
        d_initial_coefficients=coefficients.new_empty(heads, batches, parts, 3),
    )
    # often the gradient of a transposed tensor
    d_hidden = incoming.get('hidden')
    flags = dict(
        d_first_initial='FIRST_INITIAL', d_last_initial='LAST_INITIAL', d_gamma_initial='GAMMA_INITIAL',
        d_hidden_deltas='OF_HIDDEN_DELTAS', d_deltas='OF_DELTAS', d_of_gamma='OF_GAMMA', d_losses='LOSSES',
    )  # fmt: skip
    given = {name: incoming.get(name.removeprefix('d_')) for name in flags}
    arguments: dict[str, Any] = (
        shared
        | {name: absent if d is None else d.contiguous() for name, d in given.items()}
        | {flags[name]: d is not None for name, d in given.items()}
        | named_strides('d_hidden', d_hidden, 'head batch row unit')
        | dict(d_hidden=absent if d_hidden is None else d_hidden, OF_HIDDEN=d_hidden is not None)
        | dict(hidden=hidden, hidden_deltas=hidden_deltas, deltas=deltas, of_gamma=of_gamma, products=products)
        | dict(first_saved=first_saved, last_saved=last_saved, gamma_saved=gamma_saved)
        | dict(batches_per_block=batches_per_block, NORM=gamma is not None, SCALAR=scalar)
        | results
    )
    states = dict(d_first=d_first, d_last=d_last, d_gamma=d_gamma)
    _launch(_backward_kernel, arguments, states, states)

    if scalar:
        d_coefficients = torch.zeros_like(coefficients, memory_format=torch.contiguous_format)
    else:
        d_coefficients = results['d_coefficients'].sum(dim=2).unflatten(-1, (chunks, rows)).sum(dim=-1)
    kept, added, kept_momentum = results['d_initial_coefficients'].sum(dim=2).unbind(-1)
    d_mix = torch.zeros_like(initial_coefficients)
    d_mix[:, :, 0, 0] = kept
    if count > 1:
        d_mix[:, :, 0, 1], d_mix[:, :, 1, 1] = added, kept_momentum
    return (
        results['d_keys'].sum(dim=2).view(keys.shape).to(keys.dtype),
        results['d_values'].to(values.dtype),
        results['d_step_sizes'].to(step_sizes.dtype),
        d_first,
        d_last,
        # each program of a head has its own copy of this gradient; one is enough
        None if gamma is None else d_gamma[:, 0].clone(),
        d_coefficients,
        d_mix,
    )


memory_batch_scan_on_chip = register_kernel(
    'memory_batch_scan_on_chip',
    _forward,
    _backward,
    outputs=lambda *arguments: [*_outputs(*arguments)],
    saved=(*map(OUTPUTS.index, ('hidden', 'hidden_deltas', 'deltas', 'of_gamma')), *FOR_BACKWARD),
    not_differentiable=(*FOR_BACKWARD,),
    # later layers may use only some of the outputs
    materialize_grads=False,
)


def _arguments(
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    first: Tensor,
    coefficients: Tensor,
    initial_coefficients: Tensor,
    eps: float,
    operands: torch.dtype,
) -> dict[str, Any]:
    """Arguments of both kernels."""
    keys, values = contiguous_inside(keys, 1), contiguous_inside(values, 1)
    heads, batches, count, chunks = coefficients.shape
    rows, dim = keys.shape[2:]
    width = first.shape[3]
    padded, on_chip, parts = tile_size(dim), tile_size(chunks * rows), triton.cdiv(width, UNITS)
    size = on_chip * padded  # of a program's part of a sum
    return dict(
        keys=keys, **named_strides('key', keys, 'head chunk row'),
        values=values, **named_strides('value', values, 'head chunk row'),
        step_sizes=step_sizes, **named_strides('step', step_sizes, 'head chunk row'),
        coefficients=coefficients.contiguous(), initial_coefficients=initial_coefficients.contiguous(),
        partial=coefficients.new_empty(heads, 2, parts, size),
        batches=batches, heads=heads, chunks=chunks, rows=rows, eps=eps,
        dim=dim, width=width, STATES=count, MOMENTUM=count > 1, COUNTER_STRIDE=COUNTER_STRIDE, SIZE=size,
        PARTS=parts, ROWS=on_chip, DIM=padded, UNITS=UNITS, num_warps=WARPS, **product_precision(operands),
    )  # fmt: skip


def _launch(
    kernel: Any,
    arguments: dict[str, Any],
    states: dict[str, Tensor],
    carried: dict[str, Tensor],
) -> None:
    """Run all memory batches in one launch, or, where programs cannot wait for each other, one launch per phase.

    Args:
        states, carried: arguments that hold the states at the start of the first launch and between launches.
    """
    heads, batches, parts = arguments['heads'], arguments['batches'], arguments['PARTS']
    device = arguments['keys'].device

    def launch(first_batch: int, last_batch: int, present: tuple[str, ...], waits: bool) -> None:
        own = arguments | (states if first_batch == 0 else carried) | {phase: phase in present for phase in PHASES}
        own |= dict(
            first_batch=first_batch, last_batch=last_batch, WAITS=waits,
            counters=new_counters(heads if waits else 0, device),
        )  # fmt: skip
        groups = heads
        if waits:
            own |= dict(launch_cooperative_grid=True)
            groups = heads_together(kernel, own, heads, parts, device)
        kernel[(groups * parts,)](**own)

    if parts == 1 or device.type == 'cuda':
        launch(0, batches, PHASES, waits=parts > 1)
        return
    for batch in range(batches):
        for phase in PHASES:
            launch(batch, batch + 1, (phase,), waits=False)
