"""Choice of a token in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Float, Int

TINY = 1e-20
"""Lower bound on the argument of a logarithm."""


def token_choice(
    logits: Float[Tensor, '... l'], uniform: Float[Tensor, '... l'] | None, temperature: float, min_p: float | None
) -> tuple[Int[Tensor, ' ...'], Float[Tensor, ' ...']]:
    if min_p is not None:
        logits = without_unlikely(logits, min_p)
    if uniform is not None:
        # at most 0, so that no quotient overflows
        logits = at_least_float32(logits)
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature + gumbel(uniform)
    best, tokens = logits.max(dim=-1)
    return tokens, best


def without_unlikely(logits: Float[Tensor, '... l'], min_p: float | Tensor) -> Float[Tensor, '... l']:
    """Set logits to −inf for tokens less likely than `min_p` times the likeliest."""
    probs = at_least_float32(logits).softmax(dim=-1)
    return logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), float('-inf'))


def gumbel(uniform: Float[Tensor, ' ...']) -> Float[Tensor, ' ...']:
    """Standard Gumbel noise from uniform noise."""
    return -torch.log((-torch.log(uniform.clamp(min=TINY))).clamp(min=TINY))
