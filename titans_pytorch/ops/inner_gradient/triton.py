"""Kernels of the inner gradient: forward, gradient and second derivative of a memory MLP for many rows.

A program owns some rows of one head: whole chunks, or part of one. It loops over blocks of hidden features and
recomputes them rather than keeping them. Gradients of weights are sums over rows: the program writes the factors of
each row, and another kernel sums their products.

With RESIDUAL weights, each chunk has its own weights. Reading matrices then takes most of the time, and rows are few: a
program owns rows of one chunk and, if the chunk's matrices fit on chip, keeps them there (KEEPS).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._streams import side_by_side
from titans_pytorch.ops._triton import (
    MOST_ROWS,
    contiguous_inside,
    gelu_derivative,
    gelu_second_derivative,
    multiply_add,
    named_strides,
    normal_cdf,
    product_precision,
    project_out,
    row_mean,
    rows_per_program,
    standardize,
    sum_rows,
    taken_by,
    tile_size,
)

# entries and columns of the block of a matrix that is on chip at a time
BLOCK, MOST_COLUMNS = 4096, 64
# hidden features of a program that sums weights' gradients, and rows that it reads at a time
UNITS, ROWS_AT_A_TIME = 32, 32
STAGES = 2
# with residual weights: entries of each matrix that a program keeps on chip. Matrices read only once need no stages
KEPT, KEPT_IN_FULL, RESIDUAL_STAGES = 8192, 4096, 1
# warps of a program, and, backward, registers of a thread, so that two or three programs fit on a multiprocessor; three
# are chosen if there are MANY_PROGRAMS
RESIDUAL_WARPS, RESIDUAL_REGISTERS, MANY_PROGRAMS = (8, 4), (128, 168), 4096
# for summing weights' gradients: hidden features, warps (a single one needs no barrier) and stages of a program, and
# programs that share the chunks
RESIDUAL_UNITS, RESIDUAL_SUM_WARPS, RESIDUAL_SUM_STAGES, ENOUGH_SUMS = 16, 1, 3, 1024


@triton.jit
def _parameter(base, residual, share, head, chunk, base_head, residual_head, residual_chunk):  # type: ignore[no-untyped-def]
    """Where a head's W is, what a chunk adds to it, and its share."""
    return base + head * base_head, residual + head * residual_head + chunk * residual_chunk, share


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    parameter, rows, columns, height: tl.constexpr, width: tl.constexpr, RESIDUAL: tl.constexpr, OPERAND: tl.constexpr
):
    """A block of a (height, width) matrix; transposed if `columns` go down and `rows` across."""
    base, residual, share = parameter
    inside = (rows < height) & (columns < width)
    w = tl.load(base + rows * width + columns, mask=inside, other=0.0)
    if RESIDUAL:
        w += share * tl.load(residual + rows * width + columns, mask=inside, other=0.0).to(tl.float32)
    return w.to(OPERAND)


@triton.jit
def block_of_rows(start, offsets, stride, first_unit, valid, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of columns of some rows. Loops that add products to it must read it one block ahead themselves, because
    Triton does so only for the factors of products."""
    unit = first_unit + tl.arange(0, BLOCK)
    present = valid[:, None] & (unit < width)[None, :]
    return tl.load(start + offsets[:, None] + (unit * stride)[None, :], mask=present, other=0.0)


@triton.jit
def rows_of_block(block, parts, chunks, rows, CHUNKS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """For each of a block's rows: its chunk, its offset in that chunk, and whether it is valid."""
    index = tl.arange(0, CHUNKS * ROWS)
    chunk = (block // parts) * CHUNKS + index // ROWS
    row = (block % parts) * ROWS + index % ROWS
    return chunk, row, (chunk < chunks) & (row < rows)


@triton.jit
def sum_rows_of_chunks(of_rows, CHUNKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum a block's rows over each chunk."""
    if ROWS > 1:
        of_chunks = tl.sum(tl.reshape(of_rows, (CHUNKS, ROWS, WIDTH)), axis=1)
    else:
        of_chunks = of_rows
    return of_chunks


@triton.jit
def gradient_terms(y, k, v, theta, gain, inside, eps, dim: tl.constexpr, NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The terms of Δ₂ and of its gradient, from the product y with the last matrix: p − v, s = −(2θ/d) (p − v), and,
    with a norm, x̂, r, u = s ∘ (1 + γ), mean(u ∘ x̂) and P(u). `gain` is 1 + γ."""
    if NORM:
        x, inverse = standardize(y, inside, eps, dim)
        difference = x * gain + k - v
        s = theta * difference * (-2.0 / dim)
        u = s * gain
        along = row_mean(u * x, dim)
        tangent = tl.where(inside, u - row_mean(u, dim) - x * along, 0.0)
    else:
        x, inverse, along, difference = y, 1.0, 0.0, y - v
        s = theta * difference * (-2.0 / dim)
        u, tangent = s, s
    return difference, s, x, inverse, u, along, tangent


@triton.jit
def gradient_of_product(y, k, v, theta, gain, inside, eps, dim: tl.constexpr, NORM: tl.constexpr):  # type: ignore[no-untyped-def]
    """From the product y with the last matrix: p − v, Δ₂, and each row's negative gradient of γ. `gain` is 1 + γ."""
    difference, s, x, inverse, _, _, tangent = gradient_terms(y, k, v, theta, gain, inside, eps, dim, NORM)
    # Δ₂ = r · P(u)
    return difference, inverse * tangent, s * x


@triton.jit
def gradient_of_product_backward(  # type: ignore[no-untyped-def]
    terms, theta, gain, d_delta, d_of_rows, d_loss, inside, dim: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """The backward pass of `gradient_terms`: gradients of θ, p, k (through the residual around the network) and y, and
    each row's part of the gradient of γ."""
    difference, s, x, inverse, u, along, tangent = terms
    if NORM:
        # P is symmetric and depends on x̂
        d_inverse = tl.sum(d_delta * tangent, axis=1)[:, None]
        d_tangent = inverse * d_delta
        d_along = row_mean(d_tangent * x, dim)
        d_u = tl.where(inside, d_tangent - row_mean(d_tangent, dim) - x * d_along, 0.0)
        # minus the gradient of γ is Σ s ∘ x̂
        d_s = d_u * gain + d_of_rows * x
        d_x = d_of_rows * s - along * d_tangent - d_along * u
    else:
        d_s = d_delta

    # s = −(2θ/d) (p − v), loss = mean (p − v)²
    d_step = tl.sum(d_s * difference, axis=1) * (-2.0 / dim)
    d_prediction = d_s * theta * (-2.0 / dim) + d_loss * difference * (2.0 / dim)

    if NORM:
        # p = x̂ ∘ (1 + γ) + k
        d_k, of_gamma = d_prediction, d_u * s + d_prediction * x
        d_x += d_prediction * gain
        # x̂ = (y − mean y) · r, and ∂r/∂y = −r² x̂ / d
        d_product = inverse * (project_out(d_x, x, inside, dim) - d_inverse * inverse * x / dim)
    else:
        d_k = tl.zeros_like(x)
        d_product, of_gamma = d_prediction, d_k
    return d_step, d_prediction, d_k, d_product, of_gamma


@triton.jit
def forward_of_rows(  # type: ignore[no-untyped-def]
    keys, key_offset, values, value_offset, step_sizes, step_offset, w_first, w_last, w_gamma,
    hidden, hidden_deltas, deltas, losses, row_offset, valid, feature, eps,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, KEEPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Send rows forward, and back to the deltas. Pointers to inputs have offsets of their own; outputs are those of
    whole tensors. Returns each row's negative gradient of γ."""
    inside = valid[:, None] & (feature < dim)[None, :]
    k = tl.load(keys + key_offset[:, None] + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.zeros((ROWS, DIM), tl.float32)
    if HIDDEN:
        nothing = tl.zeros((ROWS, BLOCK), tl.float32)
        kept_h, kept_last = nothing, tl.zeros((BLOCK, DIM), OPERAND)
        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            from_keys = _block(w_first, feature[:, None], unit[None, :], dim, width, RESIDUAL, OPERAND)
            if KEEPS:
                # load both matrices at once
                kept_last = _block(w_last, unit[:, None], feature[None, :], width, dim, RESIDUAL, OPERAND)
            h = multiply_add(nothing, k, from_keys, PRECISION, OPERAND)
            a = h * normal_cdf(h)
            units, present = row_offset[:, None] * width + unit[None, :], valid[:, None] & (unit < width)[None, :]
            tl.store(hidden + units, a, mask=present)
            if KEEPS:
                kept_h, from_hidden = h, kept_last
            else:
                from_hidden = _block(w_last, unit[:, None], feature[None, :], width, dim, RESIDUAL, OPERAND)
            y = multiply_add(y, a, from_hidden, PRECISION, OPERAND)
    else:
        from_keys = _block(w_last, feature[:, None], feature[None, :], dim, dim, RESIDUAL, OPERAND)
        y = multiply_add(y, k, from_keys, PRECISION, OPERAND)

    v = tl.load(values + value_offset[:, None] + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    theta = tl.load(step_sizes + step_offset, mask=valid, other=0.0).to(tl.float32)[:, None]
    gain = 1.0
    if NORM:
        gain += _block(w_gamma, 0, feature[None, :], 1, dim, RESIDUAL, tl.float32)
    difference, delta, of_rows = gradient_of_product(y, k, v, theta, gain, inside, eps, dim, NORM)
    tl.store(losses + row_offset, tl.sum(difference * difference, axis=1) / dim, mask=valid)
    tl.store(deltas + row_offset[:, None] * dim + feature[None, :], delta, mask=inside)

    if HIDDEN:
        # Δ₁ = (Δ₂ W₂ᵀ) ∘ gelu′(h)
        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            if KEEPS:
                h, from_last = kept_h, tl.trans(kept_last)
            else:
                from_keys = _block(w_first, feature[:, None], unit[None, :], dim, width, RESIDUAL, OPERAND)
                h = multiply_add(nothing, k, from_keys, PRECISION, OPERAND)
                from_last = _block(w_last, unit[None, :], feature[:, None], width, dim, RESIDUAL, OPERAND)
            g = multiply_add(nothing, delta, from_last, PRECISION, OPERAND)
            units, present = row_offset[:, None] * width + unit[None, :], valid[:, None] & (unit < width)[None, :]
            tl.store(hidden_deltas + units, g * gelu_derivative(h), mask=present)
    return of_rows


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    keys, values, step_sizes, first, last, gamma, shares, residual_first, residual_last, residual_gamma,
    hidden, hidden_deltas, deltas, of_gamma, losses,
    blocks, parts, chunks, rows, eps,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
    first_head, last_head, gamma_head,
    share_head, share_chunk, residual_first_head, residual_first_chunk,
    residual_last_head, residual_last_chunk, residual_gamma_head, residual_gamma_chunk,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, KEEPS: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block, head = program % blocks, (program // blocks).to(tl.int64)
    chunk, row, valid = rows_of_block(block, parts, chunks, rows, CHUNKS, ROWS)
    feature = tl.arange(0, DIM)
    # outputs are whole tensors; indices count from the head's first row, so that they fit in 32 bits
    start, row_offset = head * chunks * rows, chunk * rows + row
    share, own = 0.0, block // parts
    if RESIDUAL:
        share = tl.load(shares + head * share_head + own * share_chunk).to(tl.float32)
    w_first = _parameter(first, residual_first, share, head, own, first_head, residual_first_head, residual_first_chunk)
    w_last = _parameter(last, residual_last, share, head, own, last_head, residual_last_head, residual_last_chunk)
    w_gamma = _parameter(gamma, residual_gamma, share, head, own, gamma_head, residual_gamma_head, residual_gamma_chunk)
    of_rows = forward_of_rows(
        keys + head * key_head, chunk * key_chunk + row * key_row,
        values + head * value_head, chunk * value_chunk + row * value_row,
        step_sizes + head * step_head, chunk * step_chunk + row * step_row, w_first, w_last, w_gamma,
        hidden + start * width, hidden_deltas + start * width, deltas + start * dim, losses + start,
        row_offset, valid, feature, eps,
        dim, width, HIDDEN, NORM, RESIDUAL, KEEPS, CHUNKS * ROWS, DIM, BLOCK, PRECISION, OPERAND,
    )  # fmt: skip
    if NORM:
        of_chunks = sum_rows_of_chunks(of_rows, CHUNKS, ROWS, DIM)
        summed = (block // parts) * CHUNKS + tl.arange(0, CHUNKS)
        to_chunks = of_gamma + ((head * chunks + summed) * parts + block % parts)[:, None] * dim + feature[None, :]
        tl.store(to_chunks, of_chunks, mask=(summed < chunks)[:, None] & (feature < dim)[None, :])


@triton.jit
def backward_of_rows(  # type: ignore[no-untyped-def]
    d_hidden, d_hidden_offset, d_hidden_unit, d_hidden_deltas, d_deltas, d_of_gamma, gamma_offset, d_losses,
    keys, key_offset, values, value_offset, step_sizes, step_offset, w_first, w_last, w_gamma,
    d_values, d_step_sizes, d_products, d_y, d_h, row_offset, valid, feature, eps,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr, LOSSES: tl.constexpr,
    RESIDUAL: tl.constexpr, KEEPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """The backward pass of `forward_of_rows`. Returns the gradients of the keys and of γ."""
    inside = valid[:, None] & (feature < dim)[None, :]
    features = row_offset[:, None] * dim + feature[None, :]
    k = tl.load(keys + key_offset[:, None] + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    # D, the gradient of Δ₂; valid rows also get one through g = Δ₂ W₂ᵀ and Δ₁ = g ∘ gelu′(h)
    d_delta = tl.load(d_deltas + features, mask=inside, other=0.0).to(tl.float32)
    y = tl.zeros((ROWS, DIM), tl.float32)
    if HIDDEN:
        nothing = tl.zeros((ROWS, BLOCK), tl.float32)
        kept_h, kept_first, kept_last = nothing, tl.zeros((DIM, BLOCK), OPERAND), tl.zeros((BLOCK, DIM), OPERAND)
        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            units, present = row_offset[:, None] * width + unit[None, :], valid[:, None] & (unit < width)[None, :]
            from_keys = _block(w_first, feature[:, None], unit[None, :], dim, width, RESIDUAL, OPERAND)
            from_hidden = _block(w_last, unit[:, None], feature[None, :], width, dim, RESIDUAL, OPERAND)
            h = multiply_add(nothing, k, from_keys, PRECISION, OPERAND)
            d_g = tl.load(d_hidden_deltas + units, mask=present, other=0.0).to(tl.float32) * gelu_derivative(h)
            tl.store(d_products + units, d_g, mask=present)
            y = multiply_add(y, h * normal_cdf(h), from_hidden, PRECISION, OPERAND)
            d_delta = multiply_add(d_delta, d_g, from_hidden, PRECISION, OPERAND)
            if KEEPS:
                kept_h, kept_first, kept_last = h, from_keys, from_hidden
    else:
        from_keys = _block(w_last, feature[:, None], feature[None, :], dim, dim, RESIDUAL, OPERAND)
        y = multiply_add(y, k, from_keys, PRECISION, OPERAND)

    v = tl.load(values + value_offset[:, None] + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    theta = tl.load(step_sizes + step_offset, mask=valid, other=0.0).to(tl.float32)[:, None]
    gain, d_chunk, d_loss = 1.0, 0.0, 0.0
    if NORM:
        gain += _block(w_gamma, 0, feature[None, :], 1, dim, RESIDUAL, tl.float32)
        from_chunks = d_of_gamma + gamma_offset[:, None] * dim + feature[None, :]
        d_chunk = tl.load(from_chunks, mask=inside, other=0.0)
    if LOSSES:
        d_loss = tl.load(d_losses + row_offset, mask=valid, other=0.0)[:, None]
    terms = gradient_terms(y, k, v, theta, gain, inside, eps, dim, NORM)
    _, _, _, inverse, _, _, tangent = terms
    delta = inverse * tangent
    d_step, d_prediction, d_k, d_product, of_gamma = gradient_of_product_backward(
        terms, theta, gain, d_delta, d_chunk, d_loss, inside, dim, NORM
    )
    tl.store(d_step_sizes + row_offset, d_step, mask=valid)
    tl.store(d_values + features, -d_prediction, mask=inside)
    tl.store(d_y + features, d_product, mask=inside)

    if HIDDEN:
        upcoming = block_of_rows(d_hidden, d_hidden_offset, d_hidden_unit, 0, valid, width, BLOCK)
        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            units, present = row_offset[:, None] * width + unit[None, :], valid[:, None] & (unit < width)[None, :]
            if KEEPS:
                h, from_h, from_last = kept_h, tl.trans(kept_first), tl.trans(kept_last)
            else:
                from_keys = _block(w_first, feature[:, None], unit[None, :], dim, width, RESIDUAL, OPERAND)
                from_h = _block(w_first, feature[None, :], unit[:, None], dim, width, RESIDUAL, OPERAND)
                from_last = _block(w_last, unit[None, :], feature[:, None], width, dim, RESIDUAL, OPERAND)
                h = multiply_add(nothing, k, from_keys, PRECISION, OPERAND)
            d_a = upcoming.to(tl.float32)
            upcoming = block_of_rows(d_hidden, d_hidden_offset, d_hidden_unit, first_unit + BLOCK, valid, width, BLOCK)
            d_a = multiply_add(d_a, d_product, from_last, PRECISION, OPERAND)
            g = multiply_add(nothing, delta, from_last, PRECISION, OPERAND)
            d_slope = g * tl.load(d_hidden_deltas + units, mask=present, other=0.0).to(tl.float32)
            of_h = d_a * gelu_derivative(h) + d_slope * gelu_second_derivative(h)
            tl.store(d_h + units, of_h, mask=present)
            d_k = multiply_add(d_k, of_h, from_h, PRECISION, OPERAND)
    else:
        from_last = _block(w_last, feature[None, :], feature[:, None], dim, dim, RESIDUAL, OPERAND)
        d_k = multiply_add(d_k, d_product, from_last, PRECISION, OPERAND)
    return d_k, tl.sum(of_gamma, axis=0)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_hidden, d_hidden_deltas, d_deltas, d_of_gamma, d_losses,
    keys, values, step_sizes, first, last, gamma, shares, residual_first, residual_last, residual_gamma,
    d_keys, d_values, d_step_sizes, d_gamma, d_products, d_y, d_h,
    d_hidden_head, d_hidden_chunk, d_hidden_row, d_hidden_unit, blocks, parts, chunks, rows, eps,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
    first_head, last_head, gamma_head,
    share_head, share_chunk, residual_first_head, residual_first_chunk,
    residual_last_head, residual_last_chunk, residual_gamma_head, residual_gamma_chunk,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr, LOSSES: tl.constexpr,
    RESIDUAL: tl.constexpr, KEEPS: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block, head = program % blocks, (program // blocks).to(tl.int64)
    chunk, row, valid = rows_of_block(block, parts, chunks, rows, CHUNKS, ROWS)
    feature = tl.arange(0, DIM)
    start, row_offset = head * chunks * rows, chunk * rows + row
    share, own = 0.0, block // parts
    if RESIDUAL:
        share = tl.load(shares + head * share_head + own * share_chunk).to(tl.float32)
    w_first = _parameter(first, residual_first, share, head, own, first_head, residual_first_head, residual_first_chunk)
    w_last = _parameter(last, residual_last, share, head, own, last_head, residual_last_head, residual_last_chunk)
    w_gamma = _parameter(gamma, residual_gamma, share, head, own, gamma_head, residual_gamma_head, residual_gamma_chunk)
    d_k, of_gamma = backward_of_rows(
        # has strides, because it is often the gradient of a transposed tensor
        d_hidden + head * d_hidden_head, chunk * d_hidden_chunk + row * d_hidden_row, d_hidden_unit,
        d_hidden_deltas + start * width, d_deltas + start * dim, d_of_gamma + head * chunks * dim, chunk,
        d_losses + start, keys + head * key_head, chunk * key_chunk + row * key_row,
        values + head * value_head, chunk * value_chunk + row * value_row,
        step_sizes + head * step_head, chunk * step_chunk + row * step_row, w_first, w_last, w_gamma,
        d_values + start * dim, d_step_sizes + start,
        d_products + start * width, d_y + start * dim, d_h + start * width, row_offset, valid, feature, eps,
        dim, width, HIDDEN, NORM, LOSSES, RESIDUAL, KEEPS, CHUNKS * ROWS, DIM, BLOCK, PRECISION, OPERAND,
    )  # fmt: skip
    inside = valid[:, None] & (feature < dim)[None, :]
    tl.store(d_keys + start * dim + row_offset[:, None] * dim + feature[None, :], d_k, mask=inside)
    if NORM:
        to_gamma = d_gamma + (head * blocks + block) * dim + feature
        tl.store(to_gamma, of_gamma, mask=feature < dim)


@triton.jit
def outer_products(  # type: ignore[no-untyped-def]
    keys, hidden, deltas, d_products, d_y, d_h, first_row, last_row, steps, unit, feature, rows, key_chunk, key_row,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr,
    UNITS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """What some rows of a head add to the gradients of a block of hidden features: columns of the first matrix, stored
    as rows, and rows of the last."""
    of_first = tl.zeros((UNITS, DIM), tl.float32)
    of_last = tl.zeros((UNITS, DIM), tl.float32)
    for step in range(0, steps):
        index = first_row + step * ROWS + tl.arange(0, ROWS)
        valid = index < last_row
        key_offset = (index // rows) * key_chunk + (index % rows) * key_row
        # the left operand is loaded transposed, with rows across
        across = valid[None, :] & (unit < width)[:, None]
        inside = valid[:, None] & (feature < dim)[None, :]
        features = index[:, None] * dim + feature[None, :]
        d_product = tl.load(d_y + features, mask=inside, other=0.0)
        if HIDDEN:
            # y = a W₂, g = Δ₂ W₂ᵀ, h = k W₁
            units = index[None, :] * width + unit[:, None]
            a = tl.load(hidden + units, mask=across, other=0.0)
            of_last = multiply_add(of_last, a, d_product, PRECISION, OPERAND)
            d_g = tl.load(d_products + units, mask=across, other=0.0)
            delta = tl.load(deltas + features, mask=inside, other=0.0)
            of_last = multiply_add(of_last, d_g, delta, PRECISION, OPERAND)
            of_h = tl.load(d_h + units, mask=across, other=0.0)
            k = tl.load(keys + key_offset[:, None] + feature[None, :], mask=inside, other=0.0)
            of_first = multiply_add(of_first, of_h, k, PRECISION, OPERAND)
        else:
            k = tl.load(keys + key_offset[None, :] + unit[:, None], mask=across, other=0.0)
            of_last = multiply_add(of_last, k, d_product, PRECISION, OPERAND)
    return of_first, of_last


@triton.jit
def _weights_kernel(  # type: ignore[no-untyped-def]
    keys, hidden, deltas, d_products, d_y, d_h, of_gamma, shares, residual_first, residual_last, residual_gamma,
    d_first, d_last, d_gamma, d_shares, d_residual_first, d_residual_last, d_residual_gamma,
    d_residual_first_head, d_residual_last_head, d_residual_gamma_head,
    blocks, groups, group_chunks, steps, parts, row_blocks, chunks, rows, key_head, key_chunk, key_row,
    share_head, share_chunk, residual_first_head, residual_first_chunk,
    residual_last_head, residual_last_chunk, residual_gamma_head, residual_gamma_chunk,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    UNITS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """A program owns a block of hidden features of a head; if chunks have their own weights, only for some chunks."""
    program = tl.program_id(0)
    block, group = program % blocks, program // blocks % groups
    head = (program // (blocks * groups)).to(tl.int64)
    unit = block * UNITS + tl.arange(0, UNITS)
    feature = tl.arange(0, DIM)
    start = head * chunks * rows
    keys += head * key_head
    hidden += start * width
    d_products += start * width
    d_h += start * width
    deltas += start * dim
    d_y += start * dim
    present = (unit < width)[:, None] & (feature < dim)[None, :]
    in_last, in_first = unit[:, None] * dim + feature[None, :], feature[None, :] * width + unit[:, None]

    if RESIDUAL:
        of_first = tl.zeros((UNITS, DIM), tl.float32)
        of_last = tl.zeros((UNITS, DIM), tl.float32)
        first_chunk = group * group_chunks
        last_chunk = tl.minimum(first_chunk + group_chunks, chunks)
        from_first = residual_first + head * residual_first_head + in_first
        from_last = residual_last + head * residual_last_head + in_last
        # read one chunk ahead, which Triton does on its own only for the factors of products
        next_last = tl.load(from_last + first_chunk * residual_last_chunk, mask=present, other=0.0)
        next_first = next_last
        if HIDDEN:
            next_first = tl.load(from_first + first_chunk * residual_first_chunk, mask=present, other=0.0)
        for chunk in range(first_chunk, last_chunk):
            share = tl.load(shares + head * share_head + chunk * share_chunk).to(tl.float32)
            offset = head * chunks + chunk
            other_first, other_last = next_first, next_last
            following = present & (unit < tl.where(chunk + 1 < last_chunk, width, 0))[:, None]
            next_last = tl.load(from_last + (chunk + 1) * residual_last_chunk, mask=following, other=0.0)
            if HIDDEN:
                next_first = tl.load(from_first + (chunk + 1) * residual_first_chunk, mask=following, other=0.0)
            own_first, own_last = outer_products(
                keys, hidden, deltas, d_products, d_y, d_h, chunk * rows, (chunk + 1) * rows, steps, unit, feature,
                rows, key_chunk, key_row, dim, width, HIDDEN, UNITS, ROWS, DIM, PRECISION, OPERAND,
            )  # fmt: skip
            of_last += own_last
            to_last = d_residual_last + head * d_residual_last_head + chunk * (width * dim) + in_last
            tl.store(to_last, share * own_last, mask=present)
            of_share = tl.sum(own_last * other_last.to(tl.float32))
            if HIDDEN:
                of_first += own_first
                to_first = d_residual_first + head * d_residual_first_head + chunk * (width * dim) + in_first
                tl.store(to_first, share * own_first, mask=present)
                of_share += tl.sum(own_first * other_first.to(tl.float32))
            if NORM:
                # done by the first block's program
                with_gamma = feature < tl.where(block == 0, dim, 0)
                from_gamma = residual_gamma + head * residual_gamma_head + chunk * residual_gamma_chunk + feature
                other_gamma = tl.load(from_gamma, mask=with_gamma, other=0.0).to(tl.float32)
                own_gamma = sum_rows(of_gamma + offset * parts * dim, parts, feature, dim, DIM)
                to_gamma = d_residual_gamma + head * d_residual_gamma_head + chunk * dim + feature
                tl.store(to_gamma, share * own_gamma, mask=with_gamma)
                of_share += tl.sum(own_gamma * other_gamma)
            tl.store(d_shares + offset * blocks + block, of_share)
    else:
        of_first, of_last = outer_products(
            keys, hidden, deltas, d_products, d_y, d_h, 0, chunks * rows, steps, unit, feature,
            rows, key_chunk, key_row, dim, width, HIDDEN, UNITS, ROWS, DIM, PRECISION, OPERAND,
        )  # fmt: skip

    to_base = (head * groups + group) * width * dim
    tl.store(d_last + to_base + in_last, of_last, mask=present)
    if HIDDEN:
        tl.store(d_first + to_base + in_first, of_first, mask=present)
    if NORM:
        if (block == 0) & (group == 0):
            of_head = sum_rows(of_gamma + head * row_blocks * dim, row_blocks, feature, dim, DIM)
            tl.store(d_gamma + head * dim + feature, of_head, mask=feature < dim)


class Arguments(NamedTuple):
    """The arguments of the operation."""

    keys: Tensor
    values: Tensor
    step_sizes: Tensor
    first: Tensor | None
    last: Tensor
    gamma: Tensor | None
    shares: Tensor | None
    residual_first: Tensor | None
    residual_last: Tensor | None
    residual_gamma: Tensor | None
    eps: float
    operands: torch.dtype


def _outputs(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `InnerGradient`; absent ones are empty."""
    given = Arguments(*arguments)
    keys, first, last, operands = given.keys, given.first, given.last, given.operands
    heads, chunks, rows, dim = keys.shape
    of_hidden = (0,) if first is None else (heads, chunks, rows, first.shape[-1])
    return (
        keys.new_empty(of_hidden, dtype=operands),
        keys.new_empty(of_hidden, dtype=operands),
        keys.new_empty(keys.shape, dtype=operands),
        last.new_empty((0,) if given.gamma is None else (heads, chunks, dim)),
        last.new_empty(heads, chunks, rows),
    )


def _forward(
    keys: Tensor,  # bh n m d
    values: Tensor,  # bh n m d
    step_sizes: Tensor,  # bh n m
    first: Tensor | None,  # bh d e
    last: Tensor,  # bh e d
    gamma: Tensor | None,  # bh d
    shares: Tensor | None,  # bh n
    residual_first: Tensor | None,  # bh n d e
    residual_last: Tensor | None,  # bh n e d
    residual_gamma: Tensor | None,  # bh n d
    eps: float,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = Arguments(
        keys, values, step_sizes, first, last, gamma, shares, residual_first, residual_last, residual_gamma,
        eps, operands,
    )  # fmt: skip
    outputs = _outputs(*given)
    write_gradients(outputs, given)
    return outputs


def write_gradients(outputs: Sequence[Tensor], given: Arguments) -> None:
    """`_forward` with given tensors for its results, which are contiguous."""
    hidden, hidden_deltas, deltas, of_gamma, losses = outputs
    heads, chunks, rows, dim = given.keys.shape
    tiles = _tiles(given)
    blocks, parts = _blocks(chunks, rows, tiles)
    gamma_parts = of_gamma if given.gamma is None or parts == 1 else of_gamma.new_empty(heads, chunks, parts, dim)
    _forward_kernel[(heads * blocks,)](
        **_tensors(given), **_sizes(given), **tiles,
        hidden=hidden, hidden_deltas=hidden_deltas, deltas=deltas, of_gamma=gamma_parts, losses=losses,
        blocks=blocks, parts=parts,
    )  # fmt: skip
    if gamma_parts is not of_gamma:
        torch.sum(gamma_parts, dim=2, out=of_gamma)


def _backward(
    d_hidden: Tensor | None,  # bh n m e
    d_hidden_deltas: Tensor | None,  # bh n m e
    d_deltas: Tensor | None,  # bh n m d
    d_of_gamma: Tensor | None,  # bh n d
    d_losses: Tensor | None,  # bh n m
    hidden: Tensor,  # bh n m e
    deltas: Tensor,  # bh n m d
    *arguments: Any,
) -> list[Tensor | None]:
    given = Arguments(*arguments)
    of_residual = given.residual_first, given.residual_last, given.residual_gamma
    d_residual = [None if t is None else t.new_empty(t.shape) for t in of_residual]
    d_outputs = d_hidden, d_hidden_deltas, d_deltas, d_of_gamma, d_losses
    return [*second_derivatives(d_residual, d_outputs, hidden, deltas, given), *d_residual]


def second_derivatives(
    d_residual: Sequence[Tensor | None],  # contiguous but for the first axis
    d_outputs: Sequence[Tensor | None],
    hidden: Tensor,
    deltas: Tensor,
    given: Arguments,
) -> list[Any]:
    """`_backward` but for the gradients of residual weights, for which places are given."""
    d_hidden, d_hidden_deltas, d_deltas, d_of_gamma, d_losses = d_outputs
    keys, first, last, gamma, shares, operands = (
        given.keys, given.first, given.last, given.gamma, given.shares, given.operands
    )  # fmt: skip
    tensors, sizes, tiles = _tensors(given), _sizes(given), _tiles(given)
    heads, chunks, rows, dim = keys.shape
    width, residual = last.shape[1], shares is not None
    blocks, parts = _blocks(chunks, rows, tiles)
    absent = last.new_empty(0)
    if d_hidden is None:
        d_hidden = torch.zeros_like(hidden)
    d_hidden_deltas = torch.zeros_like(hidden) if d_hidden_deltas is None else d_hidden_deltas.contiguous()
    d_deltas = torch.zeros_like(deltas) if d_deltas is None else d_deltas.contiguous()
    if gamma is None:
        d_of_gamma = absent
    else:
        d_of_gamma = last.new_zeros(heads, chunks, dim) if d_of_gamma is None else d_of_gamma.contiguous()

    d_keys, d_values, d_step_sizes = (t.new_empty(t.shape) for t in given[:3])
    # each row's factors of the weights' gradients; the gradient of γ is summed over a program's rows
    d_y = keys.new_empty(keys.shape, dtype=operands)
    d_products, d_h = (keys.new_empty(hidden.shape, dtype=operands) for _ in range(2))
    gamma_parts = last.new_empty((0,) if gamma is None else (heads, blocks, dim))
    registers = None
    if residual and operands != torch.float32 and tiles['ROWS'] == 16:  # other programs need all that there are
        registers = RESIDUAL_REGISTERS[heads * chunks * parts >= MANY_PROGRAMS]
    # `d_hidden` is often the gradient of a transposed tensor
    _backward_kernel[(heads * blocks,)](
        **tensors, **sizes, **tiles, maxnreg=registers,
        d_hidden=d_hidden,
        **named_strides('d_hidden', None if first is None else d_hidden, 'head chunk row unit'),
        d_hidden_deltas=d_hidden_deltas, d_deltas=d_deltas, d_of_gamma=d_of_gamma,
        d_losses=absent if d_losses is None else d_losses.contiguous(), LOSSES=d_losses is not None,
        d_keys=d_keys, d_values=d_values, d_step_sizes=d_step_sizes,
        d_gamma=gamma_parts, d_products=d_products, d_y=d_y, d_h=d_h, blocks=blocks, parts=parts,
    )  # fmt: skip

    units = min(RESIDUAL_UNITS if residual else UNITS, tile_size(width))
    unit_blocks, groups, at_a_time, summed = triton.cdiv(width, units), 1, ROWS_AT_A_TIME, chunks * rows
    warps, stages = 4, STAGES
    if residual:
        groups = min(chunks, triton.cdiv(ENOUGH_SUMS, heads * unit_blocks))
        at_a_time, summed = min(at_a_time, tile_size(rows)), rows
        warps, stages = RESIDUAL_SUM_WARPS, RESIDUAL_SUM_STAGES
    group_chunks = triton.cdiv(chunks, groups)
    groups = triton.cdiv(chunks, group_chunks)
    d_first, d_last = (
        None if w is None else last.new_empty((heads, groups, *w.shape[1:]) if groups > 1 else w.shape)
        for w in (first, last)
    )
    assert d_last is not None
    d_gamma = None if gamma is None else last.new_empty(gamma.shape)
    d_shares = last.new_empty((heads, chunks, unit_blocks) if residual else (0,))
    d_residual_first, d_residual_last, d_residual_gamma = (absent if t is None else t for t in d_residual)
    _weights_kernel[(heads * groups * unit_blocks,)](
        **taken_by(_weights_kernel, tensors | sizes),
        hidden=hidden, deltas=deltas, d_products=d_products, d_y=d_y, d_h=d_h, of_gamma=gamma_parts,
        d_first=absent if d_first is None else d_first, d_last=d_last, d_gamma=absent if d_gamma is None else d_gamma,
        d_shares=d_shares, d_residual_first=d_residual_first, d_residual_last=d_residual_last,
        d_residual_gamma=d_residual_gamma,
        **named_strides('d_residual_first', d_residual[0], 'head'),
        **named_strides('d_residual_last', d_residual[1], 'head'),
        **named_strides('d_residual_gamma', d_residual[2], 'head'),
        blocks=unit_blocks, groups=groups, group_chunks=group_chunks, steps=triton.cdiv(summed, at_a_time),
        parts=parts, row_blocks=blocks, UNITS=units, ROWS=at_a_time,
        num_warps=warps if sizes['DIM'] <= 64 else 2 * warps, num_stages=stages,
    )  # fmt: skip
    if residual:
        axis = 1 if groups > 1 else None
        d_first, d_last, d_shares = side_by_side(
            partial(_summed, d_first, axis), partial(_summed, d_last, axis), partial(_summed, d_shares, -1)
        )
    of_shares = None if shares is None else d_shares.to(shares.dtype)
    return [d_keys, d_values, d_step_sizes, d_first, d_last, d_gamma, of_shares]


inner_gradient = register_kernel(
    'inner_gradient', _forward, _backward, outputs=_outputs, saved=(0, 2), materialize_grads=False
)


def _summed(parts: Tensor | None, axis: int | None) -> Tensor | None:
    return parts if parts is None or axis is None else parts.sum(dim=axis)


def _tensors(given: Arguments) -> dict[str, Any]:
    """Tensors, their strides and numbers of rows. Chunks may be slices of a longer sequence and heads may share
    weights, but features are contiguous."""
    # which axes must be contiguous, and the names of the others
    layouts = {
        'keys': (1, 'key', 'head chunk row'),
        'values': (1, 'value', 'head chunk row'),
        'step_sizes': (0, 'step', 'head chunk row'),
        'first': (2, 'first', 'head'),
        'last': (2, 'last', 'head'),
        'gamma': (1, 'gamma', 'head'),
        'shares': (0, 'share', 'head chunk'),
        'residual_first': (2, 'residual_first', 'head chunk'),
        'residual_last': (2, 'residual_last', 'head chunk'),
        'residual_gamma': (1, 'residual_gamma', 'head chunk'),
    }
    tensors: dict[str, Any] = {'chunks': given.keys.shape[1], 'rows': given.keys.shape[2], 'eps': given.eps}
    for name, (contiguous, prefix, axes) in layouts.items():
        t = getattr(given, name)
        t = t if t is None or not contiguous else contiguous_inside(t, contiguous)
        tensors |= {name: given.last.new_empty(0) if t is None else t, **named_strides(prefix, t, axes)}
    return tensors


def _sizes(given: Arguments) -> dict[str, Any]:
    """Constants of all kernels."""
    dim = given.keys.shape[-1]
    return dict(
        dim=dim, width=given.last.shape[1], DIM=tile_size(dim), HIDDEN=given.first is not None,
        NORM=given.gamma is not None, RESIDUAL=given.shares is not None, **product_precision(given.operands),
    )  # fmt: skip


def _tiles(given: Arguments) -> dict[str, Any]:
    """How the kernels split rows into tiles, and their launch options."""
    heads, chunks, rows, dim = given.keys.shape
    padded, wide = tile_size(dim), tile_size(given.last.shape[1])
    in_full = given.operands == torch.float32
    block = min(wide, MOST_COLUMNS, BLOCK // padded, max(32, padded))
    if given.shares is None:
        own, warps = rows_per_program(heads, chunks * rows, max(padded, block), in_full)
        of_chunk = min(triton.next_power_of_2(rows), own)
        # in full float32 and at this width, two stages need more memory than compute capability 8.6 has
        options = {'num_warps': warps, 'num_stages': 1 if in_full and padded > 64 else STAGES}
        return dict(KEEPS=False, CHUNKS=own // of_chunk, ROWS=of_chunk, BLOCK=block, **options)
    keeps = given.first is not None and wide * padded <= (KEPT_IN_FULL if in_full else KEPT)
    own = min(MOST_ROWS, tile_size(rows))
    many = heads * chunks * triton.cdiv(rows, own) >= MANY_PROGRAMS
    options = {'num_warps': RESIDUAL_WARPS[many], 'num_stages': RESIDUAL_STAGES}
    return dict(KEEPS=keeps, CHUNKS=1, ROWS=own, BLOCK=wide if keeps else block, **options)


def _blocks(chunks: int, rows: int, tiles: dict[str, Any]) -> tuple[int, int]:
    """Number of programs per head, and of parts per chunk."""
    parts = triton.cdiv(rows, tiles['ROWS'])
    return triton.cdiv(chunks, tiles['CHUNKS']) * parts, parts
