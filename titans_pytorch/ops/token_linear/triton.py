"""Kernels of a linear layer for one token, in one launch: norm, product and gate.

For few batch entries, a program is a single warp that computes one output of one entry: warps that share nothing never
wait for each other. For more entries, a program computes a tile with tensor cores, and each warp has a share of the
features. The norm is a factor on the result, and every program computes it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._triton import (
    begin,
    cache_lines,
    contiguous_inside,
    let_next_begin,
    norm_eps,
    overlapping,
    prefetch,
    product_precision,
    wait_for_inputs,
)

# most features at a time
BLOCK = 1024
# of a tile: entries, outputs, warps (each has its own features), and features of a warp at a time
ROWS_OF_TILE, OUTPUTS_OF_TILE, WARPS, FEATURES = 16, 16, 4, 32
# most features at a time that a program of a tile reads for the norm
FEATURES_OF_NORM = 128
# registers per thread, so that three programs fit on a multiprocessor
REGISTERS = 168


@triton.jit
def _row_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, gain, out, normed,
    stride_b, eps,
    OUTPUTS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    NORMS: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    begin(START)
    # the program after those of the outputs stores the normalised input
    row, entry = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x += entry * stride_b
    # of a gated output's two rows, the second is for the gate
    to_value = weight + tl.minimum(row, OUTPUTS - 1).to(tl.int64) * DIM
    to_gate = to_value + OUTPUTS * DIM

    feature = tl.arange(0, BLOCK)
    first_value = tl.load(to_value + feature, mask=feature < DIM, other=0.0).to(tl.float32)
    if GATED:
        first_gate = tl.load(to_gate + feature, mask=feature < DIM, other=0.0).to(tl.float32)
    if NORMS:
        first_gain = tl.load(gain + feature, mask=feature < DIM, other=0.0).to(tl.float32)
    wait_for_inputs(START)

    squares = tl.zeros((BLOCK,), tl.float32)
    values = tl.zeros((BLOCK,), tl.float32)
    gates = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, DIM, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        own = tl.load(x + feature, mask=feature < DIM, other=0.0).to(tl.float32)
        if NORMS:
            squares += own * own
            if start == 0:
                own *= first_gain
            else:
                own *= tl.load(gain + feature, mask=feature < DIM, other=0.0).to(tl.float32)
        if start == 0:
            values += own * first_value
        else:
            values += own * tl.load(to_value + feature, mask=feature < DIM, other=0.0).to(tl.float32)
        if GATED:
            if start == 0:
                gates += own * first_gate
            else:
                gates += own * tl.load(to_gate + feature, mask=feature < DIM, other=0.0).to(tl.float32)

    inverse = 1.0
    if NORMS:
        inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / DIM + eps)
    if row < OUTPUTS:
        value = tl.sum(values, axis=0) * inverse
        gate = tl.sum(gates, axis=0) * inverse
        if HAS_BIAS:
            value += tl.load(bias + row).to(tl.float32)
            if GATED:
                gate += tl.load(bias + OUTPUTS + row).to(tl.float32)
        if GATED:
            value *= gate * tl.sigmoid(gate)
        tl.store(out + entry * OUTPUTS + row, value)
    else:
        for start in tl.static_range(0, DIM, BLOCK):
            feature = start + tl.arange(0, BLOCK)
            own = tl.load(x + feature, mask=feature < DIM, other=0.0).to(tl.float32) * inverse
            own *= tl.load(gain + feature, mask=feature < DIM, other=0.0).to(tl.float32)
            tl.store(normed + entry * DIM + feature, own, mask=feature < DIM)


@triton.jit
def _of_entries(x, entry, feature, stride_b, batch, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """These features (1, d) of entries (b, 1)."""
    present = (entry < batch) & (feature < DIM)
    return tl.load(x + entry.to(tl.int64) * stride_b + feature, mask=present, other=0.0).to(tl.float32)


@triton.jit
def _tile_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, gain, out, normed,
    batch, stride_b, eps,
    OUTPUTS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WARPS: tl.constexpr,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr, NORMS: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr,
    LINE: tl.constexpr, LINES: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    let_next_begin(START)
    entry = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    output = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    lines = tl.minimum(LINE * tl.arange(0, LINES), DIM - 1)[None, :]
    lines = weight + tl.minimum(output, OUTPUTS - 1)[:, None] * DIM + lines
    prefetch(lines, START)
    if GATED:
        prefetch(lines + OUTPUTS * DIM, START)
    wait_for_inputs(START)

    column, feature = entry[:, None], tl.arange(0, BLOCK)[None, :]
    if NORMS:  # requested before the products but summed after them, because the sums would hold the products up
        first = _of_entries(x, column, feature, stride_b, batch, DIM)
    here, wanted = (entry < batch)[None, :, None], (output < OUTPUTS)[None, None, :]
    rows = x + entry.to(tl.int64)[None, :, None] * stride_b
    to_values = weight + output[None, None, :] * DIM
    # (warp, …, feature) and (warp, feature, …)
    of_warp = FEATURES * tl.arange(0, WARPS)[:, None, None]
    across, down = of_warp + tl.arange(0, FEATURES)[None, None, :], of_warp + tl.arange(0, FEATURES)[None, :, None]

    values = tl.zeros((WARPS, ROWS, TILE), tl.float32)
    gates = tl.zeros((WARPS, ROWS, TILE), tl.float32)
    for start in range(0, DIM, WARPS * FEATURES):
        own = tl.load(rows + start + across, mask=here & (start + across < DIM), other=0.0)
        if NORMS:
            of_gain = tl.load(gain + start + across, mask=start + across < DIM, other=0.0)
            own = own.to(tl.float32) * of_gain.to(tl.float32)
        own = own.to(OPERAND)
        inside = wanted & (start + down < DIM)
        to_value = tl.load(to_values + start + down, mask=inside, other=0.0)
        values = tl.dot(own, to_value, values, input_precision=PRECISION)
        if GATED:
            to_gate = tl.load(to_values + OUTPUTS * DIM + start + down, mask=inside, other=0.0)
            gates = tl.dot(own, to_gate, gates, input_precision=PRECISION)

    value, gate = tl.sum(values, axis=0), tl.sum(gates, axis=0)
    if NORMS:
        squares = tl.sum(first * first, axis=1, keep_dims=True)
        for block in tl.static_range(BLOCK, DIM, BLOCK):
            own = _of_entries(x, column, block + feature, stride_b, batch, DIM)
            squares += tl.sum(own * own, axis=1, keep_dims=True)
        inverse = 1.0 / tl.sqrt(squares / DIM + eps)
        value *= inverse
        gate *= inverse
    if HAS_BIAS:
        value += tl.load(bias + output, mask=output < OUTPUTS, other=0.0).to(tl.float32)[None, :]
        if GATED:
            gate += tl.load(bias + OUTPUTS + output, mask=output < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    if GATED:
        value *= gate * tl.sigmoid(gate)
    target = out + entry.to(tl.int64)[:, None] * OUTPUTS + output[None, :]
    tl.store(target, value, mask=(entry < batch)[:, None] & (output < OUTPUTS)[None, :])

    if NORMS:
        if tl.program_id(0) * TILE >= OUTPUTS:  # the tile after those of outputs stores the normalised input
            for block in tl.static_range(0, DIM, BLOCK):
                at = block + feature
                own = _of_entries(x, column, at, stride_b, batch, DIM) * inverse
                own *= tl.load(gain + at, mask=at < DIM, other=0.0).to(tl.float32)
                tl.store(normed + column.to(tl.int64) * DIM + at, own, mask=(column < batch) & (at < DIM))


def token_linear(
    x: Tensor,  # b 1 d
    weight: Tensor,  # e d
    bias: Tensor | None,  # e
    norm: tuple[Tensor, float | None] | None,  # d
    gated: bool,
    in_tiles: bool,
) -> tuple[Tensor, Tensor]:  # b 1 e or b 1 e/2, b 1 d
    batch, _, dim = x.shape
    outputs = len(weight) // 2 if gated else len(weight)
    gain, eps = (x, 0.0) if norm is None else norm
    x = contiguous_inside(x, 1)
    out = x.new_empty(batch, 1, outputs)
    normed = x if norm is None else x.new_empty(x.shape)
    if not batch:
        return out, normed

    arguments: dict[str, Any] = {
        'x': x, 'weight': weight.contiguous(), 'bias': x if bias is None else bias.contiguous(),
        'gain': gain.contiguous(), 'out': out, 'normed': normed, 'stride_b': x.stride(0),
        'eps': norm_eps(eps), 'OUTPUTS': outputs, 'DIM': dim,
        'NORMS': norm is not None, 'HAS_BIAS': bias is not None, 'GATED': gated,
    }  # fmt: skip
    with torch.cuda.device_of(x):
        if not in_tiles:
            block = min(BLOCK, triton.next_power_of_2(dim))
            constants = weight, bias, *(() if norm is None else (gain,))
            _row_kernel[(outputs + (norm is not None), batch)](
                **arguments, BLOCK=block, **overlapping(x, *constants), num_warps=1
            )
        else:
            tiles = triton.cdiv(outputs, OUTPUTS_OF_TILE)
            _tile_kernel[(tiles + (norm is not None), triton.cdiv(batch, ROWS_OF_TILE))](
                **arguments, batch=batch, ROWS=ROWS_OF_TILE, TILE=OUTPUTS_OF_TILE, WARPS=WARPS, FEATURES=FEATURES,
                BLOCK=min(FEATURES_OF_NORM, triton.next_power_of_2(dim)),
                **cache_lines(weight, dim),
                **product_precision(x.dtype), **overlapping(x), num_warps=WARPS, maxnreg=REGISTERS,
            )  # fmt: skip
    return out, normed
