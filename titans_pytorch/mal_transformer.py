"""Memory as layer (MAL): long-term memory followed by sliding-window attention (Titans, section 4.3)."""

from __future__ import annotations

from titans_pytorch.models.block import Parts
from titans_pytorch.models.hybrid import HybridBlock, HybridTransformer
from titans_pytorch.models.residual_streams import Streams


class MALBlock(HybridBlock):
    branch_names = ('memory', 'attention', 'feedforward')

    def update_stream(self, x: Streams, parts: Parts) -> Streams:
        to_memory, to_attention, to_feedforward = parts.connections
        # Titans eq. 30, 31: y = M(x), o = SW-Attn(y), each around a residual
        if self.memory is not None:
            seq, add_residual = to_memory(x)
            x = add_residual(parts.store_and_retrieve(seq))
        seq, add_residual = to_attention(x)
        x = add_residual(parts.attend(seq))

        seq, add_residual = to_feedforward(x)
        return add_residual(parts.feed_forward(seq))


class MemoryAsLayerTransformer(HybridTransformer):
    """A language model whose layers consist of a memory, then sliding-window attention over its output.

    The two are separate branches of the residual stream. For the arguments, see `HybridTransformer`.
    """

    block = MALBlock
