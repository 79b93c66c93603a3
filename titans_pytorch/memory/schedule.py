"""The schedule of a memory, in integers only: chunks, memory batches, and the weights that each token reads.

Tokens are counted from 0 over all calls. Chunk c holds tokens c · C to (c + 1) · C − 1, where C is the chunk size, and
is stored when its last token arrives. Token t reads the weights after ⌊(t + 1) / C⌋ complete chunks, so the last token
of a chunk is the first to read the weights that the chunk leaves. A memory batch of B tokens is B / C consecutive
chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.utils.functional import constant
from titans_pytorch.utils.shapes import Bool, divided


class ChunkBlock(NamedTuple):
    """Consecutive chunks of one memory batch, stored together."""

    num_chunks: int
    is_batch: bool
    """True if the block is a whole memory batch."""
    ends_batch: bool
    """True if the last chunk of the block is the last of its memory batch."""


class Schedule(NamedTuple):
    """The chunks that a call completes.

    Args:
        offset_in_batch: number of chunks of the first memory batch that come before these; 0 without memory batches.
        num_chunks: number of chunks; symbolic while a program of dynamic length is being exported.
        chunks_per_batch: chunks per memory batch; `None` without memory batches.
    """

    offset_in_batch: int
    num_chunks: int
    chunks_per_batch: int | None

    @classmethod
    def of(cls, seq_index: int, num_tokens: int, chunk_size: int, batch_size: int | None) -> Schedule:
        """Schedule of `num_tokens` tokens; the first of them begins a chunk and has index `seq_index`."""
        num_chunks, _ = divided(num_tokens, chunk_size)
        if batch_size is None:
            return cls(0, num_chunks, None)
        chunks_per_batch = batch_size // chunk_size
        return cls(constant(seq_index // chunk_size % chunks_per_batch), num_chunks, chunks_per_batch)

    def blocks(self, preferred: int | None) -> list[ChunkBlock]:
        """Split the chunks into blocks of the preferred number (`None`: no limit), and where memory batches end."""
        blocks: list[ChunkBlock] = []
        chunk, end = self.offset_in_batch, self.offset_in_batch + self.num_chunks
        while chunk < end:
            length = end - chunk if preferred is None else min(end - chunk, preferred)
            left_in_batch = None
            if self.chunks_per_batch is not None:
                left_in_batch = self.chunks_per_batch - chunk % self.chunks_per_batch
                length = min(length, left_in_batch)
            blocks.append(ChunkBlock(length, length == self.chunks_per_batch, length == left_in_batch))
            chunk += length
        return blocks

    def ends_batch(self, device: torch.device) -> Bool[Tensor, ' n']:
        """For each chunk, whether it is the last of its memory batch."""
        if self.chunks_per_batch is None:
            return torch.zeros(self.num_chunks, dtype=torch.bool, device=device)
        following = torch.arange(1, self.num_chunks + 1, device=device) + self.offset_in_batch
        return following % self.chunks_per_batch == 0


class QueryGroups(NamedTuple):
    """Rows of queries cut into groups that read the same weights, all padded to one size."""

    first_step: int
    """Step of the weights that the first group reads; step 0 is before the chunk of the first query."""
    size: int
    """Number of rows in a group, padding included."""
    number: int
    padding: tuple[int, int]
    """Number of padding rows before the first query and after the last."""

    @classmethod
    def of(cls, length: int, position: int, chunk_size: int, leading: int, whole: bool) -> QueryGroups:
        """Group the queries of `length` tokens; the first of these has index `position` in its chunk.

        `leading` rows before them, carried over from earlier calls, belong to the first group. `whole`: groups keep the
        size of a chunk, as a memory network that mixes tokens requires; otherwise a single group may be shorter.
        """
        # token t reads the weights after ⌊(t + 1) / chunk⌋ chunks, and is number (t + 1) mod chunk of those that do
        first_step, offset = divided(position, chunk_size, offset=1)
        size = chunk_size
        if not isinstance(length, torch.SymInt):
            size = min(chunk_size, offset + length)
            if not whole and length <= size - offset:
                offset, size = 0, length
        count, in_last = divided(length, size, offset)
        after = -in_last % size
        return cls(first_step, size, count + int(in_last > 0), (offset - leading, after))
