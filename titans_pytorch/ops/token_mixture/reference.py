"""Mixtures of vectors of a single token in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.utils.shapes import Float


def token_mixture(
    x: Float[Tensor, 'b 1 d'],
    choices: Float[Tensor, 'b 1 c d'],
    norm: tuple[Float[Tensor, ' d'], float | None],
    weight: Float[Tensor, 'vc d'],
    bias: Float[Tensor, ' vc'],
) -> Float[Tensor, 'v b 1 d']:
    logits = F.linear(F.rms_norm(x, x.shape[-1:], *norm), weight, bias)
    shares = logits.unflatten(-1, (-1, choices.shape[2])).softmax(dim=-1)
    return (shares @ choices).movedim(2, 0)
