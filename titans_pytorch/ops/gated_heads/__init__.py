"""Norm and gate of the values that each head retrieves, side by side for the projection that combines them."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from titans_pytorch.ops._dispatch import VOLTA, use_kernel
from titans_pytorch.ops.gated_heads import reference
from titans_pytorch.utils.shapes import Float

# most features in a head
_WIDEST = 256


def gated_heads(
    x: Float[Tensor, 'b h n d'],
    gamma: Float[Tensor, 'h 1 d'] | None,
    logits: Float[Tensor, 'b n hg'],
    dtype: torch.dtype | None = None,
) -> Float[Tensor, 'b n hd']:
    """`head_norm(x, gamma)`, or x without γ, times the sigmoid of the logits.

    Args:
        logits: one for each head, or one for each of its features.
        dtype: dtype of the result. Default: as PyTorch promotes the inputs.
    """
    if dtype is None:
        dtype = reduce(torch.promote_types, (t.dtype for t in (x, gamma, logits) if t is not None))
    if use_kernel([x, gamma, logits], capability=VOLTA) and _supports(x, gamma, logits):
        from titans_pytorch.ops.gated_heads import triton

        return triton.gated_heads(x, gamma, logits, dtype)
    return reference.gated_heads(x, gamma, logits).to(dtype)


def _supports(x: Tensor, gamma: Tensor | None, logits: Tensor) -> bool:
    heads, dim = x.shape[1], x.shape[3]
    if gamma is not None and gamma.shape != (heads, 1, dim):
        return False
    return dim <= _WIDEST and logits.shape[-1] in (heads, heads * dim) and x.numel() > 0
