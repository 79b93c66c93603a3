"""Attention of a single position in decoding, over a ring-buffer cache that it updates in place.

It does everything between the projections before and after attention: it rotates the query and the keys of the
position, mixes its value with that of the first layer, writes keys and values into their slots, and attends to the
slots that the position sees:

    out = softmax(q Kᵀ / √d + bias) V    v ← v + sigmoid(⟨w, x⟩ + b) · (v_first − v)
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from titans_pytorch.ops._dispatch import VOLTA, use_kernel
from titans_pytorch.ops.token_attention import reference
from titans_pytorch.ops.token_attention.cache import Position, RingLayout
from titans_pytorch.utils.shapes import Float

__all__ = ['Position', 'RingLayout', 'ValueMix', 'token_attention']

WIDEST = 256
"""Most features in a head."""


class ValueMix(NamedTuple):
    """The first layer's values; and the input, weights and bias for the share of them that each head takes."""

    inputs: Float[Tensor, 'b 1 e']
    weight: Float[Tensor, 'h e']
    bias: Float[Tensor, ' h']
    first_values: Float[Tensor, 'b h 1 d']


def token_attention(
    projected: Float[Tensor, 'b u qkv'],
    buffers: tuple[Float[Tensor, 'b h j d'], Float[Tensor, 'b h j d']],
    layout: RingLayout,
    position: Position,
    layer: int,
    mix: ValueMix | None = None,
) -> Float[Tensor, 'b 1 hd']:
    """Attend from a position to the slots that it sees, including its own.

    Args:
        projected: queries, keys and values of the position, not rotated. Further rows hold further keys and values of
            the same position; their queries are not used.
        buffers: buffers of keys and of values; those of the position are written into them.
        layer: index into `position.frequencies`.
        mix: only for u = 1.

    The kernel has no gradient, so it runs only if gradients are off.
    """
    frequencies = position.frequencies[layer]
    inputs, states = (projected, *buffers, *(mix or ())), (frequencies,)
    if use_kernel(inputs, states, capability=VOLTA, has_backward=False) and _supports(buffers, frequencies):
        from titans_pytorch.ops.token_attention import triton

        return triton.token_attention(projected, *buffers, layout, position.number, frequencies, mix)
    slots = position.slots(layout, buffers[0].dtype)
    return reference.token_attention(projected, buffers, slots, position.rotations[layer], mix)


def _supports(buffers: tuple[Tensor, Tensor], frequencies: Tensor) -> bool:
    dim_head = buffers[0].shape[-1]
    whole = all(buffer.is_contiguous() for buffer in buffers)
    return dim_head <= WIDEST and 2 * len(frequencies) == dim_head and whole
