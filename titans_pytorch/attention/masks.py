"""Mask functions: which keys a query may attend to, for FlexAttention and for boolean masks.

A mask function is FlexAttention's `mask_mod`: it maps (batch, head, query index, key index) to a boolean, elementwise.
One definition serves FlexAttention's block masks and, evaluated over positions, the boolean masks of plain attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.nn.attention.flex_attention import BlockMask, or_masks

from titans_pytorch.utils.shapes import Bool, Int

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

BLOCK = 128
"""Number of queries, and of keys, in a block of FlexAttention."""


def first_visible(window: int, sliding: bool) -> Callable[[Tensor], Tensor]:
    """A function from a query's position to the first position it sees, which never decreases from query to query."""

    def of(query: Tensor) -> Tensor:
        return query - window if sliding else query - query % window

    return of


def segmented(window: int, sliding: bool) -> MaskMod:
    """Causal attention within blocks of `window` positions or, if `sliding`, to at most `window` positions back."""
    first = first_visible(window, sliding)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first(query) <= key) & (key <= query)

    return mask


def after_persistent(num_persistent: int, mask_mod: MaskMod) -> MaskMod:
    """`mask_mod` for keys that follow `num_persistent` keys visible to every query."""

    def is_persistent(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < num_persistent

    def others(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_mod(batch, head, query, key - num_persistent)

    return or_masks(is_persistent, others)


def over_positions(
    mask_mod: MaskMod, queries: Int[Tensor, '... i'], keys: Int[Tensor, '... j']
) -> Bool[Tensor, '... i j']:
    """`mask_mod` evaluated for every pair of a query position and a key position."""
    none = torch.zeros((), dtype=torch.long, device=queries.device)
    return mask_mod(none, none, queries.unsqueeze(-1), keys.unsqueeze(-2))


def segmented_block_mask(
    seq_len: int, window: int, num_persistent: int, sliding: bool, device: torch.device
) -> BlockMask:
    """FlexAttention's block mask of `segmented`, with persistent keys in front; cached by shape."""
    # the cache must not hold tensors without values
    is_real = not torch.compiler.is_compiling() and detect_fake_mode() is None
    made = _cached_block_mask if is_real else _block_mask
    return made(seq_len, window, num_persistent, sliding, device)


@lru_cache(maxsize=64)
def _cached_block_mask(*arguments: Any) -> BlockMask:
    # the first call may be in inference mode, and autograd accepts no tensors from there
    with torch.inference_mode(False):
        return _block_mask(*arguments)


def _block_mask(seq_len: int, window: int, num_persistent: int, sliding: bool, device: torch.device) -> BlockMask:
    """The block mask, computed from the ends of blocks.

    It equals that of `create_block_mask`, which evaluates every pair of a query and a key: too many to store for long
    sequences, and slow to compile. Here, only the ends of blocks are compared.
    """
    kv_len, first = seq_len + num_persistent, first_visible(window, sliding)
    query_blocks = torch.arange(0, seq_len, BLOCK, device=device).unsqueeze(1)
    key_blocks = torch.arange(0, kv_len, BLOCK, device=device)
    first_query, last_query = query_blocks, (query_blocks + BLOCK).clamp(max=seq_len) - 1
    # positions; the persistent keys come before position 0
    first_key, last_key = key_blocks - num_persistent, (key_blocks + BLOCK).clamp(max=kv_len) - 1 - num_persistent
    own_first = first_key.clamp(min=0)

    # among the queries at or after the block's first key, the first sees furthest back
    earliest = torch.maximum(first_query, own_first)
    some = (first_key < 0) | ((earliest <= last_query) & (first(earliest) <= last_key))
    every = (last_key < 0) | ((last_key <= first_query) & (first(last_query) <= own_first))
    every &= (query_blocks + BLOCK <= seq_len) & (key_blocks + BLOCK <= kv_len)

    return BlockMask.from_kv_blocks(
        *_chosen(some & ~every),
        *_chosen(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=after_persistent(num_persistent, segmented(window, sliding)),
        seq_lengths=(seq_len, kv_len),
    )


def _chosen(blocks: Bool[Tensor, 'q k']) -> tuple[Int[Tensor, '1 1 q'], Int[Tensor, '1 1 q k']]:
    """For each block of queries, the number of chosen blocks of keys, and their indices, followed by the others."""
    indices = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1).int()[None, None], indices.int()[None, None]


def create_mac_block_mask(seq_len: int, window_size: int, persist_mem_len: int, sliding: bool = False) -> BlockMask:
    """`segmented_block_mask` on the accelerator, or on the CPU if there is none, under the reference's name."""
    device = torch.accelerator.current_accelerator() or torch.device('cpu')
    return segmented_block_mask(seq_len, window_size, persist_mem_len, sliding, device)
