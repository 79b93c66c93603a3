"""Momentum and weights of a run, chunk after chunk, with a state on chip.

    S_c = η_c S_{c−1} + s_c · X_cᵀ Δ_c        W_c = κ_c W_{c−1} + S_c

`momenta` is the first for matrices: a program owns a block of S, the shorter side whole. `over_time` is the second, or
both, where the updates s_c · u_c are given: a program owns a strip of features. Both walk the chunks in order, and back
for gradients, so that what belongs to a chunk is read and written once. The plain twins are in
`titans_pytorch.ops.momentum_scan`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._triton import TRITON_DTYPES, contiguous_inside, multiply_add, tile_size

# what a program owns of a matrix's longer side, at most and at least, and the entries of it that a thread holds; the
# least where there would be fewer programs than these. Sides of products are 16 or more; in float32 in full, products
# take twice the registers
FORWARD, BACKWARD, BACKWARD_IN_FULL = (64, 16, 16), (64, 16, 16), (32, 16, 8)
ENOUGH_PROGRAMS, MOST_WARPS = 128, 8
# features of a strip, and its warps
STRIP, STRIP_WARPS = 512, 2
# chunks that are on their way: what the next ones bring does not wait for the state
STAGES, BACKWARD_STAGES, STRIP_STAGES = 3, 3, 3
# entries of a gradient that a program adds up
SUM_BLOCK = 512


@triton.jit
def _momenta_kernel(  # type: ignore[no-untyped-def]
    inputs, errors, scales, gates, start, every, end,
    chunks, blocks_out, blocks,
    input_head, input_chunk, input_row, error_head, error_chunk, error_row,
    scale_head, scale_chunk, gate_head, gate_chunk, start_head,
    dim: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TENSOR_CORES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks).to(tl.int64)
    own_in = (block // blocks_out) * DIM + tl.arange(0, DIM)
    own_out = (block % blocks_out) * WIDTH + tl.arange(0, WIDTH)
    place = own_in[:, None] * width + own_out[None, :]
    inside = (own_in < dim)[:, None] & (own_out < width)[None, :]
    inputs += head * input_head
    errors += head * error_head
    every += head * chunks * dim * width

    state = tl.zeros((DIM, WIDTH), tl.float32)
    if start is not None:
        state = tl.load(start + head * start_head + place, mask=inside, other=0.0).to(tl.float32)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        from_inputs = inputs + chunk * input_chunk
        from_errors = errors + chunk * error_chunk
        if TENSOR_CORES:
            row = tl.arange(0, ROWS)[:, None]
            from_inputs += row * input_row + own_in[None, :]
            from_errors += row * error_row + own_out[None, :]
            x = tl.load(from_inputs, mask=(row < rows) & (own_in < dim)[None, :], other=0.0)
            delta = tl.load(from_errors, mask=(row < rows) & (own_out < width)[None, :], other=0.0)
            update = tl.dot(tl.trans(x), delta)
        else:
            update = tl.zeros((DIM, WIDTH), tl.float32)
            for row in tl.static_range(rows):
                x = tl.load(from_inputs + row * input_row + own_in, mask=own_in < dim, other=0.0).to(tl.float32)
                delta = tl.load(from_errors + row * error_row + own_out, mask=own_out < width, other=0.0)
                update += x[:, None] * delta.to(tl.float32)[None, :]
        if scales is not None:
            update *= tl.load(scales + head * scale_head + chunk * scale_chunk)
        if gates is not None:
            update += tl.load(gates + head * gate_head + chunk * gate_chunk) * state
        state = update
        tl.store(every + chunk * (dim * width) + place, state, mask=inside)
    tl.store(end + head * dim * width + place, state, mask=inside)


@triton.jit
def _momenta_backward_kernel(  # type: ignore[no-untyped-def]
    d_every, d_end, inputs, errors, scales, gates, start, every, d_inputs, d_errors, d_scales, d_gates, d_start,
    heads, chunks, rows, blocks_out, blocks,
    input_head, input_chunk, input_row, error_head, error_chunk, error_row,
    scale_head, scale_chunk, gate_head, gate_chunk, start_head,
    dim: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """H, the gradient of a chunk's momentum, goes back: H_c = d_every_c + η_{c+1} H_{c+1}."""
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks).to(tl.int64)
    block_in, block_out = block // blocks_out, block % blocks_out
    own_in = block_in * DIM + tl.arange(0, DIM)
    own_out = block_out * WIDTH + tl.arange(0, WIDTH)
    place = own_in[:, None] * width + own_out[None, :]
    inside = (own_in < dim)[:, None] & (own_out < width)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    row_in = (row < rows) & (own_in < dim)[None, :]
    row_out = (row < rows) & (own_out < width)[None, :]
    inputs += head * input_head + row * input_row + own_in[None, :]
    errors += head * error_head + row * error_row + own_out[None, :]
    every += head * chunks * dim * width
    # this block's parts of sums over the other side
    d_inputs += (block_out * heads + head) * chunks * rows * dim + row * dim + own_in[None, :]
    d_errors += (block_in * heads + head) * chunks * rows * width + row * width + own_out[None, :]
    share = head * chunks * blocks + block

    h = tl.zeros((DIM, WIDTH), tl.float32)
    if d_end is not None:
        h = tl.load(d_end + head * dim * width + place, mask=inside, other=0.0).to(tl.float32)
    for back in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - back
        at = chunk * (dim * width)
        # what came so far is of the next chunk: its gate leads to this one. The gradient of the end has passed none
        later = back > 0
        if gates is not None:
            state = tl.load(every + at + place, mask=inside & later, other=0.0).to(tl.float32)
            tl.store(d_gates + share + (chunk + 1) * blocks, tl.sum(tl.sum(h * state, axis=1), axis=0), mask=later)
            h *= tl.load(gates + head * gate_head + (chunk + 1) * gate_chunk, mask=later, other=1.0)
        else:
            h = tl.where(later, 0.0, h)
        if d_every is not None:
            h += tl.load(d_every + head * chunks * dim * width + at + place, mask=inside, other=0.0).to(tl.float32)

        # u = s · Xᵀ Δ, so that of X is s · Δ Hᵀ, of Δ it is s · X H, and of s it is Σ X ∘ Δ Hᵀ
        x = tl.load(inputs + chunk * input_chunk, mask=row_in, other=0.0)
        delta = tl.load(errors + chunk * error_chunk, mask=row_out, other=0.0)
        # rounded before it is turned, so that one copy in shared memory serves both ways round
        low = h.to(OPERAND)
        d_x = multiply_add(tl.zeros((ROWS, DIM), tl.float32), delta, tl.trans(low), PRECISION, OPERAND)
        d_delta = multiply_add(tl.zeros((ROWS, WIDTH), tl.float32), x, low, PRECISION, OPERAND)
        if scales is not None:
            of_scale = tl.sum(tl.sum(d_x * x.to(tl.float32), axis=1), axis=0)
            tl.store(d_scales + share + chunk * blocks, of_scale)
            scale = tl.load(scales + head * scale_head + chunk * scale_chunk)
            d_x *= scale
            d_delta *= scale
        tl.store(d_inputs + chunk * (rows * dim), d_x, mask=row_in)
        tl.store(d_errors + chunk * (rows * width), d_delta, mask=row_out)

    if gates is not None:
        gate = tl.load(gates + head * gate_head)
        of_gate = 0.0
        if start is not None:
            before = tl.load(start + head * start_head + place, mask=inside, other=0.0).to(tl.float32)
            of_gate = tl.sum(tl.sum(h * before, axis=1), axis=0)
            tl.store(d_start + head * dim * width + place, gate * h, mask=inside)
        tl.store(d_gates + share, of_gate)


@triton.jit
def _sum_kernel(parts, sums, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * count + entry, mask=entry < count, other=0.0)
    tl.store(sums + entry, total, mask=entry < count)


@triton.jit
def _over_time_kernel(  # type: ignore[no-untyped-def]
    updates, scales, gates, keep, momentum_start, weight_start, before, momenta, weight_end, momentum_end,
    chunks, features, strips,
    update_head, update_chunk, scale_head, scale_chunk, gate_head, gate_chunk, keep_head, keep_chunk,
    momentum_head, weight_head,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // strips).to(tl.int64)
    feature = (program % strips) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    updates += head * update_head + feature
    place = head * chunks * features + feature

    weight = tl.load(weight_start + head * weight_head + feature, mask=inside, other=0.0).to(tl.float32)
    momentum = tl.zeros((BLOCK,), tl.float32)
    if momentum_start is not None:
        momentum = tl.load(momentum_start + head * momentum_head + feature, mask=inside, other=0.0).to(tl.float32)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        update = tl.load(updates + chunk * update_chunk, mask=inside, other=0.0).to(tl.float32)
        if scales is not None:
            update *= tl.load(scales + head * scale_head + chunk * scale_chunk)
        tl.store(before + place + chunk * features, weight, mask=inside)
        if gates is not None:
            tl.store(momenta + place + chunk * features, momentum, mask=inside)
            momentum = tl.load(gates + head * gate_head + chunk * gate_chunk) * momentum + update
            update = momentum
        weight = tl.load(keep + head * keep_head + chunk * keep_chunk) * weight + update
    tl.store(weight_end + head * features + feature, weight, mask=inside)
    if gates is not None:
        tl.store(momentum_end + head * features + feature, momentum, mask=inside)


@triton.jit
def _over_time_backward_kernel(  # type: ignore[no-untyped-def]
    d_before, d_weight_end, d_momentum_end, updates, scales, gates, keep, before, momenta,
    d_updates, d_scales, d_gates, d_keep, d_momentum_start, d_weight_start,
    chunks, features, strips,
    update_head, update_chunk, scale_head, scale_chunk, gate_head, gate_chunk, keep_head, keep_chunk,
    d_before_head, d_before_chunk,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of a chunk's weight the gradient is G_c = d_before_{c+1} + κ_{c+1} G_{c+1}, and of its momentum
    H_c = G_c + η_{c+1} H_{c+1}."""
    program = tl.program_id(0)
    strip = program % strips
    head = (program // strips).to(tl.int64)
    feature = strip * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    place = head * chunks * features + feature
    share = head * chunks * strips + strip

    g = tl.zeros((BLOCK,), tl.float32)
    if d_weight_end is not None:
        g = tl.load(d_weight_end + head * features + feature, mask=inside, other=0.0).to(tl.float32)
    h = tl.zeros((BLOCK,), tl.float32)
    if d_momentum_end is not None:
        h = tl.load(d_momentum_end + head * features + feature, mask=inside, other=0.0).to(tl.float32)
    for back in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - back
        weight = tl.load(before + place + chunk * features, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_keep + share + chunk * strips, tl.sum(g * weight, axis=0))
        d_update = g
        if gates is not None:
            h += g
            d_update = h
            momentum = tl.load(momenta + place + chunk * features, mask=inside, other=0.0)
            tl.store(d_gates + share + chunk * strips, tl.sum(h * momentum, axis=0))
            h *= tl.load(gates + head * gate_head + chunk * gate_chunk)
        if scales is not None:
            from_update = updates + head * update_head + chunk * update_chunk + feature
            update = tl.load(from_update, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_scales + share + chunk * strips, tl.sum(d_update * update, axis=0))
            d_update *= tl.load(scales + head * scale_head + chunk * scale_chunk)
        tl.store(d_updates + place + chunk * features, d_update, mask=inside)
        g *= tl.load(keep + head * keep_head + chunk * keep_chunk)
        if d_before is not None:
            from_before = d_before + head * d_before_head + chunk * d_before_chunk + feature
            g += tl.load(from_before, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_weight_start + head * features + feature, g, mask=inside)
    if d_momentum_start is not None:
        tl.store(d_momentum_start + head * features + feature, h, mask=inside)


def momenta(
    inputs: Tensor,  # bh n m d
    errors: Tensor,  # bh n m e
    scales: Tensor | None,  # bh n
    gates: Tensor | None,  # bh n
    start: Tensor | None,  # bh d e
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # bh n d e, and bh d e
    """The momentum after each chunk, and the last once more, in float32."""
    inputs, errors, start = contiguous_inside(inputs, 1), contiguous_inside(errors, 1), _whole(start)
    heads, chunks, rows, dim = inputs.shape
    width = errors.shape[-1]
    every = inputs.new_empty(heads, chunks, dim, width, dtype=out_dtype)
    end = inputs.new_empty(heads, dim, width, dtype=torch.float32)
    # tensor cores multiply rows in half precision exactly; those in float32 they would not, and rows are few
    in_half = inputs.dtype == errors.dtype != torch.float32
    own_in, own_out, warps = _block(heads, dim, width, FORWARD)
    blocks_in, blocks_out = triton.cdiv(dim, own_in), triton.cdiv(width, own_out)
    with torch.cuda.device_of(inputs):
        _momenta_kernel[(heads * blocks_in * blocks_out,)](
            inputs, errors, scales, gates, start, every, end,
            chunks, blocks_out, blocks_in * blocks_out,
            *inputs.stride()[:3], *errors.stride()[:3], *_strides(scales, 2), *_strides(gates, 2), *_strides(start, 1),
            dim=dim, width=width, rows=rows, DIM=own_in, WIDTH=own_out, ROWS=tile_size(rows),
            TENSOR_CORES=in_half, STAGES=STAGES, num_warps=warps,
        )  # fmt: skip
    return every, end


def momenta_backward(
    d_every: Tensor | None,  # bh n d e
    d_end: Tensor | None,  # bh d e
    inputs: Tensor,  # bh n m d
    errors: Tensor,  # bh n m e
    scales: Tensor | None,  # bh n
    gates: Tensor | None,  # bh n
    start: Tensor | None,  # bh d e
    every: Tensor,  # bh n d e
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `inputs`, `errors`, of `scales` and `gates`, stacked, those that there are, and of `start`."""
    inputs, errors = contiguous_inside(inputs, 1), contiguous_inside(errors, 1)
    start, every = _whole(start), every.contiguous()
    d_every, d_end = _contiguous(d_every), _contiguous(d_end)
    heads, chunks, rows, dim = inputs.shape
    width = errors.shape[-1]
    # products are as precise as the least precise of what they lead to
    operand = next((t.dtype for t in (every, inputs, errors) if t.dtype.itemsize == 2), torch.float32)
    setting = BACKWARD_IN_FULL if operand == torch.float32 else BACKWARD
    own_in, own_out, warps = _block(heads, dim, width, setting)
    blocks_in, blocks_out = triton.cdiv(dim, own_in), triton.cdiv(width, own_out)
    blocks = blocks_in * blocks_out

    parts_in, parts_out = _parts(inputs, blocks_out), _parts(errors, blocks_in)
    shares, (d_scales, d_gates) = _shares(inputs, (scales, gates), blocks)
    # without gates no chunk has anything of the start
    d_start = inputs.new_empty(0, dtype=torch.float32)
    if start is not None:
        d_start = (start.new_zeros if gates is None else start.new_empty)(start.shape)
    with torch.cuda.device_of(inputs):
        _momenta_backward_kernel[(heads * blocks,)](
            d_every, d_end, inputs, errors, scales, gates, start, every,
            parts_in, parts_out, d_scales, d_gates, d_start,
            heads, chunks, rows, blocks_out, blocks,
            *inputs.stride()[:3], *errors.stride()[:3], *_strides(scales, 2), *_strides(gates, 2), *_strides(start, 1),
            dim=dim, width=width, ROWS=tile_size(rows), DIM=own_in, WIDTH=own_out,
            PRECISION=precision, OPERAND=TRITON_DTYPES[operand], STAGES=BACKWARD_STAGES, num_warps=warps,
        )  # fmt: skip
    return _summed(parts_in, inputs.dtype), _summed(parts_out, errors.dtype), shares.sum(dim=-1), d_start


def over_time(
    updates: Tensor,  # bh n f
    scales: Tensor | None,  # bh n
    gates: Tensor | None,  # bh n
    keep: Tensor,  # bh n
    momentum_start: Tensor | None,  # bh f
    weight_start: Tensor,  # bh f
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights before each chunk (bh, n, f), those at the end (bh, f), the momentum at the end, and in float32 that
    before each chunk; without gates there is none."""
    updates, weight_start = contiguous_inside(updates, 1), contiguous_inside(weight_start, 1)
    momentum_start = _whole(momentum_start)
    heads, chunks, features = updates.shape
    before = updates.new_empty(updates.shape, dtype=out_dtype)
    weight_end = updates.new_empty(heads, features, dtype=torch.float32)
    momenta, momentum_end = (
        updates.new_empty((0,) if gates is None else shape, dtype=torch.float32)
        for shape in (updates.shape, weight_end.shape)
    )
    block, strips = _strips(features)
    with torch.cuda.device_of(updates):
        _over_time_kernel[(heads * strips,)](
            updates, scales, gates, keep, momentum_start, weight_start, before, momenta, weight_end, momentum_end,
            chunks, features, strips,
            *updates.stride()[:2], *_strides(scales, 2), *_strides(gates, 2), *keep.stride(),
            *_strides(momentum_start, 1), weight_start.stride(0),
            BLOCK=block, STAGES=STRIP_STAGES, num_warps=STRIP_WARPS,
        )  # fmt: skip
    return before, weight_end, momentum_end, momenta


def over_time_backward(
    d_before: Tensor | None,  # bh n f
    d_weight_end: Tensor | None,  # bh f
    d_momentum_end: Tensor | None,  # bh f
    updates: Tensor,  # bh n f
    scales: Tensor | None,  # bh n
    gates: Tensor | None,  # bh n
    keep: Tensor,  # bh n
    momentum_start: Tensor | None,  # bh f
    before: Tensor,  # bh n f
    momenta: Tensor,  # bh n f
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `updates`, of `scales`, `gates` and `keep`, stacked, those that there are, and of both starts."""
    # the gradient of a run's weights is cut out of that of all runs'
    d_before = None if d_before is None else contiguous_inside(d_before, 1)
    d_weight_end, d_momentum_end = _contiguous(d_weight_end), _contiguous(d_momentum_end)
    updates, before, momenta = contiguous_inside(updates, 1), before.contiguous(), momenta.contiguous()
    heads, chunks, features = updates.shape
    block, strips = _strips(features)
    shares, (d_scales, d_gates, d_keep) = _shares(updates, (scales, gates, keep), strips)
    d_updates = updates.new_empty(updates.shape)
    d_weight_start = updates.new_empty(heads, features, dtype=torch.float32)
    d_momentum_start = None if momentum_start is None else d_weight_start.new_empty(heads, features)
    with torch.cuda.device_of(updates):
        _over_time_backward_kernel[(heads * strips,)](
            d_before, d_weight_end, d_momentum_end, updates, scales, gates, keep, before, momenta,
            d_updates, d_scales, d_gates, d_keep, d_momentum_start, d_weight_start,
            chunks, features, strips,
            *updates.stride()[:2], *_strides(scales, 2), *_strides(gates, 2), *keep.stride(),
            *_strides(d_before, 3)[:2], BLOCK=block, STAGES=STRIP_STAGES, num_warps=STRIP_WARPS,
        )  # fmt: skip
    if d_momentum_start is None:
        d_momentum_start = d_weight_start.new_empty(0)
    return d_updates, shares.sum(dim=-1), d_momentum_start, d_weight_start


def _block(heads: int, dim: int, width: int, setting: tuple[int, int, int]) -> tuple[int, int, int]:
    """Rows and columns of a matrix that a program owns, and its warps."""
    short, long = sorted((dim, width))
    most, least, entries = setting
    whole, own = tile_size(short), min(most, tile_size(long))
    while own > least and heads * triton.cdiv(long, own) < ENOUGH_PROGRAMS:
        own //= 2
    warps = min(MOST_WARPS, max(1, whole * own // (32 * entries)))
    return (whole, own, warps) if dim <= width else (own, whole, warps)


def _strips(features: int) -> tuple[int, int]:
    """Features of a strip, and how many strips."""
    block = min(STRIP, tile_size(features))
    return block, triton.cdiv(features, block)


def _shares(like: Tensor, factors: tuple[Tensor | None, ...], blocks: int) -> tuple[Tensor, list[Tensor | None]]:
    """Room for each program's part of the gradients of factors (bh, n); that of each, where there is one."""
    there = [factor is not None for factor in factors]
    shares = like.new_empty(sum(there), *like.shape[:2], blocks, dtype=torch.float32)
    parts = iter(shares.unbind(0))
    return shares, [next(parts) if own else None for own in there]


def _parts(rows: Tensor, parts: int) -> Tensor:
    """Room for the parts of a gradient of `rows`; a single one is the gradient itself."""
    return rows.new_empty(parts, *rows.shape, dtype=rows.dtype if parts == 1 else torch.float32)


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    if len(parts) == 1:
        return parts.squeeze(0)
    sums = parts.new_empty(parts.shape[1:], dtype=dtype)
    with torch.cuda.device_of(parts):
        _sum_kernel[(triton.cdiv(sums.numel(), SUM_BLOCK),)](
            parts, sums, sums.numel(), PARTS=len(parts), BLOCK=SUM_BLOCK, num_warps=4
        )
    return sums


def _whole(start: Tensor | None) -> Tensor | None:
    # heads may share one
    return start if start is None or start[0].is_contiguous() else start.contiguous()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _strides(t: Tensor | None, axes: int) -> tuple[Any, ...]:
    return (0,) * axes if t is None else t.stride()[:axes]
