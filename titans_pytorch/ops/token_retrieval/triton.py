"""Kernel of retrieval for a single token, in one launch.

Each program owns a head of a batch entry, and loops over blocks of its hidden units; in most memories there is only one
block. Nearly all the time is spent waiting for the matrices, so both are requested before anything else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._triton import (
    cache_lines,
    contiguous_inside,
    let_next_begin,
    norm_eps,
    overlapping,
    prefetch,
    wait_for_inputs,
)

# entries of each matrix at a time, held in registers
TILE = 8192
# entries per warp: 64 of each matrix per thread
TILE_PER_WARP = 2048
MOST_WARPS = 16
# features at a time of the gate's input
BLOCK = 512


@triton.jit
def _query(projected, gain, feature, valid, NORMS_QUERY: tl.constexpr):  # type: ignore[no-untyped-def]
    """These features of the query, with the gain of its norm."""
    query = tl.load(projected + feature, mask=valid, other=0.0).to(tl.float32)
    if NORMS_QUERY:
        query *= tl.load(gain + feature, mask=valid, other=0.0).to(tl.float32) + 1.0
    return query


@triton.jit
def _units(  # type: ignore[no-untyped-def]
    projected, query_gain, first, last, start,
    DIM_HEAD: tl.constexpr, HIDDEN: tl.constexpr, HAS_FIRST: tl.constexpr, NORMS_QUERY: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weights that lead to hidden units from `start` on, (d, e), and those that lead on from them, (e, d); 0
    outside.

    With one matrix, the hidden units are the query itself, (e).
    """
    unit, feature = start + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    if HAS_FIRST:
        valid = (feature < DIM_HEAD)[:, None] & (unit < HIDDEN)[None, :]
        to_units = tl.load(first + feature[:, None] * HIDDEN + unit[None, :], mask=valid, other=0.0)
    else:
        to_units = _query(projected, query_gain, unit, unit < HIDDEN, NORMS_QUERY)
    valid = (unit < HIDDEN)[:, None] & (feature < DIM_HEAD)[None, :]
    from_units = tl.load(last + unit[:, None] * DIM_HEAD + feature[None, :], mask=valid, other=0.0)
    return to_units, from_units


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    projected, query_gain, first, last, gain, normed, to_gate, out,
    stride_b, normed_stride_b, query_eps, eps,
    HEADS: tl.constexpr, DIM_HEAD: tl.constexpr, HIDDEN: tl.constexpr, DIM: tl.constexpr,
    HAS_FIRST: tl.constexpr, NORMS_QUERY: tl.constexpr, HAS_NORM: tl.constexpr, HAS_GATE: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr,
    START: tl.constexpr,
):  # fmt: skip
    let_next_begin(START)
    entry, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    memory = entry * HEADS + head
    projected += entry * stride_b + head * DIM_HEAD
    query_gain += head * DIM_HEAD
    first += memory * DIM_HEAD * HIDDEN
    last += memory * HIDDEN * DIM_HEAD
    feature = tl.arange(0, PADDED)
    row, valid = feature[None, :], (feature < DIM_HEAD)[None, :]
    lines = tl.minimum(LINE * tl.arange(0, LINES), DIM_HEAD * HIDDEN - 1)
    prefetch(last + lines, START)
    if HAS_FIRST:
        prefetch(first + lines, START)
    wait_for_inputs(START)

    to_units, from_units = _units(
        projected, query_gain, first, last, 0, DIM_HEAD, HIDDEN, HAS_FIRST, NORMS_QUERY, PADDED, BLOCK
    )
    # to save registers, a compiler would delay the second matrix until the first is used, but not beyond a barrier
    tl.debug_barrier()
    query = _query(projected, query_gain, feature, feature < DIM_HEAD, NORMS_QUERY)
    if NORMS_QUERY:
        raw = tl.load(projected + feature, mask=feature < DIM_HEAD, other=0.0).to(tl.float32)
    if HAS_NORM:
        of_norm = tl.load(gain + memory * DIM_HEAD + row, mask=valid, other=0.0) + 1.0
    if HAS_GATE:
        terms = tl.zeros((DIM_BLOCK,), tl.float32)
        for start in range(0, DIM, DIM_BLOCK):
            i = start + tl.arange(0, DIM_BLOCK)
            x = tl.load(normed + entry * normed_stride_b + i, mask=i < DIM, other=0.0).to(tl.float32)
            terms += x * tl.load(to_gate + head * DIM + i, mask=i < DIM, other=0.0).to(tl.float32)

    scale = 1.0
    if NORMS_QUERY:
        scale = tl.rsqrt(tl.sum(raw * raw) / DIM_HEAD + query_eps)
        query *= scale

    y = tl.zeros((1, PADDED), tl.float32)
    for start in range(0, HIDDEN, BLOCK):
        if HAS_FIRST:
            units = tl.sum(query[:, None] * to_units, axis=0)
            units *= 0.5 * (1.0 + tl.erf(units * 0.7071067811865476))
        else:
            units = to_units * scale
        y += tl.sum(units[:, None] * from_units, axis=0, keep_dims=True)
        to_units, from_units = _units(
            projected, query_gain, first, last, start + BLOCK,
            DIM_HEAD, HIDDEN, HAS_FIRST, NORMS_QUERY, PADDED, BLOCK,
        )  # fmt: skip

    if HAS_NORM:
        centred = tl.where(valid, y - tl.sum(y, axis=1, keep_dims=True) / DIM_HEAD, 0.0)
        variance = tl.sum(centred * centred, axis=1, keep_dims=True) / DIM_HEAD
        y = centred * tl.rsqrt(variance + eps) * of_norm + query[None, :]
    if HAS_GATE:
        y *= tl.sigmoid(tl.sum(terms))
    tl.store(out + memory * DIM_HEAD + row, y, mask=valid)


def token_retrieval(
    projected: Tensor,  # b 1 hd
    matrices: list[Tensor],  # bh d e, bh e d; or one, bh d d
    query_norm: tuple[Tensor, float | None] | None,  # h 1 d
    norm: tuple[Tensor, float | None] | None,  # bh d
    gate: tuple[Tensor, Tensor] | None,  # b 1 x, h x
    heads: int,
) -> Tensor:  # b 1 hd
    """The memories' answers, in float32."""
    first, last = matrices[0], matrices[-1]
    hidden, dim_head = last.shape[-2:]
    query_gain, query_eps = (projected, 0.0) if query_norm is None else query_norm
    gain, eps = (projected, 0.0) if norm is None else norm
    normed, to_gate = (projected, projected) if gate is None else gate
    batch, dim = projected.shape[0], 1 if gate is None else normed.shape[-1]
    out = projected.new_empty(batch, 1, heads * dim_head, dtype=torch.float32)
    if not batch:
        return out

    padded = triton.next_power_of_2(dim_head)
    block = max(1, min(triton.next_power_of_2(hidden), TILE // padded))
    projected, normed = contiguous_inside(projected, 1), contiguous_inside(normed, 1)
    with torch.cuda.device_of(projected):
        _kernel[(batch, heads)](
            projected=projected, stride_b=projected.stride(0), normed=normed, normed_stride_b=normed.stride(0),
            query_gain=query_gain.contiguous(), first=first, last=last, gain=gain.contiguous(),
            to_gate=to_gate.contiguous(), out=out,
            query_eps=norm_eps(query_eps), eps=eps,
            HEADS=heads, DIM_HEAD=dim_head, HIDDEN=hidden, DIM=dim, HAS_FIRST=len(matrices) > 1,
            NORMS_QUERY=query_norm is not None, HAS_NORM=norm is not None, HAS_GATE=gate is not None,
            PADDED=padded, BLOCK=block, DIM_BLOCK=min(BLOCK, triton.next_power_of_2(dim)),
            **cache_lines(last, dim_head * hidden),
            num_warps=max(1, min(MOST_WARPS, padded * block // TILE_PER_WARP)), **overlapping(projected),
        )  # fmt: skip
    return out
