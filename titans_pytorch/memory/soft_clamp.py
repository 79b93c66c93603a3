"""Soft bounds on the norm of a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.memory.chunks import scaled
from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Float

ROUNDING_ERRORS = 64
"""A gradient counts as zero if its norm is below this many machine epsilons of the bound."""


def softclamp_max(t: Tensor, max_value: float) -> Tensor:
    """Map norms x to (tanh(2x / max) + 1) · max / 2, which goes from max / 2 at 0 up to max."""
    half = max_value / 2
    return ((t / half).tanh() + 1) * half


def soft_clamp_factor(squared_norm: Tensor, max_norm: float) -> Tensor:
    """Factors that scale norms, given squared, as `softclamp_max` does; 1 for a gradient made of rounding errors."""
    # rounding errors of terms that cancel have no direction and must not be raised to max / 2; replacing their norm by
    # 1 keeps value and gradient finite
    floor = ROUNDING_ERRORS * torch.finfo(squared_norm.dtype).eps * max_norm
    negligible = squared_norm <= floor**2
    norm = torch.where(negligible, torch.ones_like(squared_norm), squared_norm).sqrt()
    factor = softclamp_max(norm, max_norm) / norm
    return torch.where(negligible, torch.ones_like(factor), factor)


def soft_clamp_norm(gradients: Tensor, max_norm: float, batch_axes: int = 2) -> Tensor:
    """Scale gradients by `soft_clamp_factor` of their norm over all axes but the first `batch_axes`, here heads and
    chunks."""
    # a scalar parameter has no further axes, hence the extra one
    squared = at_least_float32(gradients).unsqueeze(-1).flatten(batch_axes).square().sum(dim=-1)
    return scaled(soft_clamp_factor(squared, max_norm), gradients).to(gradients.dtype)


def softclamp_grad_norm(t: Float[Tensor, 'bn ...'], max_value: float) -> Float[Tensor, 'bn ...']:
    """`soft_clamp_norm` of gradients with one batch axis, under the reference's name."""
    return soft_clamp_norm(t.unsqueeze(-1), max_value, 1).squeeze(-1)
