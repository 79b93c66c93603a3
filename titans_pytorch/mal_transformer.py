"""Memory as layer (MAL): long-term memory, and after it sliding-window attention (Titans, section 4.3)."""

from __future__ import annotations

from titans_pytorch.models.block import Parts
from titans_pytorch.models.hybrid import HybridBlock, HybridTransformer
from titans_pytorch.models.residual_streams import Streams


class MALBlock(HybridBlock):
    branch_names = ('memory', 'attention', 'feedforward')

    def arranged(self, x: Streams, parts: Parts) -> Streams:
        to_memory, to_attention, to_feedforward = parts.connections
        # Titans eq. 30, 31: y = M(x), o = SW-Attn(y), each around a residual
        if self.memory is not None:
            seq, add_residual = to_memory(x)
            x = add_residual(parts.remember(seq))
        seq, add_residual = to_attention(x)
        x = add_residual(parts.attend(seq))

        seq, add_residual = to_feedforward(x)
        return add_residual(self.feedforward(seq))


class MemoryAsLayerTransformer(HybridTransformer):
    """A language model in whose layers memory comes first, and attention reads what it has made of the past.

    Each is a branch of its own from the residual stream. Arguments: those of `HybridTransformer`.
    """

    block = MALBlock
