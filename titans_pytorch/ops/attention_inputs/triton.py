"""Kernels of the inputs of attention: one pass from a projection to heads that are rotated, mixed and preceded by
persistent keys and values, and one pass back. A program owns some rows of one or several heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import contiguous_inside, named_strides, rotary_angles

# entries in a program's tile of queries, keys or values, and most rows in it
ENTRIES, MOST_ROWS = 1024, 16
# a program computes angles once for several heads, as many as leave this number of programs
ENOUGH_PROGRAMS = 512
# entries of persistent keys whose gradients a program sums, and sequences that it reads at once
SUM_BLOCK, SUM_BATCHES = 128, 16


@triton.jit
def _cos_sin(frequencies, positions, first, row, n, half: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cosines and sines of each row's angles; positions are given, or counted from `first`."""
    pair = tl.arange(0, HALF)
    own = tl.load(frequencies + pair, mask=pair < half, other=0.0)
    position = first + row
    if positions is not None:
        position = tl.load(positions + row, mask=(row >= 0) & (row < n), other=0)
    angles = rotary_angles(position[:, None], own[None, :])
    return tl.cos(angles), tl.sin(angles)


@triton.jit
def _rotated(rows, cos, sin, ROWS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    real, imaginary = tl.split(tl.reshape(rows, (ROWS, HALF, 2)))
    rotated = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
    return tl.reshape(rotated, (ROWS, 2 * HALF))


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    projected, frequencies, positions, residual, shares, persistent, queries, keys, values,
    heads, heads_of_program, n, num_persistent, first,
    projected_batch, projected_row, positions_batch,
    residual_batch, residual_head, residual_row, share_batch, share_head, share_row,
    half: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dim: tl.constexpr = 2 * half
    blocks = tl.cdiv(num_persistent + n, ROWS)
    batch, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    # persistent keys and values have the rows before 0
    row = (block * ROWS + tl.arange(0, ROWS) - num_persistent).to(tl.int64)
    row_of, feature = row[:, None], tl.arange(0, 2 * HALF)[None, :]
    exists = (row_of < n) & (feature < dim)
    inside = exists & (row_of >= 0)
    is_persistent = exists & (row_of < 0)
    if positions is not None:
        positions += batch * positions_batch
    cos, sin = _cos_sin(frequencies, positions, first, row, n, half, HALF)

    first_head = tl.program_id(1).to(tl.int64) * heads_of_program
    for head in range(first_head, tl.minimum(heads, first_head + heads_of_program)):
        own = projected + batch * projected_batch + row_of * projected_row + head * dim + feature
        query = tl.load(own, mask=inside, other=0.0).to(tl.float32)
        key = tl.load(own + heads * dim, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(own + 2 * heads * dim, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            from_share = shares + batch * share_batch + head * share_head + row_of * share_row
            from_residual = residual + batch * residual_batch + head * residual_head + row_of * residual_row + feature
            share = tl.load(from_share, mask=(row_of >= 0) & (row_of < n), other=0.0).to(tl.float32)
            value += share * (tl.load(from_residual, mask=inside, other=0.0).to(tl.float32) - value)
        key = _rotated(key, cos, sin, ROWS, HALF)
        if persistent is not None:
            from_persistent = persistent + (head * num_persistent + num_persistent + row_of) * dim + feature
            key = tl.where(is_persistent, tl.load(from_persistent, mask=is_persistent, other=0.0).to(tl.float32), key)
            from_persistent += heads * num_persistent * dim
            value = tl.where(
                is_persistent, tl.load(from_persistent, mask=is_persistent, other=0.0).to(tl.float32), value
            )
        own_head = batch * heads + head
        to_queries = queries + (own_head * n + row_of) * dim + feature
        tl.store(to_queries, _rotated(query, cos, sin, ROWS, HALF), mask=inside)
        offset = (own_head * (num_persistent + n) + num_persistent + row_of) * dim + feature
        tl.store(keys + offset, key, mask=exists)
        tl.store(values + offset, value, mask=exists)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_queries, d_keys, d_values, projected, frequencies, positions, residual, shares,
    d_projected, d_residual, d_share,
    heads, heads_of_program, n, num_persistent, first,
    projected_batch, projected_row, positions_batch,
    residual_batch, residual_head, residual_row, share_batch, share_head, share_row,
    queries_batch, queries_head, queries_row, keys_batch, keys_head, keys_row, values_batch, values_head, values_row,
    half: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dim: tl.constexpr = 2 * half
    blocks = tl.cdiv(n, ROWS)
    batch, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_of, feature = row[:, None], tl.arange(0, 2 * HALF)[None, :]
    inside = (row_of < n) & (feature < dim)
    if positions is not None:
        positions += batch * positions_batch
    cos, sin = _cos_sin(frequencies, positions, first, row, n, half, HALF)

    first_head = tl.program_id(1).to(tl.int64) * heads_of_program
    for head in range(first_head, tl.minimum(heads, first_head + heads_of_program)):
        from_queries = d_queries + batch * queries_batch + head * queries_head + row_of * queries_row + feature
        from_keys = d_keys + batch * keys_batch + head * keys_head + (num_persistent + row_of) * keys_row + feature
        from_values = d_values + batch * values_batch + head * values_head
        from_values += (num_persistent + row_of) * values_row + feature
        d_query = tl.load(from_queries, mask=inside, other=0.0).to(tl.float32)
        d_key = tl.load(from_keys, mask=inside, other=0.0).to(tl.float32)
        d_value = tl.load(from_values, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            own = projected + batch * projected_batch + row_of * projected_row + (2 * heads + head) * dim + feature
            from_share = shares + batch * share_batch + head * share_head + row_of * share_row
            from_residual = residual + batch * residual_batch + head * residual_head + row_of * residual_row + feature
            share = tl.load(from_share, mask=row_of < n, other=0.0).to(tl.float32)
            difference = tl.load(from_residual, mask=inside, other=0.0).to(tl.float32)
            difference -= tl.load(own, mask=inside, other=0.0).to(tl.float32)
            first_row = (batch * heads + head) * n
            tl.store(d_share + first_row + row, tl.sum(d_value * difference, axis=1), mask=row < n)
            of_residual = share * d_value
            tl.store(d_residual + (first_row + row_of) * dim + feature, of_residual, mask=inside)
            d_value -= of_residual
        to_own = d_projected + ((batch * n + row_of) * 3 * heads + head) * dim + feature
        # the inverse of a rotation is a rotation the other way
        tl.store(to_own, _rotated(d_query, cos, -sin, ROWS, HALF), mask=inside)
        tl.store(to_own + heads * dim, _rotated(d_key, cos, -sin, ROWS, HALF), mask=inside)
        tl.store(to_own + 2 * heads * dim, d_value, mask=inside)


@triton.jit
def _persistent_kernel(  # type: ignore[no-untyped-def]
    d_keys, d_values, d_persistent,
    heads, batch, entries,
    keys_batch, keys_head, keys_row, values_batch, values_head, values_row,
    dim: tl.constexpr, BLOCK: tl.constexpr, BATCHES: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of a head's persistent keys and values over sequences."""
    head, entry = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, feature = (entry // dim)[None, :], (entry % dim)[None, :]
    of_keys, of_values = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, batch, BATCHES):
        own = (first + tl.arange(0, BATCHES)).to(tl.int64)[:, None]
        inside = (own < batch) & (entry < entries)[None, :]
        from_keys = d_keys + own * keys_batch + head * keys_head + row * keys_row + feature
        from_values = d_values + own * values_batch + head * values_head + row * values_row + feature
        of_keys += tl.sum(tl.load(from_keys, mask=inside, other=0.0).to(tl.float32), axis=0)
        of_values += tl.sum(tl.load(from_values, mask=inside, other=0.0).to(tl.float32), axis=0)
    out = d_persistent + head * entries + entry
    tl.store(out, of_keys, mask=entry < entries)
    tl.store(out + heads * entries, of_values, mask=entry < entries)


class _Given(NamedTuple):
    """The arguments of `_forward`."""

    projected: Tensor
    frequencies: Tensor
    positions: Tensor | None
    residual: Tensor | None
    shares: Tensor | None
    persistent: Tensor | None
    heads: int
    first: int

    @property
    def num_persistent(self) -> int:
        return 0 if self.persistent is None else self.persistent.shape[2]

    def of_both_kernels(self) -> dict[str, Any]:
        """Arguments that both kernels take."""
        projected = contiguous_inside(self.projected, 1)
        residual = None if self.residual is None else contiguous_inside(self.residual, 1)
        positions = None if self.positions is None else contiguous_inside(self.positions, 1)
        half = len(self.frequencies)
        padded = triton.next_power_of_2(half)
        rows = max(1, min(MOST_ROWS, ENTRIES // (2 * padded)))
        blocks = triton.cdiv(self.num_persistent + projected.shape[1], rows) * len(projected)
        group = max(1, min(self.heads, blocks * self.heads // ENOUGH_PROGRAMS))
        return dict(
            projected=projected, frequencies=self.frequencies.contiguous(), positions=positions,
            residual=residual, shares=self.shares, heads=self.heads, heads_of_program=group,
            n=projected.shape[1], num_persistent=self.num_persistent, first=self.first,
            **named_strides('projected', projected, 'batch row'), **named_strides('positions', positions, 'batch'),
            **named_strides('residual', residual, 'batch head row'),
            **named_strides('share', self.shares, 'batch head row'),
            half=half, HALF=padded, ROWS=rows, num_warps=4,
        )  # fmt: skip


def _outputs(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = _Given(*arguments)
    batch, n, features = given.projected.shape
    dim, visible = features // (3 * given.heads), given.num_persistent + n
    shapes = (n, dim), (visible, dim), (visible, dim)
    queries, keys, values = (given.projected.new_empty(batch, given.heads, *shape) for shape in shapes)
    return queries, keys, values


def _grid(rows: int, batch: int, arguments: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(rows, arguments['ROWS']) * batch, triton.cdiv(arguments['heads'], arguments['heads_of_program'])


def _forward(
    projected: Tensor,  # b n (3 h d)
    frequencies: Tensor,  # d / 2
    positions: Tensor | None,  # b n
    residual: Tensor | None,  # b h n d
    shares: Tensor | None,  # b h n 1
    persistent: Tensor | None,  # 2 h p d
    heads: int,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:  # b h n d, b h (p + n) d, b h (p + n) d
    given = _Given(projected, frequencies, positions, residual, shares, persistent, heads, first)
    queries, keys, values = _outputs(*given)
    arguments = given.of_both_kernels()
    _forward_kernel[_grid(keys.shape[2], len(projected), arguments)](
        **arguments, persistent=None if persistent is None else persistent.contiguous(),
        queries=queries, keys=keys, values=values,
    )  # fmt: skip
    return queries, keys, values


def _backward(d_queries: Tensor, d_keys: Tensor, d_values: Tensor, *arguments_of_forward: Any) -> list[Tensor | None]:
    given = _Given(*arguments_of_forward)
    projected, frequencies, positions, residual, shares, persistent, heads, _ = given
    arguments = given.of_both_kernels()
    d_queries, d_keys, d_values = (contiguous_inside(d, 1) for d in (d_queries, d_keys, d_values))
    strides = named_strides('keys', d_keys, 'batch head row') | named_strides('values', d_values, 'batch head row')
    d_projected = projected.new_empty(projected.shape)
    d_residual, d_share = (None if t is None else t.new_empty(t.shape) for t in (residual, shares))
    _backward_kernel[_grid(projected.shape[1], len(projected), arguments)](
        **arguments, d_queries=d_queries, d_keys=d_keys, d_values=d_values,
        d_projected=d_projected, d_residual=d_residual, d_share=d_share,
        **named_strides('queries', d_queries, 'batch head row'), **strides,
    )  # fmt: skip
    d_persistent = None
    if persistent is not None:
        d_persistent = persistent.new_empty(persistent.shape)
        entries = d_persistent[0, 0].numel()
        _persistent_kernel[(heads, triton.cdiv(entries, SUM_BLOCK))](
            d_keys=d_keys, d_values=d_values, d_persistent=d_persistent,
            heads=heads, batch=len(projected), entries=entries, dim=persistent.shape[3], **strides,
            BLOCK=SUM_BLOCK, BATCHES=SUM_BATCHES, num_warps=4,
        )  # fmt: skip
    # gradients of frequencies and positions are never used
    d_positions = None if positions is None else positions.new_empty(positions.shape)
    d_frequencies = frequencies.new_empty(frequencies.shape)
    return [d_projected, d_frequencies, d_positions, d_residual, d_share, d_persistent]


attention_inputs = register_kernel('attention_inputs', _forward, _backward, outputs=_outputs)
