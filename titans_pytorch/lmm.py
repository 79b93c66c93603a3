"""The long-term memory module alone (LMM): a sequence model without attention (Titans, section 3)."""

from __future__ import annotations

from titans_pytorch.models.block import Parts
from titans_pytorch.models.hybrid import HybridBlock, HybridTransformer
from titans_pytorch.models.residual_streams import Streams


class LMMBlock(HybridBlock):
    branch_names = ('memory', 'feedforward')

    def update_stream(self, x: Streams, parts: Parts) -> Streams:
        to_memory, to_feedforward = parts.connections
        if self.memory is not None:
            seq, add_residual = to_memory(x)
            x = add_residual(parts.store_and_retrieve(seq))

        seq, add_residual = to_feedforward(x)
        return add_residual(parts.feed_forward(seq))


class LongTermMemoryModel(HybridTransformer):
    """A language model in which neural memory is the only connection between tokens.

    The arguments are those of `HybridTransformer`. Those for attention have no effect, except that `segment_len` is the
    default of `neural_memory_segment_len`; one of the two must be given.
    """

    block = LMMBlock
    has_attention = False
