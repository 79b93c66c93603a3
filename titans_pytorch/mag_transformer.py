"""Memory as gate (MAG): sliding-window attention and long-term memory side by side (Titans, section 4.2)."""

from __future__ import annotations

from typing import Any

from titans_pytorch.models.block import Parts
from titans_pytorch.models.gating import Gated
from titans_pytorch.models.hybrid import HybridBlock, HybridTransformer
from titans_pytorch.models.residual_streams import Streams


class MAGBlock(HybridBlock):
    branch_names = ('attention', 'feedforward')

    def __init__(self, dim: int, *parts: Any):
        super().__init__(dim, *parts)
        self.combine = None if self.memory is None else Gated(dim)

    def update_stream(self, x: Streams, parts: Parts) -> Streams:
        to_attention, to_feedforward = parts.connections
        seq, add_residual = to_attention(x)
        # Titans eq. 27, 28: y = SW-Attn*([p ‖ x]), o = y ⊗ M(x)
        out = parts.attend(seq)
        x = add_residual(out if self.combine is None else self.combine(out, parts.store_and_retrieve(seq)))

        seq, add_residual = to_feedforward(x)
        return add_residual(parts.feed_forward(seq))


class MemoryAsGateTransformer(HybridTransformer):
    """A language model in which the output of a memory gates that of sliding-window attention.

    Both read the same input: attention sees the last positions, the memory the whole past. Both outputs are normalised
    with learned gains; the memory's then passes through a sigmoid and gates the attention's. For the arguments, see
    `HybridTransformer`.
    """

    block = MAGBlock
