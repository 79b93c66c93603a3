"""`Schedule` and `QueryGroups` against the definition: token t reads the weights after ⌊(t + 1) / chunk⌋ chunks."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from titans_pytorch.memory.schedule import QueryGroups, Schedule

sizes = st.integers(1, 9)


@given(chunk_size=sizes, chunks_per_batch=st.none() | sizes, first_chunk=st.integers(0, 30), data=st.data())
def test_blocks_cover_the_chunks_and_end_with_memory_batches(chunk_size, chunks_per_batch, first_chunk, data):
    num_tokens = data.draw(st.integers(0, 200))
    preferred = data.draw(st.none() | st.integers(1, 20))
    batch_size = None if chunks_per_batch is None else chunks_per_batch * chunk_size
    schedule = Schedule.of(first_chunk * chunk_size, num_tokens, chunk_size, batch_size)
    blocks = schedule.blocks(preferred)

    assert sum(block.num_chunks for block in blocks) == schedule.num_chunks == num_tokens // chunk_size
    chunk, ends = first_chunk, []
    for block in blocks:
        assert 0 < block.num_chunks <= (preferred or schedule.num_chunks)
        start, chunk = chunk, chunk + block.num_chunks
        if chunks_per_batch is None:
            assert not block.ends_batch and not block.is_batch
            continue
        assert start // chunks_per_batch == (chunk - 1) // chunks_per_batch, 'a block is part of one memory batch'
        assert block.ends_batch == (chunk % chunks_per_batch == 0)
        assert block.is_batch == (block.ends_batch and start % chunks_per_batch == 0)
        ends += [False] * (block.num_chunks - 1) + [block.ends_batch]
    if chunks_per_batch is not None:
        assert schedule.ends_batch(torch.device('cpu')).tolist() == ends
    elif schedule.num_chunks:
        assert not schedule.ends_batch(torch.device('cpu')).any()


@given(chunk_size=sizes, before=st.integers(0, 50), length=st.integers(1, 60), whole=st.booleans())
def test_every_query_is_in_the_group_of_the_weights_that_it_reads(chunk_size, before, length, whole):
    """`before` tokens were read by earlier calls."""
    position = before % chunk_size
    in_group = (before + 1) % chunk_size
    leading = in_group if whole else 0
    groups = QueryGroups.of(length, position, chunk_size, leading, whole)
    front, back = groups.padding
    assert min(front, back) >= 0
    rows = [None] * front + [None] * leading + [before + token for token in range(length)] + [None] * back
    assert len(rows) == groups.number * groups.size and groups.size <= chunk_size
    for row, token in enumerate(rows):
        if token is not None:
            chunks_before = before // chunk_size  # complete before the chunk of the first query
            assert chunks_before + groups.first_step + row // groups.size == (token + 1) // chunk_size
        if whole and token is not None:
            assert row % groups.size == (token + 1) % chunk_size
