"""Attention of a single position, as decoding does it, over keys and values of constant size that it writes in place.

On a GPU all that lies between the two projections is one kernel; elsewhere there is its plain twin.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pytorch.ops import _dispatch
from titans_pytorch.ops.rotation import turned, turns
from titans_pytorch.utils.shapes import Float, Int

USE_KERNEL: bool | None = None
"""Whether the Triton kernel attends. Default: on CUDA devices, where there is Triton."""


class Ring(NamedTuple):
    """How buffers of keys and of values, (b, h, j, d), are laid out.

    Persistent ones come first, then positions, of which number p has place p modulo `num_positions`.
    """

    num_persistent: int
    num_positions: int
    keys_per_position: int
    slides: bool
    """Whether all positions in the buffers are seen, or those from place 0 on: a block."""

    def slots(self, positions: Int[Tensor, ' n']) -> Int[Tensor, ' nr']:
        """Where the keys of these positions stand, persistent ones not counted."""
        first = positions % self.num_positions * self.keys_per_position
        if self.keys_per_position == 1:
            return first
        return (first.unsqueeze(1) + torch.arange(self.keys_per_position, device=positions.device)).flatten()


class Slot(NamedTuple):
    """Where one position stands in such buffers."""

    numbers: Int[Tensor, ' r']
    bias: Float[Tensor, '1 1 1 j']
    """Added to its scores: 0 for the slots that it sees, −∞ for those it does not."""


class Position:
    """A position, for the attention of all layers. Tables are made once, where asked for: the kernel needs no slots.

    Args:
        number: of the position.
        frequencies: of each layer's rotary embedding.
    """

    def __init__(self, number: Int[Tensor, ' 1'], frequencies: Float[Tensor, 'layers half']):
        self.number = number
        self.frequencies = frequencies
        self._slots: dict[tuple[Ring, torch.dtype], Slot] = {}
        self._turns: Tensor | None = None

    @property  # the compiler knows no `cached_property`
    def turns(self) -> Tensor:
        """By how much each layer rotates: (layers, d/2, 2), cosines and sines."""
        if self._turns is None:
            self._turns = turns(self.frequencies, self.number)
        return self._turns

    def slot(self, ring: Ring, dtype: torch.dtype) -> Slot:
        if (ring, dtype) not in self._slots:
            numbers = ring.slots(self.number) + ring.num_persistent
            num_keys = ring.num_persistent + ring.num_positions * ring.keys_per_position
            newest = self.number * ring.keys_per_position + ring.num_persistent if ring.slides else numbers
            seen = newest[:1] + ring.keys_per_position
            slots = torch.arange(num_keys, device=self.number.device)
            bias = torch.zeros(1, 1, 1, num_keys, dtype=dtype, device=self.number.device)
            self._slots[ring, dtype] = Slot(numbers, bias.masked_fill_(slots >= seen, float('-inf')))
        return self._slots[ring, dtype]


class ValueMix(NamedTuple):
    """The first layer's values, of which each head's take over a share."""

    to_shares: nn.Sequential
    """A linear map to a logit for each head, and what makes shares of them."""
    seq: Float[Tensor, 'b 1 d']
    residual: Float[Tensor, 'b h 1 d']


def attend_one(
    projected: Float[Tensor, 'b r qkv'],
    buffers: tuple[Float[Tensor, 'b h j d'], Float[Tensor, 'b h j d']],
    ring: Ring,
    position: Position,
    layer: int,
    mix: ValueMix | None = None,
) -> Float[Tensor, 'b 1 hd']:
    """What a position sees, itself included: its keys and values are written into `buffers`.

    Args:
        projected: queries, keys and values of the position, not rotated; further rows have further keys and values of
            it, and their queries are not asked for.
        layer: of `position.frequencies`.
    """
    turn = position.turns[layer]
    kernel = _kernel_for(projected, buffers, turn)
    if kernel is None or (mix is not None and type(mix.to_shares[0]) is not nn.Linear):
        return plain_attend_one(projected, buffers, ring, position, layer, mix)
    shares = None
    if mix is not None:
        linear = mix.to_shares[0]
        shares = mix.seq, linear.weight, linear.bias, mix.residual
    return kernel.attend(projected, *buffers, ring.num_persistent, ring.slides, position.number, turn, shares)


def _kernel_for(projected: Tensor, buffers: tuple[Tensor, Tensor], turn: Tensor) -> Any:
    """The kernel, if it is to be used and computes with these: in float32, and without a gradient."""
    asked = projected.is_cuda if USE_KERNEL is None else USE_KERNEL
    if not (asked and _dispatch.kernels_are_on()) or torch.is_grad_enabled():
        return None
    kernel, dim_head = _kernel(), buffers[0].shape[-1]
    if kernel is None or dim_head > kernel.LARGEST or 2 * len(turn) != dim_head:
        return None
    is_double = torch.float64 in {t.dtype for t in (projected, *buffers, turn)}
    return None if is_double or not all(buffer.is_contiguous() for buffer in buffers) else kernel


@functools.cache
def _kernel() -> Any:
    """Imported where it is used: without a GPU there need be no Triton."""
    try:
        from titans_pytorch.ops.token_attention import triton as kernel
    except ImportError:
        return None
    return kernel


def plain_attend_one(
    projected: Float[Tensor, 'b r qkv'],
    buffers: tuple[Float[Tensor, 'b h j d'], Float[Tensor, 'b h j d']],
    ring: Ring,
    position: Position,
    layer: int,
    mix: ValueMix | None = None,
) -> Float[Tensor, 'b 1 hd']:
    by_head = heads_of(projected, buffers[0].shape[1])
    queries, keys = turned(by_head[:2], position.turns[layer])
    values = by_head[2]
    if mix is not None:
        values = values.lerp(mix.residual.to(values.dtype), mix.to_shares(mix.seq).to(values.dtype))

    slot = position.slot(ring, buffers[0].dtype)
    for buffer, new in zip(buffers, (keys, values)):
        buffer.index_copy_(2, slot.numbers, new.to(buffer.dtype))
    out = F.scaled_dot_product_attention(queries[..., :1, :], *buffers, attn_mask=slot.bias)
    return out.transpose(1, 2).flatten(2)


def heads_of(projected: Float[Tensor, 'b n qkv'], heads: int) -> Float[Tensor, '3 b h n d']:
    """Queries, keys and values of each head."""
    return projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
