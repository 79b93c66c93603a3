"""Reference implementation of the attention of a single position."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.ops.attention_inputs.reference import heads_of, mixed_values
from titans_pytorch.ops.rotation import rotate_features
from titans_pytorch.ops.token_attention.cache import CacheSlots
from titans_pytorch.utils.shapes import Float


def token_attention(
    projected: Float[Tensor, 'b u qkv'],
    buffers: tuple[Float[Tensor, 'b h j d'], Float[Tensor, 'b h j d']],
    slots: CacheSlots,
    rotation: Float[Tensor, 'half 2'],
    mix: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> Float[Tensor, 'b 1 hd']:
    by_head = heads_of(projected, buffers[0].shape[1])
    queries, keys = rotate_features(by_head[:2], rotation)
    values = by_head[2]
    if mix is not None:
        inputs, weight, bias, first_values = mix
        shares = F.linear(inputs, weight, bias).unflatten(-1, (-1, 1)).transpose(1, 2).sigmoid()
        values = mixed_values(values, first_values, shares)

    for buffer, new in zip(buffers, (keys, values)):
        buffer.index_copy_(2, slots.indices, new.to(buffer.dtype))
    out = F.scaled_dot_product_attention(queries[..., :1, :], *buffers, attn_mask=slots.bias)
    return out.transpose(1, 2).flatten(2)
