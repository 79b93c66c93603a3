"""Reference implementation of inverses."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.utils.shapes import Float


def inverse(matrices: Float[Tensor, '... m m']) -> Float[Tensor, '... m m']:
    return torch.linalg.inv_ex(matrices).inverse
