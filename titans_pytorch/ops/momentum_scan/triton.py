"""Kernels of momentum and weights over the chunks of a block, with the state on chip.

    S_c = η_c S_{c−1} + s_c · X_cᵀ Δ_c        W_c = κ_c W_{c−1} + S_c

`momentum_scan` is the first one, for matrices: a program owns a block of S, with the shorter side whole. `vector_scan`
is the second, or both, with given updates s_c · u_c: a program owns a strip of features. Both pass over the chunks in
order, and in reverse for gradients, so each chunk's data is read and written once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import EXACT, TRITON_DTYPES, contiguous_inside, multiply_add, named_strides, tile_size


class Block(NamedTuple):
    """A program's block of a matrix: its longer side, and the entries that a thread holds. Blocks are smaller, down to
    the least, if there would be too few programs."""

    longer: int
    entries: int
    least_longer: int = 16  # no side of a product is shorter
    least_entries: int = 8


# in full float32, products take twice the registers
FORWARD, BACKWARD, BACKWARD_IN_FULL = Block(64, 16), Block(64, 32), Block(32, 8)
ENOUGH_PROGRAMS, MOST_WARPS = 128, 8
# most rows of float32 that are multiplied one by one
MOST_SINGLE_ROWS = 16
# features and warps of a strip; within a single warp, sums need no barrier
STRIP, STRIP_WARPS = 256, 1
# chunks that are loaded ahead, because loads of later chunks do not depend on the state
STAGES, BACKWARD_STAGES, STRIP_STAGES = 3, 3, 5
# entries of a gradient that a program sums
SUM_BLOCK = 512


@triton.jit
def _momentum_kernel(  # type: ignore[no-untyped-def]
    inputs, deltas, scales, log_gates, start, momenta, end,
    chunks, blocks_out, blocks,
    input_head, input_chunk, input_row, delta_head, delta_chunk, delta_row,
    scale_head, scale_chunk, gate_head, gate_chunk, start_head,
    dim: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TENSOR_CORES: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks).to(tl.int64)
    own_in = (block // blocks_out) * DIM + tl.arange(0, DIM)
    own_out = (block % blocks_out) * WIDTH + tl.arange(0, WIDTH)
    offset = own_in[:, None] * width + own_out[None, :]
    inside = (own_in < dim)[:, None] & (own_out < width)[None, :]
    inputs += head * input_head
    deltas += head * delta_head
    momenta += head * chunks * dim * width

    state = tl.zeros((DIM, WIDTH), tl.float32)
    if start is not None:
        state = tl.load(start + head * start_head + offset, mask=inside, other=0.0).to(tl.float32)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        from_inputs = inputs + chunk * input_chunk
        from_deltas = deltas + chunk * delta_chunk
        if TENSOR_CORES:
            row = tl.arange(0, ROWS)[:, None]
            from_inputs += row * input_row + own_in[None, :]
            from_deltas += row * delta_row + own_out[None, :]
            x = tl.load(from_inputs, mask=(row < rows) & (own_in < dim)[None, :], other=0.0)
            delta = tl.load(from_deltas, mask=(row < rows) & (own_out < width)[None, :], other=0.0)
            update = multiply_add(tl.zeros((DIM, WIDTH), tl.float32), tl.trans(x), delta, PRECISION, OPERAND)
        else:
            update = tl.zeros((DIM, WIDTH), tl.float32)
            for row in tl.static_range(rows):
                x = tl.load(from_inputs + row * input_row + own_in, mask=own_in < dim, other=0.0).to(tl.float32)
                delta = tl.load(from_deltas + row * delta_row + own_out, mask=own_out < width, other=0.0)
                update += x[:, None] * delta.to(tl.float32)[None, :]
        if scales is not None:
            update *= tl.load(scales + head * scale_head + chunk * scale_chunk)
        if log_gates is not None:
            update += tl.exp(tl.load(log_gates + head * gate_head + chunk * gate_chunk)) * state
        state = update
        tl.store(momenta + chunk * (dim * width) + offset, state, mask=inside)
    tl.store(end + head * dim * width + offset, state, mask=inside)


@triton.jit
def _momentum_backward_kernel(  # type: ignore[no-untyped-def]
    d_momenta, d_end, inputs, deltas, scales, log_gates, start, momenta, d_inputs, d_deltas,
    d_scales, d_log_gates, d_start,
    heads, chunks, rows, blocks_out, blocks,
    input_head, input_chunk, input_row, delta_head, delta_chunk, delta_row,
    scale_head, scale_chunk, gate_head, gate_chunk, start_head,
    dim: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of a chunk's momentum is H_c = d_momenta_c + η_{c+1} H_{c+1}."""
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks).to(tl.int64)
    block_in, block_out = block // blocks_out, block % blocks_out
    own_in = block_in * DIM + tl.arange(0, DIM)
    own_out = block_out * WIDTH + tl.arange(0, WIDTH)
    offset = own_in[:, None] * width + own_out[None, :]
    inside = (own_in < dim)[:, None] & (own_out < width)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    row_in = (row < rows) & (own_in < dim)[None, :]
    row_out = (row < rows) & (own_out < width)[None, :]
    inputs += head * input_head + row * input_row + own_in[None, :]
    deltas += head * delta_head + row * delta_row + own_out[None, :]
    momenta += head * chunks * dim * width
    # this block's part of sums over the other side
    d_inputs += (block_out * heads + head) * chunks * rows * dim + row * dim + own_in[None, :]
    d_deltas += (block_in * heads + head) * chunks * rows * width + row * width + own_out[None, :]
    partial = head * chunks * blocks + block

    h = tl.zeros((DIM, WIDTH), tl.float32)
    if d_end is not None:
        h = tl.load(d_end + head * dim * width + offset, mask=inside, other=0.0).to(tl.float32)
    for back in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - back
        chunk_offset = chunk * (dim * width)
        # h belongs to the next chunk, whose gate leads to this one; the end's gradient has passed through no gate
        later = back > 0
        if log_gates is not None:
            state = tl.load(momenta + chunk_offset + offset, mask=inside & later, other=0.0).to(tl.float32)
            h *= tl.exp(tl.load(log_gates + head * gate_head + (chunk + 1) * gate_chunk, mask=later, other=0.0))
            of_gate = tl.sum(tl.sum(h * state, axis=1), axis=0)
            tl.store(d_log_gates + partial + (chunk + 1) * blocks, of_gate, mask=later)
        else:
            h = tl.where(later, 0.0, h)
        if d_momenta is not None:
            from_momenta = d_momenta + head * chunks * dim * width + chunk_offset + offset
            h += tl.load(from_momenta, mask=inside, other=0.0).to(tl.float32)

        # u = s · Xᵀ Δ: X has the gradient s · Δ Hᵀ, Δ has s · X H, and s has Σ X ∘ Δ Hᵀ
        x = tl.load(inputs + chunk * input_chunk, mask=row_in, other=0.0)
        delta = tl.load(deltas + chunk * delta_chunk, mask=row_out, other=0.0)
        # round before transposing, so that one copy in shared memory serves both layouts
        low = h.to(OPERAND)
        d_x = multiply_add(tl.zeros((ROWS, DIM), tl.float32), delta, tl.trans(low), PRECISION, OPERAND)
        d_delta = multiply_add(tl.zeros((ROWS, WIDTH), tl.float32), x, low, PRECISION, OPERAND)
        if scales is not None:
            of_scale = tl.sum(tl.sum(d_x * x.to(tl.float32), axis=1), axis=0)
            tl.store(d_scales + partial + chunk * blocks, of_scale)
            scale = tl.load(scales + head * scale_head + chunk * scale_chunk)
            d_x *= scale
            d_delta *= scale
        tl.store(d_inputs + chunk * (rows * dim), d_x, mask=row_in)
        tl.store(d_deltas + chunk * (rows * width), d_delta, mask=row_out)

    if log_gates is not None:
        h *= tl.exp(tl.load(log_gates + head * gate_head))
        of_first_gate = 0.0
        if start is not None:
            before = tl.load(start + head * start_head + offset, mask=inside, other=0.0).to(tl.float32)
            of_first_gate = tl.sum(tl.sum(h * before, axis=1), axis=0)
            tl.store(d_start + head * dim * width + offset, h, mask=inside)
        tl.store(d_log_gates + partial, of_first_gate)


@triton.jit
def _sum_kernel(parts, sums, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(PARTS):
        total += tl.load(parts + entry, mask=entry < count, other=0.0)
        parts += count  # because an offset from the first part may exceed 32 bits
    tl.store(sums + entry, total, mask=entry < count)


@triton.jit
def _vector_kernel(  # type: ignore[no-untyped-def]
    updates, scales, log_gates, log_retention, momentum_start, weight_start, before, momenta, weight_end, momentum_end,
    chunks, features, strips,
    update_head, update_chunk, scale_head, scale_chunk, gate_head, gate_chunk, retention_head, retention_chunk,
    momentum_head, weight_head, before_head,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // strips).to(tl.int64)
    feature = (program % strips) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    updates += head * update_head + feature
    before += head * before_head + feature
    if log_gates is not None:
        momenta += head * chunks * features + feature

    weight = tl.load(weight_start + head * weight_head + feature, mask=inside, other=0.0).to(tl.float32)
    momentum = tl.zeros((BLOCK,), tl.float32)
    if momentum_start is not None:
        momentum = tl.load(momentum_start + head * momentum_head + feature, mask=inside, other=0.0).to(tl.float32)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        update = tl.load(updates + chunk * update_chunk, mask=inside, other=0.0).to(tl.float32)
        if scales is not None:
            update *= tl.load(scales + head * scale_head + chunk * scale_chunk)
        tl.store(before + chunk * features, weight, mask=inside)
        if log_gates is not None:
            tl.store(momenta + chunk * features, momentum, mask=inside)
            momentum = tl.exp(tl.load(log_gates + head * gate_head + chunk * gate_chunk)) * momentum + update
            update = momentum
        weight = tl.exp(tl.load(log_retention + head * retention_head + chunk * retention_chunk)) * weight + update
    tl.store(weight_end + head * features + feature, weight, mask=inside)
    if log_gates is not None:
        tl.store(momentum_end + head * features + feature, momentum, mask=inside)


@triton.jit
def _vector_backward_kernel(  # type: ignore[no-untyped-def]
    d_before, d_weight_end, d_momentum_end, updates, scales, log_gates, log_retention, before, momenta,
    d_updates, d_scales, d_log_gates, d_log_retention, d_momentum_start, d_weight_start,
    chunks, features, strips,
    update_head, update_chunk, scale_head, scale_chunk, gate_head, gate_chunk, retention_head, retention_chunk,
    before_head, d_before_head, d_before_chunk,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of the weights before a chunk is G_c = d_before_{c+1} + κ_{c+1} G_{c+1}, and that of its momentum
    H_c = G_c + η_{c+1} H_{c+1}."""
    program = tl.program_id(0)
    strip = program % strips
    head = (program // strips).to(tl.int64)
    feature = strip * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    offset = head * chunks * features + feature
    partial = head * chunks * strips + strip

    g = tl.zeros((BLOCK,), tl.float32)
    if d_weight_end is not None:
        g = tl.load(d_weight_end + head * features + feature, mask=inside, other=0.0).to(tl.float32)
    h = tl.zeros((BLOCK,), tl.float32)
    if d_momentum_end is not None:
        h = tl.load(d_momentum_end + head * features + feature, mask=inside, other=0.0).to(tl.float32)
    for back in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - back
        from_before = before + head * before_head + chunk * features + feature
        weight = tl.load(from_before, mask=inside, other=0.0).to(tl.float32)
        d_update = g
        if log_gates is not None:
            h += g
            d_update = h
            momentum = tl.load(momenta + offset + chunk * features, mask=inside, other=0.0)
            h *= tl.exp(tl.load(log_gates + head * gate_head + chunk * gate_chunk))
            tl.store(d_log_gates + partial + chunk * strips, tl.sum(h * momentum, axis=0))
        if scales is not None:
            from_update = updates + head * update_head + chunk * update_chunk + feature
            update = tl.load(from_update, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_scales + partial + chunk * strips, tl.sum(d_update * update, axis=0))
            d_update *= tl.load(scales + head * scale_head + chunk * scale_chunk)
        tl.store(d_updates + offset + chunk * features, d_update, mask=inside)
        g *= tl.exp(tl.load(log_retention + head * retention_head + chunk * retention_chunk))
        tl.store(d_log_retention + partial + chunk * strips, tl.sum(g * weight, axis=0))
        if d_before is not None:
            from_d_before = d_before + head * d_before_head + chunk * d_before_chunk + feature
            g += tl.load(from_d_before, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_weight_start + head * features + feature, g, mask=inside)
    if d_momentum_start is not None:
        tl.store(d_momentum_start + head * features + feature, h, mask=inside)


def _momentum_outputs(
    inputs: Tensor, deltas: Tensor, scales: Any, log_gates: Any, start: Any, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    heads, chunks, _, dim = inputs.shape
    width = deltas.shape[-1]
    momenta = inputs.new_empty(heads, chunks, dim, width, dtype=out_dtype)
    return momenta, inputs.new_empty(heads, dim, width, dtype=torch.float32)


def _momentum_forward(
    inputs: Tensor,  # bh n m d
    deltas: Tensor,  # bh n m e
    scales: Tensor | None,  # bh n
    log_gates: Tensor | None,  # bh n
    start: Tensor | None,  # bh d e
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # bh n d e, and bh d e
    """The momentum after each chunk, and the last one in float32."""
    momenta, end = _momentum_outputs(inputs, deltas, scales, log_gates, start, out_dtype)
    write_momentum(momenta, end, inputs, deltas, scales, log_gates, start)
    return momenta, end


def write_momentum(
    momenta: Tensor,  # bh n d e, contiguous
    end: Tensor,  # bh d e, contiguous
    inputs: Tensor,
    deltas: Tensor,
    scales: Tensor | None,
    log_gates: Tensor | None,
    start: Tensor | None,
) -> None:
    """`_momentum_forward` with given tensors for its results."""
    arguments = _momentum_arguments(inputs, deltas, scales, log_gates, start)
    heads, chunks, rows, dim = inputs.shape
    width = deltas.shape[-1]
    # tensor cores multiply half precision exactly but not float32, where a few rows are multiplied one by one
    operand = inputs.dtype if inputs.dtype == deltas.dtype else torch.float32
    tensor_cores = operand != torch.float32 or rows > MOST_SINGLE_ROWS
    own_in, own_out, warps = _sizes(heads, dim, width, FORWARD)
    blocks_in, blocks_out = triton.cdiv(dim, own_in), triton.cdiv(width, own_out)
    _momentum_kernel[(heads * blocks_in * blocks_out,)](
        **arguments, momenta=momenta, end=end,
        chunks=chunks, rows=rows, blocks_out=blocks_out, blocks=blocks_in * blocks_out,
        DIM=own_in, WIDTH=own_out, STAGES=STAGES, num_warps=warps,
        TENSOR_CORES=tensor_cores, PRECISION=EXACT.value, OPERAND=TRITON_DTYPES[operand],
    )  # fmt: skip


def _momentum_backward(
    d_momenta: Tensor | None,  # bh n d e
    d_end: Tensor | None,  # bh d e
    momenta: Tensor,  # bh n d e
    inputs: Tensor,  # bh n m d
    deltas: Tensor,  # bh n m e
    scales: Tensor | None,  # bh n
    log_gates: Tensor | None,  # bh n
    start: Tensor | None,  # bh d e
    out_dtype: torch.dtype,
) -> list[Tensor | None]:
    return summed_factors(
        momentum_gradients(d_momenta, d_end, momenta, inputs, deltas, scales, log_gates, start), of=(2, 3)
    )


def momentum_gradients(
    d_momenta: Tensor | None,
    d_end: Tensor | None,
    momenta: Tensor,
    inputs: Tensor,
    deltas: Tensor,
    scales: Tensor | None,
    log_gates: Tensor | None,
    start: Tensor | None,
) -> list[Any]:
    """`_momentum_backward`, except that gradients of factors (scales and log_gates) come in parts (bh, n, _)."""
    arguments = _momentum_arguments(inputs, deltas, scales, log_gates, start)
    heads, chunks, rows, dim = inputs.shape
    width = deltas.shape[-1]
    # products are as precise as the least precise of their factors and results
    operand = next((t.dtype for t in (momenta, inputs, deltas) if t.dtype.itemsize == 2), torch.float32)
    block = BACKWARD_IN_FULL if operand == torch.float32 else BACKWARD
    own_in, own_out, warps = _sizes(heads, dim, width, block)
    blocks_in, blocks_out = triton.cdiv(dim, own_in), triton.cdiv(width, own_out)
    blocks = blocks_in * blocks_out

    # sums over the blocks of the other side come in parts
    d_inputs, d_deltas = _parts(inputs, blocks_out), _parts(deltas, blocks_in)
    d_scales, d_log_gates = _partial_sums(scales, blocks), _partial_sums(log_gates, blocks)
    d_start = None
    if start is not None:
        # without log_gates, no chunk depends on the start
        d_start = (start.new_zeros if log_gates is None else start.new_empty)(start.shape)
    _momentum_backward_kernel[(heads * blocks,)](
        **arguments, momenta=momenta.contiguous(),
        d_momenta=None if d_momenta is None else d_momenta.contiguous(),
        d_end=None if d_end is None else d_end.contiguous(),
        d_inputs=d_inputs, d_deltas=d_deltas, d_scales=d_scales, d_log_gates=d_log_gates, d_start=d_start,
        heads=heads, chunks=chunks, rows=rows, blocks_out=blocks_out, blocks=blocks,
        DIM=own_in, WIDTH=own_out, PRECISION=EXACT.value, OPERAND=TRITON_DTYPES[operand],
        STAGES=BACKWARD_STAGES, num_warps=warps,
    )  # fmt: skip
    return [_summed(d_inputs, inputs.dtype), _summed(d_deltas, deltas.dtype), d_scales, d_log_gates, d_start]


momentum_scan = register_kernel(
    'momentum_scan',
    _momentum_forward,
    _momentum_backward,
    outputs=_momentum_outputs,
    saved=(0,),
    materialize_grads=False,
)


def _momentum_arguments(
    inputs: Tensor, deltas: Tensor, scales: Tensor | None, log_gates: Tensor | None, start: Tensor | None
) -> dict[str, Any]:
    inputs, deltas = contiguous_inside(inputs, 1), contiguous_inside(deltas, 1)
    start = None if start is None else contiguous_inside(start, 2)
    return dict(
        inputs=inputs, deltas=deltas, scales=scales, log_gates=log_gates, start=start,
        **named_strides('input', inputs, 'head chunk row'),
        **named_strides('delta', deltas, 'head chunk row'),
        **named_strides('scale', scales, 'head chunk'), **named_strides('gate', log_gates, 'head chunk'),
        **named_strides('start', start, 'head'),
        dim=inputs.shape[-1], width=deltas.shape[-1], ROWS=tile_size(inputs.shape[2]),
    )  # fmt: skip


def _vector_outputs(
    updates: Tensor,
    scales: Any,
    log_gates: Tensor | None,
    log_retention: Any,
    momentum_start: Any,
    weight_start: Any,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, _, features = updates.shape
    return (
        updates.new_empty(updates.shape, dtype=out_dtype),
        updates.new_empty(heads, features, dtype=torch.float32),
        updates.new_empty((0,) if log_gates is None else (heads, features), dtype=torch.float32),
        updates.new_empty((0,) if log_gates is None else updates.shape, dtype=torch.float32),
    )


def _vector_forward(
    updates: Tensor,  # bh n f
    scales: Tensor | None,  # bh n
    log_gates: Tensor | None,  # bh n
    log_retention: Tensor,  # bh n
    momentum_start: Tensor | None,  # bh f
    weight_start: Tensor,  # bh f
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # bh n f, bh f, bh f, bh n f
    """Weights before each chunk, weights and momentum at the end, and, for the gradient, the momentum before each
    chunk; without log_gates, momenta are empty."""
    outputs = _vector_outputs(updates, scales, log_gates, log_retention, momentum_start, weight_start, out_dtype)
    before, weight_end, momentum_end, momenta = outputs
    write_weights(
        before, weight_end, momentum_end, momenta,
        updates, scales, log_gates, log_retention, momentum_start, weight_start,
    )  # fmt: skip
    return outputs


def write_weights(
    before: Tensor,  # bh n f, contiguous but for the first axis
    weight_end: Tensor,  # bh f, contiguous
    momentum_end: Tensor | None,  # bh f, contiguous
    momenta: Tensor | None,  # bh n f, contiguous
    updates: Tensor,
    scales: Tensor | None,
    log_gates: Tensor | None,
    log_retention: Tensor,
    momentum_start: Tensor | None,
    weight_start: Tensor,
) -> None:
    """`_vector_forward` with given tensors for its results."""
    arguments = _vector_arguments(updates, scales, log_gates, log_retention)
    weight_start = contiguous_inside(weight_start, 1)
    momentum_start = None if momentum_start is None else contiguous_inside(momentum_start, 1)
    _vector_kernel[(len(updates) * arguments['strips'],)](
        **arguments, momentum_start=momentum_start, weight_start=weight_start,
        before=before, momenta=momenta, weight_end=weight_end, momentum_end=momentum_end,
        **named_strides('momentum', momentum_start, 'head'), **named_strides('weight', weight_start, 'head'),
        **named_strides('before', before, 'head'),
    )  # fmt: skip


def _vector_backward(
    d_before: Tensor | None,  # bh n f
    d_weight_end: Tensor | None,  # bh f
    d_momentum_end: Tensor | None,  # bh f
    before: Tensor,  # bh n f
    momenta: Tensor,  # bh n f
    updates: Tensor,  # bh n f
    scales: Tensor | None,  # bh n
    log_gates: Tensor | None,  # bh n
    log_retention: Tensor,  # bh n
    momentum_start: Tensor | None,  # bh f
    weight_start: Tensor,  # bh f
    out_dtype: torch.dtype,
) -> list[Tensor | None]:
    factors, starts = (scales, log_gates, log_retention), (momentum_start, weight_start)
    gradients = weight_gradients(d_before, d_weight_end, d_momentum_end, before, momenta, updates, *factors, *starts)
    return summed_factors(gradients, of=(1, 2, 3))


def weight_gradients(
    d_before: Tensor | None,
    d_weight_end: Tensor | None,
    d_momentum_end: Tensor | None,
    before: Tensor,  # contiguous but for the first axis
    momenta: Tensor | None,
    updates: Tensor,  # not read without scales
    scales: Tensor | None,
    log_gates: Tensor | None,
    log_retention: Tensor,
    momentum_start: Tensor | None,
    weight_start: Tensor,
) -> list[Any]:
    """`_vector_backward`, but gradients of factors (scales, log_gates, log_retention) come in parts (bh, n, _)."""
    # the gradient of one block's weights is a slice of the gradient of all blocks' weights
    d_before = None if d_before is None else contiguous_inside(d_before, 1)
    arguments = _vector_arguments(updates, scales, log_gates, log_retention)
    d_scales, d_log_gates, d_log_retention = (
        _partial_sums(factor, arguments['strips']) for factor in (scales, log_gates, log_retention)
    )
    d_updates = updates.new_empty(updates.shape)
    d_weight_start = weight_start.new_empty(weight_start.shape)
    d_momentum_start = None if momentum_start is None else momentum_start.new_empty(momentum_start.shape)
    _vector_backward_kernel[(len(updates) * arguments['strips'],)](
        **arguments, before=before, momenta=None if momenta is None else momenta.contiguous(), d_before=d_before,
        d_weight_end=None if d_weight_end is None else d_weight_end.contiguous(),
        d_momentum_end=None if d_momentum_end is None or log_gates is None else d_momentum_end.contiguous(),
        d_updates=d_updates, d_scales=d_scales, d_log_gates=d_log_gates, d_log_retention=d_log_retention,
        d_momentum_start=d_momentum_start, d_weight_start=d_weight_start,
        **named_strides('before', before, 'head'), **named_strides('d_before', d_before, 'head chunk'),
    )  # fmt: skip
    return [d_updates, d_scales, d_log_gates, d_log_retention, d_momentum_start, d_weight_start]


def summed_factors(gradients: list[Tensor | None], of: tuple[int, ...]) -> list[Tensor | None]:
    """The gradients, with the parts of the factors `of` added up."""
    return [t if t is None or index not in of else t.sum(dim=-1) for index, t in enumerate(gradients)]


vector_scan = register_kernel(
    'vector_scan',
    _vector_forward,
    _vector_backward,
    outputs=_vector_outputs,
    saved=(0, 3),
    not_differentiable=(3,),
    materialize_grads=False,
)


def _vector_arguments(
    updates: Tensor, scales: Tensor | None, log_gates: Tensor | None, log_retention: Tensor
) -> dict[str, Any]:
    updates = contiguous_inside(updates, 1)
    _, chunks, features = updates.shape
    block = min(STRIP, tile_size(features))
    return dict(
        updates=updates, scales=scales, log_gates=log_gates, log_retention=log_retention,
        chunks=chunks, features=features, strips=triton.cdiv(features, block),
        **named_strides('update', updates, 'head chunk'), **named_strides('scale', scales, 'head chunk'),
        **named_strides('gate', log_gates, 'head chunk'), **named_strides('retention', log_retention, 'head chunk'),
        BLOCK=block, STAGES=STRIP_STAGES, num_warps=STRIP_WARPS,
    )  # fmt: skip


def _sizes(heads: int, dim: int, width: int, block: Block) -> tuple[int, int, int]:
    """Rows and columns of a matrix that a program owns, and its number of warps."""
    short, long = sorted((dim, width))
    whole, own = tile_size(short), min(block.longer, tile_size(long))
    while own > block.least_longer and heads * triton.cdiv(long, own) < ENOUGH_PROGRAMS:
        own //= 2
    entries = block.entries if own > block.least_longer else block.least_entries
    warps = min(MOST_WARPS, max(1, whole * own // (32 * entries)))
    return (whole, own, warps) if dim <= width else (own, whole, warps)


def _partial_sums(factor: Tensor | None, blocks: int) -> Tensor | None:
    """Uninitialised parts, one per program, of the gradient of a factor (bh, n)."""
    return None if factor is None else factor.new_empty(*factor.shape, blocks)


def _parts(rows: Tensor, parts: int) -> Tensor:
    """Uninitialised parts of a gradient of `rows`; a single part is the gradient itself."""
    return rows.new_empty(parts, *rows.shape, dtype=rows.dtype if parts == 1 else torch.float32)


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    if len(parts) == 1:
        return parts.squeeze(0)
    sums = parts.new_empty(parts.shape[1:], dtype=dtype)
    _sum_kernel[(triton.cdiv(sums.numel(), SUM_BLOCK),)](
        parts=parts, sums=sums, count=sums.numel(), PARTS=len(parts), BLOCK=SUM_BLOCK, num_warps=4
    )
    return sums
