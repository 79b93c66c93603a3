"""Products of consecutive gates, by which a recurrence over chunks is solved at once."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.ops._dispatch import use_kernel
from titans_pytorch.ops.gate_products import reference
from titans_pytorch.utils.shapes import Float

# steps; a program holds a matrix
_MOST_STEPS = 128


def gate_products(log_gates: Float[Tensor, '... n']) -> Float[Tensor, '... n n']:
    """L[c, j] = g_{j+1} · … · g_c for j ≤ c, else 0: the share of the input of step j that is left at step c.

    Each entry sums the logarithms of its own range: the difference of two long sums would cancel.
    """
    if log_gates.shape[-1] == 1:
        # the product of no gates: a constant, so that what follows needs no gradient of it
        return torch.ones_like(log_gates.detach()).unsqueeze(-1)
    if use_kernel([log_gates], dtypes=(torch.float32,)) and _supports(log_gates):
        from titans_pytorch.ops.gate_products import triton

        return triton.gate_products(log_gates)
    return reference.gate_products(log_gates)


def _supports(log_gates: Tensor) -> bool:
    return log_gates.shape[-1] <= _MOST_STEPS and log_gates.numel() > 0
