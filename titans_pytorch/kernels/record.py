"""One forward, one gradient and one second derivative of a memory MLP for many rows, at one set of weights a head.

A program owns some rows of one head: whole chunks, or a part of one. It walks over the hidden features in blocks and
computes what it needs of them again rather than keep it. What is summed over rows to be a weight's gradient it
writes row by row, and another kernel sums it. The equations, and the plain twins, are in
`titans_pytorch.fused_mlp`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.kernels.products import plus

OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

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
def _matrix(start, rows, columns, height: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of a (height, width) matrix. As `columns` may be down and `rows` across, it may come transposed."""
    return tl.load(start + rows * width + columns, mask=(rows < height) & (columns < width), other=0.0)


@triton.jit
def _own_rows(blocks, parts, chunks, rows, CHUNKS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Head, block, and of each of the block's rows its chunk, its place in that, and whether it is there."""
    program = tl.program_id(0)
    block = program % blocks
    index = tl.arange(0, CHUNKS * ROWS)
    chunk = (block // parts) * CHUNKS + index // ROWS
    row = (block % parts) * ROWS + index % ROWS
    return (program // blocks).to(tl.int64), block, chunk, row, (chunk < chunks) & (row < rows)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    keys, values, step_sizes, first, last, gamma,
    hidden, hidden_errors, errors, of_gamma, losses,
    blocks, parts, chunks, rows, eps,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
    first_head, last_head, gamma_head,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    head, block, chunk, row, there = _own_rows(blocks, parts, chunks, rows, CHUNKS, ROWS)
    feature = tl.arange(0, DIM)
    inside = there[:, None] & (feature < dim)[None, :]
    # outputs are whole; places count from the head's first row, so that they need no 64 bits
    start, row_place = head * chunks * rows, chunk * rows + row
    features = row_place[:, None] * dim + feature[None, :]
    first += head * first_head
    last += head * last_head
    hidden += start * width
    hidden_errors += start * width

    from_keys = keys + head * key_head + (chunk * key_chunk + row * key_row)[:, None] + feature[None, :]
    k = tl.load(from_keys, mask=inside, other=0.0).to(tl.float32)
    y = tl.zeros((CHUNKS * ROWS, DIM), tl.float32)
    if HIDDEN:
        nothing = tl.zeros((CHUNKS * ROWS, BLOCK), tl.float32)
        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            h = plus(nothing, k, _matrix(first, feature[:, None], unit[None, :], dim, width), PRECISION, OPERAND)
            a = h * _below(h)
            units, present = row_place[:, None] * width + unit[None, :], there[:, None] & (unit < width)[None, :]
            tl.store(hidden + units, a, mask=present)
            y = plus(y, a, _matrix(last, unit[:, None], feature[None, :], width, dim), PRECISION, OPERAND)
    else:
        y = plus(y, k, _matrix(last, feature[:, None], feature[None, :], dim, dim), PRECISION, OPERAND)

    from_values = values + head * value_head + (chunk * value_chunk + row * value_row)[:, None] + feature[None, :]
    v = tl.load(from_values, mask=inside, other=0.0).to(tl.float32)
    from_steps = step_sizes + head * step_head + chunk * step_chunk + row * step_row
    theta = tl.load(from_steps, mask=there, other=0.0).to(tl.float32)[:, None]

    # s = −(2θ/d) (p − v)
    if NORM:
        x, inverse = _normalised(y, inside, eps, dim)
        gain = 1.0 + tl.load(gamma + head * gamma_head + feature, mask=feature < dim, other=0.0)[None, :]
        difference = x * gain + k - v
        descent = theta * difference * (-2.0 / dim)
        # Δ₂ = r · P(s ∘ (1 + γ))
        delta = inverse * _tangent(descent * gain, x, inside, dim)
        of_rows = descent * x
        if ROWS > 1:
            of_chunks = tl.sum(tl.reshape(of_rows, (CHUNKS, ROWS, DIM)), axis=1)
        else:
            of_chunks = of_rows
        summed = (block // parts) * CHUNKS + tl.arange(0, CHUNKS)
        to_chunks = of_gamma + ((head * chunks + summed) * parts + block % parts)[:, None] * dim + feature[None, :]
        tl.store(to_chunks, of_chunks, mask=(summed < chunks)[:, None] & (feature < dim)[None, :])
    else:
        difference = y - v
        delta = theta * difference * (-2.0 / dim)
    tl.store(losses + start + row_place, tl.sum(difference * difference, axis=1) / dim, mask=there)
    tl.store(errors + start * dim + features, delta, mask=inside)

    if HIDDEN:
        # Δ₁ = (Δ₂ W₂ᵀ) ∘ gelu′(h)
        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            h = plus(nothing, k, _matrix(first, feature[:, None], unit[None, :], dim, width), PRECISION, OPERAND)
            g = plus(nothing, delta, _matrix(last, unit[None, :], feature[:, None], width, dim), PRECISION, OPERAND)
            units, present = row_place[:, None] * width + unit[None, :], there[:, None] & (unit < width)[None, :]
            tl.store(hidden_errors + units, g * _gelu_slope(h), mask=present)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_hidden, d_hidden_errors, d_errors, d_of_gamma, d_losses,
    keys, values, step_sizes, first, last, gamma,
    d_keys, d_values, d_step_sizes, d_gamma, d_products, d_y, d_h,
    blocks, parts, chunks, rows, eps,
    key_head, key_chunk, key_row, value_head, value_chunk, value_row, step_head, step_chunk, step_row,
    first_head, last_head, gamma_head,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr, NORM: tl.constexpr, LOSSES: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    head, block, chunk, row, there = _own_rows(blocks, parts, chunks, rows, CHUNKS, ROWS)
    feature = tl.arange(0, DIM)
    inside = there[:, None] & (feature < dim)[None, :]
    start, row_place = head * chunks * rows, chunk * rows + row
    features = row_place[:, None] * dim + feature[None, :]
    first += head * first_head
    last += head * last_head
    d_hidden += start * width
    d_hidden_errors += start * width
    d_products += start * width
    d_h += start * width

    from_keys = keys + head * key_head + (chunk * key_chunk + row * key_row)[:, None] + feature[None, :]
    k = tl.load(from_keys, mask=inside, other=0.0).to(tl.float32)
    # D, the gradient of Δ₂, of which there is more through g = Δ₂ W₂ᵀ and Δ₁ = g ∘ gelu′(h)
    d_delta = tl.load(d_errors + start * dim + features, mask=inside, other=0.0).to(tl.float32)
    y = tl.zeros((CHUNKS * ROWS, DIM), tl.float32)
    if HIDDEN:
        nothing = tl.zeros((CHUNKS * ROWS, BLOCK), tl.float32)
        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            units, present = row_place[:, None] * width + unit[None, :], there[:, None] & (unit < width)[None, :]
            h = plus(nothing, k, _matrix(first, feature[:, None], unit[None, :], dim, width), PRECISION, OPERAND)
            d_g = tl.load(d_hidden_errors + units, mask=present, other=0.0).to(tl.float32) * _gelu_slope(h)
            tl.store(d_products + units, d_g, mask=present)
            from_hidden = _matrix(last, unit[:, None], feature[None, :], width, dim)
            y = plus(y, h * _below(h), from_hidden, PRECISION, OPERAND)
            d_delta = plus(d_delta, d_g, from_hidden, PRECISION, OPERAND)
    else:
        y = plus(y, k, _matrix(last, feature[:, None], feature[None, :], dim, dim), PRECISION, OPERAND)

    from_values = values + head * value_head + (chunk * value_chunk + row * value_row)[:, None] + feature[None, :]
    v = tl.load(from_values, mask=inside, other=0.0).to(tl.float32)
    from_steps = step_sizes + head * step_head + chunk * step_chunk + row * step_row
    theta = tl.load(from_steps, mask=there, other=0.0).to(tl.float32)[:, None]

    if NORM:
        x, inverse = _normalised(y, inside, eps, dim)
        gain = 1.0 + tl.load(gamma + head * gamma_head + feature, mask=feature < dim, other=0.0)[None, :]
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
        from_chunks = d_of_gamma + (head * chunks + chunk)[:, None] * dim + feature[None, :]
        d_chunk = tl.load(from_chunks, mask=inside, other=0.0)
        d_descent = d_u * gain + d_chunk * x
        d_x += d_chunk * descent
        of_gamma = d_u * descent
    else:
        difference = y - v
        delta = theta * difference * (-2.0 / dim)
        d_descent = d_delta

    # s = −(2θ/d) (p − v), loss = mean (p − v)²
    tl.store(d_step_sizes + start + row_place, tl.sum(d_descent * difference, axis=1) * (-2.0 / dim), mask=there)
    d_prediction = d_descent * theta * (-2.0 / dim)
    if LOSSES:
        d_loss = tl.load(d_losses + start + row_place, mask=there, other=0.0)[:, None]
        d_prediction += d_loss * difference * (2.0 / dim)
    tl.store(d_values + start * dim + features, -d_prediction, mask=inside)

    if NORM:
        # p = x̂ ∘ (1 + γ) + k
        d_k = d_prediction
        of_gamma += d_prediction * x
        to_gamma = d_gamma + (head * blocks + block) * dim + feature
        tl.store(to_gamma, tl.sum(of_gamma, axis=0), mask=feature < dim)
        d_x += d_prediction * gain
        # x̂ = (y − mean y) · r, and ∂r/∂y = −r² x̂ / d
        d_product = inverse * (_tangent(d_x, x, inside, dim) - d_inverse * inverse * x / dim)
    else:
        d_k = tl.zeros((CHUNKS * ROWS, DIM), tl.float32)
        d_product = d_prediction
    tl.store(d_y + start * dim + features, d_product, mask=inside)

    if HIDDEN:
        for first_unit in range(0, width, BLOCK):
            unit = first_unit + tl.arange(0, BLOCK)
            units, present = row_place[:, None] * width + unit[None, :], there[:, None] & (unit < width)[None, :]
            h = plus(nothing, k, _matrix(first, feature[:, None], unit[None, :], dim, width), PRECISION, OPERAND)
            from_last = _matrix(last, unit[None, :], feature[:, None], width, dim)
            d_a = tl.load(d_hidden + units, mask=present, other=0.0).to(tl.float32)
            d_a = plus(d_a, d_product, from_last, PRECISION, OPERAND)
            g = plus(nothing, delta, from_last, PRECISION, OPERAND)
            d_slope = g * tl.load(d_hidden_errors + units, mask=present, other=0.0).to(tl.float32)
            of_h = d_a * _gelu_slope(h) + d_slope * _gelu_curvature(h)
            tl.store(d_h + units, of_h, mask=present)
            d_k = plus(d_k, of_h, _matrix(first, feature[None, :], unit[:, None], dim, width), PRECISION, OPERAND)
    else:
        from_last = _matrix(last, feature[None, :], feature[:, None], dim, dim)
        d_k = plus(d_k, d_product, from_last, PRECISION, OPERAND)
    tl.store(d_keys + start * dim + features, d_k, mask=inside)


@triton.jit
def _weights_kernel(  # type: ignore[no-untyped-def]
    keys, hidden, errors, d_products, d_y, d_h, d_first, d_last,
    blocks, chunks, rows, key_head, key_chunk, key_row,
    dim: tl.constexpr, width: tl.constexpr, HIDDEN: tl.constexpr,
    UNITS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """A program owns a block of hidden features: columns of the first matrix, rows of the last."""
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    unit = (program % blocks) * UNITS + tl.arange(0, UNITS)
    feature = tl.arange(0, DIM)
    start = head * chunks * rows
    keys += head * key_head
    hidden += start * width
    d_products += start * width
    d_h += start * width
    errors += start * dim
    d_y += start * dim

    of_first = tl.zeros((UNITS, DIM), tl.float32)
    of_last = tl.zeros((UNITS, DIM), tl.float32)
    for first_row in range(0, chunks * rows, ROWS):
        index = first_row + tl.arange(0, ROWS)
        there = index < chunks * rows
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
            of_last = plus(of_last, a, d_product, PRECISION, OPERAND)
            d_g = tl.load(d_products + units, mask=across, other=0.0)
            delta = tl.load(errors + features, mask=inside, other=0.0)
            of_last = plus(of_last, d_g, delta, PRECISION, OPERAND)
            of_h = tl.load(d_h + units, mask=across, other=0.0)
            k = tl.load(keys + key_place[:, None] + feature[None, :], mask=inside, other=0.0)
            of_first = plus(of_first, of_h, k, PRECISION, OPERAND)
        else:
            k = tl.load(keys + key_place[None, :] + unit[:, None], mask=across, other=0.0)
            of_last = plus(of_last, k, d_product, PRECISION, OPERAND)

    present = (unit < width)[:, None] & (feature < dim)[None, :]
    to_last = d_last + head * width * dim + unit[:, None] * dim + feature[None, :]
    tl.store(to_last, of_last, mask=present)
    if HIDDEN:
        to_first = d_first + head * width * dim + feature[None, :] * width + unit[:, None]
        tl.store(to_first, of_first, mask=present)


def forward(
    keys: Tensor,  # bh n m d
    values: Tensor,  # bh n m d
    step_sizes: Tensor,  # bh n m
    first: Tensor | None,  # bh d e
    last: Tensor,  # bh e d
    gamma: Tensor | None,  # bh d
    eps: float,
    operands: torch.dtype,
    precision: str,
) -> tuple[Tensor, ...]:
    """What the last matrix saw, errors of both products (bh, n, m, ·), descent of γ (bh, n, d), losses (bh, n, m)."""
    call = _Call.of(keys, values, step_sizes, first, last, gamma, operands, precision)
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
    hidden: Tensor,  # bh n m e
    errors: Tensor,  # bh n m d
    eps: float,
    operands: torch.dtype,
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients of `keys`, `values`, `step_sizes`, `first`, `last` and `gamma`."""
    call = _Call.of(keys, values, step_sizes, first, last, gamma, operands, precision)
    heads, dim = len(keys), keys.shape[-1]
    d_keys, d_values, d_step_sizes = (t.new_empty(t.shape) for t in (keys, values, step_sizes))
    d_gamma = last.new_empty((0,) if gamma is None else (heads, call.blocks, dim))
    # of each row, what weights' gradients are made of
    d_y = keys.new_empty(keys.shape, dtype=operands)
    d_products, d_h = (keys.new_empty(hidden.shape, dtype=operands) for _ in range(2))
    incoming = [d_values if t is None else t.contiguous() for t in d_outputs]
    with torch.cuda.device_of(keys):
        _backward_kernel[(heads * call.blocks,)](
            *incoming, *call.tensors, d_keys, d_values, d_step_sizes, d_gamma, d_products, d_y, d_h,
            *call.numbers(eps), **call.constants, LOSSES=d_outputs[-1] is not None,
        )  # fmt: skip

    d_first = last.new_empty((0,) if first is None else first.shape)
    d_last = last.new_empty(last.shape)
    units = min(UNITS, max(16, triton.next_power_of_2(call.width)))
    blocks = triton.cdiv(call.width, units)
    with torch.cuda.device_of(keys):
        _weights_kernel[(heads * blocks,)](
            call.tensors[0], hidden, errors, d_products, d_y, d_h, d_first, d_last,
            blocks, *keys.shape[1:3], *call.strides[:3],
            dim=dim, width=call.width, HIDDEN=first is not None, UNITS=units, ROWS=ROWS_AT_A_TIME,
            DIM=call.constants['DIM'], PRECISION=precision, OPERAND=OPERANDS[operands],
            num_warps=4 if call.constants['DIM'] <= 64 else 8, num_stages=STAGES,
        )  # fmt: skip
    if gamma is not None:
        d_gamma = d_gamma.sum(dim=1)
    return d_keys, d_values, d_step_sizes, d_first, d_last, d_gamma


class _Call(NamedTuple):
    """What the two kernels are launched with."""

    tensors: tuple[Tensor, ...]
    blocks: int
    parts: int
    width: int
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
        operands: torch.dtype,
        precision: str,
    ) -> _Call:
        # chunks may be cut out of a longer sequence, and weights shared by heads
        keys, values = (t if t.stride(-1) == 1 else t.contiguous() for t in (keys, values))
        absent = last.new_empty(0)
        matrices = [
            absent if w is None else w if w.stride()[1:] == (w.shape[2], 1) else w.contiguous() for w in (first, last)
        ]
        vector = absent if gamma is None else gamma if gamma.stride(-1) == 1 else gamma.contiguous()

        heads, chunks, rows, dim = keys.shape
        width = last.shape[1]
        padded = max(16, triton.next_power_of_2(dim))
        block = min(max(16, triton.next_power_of_2(width)), MOST_COLUMNS, BLOCK // padded, max(32, padded))
        in_full = precision == 'tf32x3' and operands == torch.float32
        own, warps = _tile(heads, chunks * rows, max(padded, block), in_full)
        of_chunk = min(triton.next_power_of_2(rows), own)
        parts = triton.cdiv(rows, of_chunk)
        constants = {
            'dim': dim,
            'width': width,
            'HIDDEN': first is not None,
            'NORM': gamma is not None,
            'CHUNKS': own // of_chunk,
            'ROWS': of_chunk,
            'DIM': padded,
            'BLOCK': block,
            'PRECISION': precision,
            'OPERAND': OPERANDS[operands],
            'num_warps': warps,
            'num_stages': STAGES,
        }
        strides = (*keys.stride()[:3], *values.stride()[:3], *step_sizes.stride(), *(t.stride(0) for t in matrices))
        return cls(
            (keys, values, step_sizes, *matrices, vector),
            triton.cdiv(chunks, own // of_chunk) * parts,
            parts,
            width,
            (*strides, vector.stride(0)),
            constants,
        )

    def numbers(self, eps: float) -> tuple[Any, ...]:
        chunks, rows = self.tensors[0].shape[1:3]
        return self.blocks, self.parts, chunks, rows, eps, *self.strides


def _tile(heads: int, rows: int, columns: int, in_full: bool) -> tuple[int, int]:
    """Rows and warps of a program that has so many columns of each on chip; `in_full`: float32 without TF32."""
    entries = ENTRIES_IN_FULL if in_full else ENTRIES
    own = max(16, min(MOST_ROWS, entries // columns))
    own = own if heads * triton.cdiv(rows, own) >= ENOUGH_PROGRAMS else 16
    return own, 4 if 2 * own * columns <= entries else 8
