"""Kernels of the final state.

Forward, a program owns a block of all states. Backward, one kernel owns rows, and another a block of all initial
states.
"""

from __future__ import annotations

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
    rows_per_program,
    select,
    tile_size,
)

# the block of a state that a forward program owns, and the rows it reads at a time. With fewer than 64, Triton uses the
# older tensor-core instructions, which can read matrices in either orientation
STATE_BLOCK, STATE_ROWS = (32, 64), 32
# entries and columns of the block of a state's gradient that is on chip at a time
BLOCK, MOST_COLUMNS = 4096, 64
# entries owned by a program that computes initial states' gradients
INITIAL_BLOCK = 1024
STAGES = 2


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    coefficients, initial_coefficients, inputs, deltas,
    initial_0, initial_1, initial_2, initial_3, state_0, state_1, state_2, state_3,
    chunks, rows, blocks_in, blocks_out,
    coefficient_head, coefficient_state, coefficient_chunk,
    initial_coefficient_head, initial_coefficient_state, initial_coefficient_initial,
    input_head, input_chunk, input_row, delta_head, delta_chunk, delta_row,
    initial_head_0, initial_head_1, initial_head_2, initial_head_3,
    dim: tl.constexpr, width: tl.constexpr, STATES: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program % (blocks_in * blocks_out)
    head = (program // (blocks_in * blocks_out)).to(tl.int64)
    own_in = (block // blocks_out) * DIM + tl.arange(0, DIM)
    own_out = (block % blocks_out) * WIDTH + tl.arange(0, WIDTH)
    offset = own_in[:, None] * width + own_out[None, :]
    inside = (own_in < dim)[:, None] & (own_out < width)[None, :]
    inputs += head * input_head
    deltas += head * delta_head

    for k in tl.static_range(STATES):
        state = tl.zeros((DIM, WIDTH), tl.float32)
        for first_row in range(0, chunks * rows, ROWS):
            index = first_row + tl.arange(0, ROWS)
            chunk, row, valid = index // rows, index % rows, index < chunks * rows
            coefficient = tl.load(
                coefficients + head * coefficient_head + k * coefficient_state + chunk * coefficient_chunk,
                mask=valid,
                other=0.0,
            )
            # loaded in the orientation of the product, with rows across
            from_inputs = inputs + (chunk * input_chunk + row * input_row)[None, :] + own_in[:, None]
            x = tl.load(from_inputs, mask=valid[None, :] & (own_in < dim)[:, None], other=0.0).to(tl.float32)
            from_deltas = deltas + (chunk * delta_chunk + row * delta_row)[:, None] + own_out[None, :]
            delta = tl.load(from_deltas, mask=valid[:, None] & (own_out < width)[None, :], other=0.0)
            state = multiply_add(state, x * coefficient[None, :], delta, PRECISION, OPERAND)
        for j in tl.static_range(STATES):
            initial = select(j, initial_0, initial_1, initial_2, initial_3)
            initial_head = select(j, initial_head_0, initial_head_1, initial_head_2, initial_head_3)
            initial_coefficient = tl.load(
                initial_coefficients
                + head * initial_coefficient_head
                + k * initial_coefficient_state
                + j * initial_coefficient_initial
            )
            state += initial_coefficient * tl.load(initial + head * initial_head + offset, mask=inside, other=0.0)
        to_state = select(k, state_0, state_1, state_2, state_3)
        tl.store(to_state + head * dim * width + offset, state, mask=inside)


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    coefficients, short, long, d_state_0, d_state_1, d_state_2, d_state_3, d_coefficients, d_short, d_long,
    chunks, rows, blocks,
    coefficient_head, coefficient_state, coefficient_chunk,
    short_head, short_chunk, short_row, long_head, long_chunk, long_row,
    dim: tl.constexpr, width: tl.constexpr, short_stride: tl.constexpr, long_stride: tl.constexpr,
    STATES: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Of inputs and deltas, the shorter rows (`dim`) are on chip whole, and the longer ones (`width`) in blocks. A
    state's gradient G is oriented so that it maps the shorter to the longer ones."""
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    index = (program % blocks) * ROWS + tl.arange(0, ROWS)
    chunk, row, valid = index // rows, index % rows, index < chunks * rows
    feature = tl.arange(0, DIM)
    inside = valid[:, None] & (feature < dim)[None, :]
    start = head * chunks * rows
    coefficients += head * coefficient_head

    from_short = short + head * short_head + (chunk * short_chunk + row * short_row)[:, None] + feature[None, :]
    x = tl.load(from_short, mask=inside, other=0.0).to(tl.float32)
    from_long = long + head * long_head + (chunk * long_chunk + row * long_row)[:, None]
    d_long += start * width
    nothing = tl.zeros((ROWS, BLOCK), tl.float32)
    state = tl.arange(0, PADDED)[None, :]
    of_coefficients = tl.zeros((ROWS, PADDED), tl.float32)

    # state = Σ coefficient · xᵀ y, so y has the gradient Σ coefficient · x G, and the coefficient x G ∘ y
    for first_unit in range(0, width, BLOCK):
        unit = first_unit + tl.arange(0, BLOCK)
        present = valid[:, None] & (unit < width)[None, :]
        y = tl.load(from_long + unit[None, :], mask=present, other=0.0).to(tl.float32)
        d_y = tl.zeros((ROWS, BLOCK), tl.float32)
        for k in tl.static_range(STATES):
            d_state = select(k, d_state_0, d_state_1, d_state_2, d_state_3) + head * dim * width
            offset = feature[:, None] * short_stride + unit[None, :] * long_stride
            g = tl.load(d_state + offset, mask=(feature < dim)[:, None] & (unit < width)[None, :], other=0.0)
            product = multiply_add(nothing, x, g, PRECISION, OPERAND)
            of_coefficients += tl.where(state == k, tl.sum(product * y, axis=1)[:, None], 0.0)
            d_y += (
                tl.load(coefficients + k * coefficient_state + chunk * coefficient_chunk, mask=valid, other=0.0)[
                    :, None
                ]
                * product
            )
        tl.store(d_long + index[:, None] * width + unit[None, :], d_y, mask=present)
    to_coefficients = d_coefficients + start * STATES + state * (chunks * rows) + index[:, None]
    tl.store(to_coefficients, of_coefficients, mask=valid[:, None] & (state < STATES))

    # and x has the gradient Σ coefficient · y Gᵀ
    d_x = tl.zeros((ROWS, DIM), tl.float32)
    for first_unit in range(0, width, BLOCK):
        unit = first_unit + tl.arange(0, BLOCK)
        y = tl.load(from_long + unit[None, :], mask=valid[:, None] & (unit < width)[None, :], other=0.0).to(tl.float32)
        for k in tl.static_range(STATES):
            d_state = select(k, d_state_0, d_state_1, d_state_2, d_state_3) + head * dim * width
            offset = feature[None, :] * short_stride + unit[:, None] * long_stride
            g = tl.load(d_state + offset, mask=(feature < dim)[None, :] & (unit < width)[:, None], other=0.0)
            coefficient = tl.load(
                coefficients + k * coefficient_state + chunk * coefficient_chunk, mask=valid, other=0.0
            )[:, None]
            d_x = multiply_add(d_x, coefficient * y, g, PRECISION, OPERAND)
    tl.store(d_short + start * dim + index[:, None] * dim + feature[None, :], d_x, mask=inside)


@triton.jit
def _initial_kernel(  # type: ignore[no-untyped-def]
    initial_coefficients, d_state_0, d_state_1, d_state_2, d_state_3, initial_0, initial_1, initial_2, initial_3,
    d_initial_0, d_initial_1, d_initial_2, d_initial_3, d_initial_coefficients,
    blocks, initial_coefficient_head, initial_coefficient_state, initial_coefficient_initial,
    initial_head_0, initial_head_1, initial_head_2, initial_head_3,
    SIZE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    block = program % blocks
    entry = block * BLOCK + tl.arange(0, BLOCK)
    for j in tl.static_range(STATES):
        from_initial = select(j, initial_0, initial_1, initial_2, initial_3)
        initial_head = select(j, initial_head_0, initial_head_1, initial_head_2, initial_head_3)
        initial = tl.load(from_initial + head * initial_head + entry, mask=entry < SIZE, other=0.0)
        d_initial = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(STATES):
            d_state = select(k, d_state_0, d_state_1, d_state_2, d_state_3)
            g = tl.load(d_state + head * SIZE + entry, mask=entry < SIZE, other=0.0)
            d_initial += g * tl.load(
                initial_coefficients
                + head * initial_coefficient_head
                + k * initial_coefficient_state
                + j * initial_coefficient_initial
            )
            # this block's part of the sum
            to_initial_coefficients = d_initial_coefficients + ((head * STATES + k) * STATES + j) * blocks + block
            tl.store(to_initial_coefficients, tl.sum(g * initial, axis=0))
        to_initial = select(j, d_initial_0, d_initial_1, d_initial_2, d_initial_3)
        tl.store(to_initial + head * SIZE + entry, d_initial, mask=entry < SIZE)


def _outputs(
    coefficients: Tensor,
    initial_coefficients: Tensor,
    initial_states: list[Tensor],
    inputs: Tensor,
    deltas: Tensor,
    operands: torch.dtype,
) -> list[Tensor]:
    return [initial.new_empty(initial.shape) for initial in initial_states]


def _forward(
    coefficients: Tensor,  # bh k n
    initial_coefficients: Tensor,  # bh k k
    initial_states: list[Tensor],  # k of bh d e
    inputs: Tensor,  # bh n m d
    deltas: Tensor,  # bh n m e
    operands: torch.dtype,
) -> list[Tensor]:  # k of bh d e
    states = _outputs(coefficients, initial_coefficients, initial_states, inputs, deltas, operands)
    inputs, deltas = contiguous_inside(inputs, 1), contiguous_inside(deltas, 1)
    initial_states = [contiguous_inside(initial, 2) for initial in initial_states]
    heads, chunks, rows, dim = inputs.shape
    width = deltas.shape[-1]
    own_in, own_out = (min(tile_size(size), most) for size, most in zip((dim, width), STATE_BLOCK))
    blocks_in, blocks_out = triton.cdiv(dim, own_in), triton.cdiv(width, own_out)
    _forward_kernel[(heads * blocks_in * blocks_out,)](
        coefficients=coefficients, **named_strides('coefficient', coefficients, 'head state chunk'),
        initial_coefficients=initial_coefficients,
        **named_strides('initial_coefficient', initial_coefficients, 'head state initial'),
        inputs=inputs, **named_strides('input', inputs, 'head chunk row'),
        deltas=deltas, **named_strides('delta', deltas, 'head chunk row'),
        **numbered('initial', initial_states), **numbered('initial_head', [t.stride(0) for t in initial_states]),
        **numbered('state', states), chunks=chunks, rows=rows, blocks_in=blocks_in, blocks_out=blocks_out,
        dim=dim, width=width, STATES=len(states), DIM=own_in, WIDTH=own_out, ROWS=STATE_ROWS,
        **product_precision(operands), num_warps=4, num_stages=STAGES,
    )  # fmt: skip
    return states


def _backward(
    d_states: list[Tensor],  # k of bh d e
    coefficients: Tensor,  # bh k n
    initial_coefficients: Tensor,  # bh k k
    initial_states: list[Tensor],  # k of bh d e
    inputs: Tensor,  # bh n m d
    deltas: Tensor,  # bh n m e
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    d_states = [d_state.contiguous() for d_state in d_states]
    inputs, deltas = contiguous_inside(inputs, 1), contiguous_inside(deltas, 1)
    heads, chunks, rows, dim = inputs.shape
    width, count = deltas.shape[-1], len(initial_states)

    d_inputs, d_deltas = inputs.new_empty(inputs.shape), deltas.new_empty(deltas.shape)
    d_coefficients = coefficients.new_empty(heads, count, chunks, rows)
    # the shorter rows are on chip whole
    ways = [(inputs, dim, width, d_inputs), (deltas, width, 1, d_deltas)]
    (short, least, short_stride, d_short), (long, most, long_stride, d_long) = ways if dim <= width else ways[::-1]
    padded = tile_size(least)
    block = min(tile_size(most), MOST_COLUMNS, BLOCK // padded, max(32, padded))
    own, warps = rows_per_program(heads, chunks * rows, max(padded, block), in_full=operands == torch.float32)
    blocks = triton.cdiv(chunks * rows, own)
    _rows_kernel[(heads * blocks,)](
        coefficients=coefficients, **named_strides('coefficient', coefficients, 'head state chunk'),
        short=short, **named_strides('short', short, 'head chunk row'),
        long=long, **named_strides('long', long, 'head chunk row'),
        **numbered('d_state', d_states), d_coefficients=d_coefficients, d_short=d_short, d_long=d_long,
        chunks=chunks, rows=rows, blocks=blocks,
        dim=least, width=most, short_stride=short_stride, long_stride=long_stride,
        STATES=count, PADDED=triton.next_power_of_2(count), ROWS=own, DIM=padded, BLOCK=block,
        **product_precision(operands), num_warps=warps, num_stages=STAGES,
    )  # fmt: skip

    initial_states = [contiguous_inside(initial, 2) for initial in initial_states]
    d_initial = [initial.new_empty(initial.shape) for initial in initial_states]
    blocks = triton.cdiv(dim * width, INITIAL_BLOCK)
    d_initial_coefficients = initial_coefficients.new_empty(heads, count, count, blocks)
    _initial_kernel[(heads * blocks,)](
        initial_coefficients=initial_coefficients,
        **named_strides('initial_coefficient', initial_coefficients, 'head state initial'),
        **numbered('initial', initial_states), **numbered('initial_head', [t.stride(0) for t in initial_states]),
        **numbered('d_state', d_states), **numbered('d_initial', d_initial),
        d_initial_coefficients=d_initial_coefficients, blocks=blocks,
        SIZE=dim * width, STATES=count, BLOCK=INITIAL_BLOCK, num_warps=4,
    )  # fmt: skip
    return d_coefficients.sum(dim=-1), d_initial_coefficients.sum(dim=-1), d_initial, d_inputs, d_deltas


final_state = register_kernel('final_state', _forward, _backward, outputs=_outputs)
