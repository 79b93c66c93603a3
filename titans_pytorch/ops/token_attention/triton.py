"""Kernel of the attention of a single position, in one launch.

Each program owns a head of a batch entry and attends with a running softmax over blocks of slots. It takes the
position's own keys and values from where they were computed, not from the buffers, so that nothing in a launch waits
for its writes: it can have the other positions' buffer contents and the angles ready before its inputs are there. Loads
come before the first sum over threads, for which they would otherwise wait, and no load depends on which slots are
seen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._triton import begin, contiguous_inside, overlapping, rotary_angles, wait_for_inputs

# entries of keys, and of values, at a time
TILE = 4096
WARPS = 4
# input features of the shares at a time
BLOCK = 512
# below every score; −∞ minus −∞ would not be a number
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _rotated(x, feature, valid, cos, sin):  # type: ignore[no-untyped-def]
    """Rotate features; two neighbouring ones are the parts of a complex number."""
    own = tl.load(x + feature, mask=valid, other=0.0).to(tl.float32)
    other = tl.load(x + (feature ^ 1), mask=valid, other=0.0).to(tl.float32)
    return own * cos + tl.where(feature % 2 == 0, -other, other) * sin


@triton.jit
def _slots(keys, values, slot, feature, valid, SLOTS: tl.constexpr, DIM_HEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys and values of these slots."""
    inside = (slot < SLOTS) & valid
    k = tl.load(keys + slot * DIM_HEAD + feature, mask=inside, other=0.0)
    return k, tl.load(values + slot * DIM_HEAD + feature, mask=inside, other=0.0)


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    projected, keys, values, out, position, frequencies, inputs, to_share, bias, first_values,
    stride_b, stride_r, input_stride_b, first_stride_b, first_stride_h, scale,
    HEADS: tl.constexpr, DIM_HEAD: tl.constexpr, SLOTS: tl.constexpr, PERSISTENT: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, SLIDES: tl.constexpr, MIXES: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    begin(START)
    entry, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    feature = tl.arange(0, PADDED)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    valid = feature < DIM_HEAD
    projected += entry * stride_b + head * DIM_HEAD
    keys += (entry * HEADS + head) * SLOTS * DIM_HEAD
    values += (entry * HEADS + head) * SLOTS * DIM_HEAD

    number = tl.load(position)
    # one angle per pair of features
    angle = rotary_angles(number, tl.load(frequencies + feature // 2, mask=valid, other=0.0))
    cos, sin = tl.cos(angle), tl.sin(angle)
    slot = tl.arange(0, BLOCK)[:, None]
    next_keys, next_values = _slots(keys, values, slot, feature, valid, SLOTS, DIM_HEAD)
    if MIXES:
        i = tl.arange(0, DIM_BLOCK)[None, :]
        logit = tl.load(bias + head).to(tl.float32)
        first_to_share = tl.load(to_share + head * DIM + i, mask=i < DIM, other=0.0).to(tl.float32)
    wait_for_inputs(START)

    query = _rotated(projected, feature, valid, cos, sin) * scale
    key = _rotated(projected + HEADS * DIM_HEAD + row * stride_r, feature, valid, cos, sin)
    value = tl.load(projected + 2 * HEADS * DIM_HEAD + row * stride_r + feature, mask=valid, other=0.0).to(tl.float32)
    if MIXES:
        from_first = first_values + entry * first_stride_b + head * first_stride_h + feature
        first_value = tl.load(from_first, mask=valid, other=0.0).to(tl.float32)
        inputs += entry * input_stride_b
        terms = tl.load(inputs + i, mask=i < DIM, other=0.0).to(tl.float32) * first_to_share
        for start in range(DIM_BLOCK, DIM, DIM_BLOCK):
            i = start + tl.arange(0, DIM_BLOCK)[None, :]
            x = tl.load(inputs + i, mask=i < DIM, other=0.0).to(tl.float32)
            terms += x * tl.load(to_share + head * DIM + i, mask=i < DIM, other=0.0).to(tl.float32)

    # slots from `first` on are the position's own; slots after `last` are not seen
    offset = number % ((SLOTS - PERSISTENT) // ROWS)
    first = PERSISTENT + offset * ROWS
    last = PERSISTENT + (number if SLIDES else offset) * ROWS + ROWS - 1

    top = tl.full((1, 1), LOWEST, tl.float32)
    total = tl.zeros((1, 1), tl.float32)
    seen = tl.zeros((1, PADDED), tl.float32)
    for start in range(0, SLOTS, BLOCK):
        slot = start + tl.arange(0, BLOCK)[:, None]
        k, v = next_keys.to(tl.float32), next_values.to(tl.float32)
        next_keys, next_values = _slots(keys, values, slot + BLOCK, feature, valid, SLOTS, DIM_HEAD)
        visible = (slot < SLOTS) & (slot <= last) & ((slot < first) | (slot >= first + ROWS))
        scores = tl.where(visible, tl.sum(k * query, axis=1, keep_dims=True), -float('inf'))
        new_top = tl.maximum(top, tl.max(scores, axis=0, keep_dims=True))
        weights, shrink = tl.exp(scores - new_top), tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, axis=0, keep_dims=True)
        # the contents of a slot that is not seen may not be a number
        seen = seen * shrink + tl.sum(tl.where(visible, weights * v, 0.0), axis=0, keep_dims=True)
        top = new_top

    if MIXES:
        share = tl.sigmoid(tl.sum(terms, axis=1, keep_dims=True) + logit)
        value += share * (first_value - value)
    # later positions see them in the precision of the buffers, so this one does too
    key, value = key.to(keys.dtype.element_ty), value.to(values.dtype.element_ty)
    tl.store(keys + (first + row) * DIM_HEAD + feature, key, mask=valid & (row < ROWS))
    tl.store(values + (first + row) * DIM_HEAD + feature, value, mask=valid & (row < ROWS))

    scores = tl.sum(key.to(tl.float32) * query, axis=1, keep_dims=True)
    new_top = tl.maximum(top, tl.max(scores, axis=0, keep_dims=True))
    weights, shrink = tl.exp(scores - new_top), tl.exp(top - new_top)
    total = total * shrink + tl.sum(weights, axis=0, keep_dims=True)
    seen = seen * shrink + tl.sum(weights * value.to(tl.float32), axis=0, keep_dims=True)
    tl.store(out + (entry * HEADS + head) * DIM_HEAD + feature, seen / total, mask=valid)


def token_attention(
    projected: Tensor,  # b r 3hd
    keys: Tensor,  # b h j d
    values: Tensor,  # b h j d
    layout: tuple[int, int, int, bool],
    position: Tensor,  # 1
    frequencies: Tensor,  # d/2
    mix: tuple[Tensor, Tensor, Tensor, Tensor] | None,  # b 1 e, h e, h, b h 1 d
) -> Tensor:  # b 1 hd
    num_persistent, _, _, slides = layout
    batch, rows, _ = projected.shape
    _, heads, slots, dim_head = keys.shape
    assert mix is None or rows == 1
    inputs, to_share, bias, first_values = (projected,) * 4 if mix is None else mix
    parameters = () if mix is None else (to_share, bias)
    projected, inputs, first_values = (contiguous_inside(t, 1) for t in (projected, inputs, first_values))
    out = projected.new_empty(batch, 1, heads * dim_head)
    if not batch:
        return out

    padded, dim = triton.next_power_of_2(dim_head), 1 if mix is None else inputs.shape[-1]
    with torch.cuda.device_of(projected):
        _kernel[(batch, heads)](
            projected=projected, stride_b=projected.stride(0), stride_r=projected.stride(1),
            keys=keys, values=values, out=out, position=position, frequencies=frequencies.contiguous(),
            inputs=inputs, input_stride_b=inputs.stride(0), to_share=to_share.contiguous(), bias=bias.contiguous(),
            first_values=first_values, first_stride_b=first_values.stride(0), first_stride_h=first_values.stride(1),
            scale=dim_head**-0.5,
            HEADS=heads, DIM_HEAD=dim_head, SLOTS=slots, PERSISTENT=num_persistent, ROWS=rows,
            DIM=dim, SLIDES=slides, MIXES=mix is not None,
            PADDED=padded, BLOCK=max(1, min(triton.next_power_of_2(slots), TILE // padded)),
            DIM_BLOCK=min(BLOCK, triton.next_power_of_2(dim)), num_warps=WARPS,
            **overlapping(projected, keys, values, frequencies, *parameters),
        )  # fmt: skip
    return out
