"""Mask functions: the keys that a query may attend to, for FlexAttention and for boolean masks.

A mask function is FlexAttention's `mask_mod`: (batch, head, query index, key index) to a boolean, elementwise. One
definition serves the block masks of FlexAttention and, evaluated over positions, the boolean masks of plain attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, or_masks

from titans_pytorch.utils.shapes import Bool, Int

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# most (query, key) pairs for which a mask is evaluated on all pairs at once, outside of compiled programs
DENSE_PAIRS = 2**26


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def same_window(size: int) -> MaskMod:
    """True if query and key are in the same window [0, size), [size, 2 · size), …"""

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query // size == key // size

    return mask


def within(distance: int) -> MaskMod:
    """True if the key is at most `distance` positions back."""

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query - key <= distance

    return mask


def after_persistent(num_persistent: int, mask_mod: MaskMod) -> MaskMod:
    """`mask_mod` for keys that follow `num_persistent` keys visible to every query."""

    def is_persistent(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < num_persistent

    def others(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_mod(batch, head, query, key - num_persistent)

    return or_masks(is_persistent, others)


def segmented(window: int, sliding: bool) -> MaskMod:
    """Causal attention within blocks of `window` positions or, if `sliding`, to at most `window` positions back."""
    return and_masks(causal, within(window) if sliding else same_window(window))


def over_positions(
    mask_mod: MaskMod, queries: Int[Tensor, '... i'], keys: Int[Tensor, '... j']
) -> Bool[Tensor, '... i j']:
    """`mask_mod` evaluated for every pair of a query position and a key position."""
    none = torch.zeros((), dtype=torch.long, device=queries.device)
    return mask_mod(none, none, queries.unsqueeze(-1), keys.unsqueeze(-2))


@lru_cache(maxsize=64)
def segmented_block_mask(
    seq_len: int, window: int, num_persistent: int, sliding: bool, device: torch.device
) -> BlockMask:
    """FlexAttention's block mask of `segmented`, with persistent keys in front; cached by shape."""
    mask_mod = after_persistent(num_persistent, segmented(window, sliding))
    kv_len = seq_len + num_persistent
    # the pairs of a long sequence would fill the memory; the compiler reduces them to blocks without storing them
    compiled = device.type == 'cuda' and seq_len * kv_len > DENSE_PAIRS and not torch.compiler.is_compiling()
    create = _compiled_create_block_mask() if compiled else create_block_mask
    return create(mask_mod, None, None, seq_len, kv_len, device=device)


@cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)


def create_mac_block_mask(seq_len: int, window_size: int, persist_mem_len: int, sliding: bool = False) -> BlockMask:
    """`segmented_block_mask` on the accelerator, or on the CPU without one, under the reference's name."""
    device = torch.accelerator.current_accelerator() or torch.device('cpu')
    return segmented_block_mask(seq_len, window_size, persist_mem_len, sliding, device)
