"""Reference implementation of norm and gate of heads."""

from __future__ import annotations

from torch import Tensor

from titans_pytorch.ops.head_norm.reference import head_norm
from titans_pytorch.utils.shapes import Float


def gated_heads(
    x: Float[Tensor, 'b h n d'], gamma: Float[Tensor, 'h 1 d'] | None, logits: Float[Tensor, 'b n hg']
) -> Float[Tensor, 'b n hd']:
    normed = x if gamma is None else head_norm(x, gamma)
    return (normed * logits.unflatten(-1, (x.shape[1], -1)).transpose(1, 2).sigmoid()).transpose(1, 2).flatten(2)
