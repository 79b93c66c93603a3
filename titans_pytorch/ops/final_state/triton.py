"""What a run of chunks leaves in a matrix and in its momentum, and the way back.

    state_k = Σ_t share[k, t] · X_tᵀ Δ_t + Σ_j end_starts[k, j] · start_j

with share[k, t] = end[k, chunk of t]. Forward, a program owns a block of all states; backward, one kernel owns rows
and another a block of all starts. The plain twins are in `titans_pytorch.ops.inner_gradient`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._triton import TRITON_DTYPES, contiguous_inside, multiply_add, select, tile_size

# of a state, what a forward program owns, and the rows that it reads at a time. With fewer than 64, Triton takes the
# tensor cores' older instructions, which read matrices either way round
STATE_BLOCK, STATE_ROWS = (32, 64), 32
# rows of a backward program; where there would be fewer programs than these, each gets 16
MOST_ROWS = 32
ENOUGH_PROGRAMS = 128
# entries of its rows that eight warps hold; in float32 in full, products take twice the registers
ENTRIES, ENTRIES_IN_FULL = 4096, 2048
# entries and columns of the block of a state's gradient that is on chip at a time
BLOCK, MOST_COLUMNS = 4096, 64
# entries that a program of the starts' gradients owns
STARTS_BLOCK = 1024
STAGES = 2


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    end, end_starts, inputs, errors, start_0, start_1, start_2, start_3, state_0, state_1, state_2, state_3,
    chunks, rows, blocks_in, blocks_out,
    end_head, end_state, end_chunk, mix_head, mix_state, mix_start,
    input_head, input_chunk, input_row, error_head, error_chunk, error_row,
    start_head_0, start_head_1, start_head_2, start_head_3,
    dim: tl.constexpr, width: tl.constexpr, STATES: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program % (blocks_in * blocks_out)
    head = (program // (blocks_in * blocks_out)).to(tl.int64)
    own_in = (block // blocks_out) * DIM + tl.arange(0, DIM)
    own_out = (block % blocks_out) * WIDTH + tl.arange(0, WIDTH)
    place = own_in[:, None] * width + own_out[None, :]
    inside = (own_in < dim)[:, None] & (own_out < width)[None, :]
    inputs += head * input_head
    errors += head * error_head

    for k in tl.static_range(STATES):
        state = tl.zeros((DIM, WIDTH), tl.float32)
        for first_row in range(0, chunks * rows, ROWS):
            index = first_row + tl.arange(0, ROWS)
            chunk, row, there = index // rows, index % rows, index < chunks * rows
            share = tl.load(end + head * end_head + k * end_state + chunk * end_chunk, mask=there, other=0.0)
            # loaded as it stands in the product, rows across
            from_inputs = inputs + (chunk * input_chunk + row * input_row)[None, :] + own_in[:, None]
            x = tl.load(from_inputs, mask=there[None, :] & (own_in < dim)[:, None], other=0.0).to(tl.float32)
            from_errors = errors + (chunk * error_chunk + row * error_row)[:, None] + own_out[None, :]
            delta = tl.load(from_errors, mask=there[:, None] & (own_out < width)[None, :], other=0.0)
            state = multiply_add(state, x * share[None, :], delta, PRECISION, OPERAND)
        for j in tl.static_range(STATES):
            start = select(j, start_0, start_1, start_2, start_3)
            start_head = select(j, start_head_0, start_head_1, start_head_2, start_head_3)
            of_start = tl.load(end_starts + head * mix_head + k * mix_state + j * mix_start)
            state += of_start * tl.load(start + head * start_head + place, mask=inside, other=0.0)
        to_state = select(k, state_0, state_1, state_2, state_3)
        tl.store(to_state + head * dim * width + place, state, mask=inside)


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    end, short, long, d_state_0, d_state_1, d_state_2, d_state_3, d_shares, d_short, d_long,
    chunks, rows, blocks,
    end_head, end_state, end_chunk, short_head, short_chunk, short_row, long_head, long_chunk, long_row,
    dim: tl.constexpr, width: tl.constexpr, short_stride: tl.constexpr, long_stride: tl.constexpr,
    STATES: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Of inputs and errors, the shorter rows (`dim`) are on chip whole, the longer ones (`width`) in blocks; a state's
    gradient G is turned so that it leads from the shorter to the longer."""
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    index = (program % blocks) * ROWS + tl.arange(0, ROWS)
    chunk, row, there = index // rows, index % rows, index < chunks * rows
    feature = tl.arange(0, DIM)
    inside = there[:, None] & (feature < dim)[None, :]
    start = head * chunks * rows
    end += head * end_head

    from_short = short + head * short_head + (chunk * short_chunk + row * short_row)[:, None] + feature[None, :]
    x = tl.load(from_short, mask=inside, other=0.0).to(tl.float32)
    from_long = long + head * long_head + (chunk * long_chunk + row * long_row)[:, None]
    d_long += start * width
    nothing = tl.zeros((ROWS, BLOCK), tl.float32)
    state = tl.arange(0, PADDED)[None, :]
    of_shares = tl.zeros((ROWS, PADDED), tl.float32)

    # state = Σ share · xᵀ y, so that of y is Σ share · x G, and that of the share x G ∘ y
    for first_unit in range(0, width, BLOCK):
        unit = first_unit + tl.arange(0, BLOCK)
        present = there[:, None] & (unit < width)[None, :]
        y = tl.load(from_long + unit[None, :], mask=present, other=0.0).to(tl.float32)
        d_y = tl.zeros((ROWS, BLOCK), tl.float32)
        for k in tl.static_range(STATES):
            d_state = select(k, d_state_0, d_state_1, d_state_2, d_state_3) + head * dim * width
            place = feature[:, None] * short_stride + unit[None, :] * long_stride
            g = tl.load(d_state + place, mask=(feature < dim)[:, None] & (unit < width)[None, :], other=0.0)
            product = multiply_add(nothing, x, g, PRECISION, OPERAND)
            of_shares += tl.where(state == k, tl.sum(product * y, axis=1)[:, None], 0.0)
            d_y += tl.load(end + k * end_state + chunk * end_chunk, mask=there, other=0.0)[:, None] * product
        tl.store(d_long + index[:, None] * width + unit[None, :], d_y, mask=present)
    to_shares = d_shares + start * STATES + state * (chunks * rows) + index[:, None]
    tl.store(to_shares, of_shares, mask=there[:, None] & (state < STATES))

    # and that of x is Σ share · y Gᵀ
    d_x = tl.zeros((ROWS, DIM), tl.float32)
    for first_unit in range(0, width, BLOCK):
        unit = first_unit + tl.arange(0, BLOCK)
        y = tl.load(from_long + unit[None, :], mask=there[:, None] & (unit < width)[None, :], other=0.0).to(tl.float32)
        for k in tl.static_range(STATES):
            d_state = select(k, d_state_0, d_state_1, d_state_2, d_state_3) + head * dim * width
            place = feature[None, :] * short_stride + unit[:, None] * long_stride
            g = tl.load(d_state + place, mask=(feature < dim)[None, :] & (unit < width)[:, None], other=0.0)
            share = tl.load(end + k * end_state + chunk * end_chunk, mask=there, other=0.0)[:, None]
            d_x = multiply_add(d_x, share * y, g, PRECISION, OPERAND)
    tl.store(d_short + start * dim + index[:, None] * dim + feature[None, :], d_x, mask=inside)


@triton.jit
def _starts_kernel(  # type: ignore[no-untyped-def]
    end_starts, d_state_0, d_state_1, d_state_2, d_state_3, start_0, start_1, start_2, start_3,
    d_start_0, d_start_1, d_start_2, d_start_3, d_mix,
    blocks, mix_head, mix_state, mix_start, start_head_0, start_head_1, start_head_2, start_head_3,
    SIZE: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    block = program % blocks
    entry = block * BLOCK + tl.arange(0, BLOCK)
    for j in tl.static_range(STATES):
        from_start = select(j, start_0, start_1, start_2, start_3)
        start_head = select(j, start_head_0, start_head_1, start_head_2, start_head_3)
        start = tl.load(from_start + head * start_head + entry, mask=entry < SIZE, other=0.0)
        d_start = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(STATES):
            d_state = select(k, d_state_0, d_state_1, d_state_2, d_state_3)
            g = tl.load(d_state + head * SIZE + entry, mask=entry < SIZE, other=0.0)
            d_start += g * tl.load(end_starts + head * mix_head + k * mix_state + j * mix_start)
            # this block's part of the sum
            to_mix = d_mix + ((head * STATES + k) * STATES + j) * blocks + block
            tl.store(to_mix, tl.sum(g * start, axis=0))
        to_start = select(j, d_start_0, d_start_1, d_start_2, d_start_3)
        tl.store(to_start + head * SIZE + entry, d_start, mask=entry < SIZE)


def forward(
    end: Tensor,  # bh k n
    end_starts: Tensor,  # bh k k
    starts: list[Tensor],  # k of bh d e
    inputs: Tensor,  # bh n m d
    errors: Tensor,  # bh n m e
    operands: torch.dtype,
    precision: str,
) -> list[Tensor]:  # k of bh d e
    """Each state after the run."""
    inputs, errors = contiguous_inside(inputs, 1), contiguous_inside(errors, 1)
    starts = [contiguous_inside(start, 2) for start in starts]
    heads, chunks, rows, dim = inputs.shape
    width = errors.shape[-1]
    states = [start.new_empty(start.shape) for start in starts]
    own_in, own_out = (min(tile_size(size), most) for size, most in zip((dim, width), STATE_BLOCK))
    blocks_in, blocks_out = triton.cdiv(dim, own_in), triton.cdiv(width, own_out)
    with torch.cuda.device_of(inputs):
        _forward_kernel[(heads * blocks_in * blocks_out,)](
            end, end_starts, inputs, errors, *_four(starts), *_four(states),
            chunks, rows, blocks_in, blocks_out,
            *end.stride(), *end_starts.stride(), *inputs.stride()[:3], *errors.stride()[:3],
            *_four([start.stride(0) for start in starts]),
            dim=dim, width=width, STATES=len(starts), DIM=own_in, WIDTH=own_out,
            ROWS=STATE_ROWS, PRECISION=precision, OPERAND=TRITON_DTYPES[operands], num_warps=4, num_stages=STAGES,
        )  # fmt: skip
    return states


def backward(
    d_states: list[Tensor],  # k of bh d e
    end: Tensor,  # bh k n
    end_starts: Tensor,  # bh k k
    starts: list[Tensor],  # k of bh d e
    inputs: Tensor,  # bh n m d
    errors: Tensor,  # bh n m e
    operands: torch.dtype,
    precision: str,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    """Gradients of `end`, `end_starts`, `starts`, `inputs` and `errors`."""
    d_states = [d_state.contiguous() for d_state in d_states]
    inputs, errors = contiguous_inside(inputs, 1), contiguous_inside(errors, 1)
    heads, chunks, rows, dim = inputs.shape
    width, count = errors.shape[-1], len(starts)

    d_inputs, d_errors = inputs.new_empty(inputs.shape), errors.new_empty(errors.shape)
    d_shares = end.new_empty(heads, count, chunks, rows)
    # the shorter rows are on chip whole
    ways = [(inputs, dim, width, d_inputs), (errors, width, 1, d_errors)]
    (short, least, short_stride, d_short), (long, most, long_stride, d_long) = ways if dim <= width else ways[::-1]
    padded = tile_size(least)
    block = min(tile_size(most), MOST_COLUMNS, BLOCK // padded, max(32, padded))
    in_full = precision == 'tf32x3' and operands == torch.float32
    own, warps = _tile(heads, chunks * rows, max(padded, block), in_full)
    blocks = triton.cdiv(chunks * rows, own)
    with torch.cuda.device_of(inputs):
        _rows_kernel[(heads * blocks,)](
            end, short, long, *_four(d_states), d_shares, d_short, d_long,
            chunks, rows, blocks, *end.stride(), *short.stride()[:3], *long.stride()[:3],
            dim=least, width=most, short_stride=short_stride, long_stride=long_stride,
            STATES=count, PADDED=triton.next_power_of_2(count),
            ROWS=own, DIM=padded, BLOCK=block,
            PRECISION=precision, OPERAND=TRITON_DTYPES[operands], num_warps=warps, num_stages=STAGES,
        )  # fmt: skip

    starts = [contiguous_inside(start, 2) for start in starts]
    d_starts = [start.new_empty(start.shape) for start in starts]
    blocks = triton.cdiv(dim * width, STARTS_BLOCK)
    d_end_starts = end_starts.new_empty(heads, count, count, blocks)
    with torch.cuda.device_of(inputs):
        _starts_kernel[(heads * blocks,)](
            end_starts, *_four(d_states), *_four(starts), *_four(d_starts), d_end_starts,
            blocks, *end_starts.stride(), *_four([start.stride(0) for start in starts]),
            SIZE=dim * width, STATES=count, BLOCK=STARTS_BLOCK, num_warps=4,
        )  # fmt: skip
    return d_shares.sum(dim=-1), d_end_starts.sum(dim=-1), d_starts, d_inputs, d_errors


def _four(few: list[Any]) -> list[Any]:
    """Kernels take four of each; those that there are not stay unread."""
    return few + few[:1] * (4 - len(few))


def _tile(heads: int, rows: int, columns: int, in_full: bool) -> tuple[int, int]:
    """Rows and warps of a program that has so many columns of each on chip; `in_full`: float32 without TF32."""
    entries = ENTRIES_IN_FULL if in_full else ENTRIES
    own = max(16, min(MOST_ROWS, entries // columns))
    own = own if heads * triton.cdiv(rows, own) >= ENOUGH_PROGRAMS else 16
    return own, 4 if 2 * own * columns <= entries else 8
