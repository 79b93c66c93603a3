"""Kernel of a hyper-connection for one token, in one launch: add the last branch's output, read for the next branch.

Each program owns the streams of one batch entry. All tiles are (from stream, to stream or gate, feature). With features
across the threads, each thread holds the whole mix of streams and iterates on it alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._triton import begin, contiguous_inside, divide_by_sums, overlapping, wait_for_inputs

# most features at a time
BLOCK = 512
# four per thread, which loads them at once; with fewer, warps would divide the streams and wait for each other
FEATURES_PER_WARP = 128


@triton.jit
def _streams(  # type: ignore[no-untyped-def]
    x, write, branch_out, feature, stride_s,
    STREAMS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PENDING: tl.constexpr,
):  # fmt: skip
    """These features of all streams (i, 1, d), with the pending branch output added; 0 outside."""
    stream = tl.arange(0, PADDED)[:, None, None]
    rows = tl.load(x + stream * stride_s + feature, mask=(stream < STREAMS) & (feature < DIM), other=0.0)
    rows = rows.to(tl.float32)
    if PENDING:
        share = tl.load(write + stream, mask=stream < STREAMS, other=0.0).to(tl.float32)
        rows += 2.0 * share * tl.load(branch_out + feature, mask=feature < DIM, other=0.0).to(tl.float32)
    return rows


@triton.jit
def _to_logits(to_logits, number, feature, wanted, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """These features of the weights of logits (1, j, d), given the logits' indices (1, j); 0 where not wanted."""
    present = wanted[:, :, None] & (feature < DIM)
    return tl.load(to_logits + number[:, :, None] * DIM + feature, mask=present, other=0.0)


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x, write, branch_out, to_logits, bias, branch_in, residual, next_write,
    stride_b, stride_s, branch_stride_b, root_of_dim, iters,
    STREAMS: tl.constexpr, DIM: tl.constexpr, LOGITS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    EPS: tl.constexpr, PENDING: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    begin(START)
    entry = tl.program_id(0).to(tl.int64)
    x += entry * stride_b
    write += entry * STREAMS
    branch_out += entry * branch_stride_b

    # of a stream's logits, the first is for reading, the last, if present, for writing, and those between for mixing
    i, j, gate = tl.arange(0, PADDED)[:, None], tl.arange(0, PADDED)[None, :], tl.arange(0, 2)[None, :]
    of_mix, of_gate = 1 + j, (STREAMS + 1) * gate
    is_mix, is_gate = (i < STREAMS) & (j < STREAMS), (i < STREAMS) & (of_gate < LOGITS)

    feature = tl.arange(0, BLOCK)[None, None, :]
    first_to_mix = _to_logits(to_logits, of_mix, feature, j < STREAMS, DIM)
    first_to_gates = _to_logits(to_logits, of_gate, feature, of_gate < LOGITS, DIM)
    mix_bias = tl.load(bias + i * LOGITS + of_mix, mask=is_mix, other=0.0)
    gate_bias = tl.load(bias + i * LOGITS + of_gate, mask=is_gate, other=0.0)
    wait_for_inputs(START)

    squares = tl.zeros((PADDED, 1), tl.float32)
    mix = tl.zeros((PADDED, PADDED), tl.float32)
    gates = tl.zeros((PADDED, 2), tl.float32)
    for start in tl.static_range(0, DIM, BLOCK):
        feature = start + tl.arange(0, BLOCK)[None, None, :]
        rows = _streams(x, write, branch_out, feature, stride_s, STREAMS, DIM, PADDED, PENDING)
        to_mix, to_gates = first_to_mix, first_to_gates
        if start > 0:
            to_mix = _to_logits(to_logits, of_mix, feature, j < STREAMS, DIM)
            to_gates = _to_logits(to_logits, of_gate, feature, of_gate < LOGITS, DIM)
        squares += tl.sum(rows * rows, axis=2)
        mix += tl.sum(rows * to_mix, axis=2)
        gates += tl.sum(rows * to_gates, axis=2)

    # normalisation comes last, as a factor on the logits; NaN norms stay NaN
    scale = root_of_dim / tl.maximum(tl.sqrt(squares), EPS, propagate_nan=tl.PropagateNan.ALL)
    mix = mix * scale + mix_bias
    gates = tl.sigmoid(gates * scale + gate_bias)
    read = tl.sum(tl.where(gate == 0, gates, 0.0), axis=1, keep_dims=True)
    tl.store(next_write + entry * STREAMS + i + 0 * gate, gates, mask=is_gate & (gate == 1))

    mix = tl.exp(mix - tl.max(tl.where(is_mix, mix, -float('inf')), axis=0, keep_dims=True))
    mix = tl.where(is_mix, mix, 0.0)
    for _ in range(iters):
        mix, _ = divide_by_sums(mix, 0, EPS)
        mix, _ = divide_by_sums(mix, 1, EPS)

    for start in range(0, DIM, BLOCK):
        feature = start + tl.arange(0, BLOCK)[None, None, :]
        rows = _streams(x, write, branch_out, feature, stride_s, STREAMS, DIM, PADDED, PENDING)
        for_branch, mixed = tl.sum(rows * read[:, :, None], axis=0), tl.sum(rows * mix[:, :, None], axis=0)
        column = start + tl.arange(0, BLOCK)[None, :]
        tl.store(branch_in + entry * DIM + column, for_branch, mask=column < DIM)
        tl.store(residual + (entry * STREAMS + i) * DIM + column, mixed, mask=(i < STREAMS) & (column < DIM))


def token_hyper_connection(
    x: Tensor,  # b s d
    pending: tuple[Tensor, Tensor] | None,  # b s 1, b 1 d
    to_logits: Tensor,  # l d
    bias: Tensor,  # s l
    iters: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # b 1 d, b s d, b s 1
    batch, streams, dim = x.shape
    logits = to_logits.shape[0]
    write, branch_out = (x, x) if pending is None else (pending[0].contiguous(), contiguous_inside(pending[1], 1))
    x, to_logits, bias = contiguous_inside(x, 1), to_logits.contiguous(), bias.contiguous()
    branch_in, residual = x.new_empty(batch, 1, dim), x.new_empty(batch, streams, dim)
    next_write = x.new_empty(batch, streams, logits - streams - 1)

    block = min(BLOCK, triton.next_power_of_2(dim))
    if batch:
        with torch.cuda.device_of(x):
            _kernel[(batch,)](
                x=x, write=write, branch_out=branch_out, to_logits=to_logits, bias=bias,
                branch_in=branch_in, residual=residual, next_write=next_write,
                stride_b=x.stride(0), stride_s=x.stride(1), branch_stride_b=branch_out.stride(0),
                root_of_dim=dim**0.5, iters=iters,
                STREAMS=streams, DIM=dim, LOGITS=logits, PADDED=triton.next_power_of_2(streams), BLOCK=block,
                EPS=eps, PENDING=pending is not None, num_warps=max(1, block // FEATURES_PER_WARP),
                **overlapping(x, to_logits, bias),
            )  # fmt: skip
    return branch_in, residual, next_write
