"""One forward, one gradient and one second derivative of a memory MLP for many rows, at one set of weights a head.

A program owns some rows of one head: whole chunks, or a part of one. It walks over the hidden features in blocks and
computes what it needs of them again rather than keep it. What is summed over rows to be a weight's gradient it
writes row by row, and another kernel sums it. The equations, and the plain twins, are in
`titans_pytorch.ops.inner_gradient`.

With something ADDED each chunk has weights of its own. Then reading matrices is what takes time, and rows are few: a
program owns rows of one chunk and, if its matrices fit on chip, keeps them (KEEPS).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._triton import TRITON_DTYPES, multiply_add

# shares, and what is added to the first matrix, the last one and γ
Added = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
# rows of a program: the more, the less often weights are read. With fewer than 64, Triton takes the tensor cores'
# older instructions, which read matrices either way round
MOST_ROWS = 32
# where there would be fewer programs than these, each gets 16 rows
ENOUGH_PROGRAMS = 128
# entries of a program's rows that eight warps hold; in float32 in full, products take twice the registers
ENTRIES, ENTRIES_IN_FULL = 4096, 2048
# entries and columns of the block of a matrix that is on chip at a time
BLOCK, MOST_COLUMNS = 4096, 64
# hidden features of a program that sums weights' gradients, and the rows that it reads at a time
UNITS, ROWS_AT_A_TIME = 32, 32
STAGES = 2
# where chunks have matrices of their own: entries of each that a program keeps on chip. Matrices that are read but
# once need no stages
KEPT, KEPT_IN_FULL, ADDED_STAGES = 8192, 4096, 1
# there, the warps of a program, and registers of a thread in the backward, so that a multiprocessor holds two programs
# or three; the latter where there are so many
ADDED_WARPS, ADDED_REGISTERS, MANY_PROGRAMS = (8, 4), (128, 168), 4096
# there, what sums weights' gradients: hidden features and warps of a program, and programs to share the chunks out to
ADDED_UNITS, ADDED_SUM_WARPS, ENOUGH_SUMS = 16, 4, 512


@triton.jit
def _below(h):  # type: ignore[no-untyped-def]
    """Φ, the normal distribution"""
    return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit
def _density(h):  # type: ignore[no-untyped-def]
    """φ, its density"""
    return 0.3989422804014327 * tl.exp(-0.5 * h * h)


@triton.jit
def _gelu_slope(h):  # type: ignore[no-untyped-def]
    """gelu = h Φ, so gelu′ = Φ + h φ"""
    return _below(h) + h * _density(h)


@triton.jit
def _gelu_curvature(h):  # type: ignore[no-untyped-def]
    """gelu″ = (2 − h²) φ"""
    return (2.0 - h * h) * _density(h)


@triton.jit
def _mean(x, dim: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(x, axis=1)[:, None] / dim


@triton.jit
def _normalised(y, inside, eps, dim: tl.constexpr):  # type: ignore[no-untyped-def]
    """x̂ and r"""
    centred = tl.where(inside, y - _mean(y, dim), 0.0)
    inverse = 1.0 / tl.sqrt(_mean(centred * centred, dim) + eps)
    return centred * inverse, inverse


@triton.jit
def _tangent(u, x, inside, dim: tl.constexpr):  # type: ignore[no-untyped-def]
    """P(u) = u − mean u − x̂ · mean(u ∘ x̂)"""
    return tl.where(inside, u - _mean(u, dim) - x * _mean(u * x, dim), 0.0)


@triton.jit
def _parameter(base, added, share, head, chunk, base_head, added_head, added_chunk):  # type: ignore[no-untyped-def]
    """Where a head's W is, what a chunk adds to it, and the share of that."""
    return base + head * base_head, added + head * added_head + chunk * added_chunk, share


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    parameter, rows, columns, height: tl.constexpr, width: tl.constexpr, ADDED: tl.constexpr, OPERAND: tl.constexpr
):
    """A block of a (height, width) matrix. As `columns` may be down and `rows` across, it may come transposed."""
    base, added, share = parameter
    inside = (rows < height) & (columns < width)
    w = tl.load(base + rows * width + columns, mask=inside, other=0.0)
    if ADDED:
        w += share * tl.load(added + rows * width + columns, mask=inside, other=0.0).to(tl.float32)
    return w.to(OPERAND)


@triton.jit
def _rows_of(block, parts, chunks, rows, CHUNKS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each of a block's rows its chunk, its place in that, and whether it is there."""
    index = tl.arange(0, CHUNKS * ROWS)
    chunk = (block // parts) * CHUNKS + index // ROWS
    row = (block % parts) * ROWS + index % ROWS
    return chunk, row, (chunk < chunks) & (row < rows)


@triton.jit
def _sum_of_chunks(of_rows, CHUNKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a block's rows, those of each chunk summed."""
    if ROWS > 1:
        of_chunks = tl.sum(tl.reshape(of_rows, (CHUNKS, ROWS, WIDTH)), axis=1)
    else:
        of_chunks = of_rows
    return of_chunks


@triton.jit
def _forward_of_rows(  # type: ignore[no-untyped-def]
    keys, key_place, values, value_place, step_sizes, step_place, w_first, w_last, w_gamma,
    hidden, hidden_errors, errors, losses, row_place, there, feature, eps,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr,
    ADDED: tl.constexpr, KEEPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Rows forward, and back to the errors. What is read has places of its own, what is written those of whole
    outputs. Returns what γ is to descend by each row."""
    inside = there[:, None] & (feature < dim)[None, :]
    k = tl.load(keys + key_place[:, None] + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.zeros((ROWS, DIM), tl.float32)
    if HIDDEN:
        nothing = tl.zeros((ROWS, BLOCK), tl.float32)
        kept_h, kept_last = nothing, tl.zeros((BLOCK, DIM), OPERAND)
        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            from_keys = _block(w_first, feature[:, None], unit[None, :], dim, width, ADDED, OPERAND)
            if KEEPS:
                # both matrices are on their way at once
                kept_last = _block(w_last, unit[:, None], feature[None, :], width, dim, ADDED, OPERAND)
            h = multiply_add(nothing, k, from_keys, PRECISION, OPERAND)
            a = h * _below(h)
            units, present = row_place[:, None] * width + unit[None, :], there[:, None] & (unit < width)[None, :]
            tl.store(hidden + units, a, mask=present)
            if KEEPS:
                kept_h, from_hidden = h, kept_last
            else:
                from_hidden = _block(w_last, unit[:, None], feature[None, :], width, dim, ADDED, OPERAND)
            y = multiply_add(y, a, from_hidden, PRECISION, OPERAND)
    else:
        from_keys = _block(w_last, feature[:, None], feature[None, :], dim, dim, ADDED, OPERAND)
        y = multiply_add(y, k, from_keys, PRECISION, OPERAND)

    v = tl.load(values + value_place[:, None] + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    theta = tl.load(step_sizes + step_place, mask=there, other=0.0).to(tl.float32)[:, None]

    # s = −(2θ/d) (p − v)
    if NORM:
        x, inverse = _normalised(y, inside, eps, dim)
        gain = 1.0 + _block(w_gamma, 0, feature[None, :], 1, dim, ADDED, tl.float32)
        difference = x * gain + k - v
        descent = theta * difference * (-2.0 / dim)
        # Δ₂ = r · P(s ∘ (1 + γ))
        delta = inverse * _tangent(descent * gain, x, inside, dim)
        of_rows = descent * x
    else:
        difference = y - v
        delta = theta * difference * (-2.0 / dim)
        of_rows = delta
    tl.store(losses + row_place, tl.sum(difference * difference, axis=1) / dim, mask=there)
    tl.store(errors + row_place[:, None] * dim + feature[None, :], delta, mask=inside)

    if HIDDEN:
        # Δ₁ = (Δ₂ W₂ᵀ) ∘ gelu′(h)
        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            if KEEPS:
                h, from_last = kept_h, tl.trans(kept_last)
            else:
                from_keys = _block(w_first, feature[:, None], unit[None, :], dim, width, ADDED, OPERAND)
                h = multiply_add(nothing, k, from_keys, PRECISION, OPERAND)
                from_last = _block(w_last, unit[None, :], feature[:, None], width, dim, ADDED, OPERAND)
            g = multiply_add(nothing, delta, from_last, PRECISION, OPERAND)
            units, present = row_place[:, None] * width + unit[None, :], there[:, None] & (unit < width)[None, :]
            tl.store(hidden_errors + units, g * _gelu_slope(h), mask=present)
    return of_rows


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    keys, values, step_sizes, first, last, gamma, shares, add_first, add_last, add_gamma,
    hidden, hidden_errors, errors, of_gamma, losses,
    blocks, parts, chunks, rows, eps,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
    first_head, last_head, gamma_head,
    share_head, share_chunk, add_first_head, add_first_chunk,
    add_last_head, add_last_chunk, add_gamma_head, add_gamma_chunk,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr,
    ADDED: tl.constexpr, KEEPS: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block, head = program % blocks, (program // blocks).to(tl.int64)
    chunk, row, there = _rows_of(block, parts, chunks, rows, CHUNKS, ROWS)
    feature = tl.arange(0, DIM)
    # outputs are whole; places count from the head's first row, so that they need no 64 bits
    start, row_place = head * chunks * rows, chunk * rows + row
    share, own = 0.0, block // parts
    if ADDED:
        share = tl.load(shares + head * share_head + own * share_chunk).to(tl.float32)
    w_first = _parameter(first, add_first, share, head, own, first_head, add_first_head, add_first_chunk)
    w_last = _parameter(last, add_last, share, head, own, last_head, add_last_head, add_last_chunk)
    w_gamma = _parameter(gamma, add_gamma, share, head, own, gamma_head, add_gamma_head, add_gamma_chunk)
    of_rows = _forward_of_rows(
        keys + head * key_head, chunk * key_chunk + row * key_row,
        values + head * value_head, chunk * value_chunk + row * value_row,
        step_sizes + head * step_head, chunk * step_chunk + row * step_row, w_first, w_last, w_gamma,
        hidden + start * width, hidden_errors + start * width, errors + start * dim, losses + start,
        row_place, there, feature, eps,
        dim, width, HIDDEN, NORM, ADDED, KEEPS, CHUNKS * ROWS, DIM, BLOCK, PRECISION, OPERAND,
    )  # fmt: skip
    if NORM:
        of_chunks = _sum_of_chunks(of_rows, CHUNKS, ROWS, DIM)
        summed = (block // parts) * CHUNKS + tl.arange(0, CHUNKS)
        to_chunks = of_gamma + ((head * chunks + summed) * parts + block % parts)[:, None] * dim + feature[None, :]
        tl.store(to_chunks, of_chunks, mask=(summed < chunks)[:, None] & (feature < dim)[None, :])


@triton.jit
def _backward_of_rows(  # type: ignore[no-untyped-def]
    d_hidden, d_hidden_place, d_hidden_unit, d_hidden_errors, d_errors, d_of_gamma, gamma_place, d_losses,
    keys, key_place, values, value_place, step_sizes, step_place, w_first, w_last, w_gamma,
    d_values, d_step_sizes, d_products, d_y, d_h, row_place, there, feature, eps,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr, LOSSES: tl.constexpr,
    ADDED: tl.constexpr, KEEPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """The way back through `_forward_of_rows`. Returns the gradients of the keys, and of γ."""
    inside = there[:, None] & (feature < dim)[None, :]
    features = row_place[:, None] * dim + feature[None, :]
    k = tl.load(keys + key_place[:, None] + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    # D, the gradient of Δ₂, of which there is more through g = Δ₂ W₂ᵀ and Δ₁ = g ∘ gelu′(h)
    d_delta = tl.load(d_errors + features, mask=inside, other=0.0).to(tl.float32)
    y = tl.zeros((ROWS, DIM), tl.float32)
    if HIDDEN:
        nothing = tl.zeros((ROWS, BLOCK), tl.float32)
        kept_h, kept_first, kept_last = nothing, tl.zeros((DIM, BLOCK), OPERAND), tl.zeros((BLOCK, DIM), OPERAND)
        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            units, present = row_place[:, None] * width + unit[None, :], there[:, None] & (unit < width)[None, :]
            from_keys = _block(w_first, feature[:, None], unit[None, :], dim, width, ADDED, OPERAND)
            from_hidden = _block(w_last, unit[:, None], feature[None, :], width, dim, ADDED, OPERAND)
            h = multiply_add(nothing, k, from_keys, PRECISION, OPERAND)
            d_g = tl.load(d_hidden_errors + units, mask=present, other=0.0).to(tl.float32) * _gelu_slope(h)
            tl.store(d_products + units, d_g, mask=present)
            y = multiply_add(y, h * _below(h), from_hidden, PRECISION, OPERAND)
            d_delta = multiply_add(d_delta, d_g, from_hidden, PRECISION, OPERAND)
            if KEEPS:
                kept_h, kept_first, kept_last = h, from_keys, from_hidden
    else:
        from_keys = _block(w_last, feature[:, None], feature[None, :], dim, dim, ADDED, OPERAND)
        y = multiply_add(y, k, from_keys, PRECISION, OPERAND)

    v = tl.load(values + value_place[:, None] + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    theta = tl.load(step_sizes + step_place, mask=there, other=0.0).to(tl.float32)[:, None]

    if NORM:
        x, inverse = _normalised(y, inside, eps, dim)
        gain = 1.0 + _block(w_gamma, 0, feature[None, :], 1, dim, ADDED, tl.float32)
        difference = x * gain + k - v
        descent = theta * difference * (-2.0 / dim)
        # Δ₂ = r · P(u) with u = s ∘ (1 + γ); P is symmetric, and made of x̂
        tangent = _tangent(descent * gain, x, inside, dim)
        delta = inverse * tangent
        d_inverse = tl.sum(d_delta * tangent, axis=1)[:, None]
        d_delta *= inverse
        d_u = _tangent(d_delta, x, inside, dim)
        d_x = -_mean(descent * gain * x, dim) * d_delta - _mean(d_delta * x, dim) * (descent * gain)
        # and minus the gradient of γ is Σ s ∘ x̂
        from_chunks = d_of_gamma + gamma_place[:, None] * dim + feature[None, :]
        d_chunk = tl.load(from_chunks, mask=inside, other=0.0)
        d_descent = d_u * gain + d_chunk * x
        d_x += d_chunk * descent
        of_gamma = d_u * descent
    else:
        difference = y - v
        delta = theta * difference * (-2.0 / dim)
        d_descent = d_delta

    # s = −(2θ/d) (p − v), loss = mean (p − v)²
    tl.store(d_step_sizes + row_place, tl.sum(d_descent * difference, axis=1) * (-2.0 / dim), mask=there)
    d_prediction = d_descent * theta * (-2.0 / dim)
    if LOSSES:
        d_loss = tl.load(d_losses + row_place, mask=there, other=0.0)[:, None]
        d_prediction += d_loss * difference * (2.0 / dim)
    tl.store(d_values + features, -d_prediction, mask=inside)

    if NORM:
        # p = x̂ ∘ (1 + γ) + k
        d_k = d_prediction
        of_gamma = tl.sum(of_gamma + d_prediction * x, axis=0)
        d_x += d_prediction * gain
        # x̂ = (y − mean y) · r, and ∂r/∂y = −r² x̂ / d
        d_product = inverse * (_tangent(d_x, x, inside, dim) - d_inverse * inverse * x / dim)
    else:
        d_k = tl.zeros((ROWS, DIM), tl.float32)
        d_product, of_gamma = d_prediction, 0.0
    tl.store(d_y + features, d_product, mask=inside)

    if HIDDEN:
        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            units, present = row_place[:, None] * width + unit[None, :], there[:, None] & (unit < width)[None, :]
            if KEEPS:
                h, from_h, from_last = kept_h, tl.trans(kept_first), tl.trans(kept_last)
            else:
                from_keys = _block(w_first, feature[:, None], unit[None, :], dim, width, ADDED, OPERAND)
                from_h = _block(w_first, feature[None, :], unit[:, None], dim, width, ADDED, OPERAND)
                from_last = _block(w_last, unit[None, :], feature[:, None], width, dim, ADDED, OPERAND)
                h = multiply_add(nothing, k, from_keys, PRECISION, OPERAND)
            from_rows = d_hidden + d_hidden_place[:, None]
            d_a = tl.load(from_rows + (unit * d_hidden_unit)[None, :], mask=present, other=0.0).to(tl.float32)
            d_a = multiply_add(d_a, d_product, from_last, PRECISION, OPERAND)
            g = multiply_add(nothing, delta, from_last, PRECISION, OPERAND)
            d_slope = g * tl.load(d_hidden_errors + units, mask=present, other=0.0).to(tl.float32)
            of_h = d_a * _gelu_slope(h) + d_slope * _gelu_curvature(h)
            tl.store(d_h + units, of_h, mask=present)
            d_k = multiply_add(d_k, of_h, from_h, PRECISION, OPERAND)
    else:
        from_last = _block(w_last, feature[None, :], feature[:, None], dim, dim, ADDED, OPERAND)
        d_k = multiply_add(d_k, d_product, from_last, PRECISION, OPERAND)
    return d_k, of_gamma


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_hidden, d_hidden_errors, d_errors, d_of_gamma, d_losses,
    keys, values, step_sizes, first, last, gamma, shares, add_first, add_last, add_gamma,
    d_keys, d_values, d_step_sizes, d_gamma, d_products, d_y, d_h,
    d_hidden_head, d_hidden_chunk, d_hidden_row, d_hidden_unit, blocks, parts, chunks, rows, eps,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
    first_head, last_head, gamma_head,
    share_head, share_chunk, add_first_head, add_first_chunk,
    add_last_head, add_last_chunk, add_gamma_head, add_gamma_chunk,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr, LOSSES: tl.constexpr,
    ADDED: tl.constexpr, KEEPS: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block, head = program % blocks, (program // blocks).to(tl.int64)
    chunk, row, there = _rows_of(block, parts, chunks, rows, CHUNKS, ROWS)
    feature = tl.arange(0, DIM)
    start, row_place = head * chunks * rows, chunk * rows + row
    share, own = 0.0, block // parts
    if ADDED:
        share = tl.load(shares + head * share_head + own * share_chunk).to(tl.float32)
    w_first = _parameter(first, add_first, share, head, own, first_head, add_first_head, add_first_chunk)
    w_last = _parameter(last, add_last, share, head, own, last_head, add_last_head, add_last_chunk)
    w_gamma = _parameter(gamma, add_gamma, share, head, own, gamma_head, add_gamma_head, add_gamma_chunk)
    d_k, of_gamma = _backward_of_rows(
        # often the gradient of what was transposed
        d_hidden + head * d_hidden_head, chunk * d_hidden_chunk + row * d_hidden_row, d_hidden_unit,
        d_hidden_errors + start * width, d_errors + start * dim, d_of_gamma + head * chunks * dim, chunk,
        d_losses + start, keys + head * key_head, chunk * key_chunk + row * key_row,
        values + head * value_head, chunk * value_chunk + row * value_row,
        step_sizes + head * step_head, chunk * step_chunk + row * step_row, w_first, w_last, w_gamma,
        d_values + start * dim, d_step_sizes + start,
        d_products + start * width, d_y + start * dim, d_h + start * width, row_place, there, feature, eps,
        dim, width, HIDDEN, NORM, LOSSES, ADDED, KEEPS, CHUNKS * ROWS, DIM, BLOCK, PRECISION, OPERAND,
    )  # fmt: skip
    inside = there[:, None] & (feature < dim)[None, :]
    tl.store(d_keys + start * dim + row_place[:, None] * dim + feature[None, :], d_k, mask=inside)
    if NORM:
        to_gamma = d_gamma + (head * blocks + block) * dim + feature
        tl.store(to_gamma, of_gamma, mask=feature < dim)


@triton.jit
def _outer_products(  # type: ignore[no-untyped-def]
    keys, hidden, errors, d_products, d_y, d_h, first_row, last_row, steps, unit, feature, rows, key_chunk, key_row,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr,
    UNITS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """What some rows of a head bring to the gradients of a block of hidden features: columns of the first matrix,
    which lie down, and rows of the last."""
    of_first = tl.zeros((UNITS, DIM), tl.float32)
    of_last = tl.zeros((UNITS, DIM), tl.float32)
    for step in range(0, steps):
        index = first_row + step * ROWS + tl.arange(0, ROWS)
        there = index < last_row
        key_place = (index // rows) * key_chunk + (index % rows) * key_row
        # what stands on the left is loaded turned, rows across
        across = there[None, :] & (unit < width)[:, None]
        inside = there[:, None] & (feature < dim)[None, :]
        features = index[:, None] * dim + feature[None, :]
        d_product = tl.load(d_y + features, mask=inside, other=0.0)
        if HIDDEN:
            # y = a W₂, g = Δ₂ W₂ᵀ, h = k W₁
            units = index[None, :] * width + unit[:, None]
            a = tl.load(hidden + units, mask=across, other=0.0)
            of_last = multiply_add(of_last, a, d_product, PRECISION, OPERAND)
            d_g = tl.load(d_products + units, mask=across, other=0.0)
            delta = tl.load(errors + features, mask=inside, other=0.0)
            of_last = multiply_add(of_last, d_g, delta, PRECISION, OPERAND)
            of_h = tl.load(d_h + units, mask=across, other=0.0)
            k = tl.load(keys + key_place[:, None] + feature[None, :], mask=inside, other=0.0)
            of_first = multiply_add(of_first, of_h, k, PRECISION, OPERAND)
        else:
            k = tl.load(keys + key_place[None, :] + unit[:, None], mask=across, other=0.0)
            of_last = multiply_add(of_last, k, d_product, PRECISION, OPERAND)
    return of_first, of_last


@triton.jit
def _summed(start, count, feature, dim: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of `count` rows."""
    total = tl.zeros((DIM,), tl.float32)
    for first_row in range(0, count, 16):
        row = first_row + tl.arange(0, 16)
        inside = (row < count)[:, None] & (feature < dim)[None, :]
        total += tl.sum(tl.load(start + row[:, None] * dim + feature[None, :], mask=inside, other=0.0), axis=0)
    return total


@triton.jit
def _weights_kernel(  # type: ignore[no-untyped-def]
    keys, hidden, errors, d_products, d_y, d_h, of_gamma, shares, add_first, add_last, add_gamma,
    d_first, d_last, d_gamma, d_shares, d_add_first, d_add_last, d_add_gamma,
    blocks, groups, group_chunks, steps, parts, row_blocks, chunks, rows, key_head, key_chunk, key_row,
    share_head, share_chunk, add_first_head, add_first_chunk,
    add_last_head, add_last_chunk, add_gamma_head, add_gamma_chunk,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr, ADDED: tl.constexpr,
    UNITS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """A program owns a block of hidden features of a head; where chunks have weights of their own, in some chunks."""
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
    errors += start * dim
    d_y += start * dim
    present = (unit < width)[:, None] & (feature < dim)[None, :]
    in_last, in_first = unit[:, None] * dim + feature[None, :], feature[None, :] * width + unit[:, None]

    if ADDED:
        of_first = tl.zeros((UNITS, DIM), tl.float32)
        of_last = tl.zeros((UNITS, DIM), tl.float32)
        first_chunk = group * group_chunks
        for chunk in range(first_chunk, tl.minimum(first_chunk + group_chunks, chunks)):
            share = tl.load(shares + head * share_head + chunk * share_chunk).to(tl.float32)
            place = head * chunks + chunk
            # long before they are needed
            from_last = add_last + head * add_last_head + chunk * add_last_chunk + in_last
            other_last = tl.load(from_last, mask=present, other=0.0).to(tl.float32)
            if HIDDEN:
                from_first = add_first + head * add_first_head + chunk * add_first_chunk + in_first
                other_first = tl.load(from_first, mask=present, other=0.0).to(tl.float32)
            own_first, own_last = _outer_products(
                keys, hidden, errors, d_products, d_y, d_h, chunk * rows, (chunk + 1) * rows, steps, unit, feature,
                rows, key_chunk, key_row, dim, width, HIDDEN, UNITS, ROWS, DIM, PRECISION, OPERAND,
            )  # fmt: skip
            of_last += own_last
            tl.store(d_add_last + place * width * dim + in_last, share * own_last, mask=present)
            of_share = tl.sum(own_last * other_last)
            if HIDDEN:
                of_first += own_first
                tl.store(d_add_first + place * width * dim + in_first, share * own_first, mask=present)
                of_share += tl.sum(own_first * other_first)
            if NORM:
                # the first block's
                with_gamma = feature < tl.where(block == 0, dim, 0)
                from_gamma = add_gamma + head * add_gamma_head + chunk * add_gamma_chunk + feature
                other_gamma = tl.load(from_gamma, mask=with_gamma, other=0.0).to(tl.float32)
                own_gamma = _summed(of_gamma + place * parts * dim, parts, feature, dim, DIM)
                tl.store(d_add_gamma + place * dim + feature, share * own_gamma, mask=with_gamma)
                of_share += tl.sum(own_gamma * other_gamma)
            tl.store(d_shares + place * blocks + block, of_share)
    else:
        of_first, of_last = _outer_products(
            keys, hidden, errors, d_products, d_y, d_h, 0, chunks * rows, steps, unit, feature,
            rows, key_chunk, key_row, dim, width, HIDDEN, UNITS, ROWS, DIM, PRECISION, OPERAND,
        )  # fmt: skip

    to_base = (head * groups + group) * width * dim
    tl.store(d_last + to_base + in_last, of_last, mask=present)
    if HIDDEN:
        tl.store(d_first + to_base + in_first, of_first, mask=present)
    if NORM:
        if (block == 0) & (group == 0):
            of_head = _summed(of_gamma + head * row_blocks * dim, row_blocks, feature, dim, DIM)
            tl.store(d_gamma + head * dim + feature, of_head, mask=feature < dim)


def forward(
    keys: Tensor,  # bh n m d
    values: Tensor,  # bh n m d
    step_sizes: Tensor,  # bh n m
    first: Tensor | None,  # bh d e
    last: Tensor,  # bh e d
    gamma: Tensor | None,  # bh d
    added: Added | None,  # bh n; bh n d e, bh n e d, bh n d
    eps: float,
    operands: torch.dtype,
    precision: str,
) -> tuple[Tensor, ...]:
    """What the last matrix saw, errors of both products (bh, n, m, ·), descent of γ (bh, n, d), losses (bh, n, m)."""
    call = _Call.of(keys, values, step_sizes, first, last, gamma, added, operands, precision)
    heads, chunks, rows, dim = keys.shape
    none = keys.new_empty(0, dtype=operands)
    hidden, hidden_errors = none, keys.new_empty(0, dtype=operands)
    if first is not None:
        hidden, hidden_errors = (keys.new_empty(heads, chunks, rows, call.width, dtype=operands) for _ in range(2))
    errors = keys.new_empty(keys.shape, dtype=operands)
    of_gamma = last.new_empty((0,) if gamma is None else (heads, chunks, call.parts, dim))
    losses = last.new_empty(heads, chunks, rows)
    with torch.cuda.device_of(keys):
        _forward_kernel[(heads * call.blocks,)](
            *call.tensors, hidden, hidden_errors, errors, of_gamma, losses,
            *call.numbers(eps), **call.constants,
        )  # fmt: skip
    if gamma is not None:
        of_gamma = of_gamma.sum(dim=2) if call.parts > 1 else of_gamma.view(heads, chunks, dim)
    return hidden, hidden_errors, errors, of_gamma, losses


def backward(
    d_outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    keys: Tensor,  # bh n m d
    values: Tensor,  # bh n m d
    step_sizes: Tensor,  # bh n m
    first: Tensor | None,  # bh d e
    last: Tensor,  # bh e d
    gamma: Tensor | None,  # bh d
    added: Added | None,  # bh n; bh n d e, bh n e d, bh n d
    hidden: Tensor,  # bh n m e
    errors: Tensor,  # bh n m d
    eps: float,
    operands: torch.dtype,
    precision: str,
) -> list[Tensor]:
    """Gradients of `keys`, `values`, `step_sizes`, `first`, `last`, `gamma` and all in `added`."""
    call = _Call.of(keys, values, step_sizes, first, last, gamma, added, operands, precision)
    heads, chunks, rows, dim = keys.shape
    d_keys, d_values, d_step_sizes = (t.new_empty(t.shape) for t in (keys, values, step_sizes))
    # of each row, what weights' gradients are made of; that of γ is summed over a program's rows
    d_y = keys.new_empty(keys.shape, dtype=operands)
    d_products, d_h = (keys.new_empty(hidden.shape, dtype=operands) for _ in range(2))
    of_gamma = last.new_empty((0,) if gamma is None else (heads, call.blocks, dim))
    d_hidden, *others = d_outputs
    incoming = [d_hidden, *(d_values if t is None else t.contiguous() for t in others)]
    d_hidden_strides = (0,) * 4 if first is None else d_hidden.stride()
    # more rows, or float32 in full, need all there are
    few = added is not None and operands != torch.float32 and call.constants['ROWS'] == 16
    at_most = {'maxnreg': ADDED_REGISTERS[call.many]} if few else {}
    with torch.cuda.device_of(keys):
        _backward_kernel[(heads * call.blocks,)](
            *incoming, *call.tensors, d_keys, d_values, d_step_sizes, of_gamma, d_products, d_y, d_h,
            *d_hidden_strides, *call.numbers(eps), **call.constants, **at_most, LOSSES=d_outputs[-1] is not None,
        )  # fmt: skip

    units = min(UNITS if added is None else ADDED_UNITS, max(16, triton.next_power_of_2(call.width)))
    blocks, groups, at_a_time, summed = triton.cdiv(call.width, units), 1, ROWS_AT_A_TIME, chunks * rows
    warps = 4
    if added is not None:
        groups = min(chunks, triton.cdiv(ENOUGH_SUMS, heads * blocks))
        at_a_time, summed, warps = min(at_a_time, max(16, triton.next_power_of_2(rows))), rows, ADDED_SUM_WARPS
    group_chunks = triton.cdiv(chunks, groups)
    groups = triton.cdiv(chunks, group_chunks)
    d_first, d_last = (
        last.new_empty((0,) if w is None else (heads, groups, *w.shape[1:]) if groups > 1 else w.shape)
        for w in (first, last)
    )
    d_gamma = last.new_empty((0,) if gamma is None else gamma.shape)
    d_others = [last.new_empty(0) if t is None else t.new_empty(t.shape) for t in (added or (None,) * 4)[1:]]
    of_shares = last.new_empty((0,) if added is None else (heads, chunks, blocks))
    with torch.cuda.device_of(keys):
        _weights_kernel[(heads * groups * blocks,)](
            call.tensors[0], hidden, errors, d_products, d_y, d_h, of_gamma, *call.tensors[6:],
            d_first, d_last, d_gamma, of_shares, *d_others,
            blocks, groups, group_chunks, triton.cdiv(summed, at_a_time), call.parts, call.blocks, chunks, rows,
            *call.strides[:3], *call.strides[12:],
            dim=dim, width=call.width, HIDDEN=first is not None, NORM=gamma is not None, ADDED=added is not None,
            UNITS=units, ROWS=at_a_time, DIM=call.constants['DIM'],
            PRECISION=precision, OPERAND=TRITON_DTYPES[operands],
            num_warps=warps if call.constants['DIM'] <= 64 else 2 * warps, num_stages=STAGES,
        )  # fmt: skip
    if groups > 1:
        d_first, d_last = (d if d.ndim == 1 else d.sum(dim=1) for d in (d_first, d_last))
    d_shares = of_shares if added is None else of_shares.sum(dim=-1).to(added[0].dtype)
    return [d_keys, d_values, d_step_sizes, d_first, d_last, d_gamma, d_shares, *d_others]


class _Call(NamedTuple):
    """What the kernels are launched with."""

    tensors: tuple[Tensor, ...]
    blocks: int
    parts: int
    width: int
    many: bool
    strides: tuple[int, ...]
    constants: dict[str, Any]

    @classmethod
    def of(
        cls,
        keys: Tensor,
        values: Tensor,
        step_sizes: Tensor,
        first: Tensor | None,
        last: Tensor,
        gamma: Tensor | None,
        added: Added | None,
        operands: torch.dtype,
        precision: str,
    ) -> _Call:
        absent = last.new_empty(0)
        # chunks may be cut out of a longer sequence, and weights shared by heads, but features are whole
        keys, values = (_whole(t, 1, absent) for t in (keys, values))
        shares, *others = added or (None,) * 4
        matrices = [_whole(t, 2, absent) for t in (first, last, *others[:2])]
        vectors = [_whole(t, 1, absent) for t in (gamma, others[2])]
        base = (*matrices[:2], vectors[0])
        chunked = (absent if shares is None else shares, *matrices[2:], vectors[1])

        heads, chunks, rows, dim = keys.shape
        width = last.shape[1]
        padded, wide = max(16, triton.next_power_of_2(dim)), max(16, triton.next_power_of_2(width))
        in_full = precision == 'tf32x3' and operands == torch.float32
        block = min(wide, MOST_COLUMNS, BLOCK // padded, max(32, padded))
        if added is None:
            keeps = False
            own, warps = _tile(heads, chunks * rows, max(padded, block), in_full)
            of_chunk = min(triton.next_power_of_2(rows), own)
            # two take more memory than a multiprocessor of compute capability 8.6 has, in full and so wide
            options = {'num_warps': warps, 'num_stages': 1 if in_full and padded > 64 else STAGES}
        else:
            keeps = first is not None and wide * padded <= (KEPT_IN_FULL if in_full else KEPT)
            block = wide if keeps else block
            own = of_chunk = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
            options = {'num_stages': ADDED_STAGES}
        parts = triton.cdiv(rows, of_chunk)
        many = heads * chunks * parts >= MANY_PROGRAMS
        if added is not None:
            options['num_warps'] = ADDED_WARPS[many]
        constants = {
            'dim': dim,
            'width': width,
            'HIDDEN': first is not None,
            'NORM': gamma is not None,
            'ADDED': added is not None,
            'KEEPS': keeps,
            'CHUNKS': own // of_chunk,
            'ROWS': of_chunk,
            'DIM': padded,
            'BLOCK': block,
            'PRECISION': precision,
            'OPERAND': TRITON_DTYPES[operands],
            **options,
        }
        strides = (*keys.stride()[:3], *values.stride()[:3], *step_sizes.stride(), *(t.stride(0) for t in base))
        of_chunks = (0,) * 8 if added is None else [n for t in chunked for n in (*t.stride(), 0)[:2]]
        return cls(
            (keys, values, step_sizes, *base, *chunked),
            triton.cdiv(chunks, own // of_chunk) * parts,
            parts,
            width,
            many,
            (*strides, *of_chunks),
            constants,
        )

    def numbers(self, eps: float) -> tuple[Any, ...]:
        chunks, rows = self.tensors[0].shape[1:3]
        return self.blocks, self.parts, chunks, rows, eps, *self.strides


def _whole(t: Tensor | None, axes: int, absent: Tensor) -> Tensor:
    """With its last axes in one piece; `absent` for nothing."""
    if t is None:
        return absent
    lengths = (t.shape[-1], 1)
    return t if t.stride()[-axes:] == lengths[-axes:] else t.contiguous()


def _tile(heads: int, rows: int, columns: int, in_full: bool) -> tuple[int, int]:
    """Rows and warps of a program that has so many columns of each on chip; `in_full`: float32 without TF32."""
    entries = ENTRIES_IN_FULL if in_full else ENTRIES
    own = max(16, min(MOST_ROWS, entries // columns))
    own = own if heads * triton.cdiv(rows, own) >= ENOUGH_PROGRAMS else 16
    return own, 4 if 2 * own * columns <= entries else 8
