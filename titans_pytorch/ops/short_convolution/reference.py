"""Reference implementation of the short convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.ops.norms import l2_norm
from titans_pytorch.utils.shapes import Float


def short_convolution(
    x: Float[Tensor, 'b t hud'], weight: Float[Tensor, 'hud 1 k'], heads: int, per_token: int, normalize: bool
) -> Float[Tensor, 'b h nu d']:
    convolved = F.conv1d(x.mT, weight.to(x.dtype), groups=weight.shape[0]).mT
    rows = F.silu(convolved).unflatten(-1, (heads, per_token, -1)).transpose(1, 2).flatten(2, 3)
    return l2_norm(rows) if normalize else rows
