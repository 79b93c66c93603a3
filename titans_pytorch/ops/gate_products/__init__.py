"""Products of consecutive gates, which solve a recurrence over chunks in one go."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.ops._dispatch import use_kernel
from titans_pytorch.ops.gate_products import reference
from titans_pytorch.utils.shapes import Float

# most steps, because a program holds the whole matrix
_MOST_STEPS = 128


def gate_products(log_gates: Float[Tensor, '... n']) -> Float[Tensor, '... n n']:
    """L[c, j] = g_{j+1} · … · g_c for j ≤ c, else 0: the share of step j's input that is left at step c.

    Each entry sums the logarithms of its own range, because the difference of two long sums would cancel.
    """
    if log_gates.shape[-1] == 1:
        # the product of no gates is a constant, so that later operations need no gradient of it
        return torch.ones_like(log_gates.detach()).unsqueeze(-1)
    if use_kernel([log_gates], dtypes=(torch.float32,)) and _supports(log_gates):
        from titans_pytorch.ops.gate_products import triton

        return triton.gate_products(log_gates)
    return reference.gate_products(log_gates)


def _supports(log_gates: Tensor) -> bool:
    return log_gates.shape[-1] <= _MOST_STEPS and log_gates.numel() > 0
