"""Ring-buffer cache of keys and values: its layout, and the slots of a position, which all layers share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.ops.rotation import rotation_at
from titans_pytorch.utils.shapes import Float, Int


class RingLayout(NamedTuple):
    """The layout of buffers of keys and of values, (b, h, j, d).

    Persistent keys and values come first, then those of positions; position p has offset p modulo `num_positions`.
    """

    num_persistent: int
    num_positions: int
    keys_per_position: int
    slides: bool
    """True if all positions in the buffers are seen; false if only those from offset 0 on are seen, that is, a
    block."""

    def slots(self, positions: Int[Tensor, ' n']) -> Int[Tensor, ' nu']:
        """The slots of the keys of these positions, not counting persistent ones."""
        first = positions % self.num_positions * self.keys_per_position
        if self.keys_per_position == 1:
            return first
        return (first.unsqueeze(1) + torch.arange(self.keys_per_position, device=positions.device)).flatten()


class CacheSlots(NamedTuple):
    """The slots of one position in such buffers."""

    indices: Int[Tensor, ' u']
    bias: Float[Tensor, '1 1 1 j']
    """Added to the position's scores: 0 for the slots that it sees, −∞ for the others."""


class Position:
    """A position, for the attention of all layers. Tables are built once, on request, because the kernel needs no
    slots.

    Args:
        number: the number of the position.
        frequencies: frequencies of each layer's rotary embedding.
    """

    def __init__(self, number: Int[Tensor, ' 1'], frequencies: Float[Tensor, 'layers half']):
        self.number = number
        self.frequencies = frequencies
        self._slots: dict[tuple[RingLayout, torch.dtype], CacheSlots] = {}
        self._rotations: Tensor | None = None

    @property  # the compiler does not support `cached_property`
    def rotations(self) -> Float[Tensor, 'layers half 2']:
        """Cosines and sines of each layer's rotation."""
        if self._rotations is None:
            self._rotations = rotation_at(self.frequencies, self.number)
        return self._rotations

    def slots(self, layout: RingLayout, dtype: torch.dtype) -> CacheSlots:
        if (layout, dtype) not in self._slots:
            indices = layout.slots(self.number) + layout.num_persistent
            num_keys = layout.num_persistent + layout.num_positions * layout.keys_per_position
            newest = self.number * layout.keys_per_position + layout.num_persistent if layout.slides else indices
            seen = newest[:1] + layout.keys_per_position
            slots = torch.arange(num_keys, device=self.number.device)
            bias = torch.zeros(1, 1, 1, num_keys, dtype=dtype, device=self.number.device)
            self._slots[layout, dtype] = CacheSlots(indices, bias.masked_fill_(slots >= seen, float('-inf')))
        return self._slots[layout, dtype]
