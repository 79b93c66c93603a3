"""FlexAttention over segments, for long sequences on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from titans_pytorch.attention.masks import segmented_block_mask
from titans_pytorch.ops._dispatch import HOPPER, nvidia_capability


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    # uncompiled, it materialises all scores; compiled at import time, it would load the compiler for every user
    return torch.compile(flex_attention)


# Tiles in half precision. PyTorch's own have 128 queries or keys on Hopper, most of which short windows mask; with
# these, attention takes 10 to 40 % less time at windows of 36 to 512 positions
_TILES_ON_HOPPER = {
    'fwd_BLOCK_M': 64,
    'fwd_BLOCK_N': 64,
    'bwd_BLOCK_M1': 32,
    'bwd_BLOCK_N1': 64,
    'bwd_BLOCK_M2': 64,
    'bwd_BLOCK_N2': 32,
    'num_warps': 4,
    'num_stages': 3,
}


def segmented_flex_attention(
    seq_len: int, window: int, num_persistent: int, sliding: bool, device: torch.device
) -> Callable[..., Tensor]:
    """FlexAttention with the block mask of segments, as a function of queries, keys and values."""
    block_mask = segmented_block_mask(seq_len, window, num_persistent, sliding, device)
    attend = _compiled_flex_attention() if device.type == 'cuda' else cast(Callable[..., Any], flex_attention)
    # with fewer queries, PyTorch's decoding kernel is used; it takes some of these tiles and writes beyond its buffers
    on_hopper = nvidia_capability(device) == HOPPER and seq_len >= 128

    def attended(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        fits = on_hopper and queries.dtype.itemsize == 2 and queries.shape[-1] <= 64
        return attend(queries, keys, values, block_mask=block_mask, kernel_options=_TILES_ON_HOPPER if fits else None)

    return attended
