"""A linear layer for a single token in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.utils.shapes import Float


def token_linear(
    x: Float[Tensor, 'b 1 d'],
    weight: Float[Tensor, 'e d'],
    bias: Float[Tensor, ' e'] | None,
    norm: tuple[Float[Tensor, ' d'], float | None] | None,
    gated: bool,
) -> tuple[Float[Tensor, 'b 1 _'], Float[Tensor, 'b 1 d']]:
    normed = x if norm is None else F.rms_norm(x, x.shape[-1:], *norm)
    out = F.linear(normed, weight, bias)
    if gated:
        values, gates = out.chunk(2, dim=-1)
        out = F.silu(gates) * values
    return out, normed
