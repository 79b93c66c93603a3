"""Norms that can be differentiated to any order, even at zero.

The memory differentiates its network inside a forward pass, so a training step takes second derivatives of every norm,
and meta-learning takes third ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Float


def layer_norm(x: Float[Tensor, '... d'], eps: float) -> Float[Tensor, '... d']:
    """Rows with mean 0 and variance 1, computed in at least float32."""
    if not torch.is_grad_enabled():
        return F.layer_norm(at_least_float32(x), x.shape[-1:], eps=eps)
    # not PyTorch's own operation: its third derivative is wrong
    return standardise(at_least_float32(x), eps)[0]


def standardise(x: Float[Tensor, '... d'], eps: float) -> tuple[Float[Tensor, '... d'], Float[Tensor, '... 1']]:
    """Layer norm of each row, and the inverse standard deviation that scaled it."""
    centred = x - x.mean(dim=-1, keepdim=True)
    inverse = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return centred * inverse, inverse


def l2_norm(x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
    """Rows of length 1, computed in at least float32.

    A row of zeros stays zero and has no gradient. There, the gradient of `F.normalize` is 1e12, beyond the range of
    float16, and its second derivative is not finite.
    """
    full = at_least_float32(x)
    squared = full.square().sum(dim=-1, keepdim=True)
    unit = full * inverse_length(squared, 1e-12)
    return torch.where(squared == 0, torch.zeros_like(full), unit).to(x.dtype)


def inverse_length(squared: Tensor, eps: float) -> Tensor:
    """1 / max(√`squared`, `eps`), without the derivatives of the square root at zero, which are not finite."""
    return squared.clamp(min=eps**2).rsqrt()
