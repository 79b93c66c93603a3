"""Reference implementation of the norm of heads."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.utils.shapes import Float


def head_norm(x: Float[Tensor, 'b h n d'], gamma: Float[Tensor, 'h 1 d']) -> Float[Tensor, 'b h n d']:
    return F.rms_norm(x, x.shape[-1:]) * (gamma + 1.0)
