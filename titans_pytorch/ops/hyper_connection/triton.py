"""Kernels of a hyper-connection for a sequence: add the last branch's output, read for the next branch; the gradient.

Each program owns some positions, with all their streams. There are two passes over the features: the first for the
products from which gates and mix are computed, or for their gradients, the second for the mixture. Between them comes
the iteration on the mix, with one entry per thread. The passes exchange tables of a few numbers per position through
memory. Forward, one kernel does all of it, and the second pass reads from a cache. Backward, each part has its own
kernel, because the iteration is a long chain of few numbers, which pays only for many positions at once.

Tiles of features are (from stream, to stream or gate, feature), with the features of the program's positions one after
another. Threads and warps then divide this dimension, whatever order Triton gives to the others: each has some features
of all streams, sums over streams are its own, and sums over features come last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import divide_by_sums, divide_by_sums_backward


class Programs(NamedTuple):
    """How positions are distributed over programs."""

    positions: int
    """Positions that a program holds at a time."""
    warps: int
    most: int | None = None
    """Most programs; each goes on to further positions, because it has its own sums for the weights' gradients."""

    def number(self, positions: int) -> int:
        needed = triton.cdiv(positions, self.positions)
        return needed if self.most is None else min(needed, self.most)


# measured with 2,320 and 74,240 positions, of four streams with 384 features
FORWARD = Programs(4, 4)
BACKWARD_PRODUCTS, BACKWARD_GATES, BACKWARD_ROWS = Programs(2, 2), Programs(8, 1, 1056), Programs(2, 1, 352)
# forward, registers per thread, for up to `FEW` streams: five programs fit on a multiprocessor instead of four
FORWARD_REGISTERS = 96
# threads that divide the features of a position, and features that each reads at once; half as many for more than `FEW`
# streams, because all of them must fit in its registers
THREADS, WIDTH, FEW = 32, 4, 4
# steps of the iteration's backward pass whose sums are read together
UNROLLED = 4
# for the kernel that adds up the programs' sums: features and programs at a time, or gates
SUMMED_FEATURES, SUMMED_PROGRAMS, SUMMED_SHARES = 8, 64, 512
# features of a program that folds the weights
FOLDED = 64


@triton.jit
def _fold_kernel(  # type: ignore[no-untyped-def]
    gamma, alpha_fn, beta_fn, to_logits,
    STREAMS: tl.constexpr, DIM: tl.constexpr, LOGITS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gain of the norm times what follows it, one row per logit: to read, to mix, to write."""
    feature, logit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :], tl.arange(0, PADDED)[:, None]
    gain = 1.0 + tl.load(gamma + feature, mask=feature < DIM, other=0.0).to(tl.float32)
    inside = (feature < DIM) & (logit < LOGITS)
    is_write = logit == STREAMS + 1
    from_alpha = alpha_fn + feature * (STREAMS + 1) + logit
    weights = tl.load(from_alpha, mask=inside & (logit < STREAMS + 1), other=0.0).to(tl.float32)
    weights += tl.load(beta_fn + feature + 0 * logit, mask=inside & is_write, other=0.0).to(tl.float32)
    tl.store(to_logits + logit * DIM + feature, gain * weights, mask=inside)


@triton.jit
def _streams(  # type: ignore[no-untyped-def]
    from_rows, from_branch, share, stream, feature,
    STREAMS: tl.constexpr, DIM: tl.constexpr, PENDING: tl.constexpr,
):  # fmt: skip
    """These features of all streams (i, 1, f), with the pending branch output added; 0 outside."""
    rows = tl.load(from_rows + feature, mask=(stream < STREAMS) & (feature < DIM), other=0.0).to(tl.float32)
    if PENDING:
        rows += share * tl.load(from_branch + feature, mask=feature < DIM, other=0.0).to(tl.float32)
    return rows


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    to_logits, feature, j, gate,
    STREAMS: tl.constexpr, DIM: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """The weights of these features for the mix (1, j, f), and for the gates."""
    inside = feature < DIM
    to_mix = tl.load(to_logits + (1 + j) * DIM + feature, mask=inside & (j < STREAMS) & (LOGITS > 1), other=0.0)
    of_gate = (STREAMS + 1) * gate
    return to_mix, tl.load(to_logits + of_gate * DIM + feature, mask=inside & (of_gate < LOGITS), other=0.0)


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    x, FROM: tl.constexpr, TO: tl.constexpr, POSITIONS: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Sums of each thread, (i, j, f) to (i, j, t)."""
    return tl.sum(tl.reshape(x, (FROM, TO, POSITIONS * THREADS, WIDTH)), axis=3)


@triton.jit
def _over_threads(  # type: ignore[no-untyped-def]
    x, FROM: tl.constexpr, TO: tl.constexpr, POSITIONS: tl.constexpr, THREADS: tl.constexpr
):  # fmt: skip
    """Sums over threads, (i, j, t) to (i, j, p)."""
    return tl.sum(tl.reshape(x, (FROM, TO, POSITIONS, THREADS)), axis=3)


@triton.jit
def _over_positions(  # type: ignore[no-untyped-def]
    x, TO: tl.constexpr, POSITIONS: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Sums over positions, (j, f) to (j, feature of a position)."""
    return tl.sum(tl.reshape(x, (TO, POSITIONS, THREADS * WIDTH)), axis=1)


@triton.jit
def _spread(  # type: ignore[no-untyped-def]
    x, FROM: tl.constexpr, TO: tl.constexpr, POSITIONS: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """A number per position, (i, j, p), repeated for each of its features, (i, j, f)."""
    x = tl.broadcast_to(x[:, :, :, None], (FROM, TO, POSITIONS, THREADS * WIDTH))
    return tl.reshape(x, (FROM, TO, POSITIONS * THREADS * WIDTH))


@triton.jit
def _own_features(POSITIONS: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Position and feature of each place f. A thread has `WIDTH` consecutive ones, in any precision."""
    place = tl.arange(0, POSITIONS * THREADS * WIDTH)
    feature = tl.max_contiguous(place % (THREADS * WIDTH), WIDTH)
    return (place // (THREADS * WIDTH))[None, None, :], feature[None, None, :]


@triton.jit
def _own_rows(  # type: ignore[no-untyped-def]
    residual, write, branch_out, first, i, positions, tokens, stride_row, stride_token, branch_row, branch_token,
    STREAMS: tl.constexpr, PADDED: tl.constexpr, PENDING: tl.constexpr,
    POSITIONS: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """For each place of the positions from `first` on: its position, batch entry, token and feature; and where its
    streams and the pending branch output are, with the share of that output in each stream.

    Indices beyond the last are clamped to it: no address is out of bounds.
    """
    own_position, own_feature = _own_features(POSITIONS, THREADS, WIDTH)
    position = tl.minimum(first + own_position, positions - 1)
    entry, token = (position // tokens).to(tl.int64), (position % tokens).to(tl.int64)
    from_rows = residual + (entry * STREAMS + i) * stride_row + token * stride_token
    from_branch = branch_out + entry * branch_row + token * branch_token
    share = 0.0
    if PENDING:
        at = tl.minimum(first + tl.arange(0, POSITIONS)[None, None, :], positions - 1)
        from_write = write + ((at // tokens).to(tl.int64) * STREAMS + i) * tokens + at % tokens
        share = 2.0 * tl.load(from_write, mask=i < STREAMS, other=0.0).to(tl.float32)
        share = _spread(share, PADDED, 1, POSITIONS, THREADS, WIDTH)
    there = first + own_position < positions
    return position, there, entry, token, own_feature, from_rows, from_branch, share


@triton.jit
def _first_mix(saved, i, j, static_alpha, mix_scale, STREAMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The matrix where the iteration begins, (p, i, j), and the products from which the logits are computed."""
    row, column = tl.minimum(i, STREAMS - 1), tl.minimum(j, STREAMS - 1)
    projected = tl.load(saved + 1 + column)
    logits = projected * mix_scale + tl.load(static_alpha + row * (STREAMS + 1) + 1 + column).to(tl.float32)
    mix = tl.exp(logits - tl.max(logits, axis=1, keep_dims=True))
    return tl.where((i < STREAMS) & (j < STREAMS), mix, 0.0), projected


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    residual, write, branch_out, to_logits, static_alpha, read_scale, mix_scale, static_beta, write_scale,
    branch_in, mixed, next_write, saved,
    positions, tokens, stride_row, stride_token, branch_row, branch_token, root_of_dim, iters,
    STREAMS: tl.constexpr, DIM: tl.constexpr, LOGITS: tl.constexpr, PADDED: tl.constexpr, EPS: tl.constexpr,
    PENDING: tl.constexpr, ADDS: tl.constexpr,
    POSITIONS: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # a stream's row in `saved`: products for the logits, the norm's scale, the mix
    ROW: tl.constexpr = LOGITS + 1 + (STREAMS if ADDS else 0)
    first = tl.program_id(0) * POSITIONS

    i, j, gate = (
        tl.arange(0, PADDED)[:, None, None],
        tl.arange(0, PADDED)[None, :, None],
        tl.arange(0, 2)[None, :, None],
    )
    position, there, entry, token, own_feature, from_rows, from_branch, share = _own_rows(
        residual, write, branch_out, first, i, positions, tokens, stride_row, stride_token, branch_row, branch_token,
        STREAMS, PADDED, PENDING, POSITIONS, THREADS, WIDTH,
    )  # fmt: skip

    squares = tl.zeros((PADDED, 1, POSITIONS * THREADS), tl.float32)
    mix = tl.zeros((PADDED, PADDED, POSITIONS * THREADS), tl.float32)
    gates = tl.zeros((PADDED, 2, POSITIONS * THREADS), tl.float32)
    for start in range(0, DIM, THREADS * WIDTH):
        feature = start + own_feature
        rows = _streams(from_rows, from_branch, share, i, feature, STREAMS, DIM, PENDING)
        to_mix, to_gates = _weights(to_logits, feature, j, gate, STREAMS, DIM, LOGITS)
        squares += _products(rows * rows, PADDED, 1, POSITIONS, THREADS, WIDTH)
        gates += _products(rows * to_gates, PADDED, 2, POSITIONS, THREADS, WIDTH)
        if ADDS:
            mix += _products(rows * to_mix, PADDED, PADDED, POSITIONS, THREADS, WIDTH)

    # normalisation comes last, as a factor on the products. A comparison, unlike a maximum, lets NaN through
    of_row, to = tl.arange(0, PADDED)[:, None, None], tl.arange(0, PADDED)[None, :, None]
    of_gate = (STREAMS + 1) * tl.arange(0, 2)[None, :, None]
    own = tl.arange(0, POSITIONS)[None, None, :]
    table = saved + ((first + own).to(tl.int64) * STREAMS + of_row) * ROW
    inside = (of_row < STREAMS) & (first + own < positions)
    norm = tl.sqrt(_over_threads(squares, PADDED, 1, POSITIONS, THREADS))
    scale = root_of_dim / tl.where(norm < EPS, EPS, norm)
    tl.store(table + LOGITS, scale, mask=inside)
    gates = _over_threads(gates, PADDED, 2, POSITIONS, THREADS) * scale
    tl.store(table + of_gate, gates, mask=inside & (of_gate < LOGITS))
    if ADDS:
        mix = _over_threads(mix, PADDED, PADDED, POSITIONS, THREADS) * scale
        tl.store(table + 1 + to, mix, mask=inside & (to < STREAMS))
    tl.debug_barrier()

    if ADDS:
        own, row = tl.arange(0, POSITIONS)[:, None, None], tl.arange(0, PADDED)[None, :, None]
        column = tl.arange(0, PADDED)[None, None, :]
        inside = (row < STREAMS) & (first + own < positions)
        at = tl.minimum(first + own, positions - 1)
        stream = tl.minimum(row, STREAMS - 1)
        table = saved + (at.to(tl.int64) * STREAMS + stream) * ROW

        logit = tl.load(table + STREAMS + 1) * tl.load(write_scale).to(tl.float32)
        logit += tl.load(static_beta + stream).to(tl.float32)
        to_write = next_write + ((at // tokens).to(tl.int64) * STREAMS + stream) * tokens + at % tokens
        tl.store(to_write, tl.sigmoid(logit), mask=inside)

        x, _ = _first_mix(table, row, column, static_alpha, tl.load(mix_scale).to(tl.float32), STREAMS)
        for _ in range(iters):
            x, _ = divide_by_sums(x, 1, EPS)
            x, _ = divide_by_sums(x, 2, EPS)
        tl.store(table + LOGITS + 1 + column, x, mask=inside & (column < STREAMS))
        tl.debug_barrier()

    stream, to = tl.minimum(i, STREAMS - 1), tl.minimum(j, STREAMS - 1)
    at = tl.minimum(first + tl.arange(0, POSITIONS)[None, None, :], positions - 1)
    table = saved + (at.to(tl.int64) * STREAMS + stream) * ROW
    read = tl.load(table) * tl.load(read_scale).to(tl.float32)
    read = tl.sigmoid(read + tl.load(static_alpha + stream * (STREAMS + 1)).to(tl.float32))
    read = _spread(read, PADDED, 1, POSITIONS, THREADS, WIDTH)
    if ADDS:
        mix = _spread(tl.load(table + LOGITS + 1 + to), PADDED, PADDED, POSITIONS, THREADS, WIDTH)
    for start in range(0, DIM, THREADS * WIDTH):
        feature = start + own_feature
        is_feature = there & (feature < DIM)
        rows = _streams(from_rows, from_branch, share, i, feature, STREAMS, DIM, PENDING)
        to_branch = branch_in + position.to(tl.int64) * DIM + feature
        tl.store(to_branch, tl.sum(rows * read, axis=0, keep_dims=True), mask=is_feature)
        if ADDS:
            to_mixed = mixed + ((entry * STREAMS + j) * tokens + token) * DIM + feature
            tl.store(to_mixed, tl.sum(rows * mix, axis=0, keep_dims=True), mask=is_feature & (j < STREAMS))


@triton.jit
def _backward_products_kernel(  # type: ignore[no-untyped-def]
    d_branch_in, d_mixed, residual, write, branch_out, work,
    positions, tokens, stride_row, stride_token, branch_row, branch_token,
    d_in_row, d_in_token, d_mixed_row, d_mixed_token,
    STREAMS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PENDING: tl.constexpr, ADDS: tl.constexpr,
    POSITIONS: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of the gate to read and of the mix: products of streams with gradients of the results.

    A stream's row in `work` begins with these. Then come the gradients of the stream's products with the weights, from
    `OF_PRODUCTS` on, the gate to read, at `READ`, and the gradient along the stream itself.
    """
    WORK: tl.constexpr = 2 * STREAMS + 5
    first = tl.program_id(0) * POSITIONS
    i, j = tl.arange(0, PADDED)[:, None, None], tl.arange(0, PADDED)[None, :, None]
    _, _, entry, token, own_feature, from_rows, from_branch, share = _own_rows(
        residual, write, branch_out, first, i, positions, tokens, stride_row, stride_token, branch_row, branch_token,
        STREAMS, PADDED, PENDING, POSITIONS, THREADS, WIDTH,
    )  # fmt: skip
    from_in = d_branch_in + entry * d_in_row + token * d_in_token
    from_mixed = d_mixed + (entry * STREAMS + j) * d_mixed_row + token * d_mixed_token

    d_read = tl.zeros((PADDED, 1, POSITIONS * THREADS), tl.float32)
    d_mix = tl.zeros((PADDED, PADDED, POSITIONS * THREADS), tl.float32)
    for start in range(0, DIM, THREADS * WIDTH):
        feature = start + own_feature
        rows = _streams(from_rows, from_branch, share, i, feature, STREAMS, DIM, PENDING)
        d_in = tl.load(from_in + feature, mask=feature < DIM, other=0.0).to(tl.float32)
        d_read += _products(rows * d_in, PADDED, 1, POSITIONS, THREADS, WIDTH)
        if ADDS:
            d_out = tl.load(from_mixed + feature, mask=(j < STREAMS) & (feature < DIM), other=0.0).to(tl.float32)
            d_mix += _products(rows * d_out, PADDED, PADDED, POSITIONS, THREADS, WIDTH)

    at = first + tl.arange(0, POSITIONS)[None, None, :]
    table = work + (at.to(tl.int64) * STREAMS + i) * WORK
    inside = (i < STREAMS) & (at < positions)
    tl.store(table, _over_threads(d_read, PADDED, 1, POSITIONS, THREADS), mask=inside)
    if ADDS:
        d_mix = _over_threads(d_mix, PADDED, PADDED, POSITIONS, THREADS)
        tl.store(table + 1 + j, d_mix, mask=inside & (j < STREAMS))


@triton.jit
def _backward_gates_kernel(  # type: ignore[no-untyped-def]
    d_next_write, static_alpha, read_scale, mix_scale, static_beta, write_scale, saved, work, sinkhorn_sums, sums,
    positions, tokens, root_of_dim, iters,
    STREAMS: tl.constexpr, DIM: tl.constexpr, LOGITS: tl.constexpr, PADDED: tl.constexpr, EPS: tl.constexpr,
    ADDS: tl.constexpr, POSITIONS: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """From the gradients of gates and mix, compute those of the streams' products with the weights, in `work`, and the
    program's sums for the gradients of biases and of scales."""
    ROW: tl.constexpr = LOGITS + 1 + (STREAMS if ADDS else 0)
    OF_PRODUCTS: tl.constexpr = STREAMS + 1
    READ: tl.constexpr = OF_PRODUCTS + STREAMS + 2
    WORK: tl.constexpr = READ + 2
    STEP: tl.constexpr = 2 * POSITIONS * PADDED * PADDED
    program = tl.program_id(0)
    sinkhorn_sums += program.to(tl.int64) * iters * STEP
    sums += program * 2 * STREAMS * LOGITS
    by_read, by_mix, by_write = tl.load(read_scale).to(tl.float32), 0.0, 0.0
    if ADDS:
        by_mix, by_write = tl.load(mix_scale).to(tl.float32), tl.load(write_scale).to(tl.float32)
    own, row = tl.arange(0, POSITIONS)[:, None, None], tl.arange(0, PADDED)[None, :, None]
    column = tl.arange(0, PADDED)[None, None, :]
    stream, to = tl.minimum(row, STREAMS - 1), tl.minimum(column, STREAMS - 1)

    # for positions (p, i, j)
    of_read, of_read_scale = tl.zeros((POSITIONS, PADDED, 1), tl.float32), tl.zeros((POSITIONS, PADDED, 1), tl.float32)
    of_write, of_write_scale = of_read, of_read
    of_mix = tl.zeros((POSITIONS, PADDED, PADDED), tl.float32)
    of_mix_scale = of_mix

    for group in range(program, tl.cdiv(positions, POSITIONS), tl.num_programs(0)):
        first = group * POSITIONS
        inside = (row < STREAMS) & (first + own < positions)
        at = tl.minimum(first + own, positions - 1)
        from_saved = saved + (at.to(tl.int64) * STREAMS + stream) * ROW
        table = work + (at.to(tl.int64) * STREAMS + stream) * WORK
        scale = tl.load(from_saved + LOGITS)

        # for a gate g = σ(logit), the logit's gradient is g (1 − g) times the gate's
        projected = tl.load(from_saved)
        read = tl.sigmoid(projected * by_read + tl.load(static_alpha + stream * (STREAMS + 1)).to(tl.float32))
        d_logit = tl.where(inside, tl.load(table) * read * (1.0 - read), 0.0)
        of_read += d_logit
        of_read_scale += d_logit * projected
        along = by_read * d_logit * projected
        tl.store(table + OF_PRODUCTS, by_read * d_logit * scale, mask=inside)
        tl.store(table + READ, read, mask=inside)
        if ADDS:
            projected = tl.load(from_saved + STREAMS + 1)
            gate_to_write = tl.sigmoid(projected * by_write + tl.load(static_beta + stream).to(tl.float32))
            from_write = d_next_write + ((at // tokens).to(tl.int64) * STREAMS + stream) * tokens + at % tokens
            d_logit = tl.load(from_write).to(tl.float32) * gate_to_write * (1.0 - gate_to_write)
            d_logit = tl.where(inside, d_logit, 0.0)
            of_write += d_logit
            of_write_scale += d_logit * projected
            along += by_write * d_logit * projected
            tl.store(table + OF_PRODUCTS + STREAMS + 1, by_write * d_logit * scale, mask=inside)

            # run the iteration again and store its sums; it is then undone by multiplying
            x, projected = _first_mix(from_saved, row, column, static_alpha, by_mix, STREAMS)
            # the hint is wrong for rows, but it tells the compiler the order of the dimensions
            entries = tl.max_contiguous((own * PADDED + row) * PADDED + column, [1, min(2, PADDED), PADDED])
            of_columns, of_rows = sinkhorn_sums + entries, sinkhorn_sums + POSITIONS * PADDED * PADDED + entries
            for step in range(iters):
                x, columns = divide_by_sums(x, 1, EPS)
                x, rows = divide_by_sums(x, 2, EPS)
                # stored once per entry, so that each thread reads only what it wrote
                tl.store(of_columns + step * STEP, tl.broadcast_to(columns, (POSITIONS, PADDED, PADDED)))
                tl.store(of_rows + step * STEP, tl.broadcast_to(rows, (POSITIONS, PADDED, PADDED)))
            tl.debug_barrier()

            d_logit = tl.where(inside & (column < STREAMS), x * tl.load(table + 1 + to), 0.0)
            for back in tl.range(0, iters, loop_unroll_factor=UNROLLED):
                step = iters - 1 - back
                rows = tl.load(of_rows + step * STEP)
                columns = tl.load(of_columns + step * STEP)
                d_logit, x = divide_by_sums_backward(d_logit, x, rows, 2, EPS)
                d_logit, x = divide_by_sums_backward(d_logit, x, columns, 1, EPS)
            of_mix += d_logit
            of_mix_scale += d_logit * projected
            along += by_mix * tl.sum(d_logit * projected, axis=2, keep_dims=True)
            to_table = table + OF_PRODUCTS + 1 + column
            tl.store(to_table, by_mix * d_logit * scale, mask=inside & (column < STREAMS))
        # n = √D x / ‖x‖ has no gradient along x; below `EPS`, n is x times a constant
        along = tl.where(scale * EPS < 0.999 * root_of_dim, along * scale * scale / DIM, 0.0)
        tl.store(table + READ + 1, along, mask=inside)

    row, column = tl.arange(0, PADDED)[:, None], tl.arange(0, PADDED)[None, :]
    to_biases = sums + row * LOGITS
    to_scales = to_biases + STREAMS * LOGITS
    tl.store(to_biases, tl.sum(of_read, axis=0), mask=row < STREAMS)
    tl.store(to_scales, tl.sum(of_read_scale, axis=0), mask=row < STREAMS)
    if ADDS:
        tl.store(to_biases + STREAMS + 1, tl.sum(of_write, axis=0), mask=row < STREAMS)
        tl.store(to_scales + STREAMS + 1, tl.sum(of_write_scale, axis=0), mask=row < STREAMS)
        inside = (row < STREAMS) & (column < STREAMS)
        tl.store(to_biases + 1 + column, tl.sum(of_mix, axis=0), mask=inside)
        tl.store(to_scales + 1 + column, tl.sum(of_mix_scale, axis=0), mask=inside)


@triton.jit
def _backward_rows_kernel(  # type: ignore[no-untyped-def]
    d_branch_in, d_mixed, residual, write, branch_out, to_logits, saved, work,
    d_residual, d_branch_out, of_shares, sums,
    positions, tokens, stride_row, stride_token, branch_row, branch_token,
    d_in_row, d_in_token, d_mixed_row, d_mixed_token,
    STREAMS: tl.constexpr, DIM: tl.constexpr, LOGITS: tl.constexpr, PADDED: tl.constexpr,
    PENDING: tl.constexpr, ADDS: tl.constexpr,
    POSITIONS: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of some features of the streams and of the pending branch output, and the program's sums for the
    gradients of the gates that write this output and of the weights."""
    ROW: tl.constexpr = LOGITS + 1 + (STREAMS if ADDS else 0)
    OF_PRODUCTS: tl.constexpr = STREAMS + 1
    READ: tl.constexpr = OF_PRODUCTS + STREAMS + 2
    WORK: tl.constexpr = READ + 2
    program, start = tl.program_id(0), tl.program_id(1) * THREADS * WIDTH
    i, j, gate = (
        tl.arange(0, PADDED)[:, None, None],
        tl.arange(0, PADDED)[None, :, None],
        tl.arange(0, 2)[None, :, None],
    )
    stream, to, own = tl.minimum(i, STREAMS - 1), tl.minimum(j, STREAMS - 1), tl.arange(0, POSITIONS)[None, None, :]
    of_gate = (STREAMS + 1) * gate
    _, own_feature = _own_features(POSITIONS, THREADS, WIDTH)
    feature = start + own_feature
    to_mix, to_gates = _weights(to_logits, feature, j, gate, STREAMS, DIM, LOGITS)
    of_gates = tl.zeros((2, POSITIONS * THREADS * WIDTH), tl.float32)
    of_mix = tl.zeros((PADDED, POSITIONS * THREADS * WIDTH), tl.float32)

    for group in range(program, tl.cdiv(positions, POSITIONS), tl.num_programs(0)):
        first = group * POSITIONS
        position, there, entry, token, _, from_rows, from_branch, share = _own_rows(
            residual, write, branch_out, first, i, positions, tokens,
            stride_row, stride_token, branch_row, branch_token,
            STREAMS, PADDED, PENDING, POSITIONS, THREADS, WIDTH,
        )  # fmt: skip
        rows = _streams(from_rows, from_branch, share, i, feature, STREAMS, DIM, PENDING)
        from_in = d_branch_in + entry * d_in_row + token * d_in_token
        d_in = tl.load(from_in + feature, mask=feature < DIM, other=0.0).to(tl.float32)

        at = tl.minimum(first + own, positions - 1)
        table = work + (at.to(tl.int64) * STREAMS + stream) * WORK
        read = _spread(tl.load(table + READ), PADDED, 1, POSITIONS, THREADS, WIDTH)
        along = _spread(tl.load(table + READ + 1), PADDED, 1, POSITIONS, THREADS, WIDTH)
        # positions beyond the last must not be counted again
        inside = (first + own < positions) & (i < STREAMS)
        from_gates = tl.load(table + OF_PRODUCTS + of_gate, mask=inside & (of_gate < LOGITS), other=0.0)
        from_gates = _spread(from_gates, PADDED, 2, POSITIONS, THREADS, WIDTH)
        of_gates += tl.sum(from_gates * rows, axis=0)
        d_rows = read * d_in - along * rows + tl.sum(from_gates * to_gates, axis=1, keep_dims=True)
        if ADDS:
            from_mixed = d_mixed + (entry * STREAMS + j) * d_mixed_row + token * d_mixed_token
            d_out = tl.load(from_mixed + feature, mask=(j < STREAMS) & (feature < DIM), other=0.0).to(tl.float32)
            from_mix = tl.load(table + OF_PRODUCTS + 1 + to, mask=inside & (j < STREAMS), other=0.0)
            from_mix = _spread(from_mix, PADDED, PADDED, POSITIONS, THREADS, WIDTH)
            from_saved = saved + (at.to(tl.int64) * STREAMS + stream) * ROW + LOGITS + 1 + to
            mix = _spread(tl.load(from_saved), PADDED, PADDED, POSITIONS, THREADS, WIDTH)
            of_mix += tl.sum(from_mix * rows, axis=0)
            d_rows += tl.sum(mix * d_out + from_mix * to_mix, axis=1, keep_dims=True)

        is_feature = there & (feature < DIM)
        to_rows = d_residual + ((entry * STREAMS + i) * tokens + token) * DIM + feature
        tl.store(to_rows, d_rows, mask=is_feature & (i < STREAMS))
        if PENDING:
            out = tl.load(from_branch + feature, mask=feature < DIM, other=0.0).to(tl.float32)
            to_branch = d_branch_out + position.to(tl.int64) * DIM + feature
            tl.store(to_branch, tl.sum(share * d_rows, axis=0, keep_dims=True), mask=is_feature)
            d_share = _products(2.0 * d_rows * out, PADDED, 1, POSITIONS, THREADS, WIDTH)
            to_share = of_shares + (tl.program_id(1).to(tl.int64) * positions + at) * STREAMS + i
            tl.store(to_share, _over_threads(d_share, PADDED, 1, POSITIONS, THREADS), mask=inside)

    feature, gate, to = start + tl.arange(0, THREADS * WIDTH)[None, :], tl.arange(0, 2)[:, None], tl.arange(0, PADDED)
    to_sums = sums + program.to(tl.int64) * LOGITS * DIM + feature
    of_gates = _over_positions(of_gates, 2, POSITIONS, THREADS, WIDTH)
    logit = (STREAMS + 1) * gate
    tl.store(to_sums + logit * DIM, of_gates, mask=(logit < LOGITS) & (feature < DIM))
    if ADDS:
        of_mix, to = _over_positions(of_mix, PADDED, POSITIONS, THREADS, WIDTH), to[:, None]
        tl.store(to_sums + (1 + to) * DIM, of_mix, mask=(to < STREAMS) & (feature < DIM))


@triton.jit
def _sum_shares(  # type: ignore[no-untyped-def]
    of_shares, d_write, start, positions, tokens, tiles, STREAMS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradients of the gates that write the pending branch output, summed from those of each tile of features."""
    place = start + tl.arange(0, BLOCK)
    inside = place < positions * STREAMS
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(tiles):
        total += tl.load(of_shares + place, mask=inside, other=0.0)
        of_shares += positions * STREAMS
    position, stream = place // STREAMS, place % STREAMS
    to_write = d_write + ((position // tokens).to(tl.int64) * STREAMS + stream) * tokens + position % tokens
    tl.store(to_write, total, mask=inside)


@triton.jit
def _sum_biases(  # type: ignore[no-untyped-def]
    sums, d_static_alpha, d_read_scale, d_mix_scale, d_static_beta, d_write_scale, programs,
    STREAMS: tl.constexpr, LOGITS: tl.constexpr, SMALL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of biases and scales; a scale is shared by all streams."""
    row, place = tl.arange(0, ROWS)[:, None], tl.arange(0, SMALL)
    total = tl.zeros((ROWS, SMALL), tl.float32)
    for first in range(0, programs, ROWS):
        inside = (first + row < programs) & (place < 2 * STREAMS * LOGITS)[None, :]
        total += tl.load(sums + (first + row) * 2 * STREAMS * LOGITS + place[None, :], mask=inside, other=0.0)
    total = tl.sum(total, axis=0)
    is_bias = place < STREAMS * LOGITS
    is_scale = (place >= STREAMS * LOGITS) & (place < 2 * STREAMS * LOGITS)
    stream, logit = (place % (STREAMS * LOGITS)) // LOGITS, place % LOGITS
    is_write = logit == STREAMS + 1
    tl.store(d_static_alpha + stream * (STREAMS + 1) + logit, total, mask=is_bias & (logit < STREAMS + 1))
    tl.store(d_read_scale, tl.sum(tl.where(is_scale & (logit == 0), total, 0.0), axis=0))
    if LOGITS > 1:
        is_mix = is_scale & (logit > 0) & (logit < STREAMS + 1)
        tl.store(d_mix_scale, tl.sum(tl.where(is_mix, total, 0.0), axis=0))
        tl.store(d_static_beta + stream, total, mask=is_bias & is_write)
        tl.store(d_write_scale, tl.sum(tl.where(is_scale & is_write, total, 0.0), axis=0))


@triton.jit
def _sum_features(  # type: ignore[no-untyped-def]
    sums, gamma, alpha_fn, beta_fn, d_gamma, d_alpha_fn, d_beta_fn, start, programs,
    STREAMS: tl.constexpr, DIM: tl.constexpr, LOGITS: tl.constexpr, PADDED: tl.constexpr,
    FEATURES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of the gain and of what follows it, for some features: the products were with gain times weight."""
    row, logit = tl.arange(0, ROWS)[:, None, None], tl.arange(0, PADDED)[None, :, None]
    feature = start + tl.arange(0, FEATURES)[None, None, :]
    inside = (logit < LOGITS) & (feature < DIM)
    total = tl.zeros((ROWS, PADDED, FEATURES), tl.float32)
    for first in range(0, programs, ROWS):
        from_sums = sums + ((first + row).to(tl.int64) * LOGITS + logit) * DIM + feature
        total += tl.load(from_sums, mask=inside & (first + row < programs), other=0.0)
    total = tl.sum(total, axis=0)

    logit, feature = tl.arange(0, PADDED)[:, None], start + tl.arange(0, FEATURES)[None, :]
    inside = (feature < DIM) & (logit < LOGITS)
    of_alpha, of_beta = inside & (logit < STREAMS + 1), inside & (logit == STREAMS + 1)
    to_alpha, to_beta = feature * (STREAMS + 1) + logit, feature + 0 * logit
    gain = 1.0 + tl.load(gamma + feature, mask=feature < DIM, other=0.0).to(tl.float32)
    weight = tl.load(alpha_fn + to_alpha, mask=of_alpha, other=0.0).to(tl.float32)
    weight += tl.load(beta_fn + to_beta, mask=of_beta, other=0.0).to(tl.float32)
    tl.store(d_alpha_fn + to_alpha, gain * total, mask=of_alpha)
    tl.store(d_beta_fn + to_beta, gain * total, mask=of_beta)
    tl.store(d_gamma + feature, tl.sum(weight * total, axis=0, keep_dims=True), mask=feature < DIM)


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    of_biases, of_features, of_shares, gamma, alpha_fn, beta_fn,
    d_gamma, d_static_alpha, d_alpha_fn, d_read_scale, d_mix_scale, d_static_beta, d_beta_fn, d_write_scale, d_write,
    programs_of_biases, programs_of_features, positions, tokens, tiles,
    STREAMS: tl.constexpr, DIM: tl.constexpr, LOGITS: tl.constexpr, PADDED: tl.constexpr, SMALL: tl.constexpr,
    FEATURES: tl.constexpr, ROWS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Add up the sums of all programs, as gradients of the weights and of the gates that write the pending output."""
    OF_FEATURES: tl.constexpr = (DIM + FEATURES - 1) // FEATURES
    program = tl.program_id(0)
    if program == 0:
        _sum_biases(
            of_biases, d_static_alpha, d_read_scale, d_mix_scale, d_static_beta, d_write_scale, programs_of_biases,
            STREAMS, LOGITS, SMALL, ROWS,
        )  # fmt: skip
    elif program <= OF_FEATURES:
        _sum_features(
            of_features, gamma, alpha_fn, beta_fn, d_gamma, d_alpha_fn, d_beta_fn, (program - 1) * FEATURES,
            programs_of_features, STREAMS, DIM, LOGITS, PADDED, FEATURES, ROWS,
        )  # fmt: skip
    else:
        start = (program - 1 - OF_FEATURES) * SHARES
        _sum_shares(of_shares, d_write, start, positions, tokens, tiles, STREAMS, SHARES)


def _outputs(
    x: list[Tensor], weights: list[Tensor], iters: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    streams, dim, adds, batch, tokens = _sizes(x, weights)
    return (
        x[0].new_empty(batch, tokens, dim),
        x[0].new_empty((batch * streams, tokens, dim) if adds else (0,)),
        x[0].new_empty((batch * streams, tokens, 1) if adds else (0,), dtype=torch.float32),
        x[0].new_empty(batch, tokens, streams, 2 * streams + 3 if adds else 2, dtype=torch.float32),
        x[0].new_empty(streams + 2 if adds else 1, dim, dtype=torch.float32),
    )


def _forward(
    x: list[Tensor], weights: list[Tensor], iters: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # b n d, (b s) n d, (b s) n 1, b n s r, l d
    """The results of `titans_pytorch.ops.hyper_connection`. For the gradient, also the folded weights and a table that
    has, for each stream of a position, its products with the weights, the factor √d / ‖x_s‖, and its row of the mix."""
    branch_in, mixed, write, saved, to_logits = _outputs(x, weights, iters, eps)
    streams, dim, adds, batch, tokens = _sizes(x, weights)
    positions = batch * tokens
    if positions:
        _fold(weights, to_logits)
        _forward_kernel[(FORWARD.number(positions),)](
            **_arguments_of_rows(x, weights), **_arguments_of_gates(weights), to_logits=to_logits,
            branch_in=branch_in, mixed=mixed, next_write=write, saved=saved,
            root_of_dim=dim**0.5, iters=iters, EPS=eps, LOGITS=streams + 2 if adds else 1,
            POSITIONS=FORWARD.positions, num_warps=FORWARD.warps,
            maxnreg=FORWARD_REGISTERS if streams <= FEW else None,
        )  # fmt: skip
    return branch_in, mixed, write, saved, to_logits


def _backward(
    d_branch_in: Tensor,  # b n d
    d_mixed: Tensor,  # (b s) n d
    d_write: Tensor,  # (b s) n 1
    saved: Tensor,  # b n s r
    to_logits: Tensor,  # l d
    x: list[Tensor],
    weights: list[Tensor],
    iters: int,
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    streams, dim, adds, batch, tokens = _sizes(x, weights)
    logits = streams + 2 if adds else 1
    d_x, d_weights = [t.new_empty(t.shape) for t in x], [t.new_empty(t.shape) for t in weights]
    if not adds:
        # nothing is mixed, so these have no gradient
        for t in d_weights[1:3] + d_weights[4:]:
            t.zero_()
    d_branch_in, d_mixed = _dense_rows([d_branch_in, d_mixed if adds else d_branch_in])
    positions, padded = batch * tokens, triton.next_power_of_2(streams)
    work = saved.new_empty(positions, streams, 2 * streams + 5)
    of_products, gates, rows = (own.number(positions) for own in (BACKWARD_PRODUCTS, BACKWARD_GATES, BACKWARD_ROWS))
    sinkhorn_sums = saved.new_empty(gates, iters if adds else 0, 2, BACKWARD_GATES.positions, padded, padded)
    of_biases, of_features = saved.new_empty(gates, 2 * streams * logits), saved.new_empty(rows, logits * dim)
    tiles = triton.cdiv(dim, THREADS * _width(streams))
    of_shares = saved.new_empty(tiles, positions * streams if len(x) > 1 else 0)
    d_residual, d_old_write, d_branch_out = d_x if len(d_x) > 1 else d_x * 3
    if positions:
        of_rows = _arguments_of_rows(x, weights)
        gradients = dict(
            d_branch_in=d_branch_in, d_mixed=d_mixed, work=work,
            d_in_row=d_branch_in.stride(0), d_in_token=d_branch_in.stride(1),
            d_mixed_row=d_mixed.stride(0), d_mixed_token=d_mixed.stride(1),
        )  # fmt: skip
        _backward_products_kernel[(of_products,)](
            **of_rows, **gradients, POSITIONS=BACKWARD_PRODUCTS.positions, num_warps=BACKWARD_PRODUCTS.warps
        )
        _backward_gates_kernel[(gates,)](
            **_arguments_of_gates(weights), d_next_write=d_write.contiguous(), saved=saved, work=work,
            sinkhorn_sums=sinkhorn_sums, sums=of_biases, positions=positions, tokens=tokens, root_of_dim=dim**0.5,
            iters=iters, STREAMS=streams, DIM=dim, LOGITS=logits, PADDED=padded, EPS=eps, ADDS=adds,
            POSITIONS=BACKWARD_GATES.positions, UNROLLED=UNROLLED, num_warps=BACKWARD_GATES.warps,
        )  # fmt: skip
        _backward_rows_kernel[(rows, tiles)](
            **of_rows, **gradients, to_logits=to_logits, saved=saved,
            d_residual=d_residual, d_branch_out=d_branch_out, of_shares=of_shares, sums=of_features, LOGITS=logits,
            POSITIONS=BACKWARD_ROWS.positions, num_warps=BACKWARD_ROWS.warps,
        )  # fmt: skip
    names = ('gamma', 'static_alpha', 'alpha_fn', 'read_scale', 'mix_scale', 'static_beta', 'beta_fn', 'write_scale')
    gamma, _, alpha_fn, *_ = weights
    programs = 1 + triton.cdiv(dim, SUMMED_FEATURES) + triton.cdiv(of_shares[:1].numel(), SUMMED_SHARES)
    _sum_kernel[(programs,)](
        of_biases=of_biases, of_features=of_features, of_shares=of_shares,
        gamma=gamma.contiguous(), alpha_fn=alpha_fn.contiguous(), beta_fn=_beta_fn(weights),
        **{f'd_{name}': t for name, t in zip(names, (*d_weights, *d_weights[-3:]))}, d_write=d_old_write,
        programs_of_biases=gates, programs_of_features=rows, positions=positions, tokens=tokens, tiles=tiles,
        STREAMS=streams, DIM=dim, LOGITS=logits, PADDED=triton.next_power_of_2(logits),
        SMALL=triton.next_power_of_2(2 * streams * logits), FEATURES=SUMMED_FEATURES, ROWS=SUMMED_PROGRAMS,
        SHARES=SUMMED_SHARES,
    )  # fmt: skip
    return d_x, d_weights


hyper_connection = register_kernel(
    'hyper_connection', _forward, _backward, outputs=_outputs, saved=(3, 4), not_differentiable=(3, 4)
)


def _sizes(x: list[Tensor], weights: list[Tensor]) -> tuple[int, int, bool, int, int]:
    """Number of streams, features, whether the branch's output is added, batch size, number of tokens."""
    streams, (rows, tokens, dim) = len(weights[1]), x[0].shape
    return streams, dim, len(weights) == 8, rows // streams, tokens


def _arguments_of_rows(x: list[Tensor], weights: list[Tensor]) -> dict[str, Any]:
    """Arguments of all kernels that pass over features."""
    streams, dim, adds, batch, tokens = _sizes(x, weights)
    x = _dense_rows(x)
    residual, write, branch_out = x if len(x) > 1 else x * 3
    return dict(
        residual=residual, write=write, branch_out=branch_out, positions=batch * tokens, tokens=tokens,
        stride_row=residual.stride(0), stride_token=residual.stride(1),
        branch_row=branch_out.stride(0), branch_token=branch_out.stride(1),
        STREAMS=streams, DIM=dim, PADDED=triton.next_power_of_2(streams), PENDING=len(x) > 1, ADDS=adds,
        THREADS=THREADS, WIDTH=_width(streams),
    )  # fmt: skip


def _width(streams: int) -> int:
    return WIDTH if streams <= FEW else WIDTH // 2


def _arguments_of_gates(weights: list[Tensor]) -> dict[str, Any]:
    """Biases and scales of the gates and the mix."""
    _, static_alpha, _, read_scale, mix_scale, *for_writing = weights
    static_beta, _, write_scale = for_writing or (static_alpha,) * 3
    return dict(
        static_alpha=static_alpha.contiguous(), read_scale=read_scale, mix_scale=mix_scale,
        static_beta=static_beta.contiguous(), write_scale=write_scale,
    )  # fmt: skip


def _dense_rows(x: list[Tensor]) -> list[Tensor]:
    """The same tensors, with the features of a row contiguous; gates, one per row, are made fully contiguous."""
    return [t if t.stride(-1) == 1 and t.shape[-1] > 1 else t.contiguous() for t in x]


def _beta_fn(weights: list[Tensor]) -> Tensor:
    return weights[6 if len(weights) > 6 else 0].contiguous()


def _fold(weights: list[Tensor], to_logits: Tensor) -> None:  # l d
    """Write the weights of the logits with 1 + γ multiplied in."""
    gamma, static_alpha, alpha_fn, *_ = weights
    logits, dim = to_logits.shape
    _fold_kernel[(triton.cdiv(dim, FOLDED),)](
        gamma=gamma.contiguous(), alpha_fn=alpha_fn.contiguous(), beta_fn=_beta_fn(weights), to_logits=to_logits,
        STREAMS=len(static_alpha), DIM=dim, LOGITS=logits, PADDED=triton.next_power_of_2(logits), BLOCK=FOLDED,
        num_warps=1,
    )  # fmt: skip
