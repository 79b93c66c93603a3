"""Newton–Schulz iteration in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titans_pytorch.ops.norms import inverse_length
from titans_pytorch.utils.precision import at_least_float32, autocast_dtype
from titans_pytorch.utils.shapes import Float


def newton_schulz(
    matrices: Float[Tensor, '... i j'], steps: int, eps: float, coefficients: tuple[float, float, float]
) -> Float[Tensor, '... i j']:
    a, b, c = coefficients
    autocast = matrices.dtype != torch.float64 and autocast_dtype(matrices.device) is not None
    x = matrices.float() if autocast else matrices
    dtype = x.dtype

    # xxᵀ is formed over the shorter side
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = x.mT if tall else x
    x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    squared = at_least_float32(x).square().sum(dim=(-2, -1), keepdim=True)
    x = (x * inverse_length(squared, eps)).to(dtype)

    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.add(torch.bmm(polynomial, x), x, alpha=a)

    return (x.mT if tall else x).view(matrices.shape).to(matrices.dtype)
