"""RMS norm of the features of each head."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.ops._dispatch import VOLTA, use_kernel
from titans_pytorch.ops.head_norm import reference
from titans_pytorch.utils.shapes import Float

# most features in a head
_WIDEST = 256


def head_norm(x: Float[Tensor, 'b h n d'], gamma: Float[Tensor, 'h 1 d']) -> Float[Tensor, 'b h n d']:
    """x / √(mean x² + ε) · (1 + γ), where ε is the machine epsilon, as in `torch.nn.RMSNorm`."""
    if use_kernel([x, gamma], capability=VOLTA) and _supports(x, gamma):
        from titans_pytorch.ops.head_norm import triton

        # heads side by side, which is how a projection leaves them
        return triton.head_norm(x.transpose(1, 2), gamma, torch.promote_types(x.dtype, gamma.dtype))
    return reference.head_norm(x, gamma)


def _supports(x: Tensor, gamma: Tensor) -> bool:
    return x.ndim == 4 and gamma.shape == (x.shape[1], 1, x.shape[3]) and x.shape[3] <= _WIDEST and x.numel() > 0
