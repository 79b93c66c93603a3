"""Reference implementation of products of gates."""

from __future__ import annotations

from torch import Tensor

from titans_pytorch.utils.shapes import Float


def gate_products(log_gates: Float[Tensor, '... n']) -> Float[Tensor, '... n n']:
    n = log_gates.shape[-1]
    sums = log_gates.unsqueeze(-1).expand(*log_gates.shape, n).tril(-1).cumsum(dim=-2)
    return sums.exp().tril()
