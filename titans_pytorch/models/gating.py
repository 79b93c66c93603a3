"""Attention gated by memory."""

from __future__ import annotations

from torch import Tensor, nn

from titans_pytorch.utils.parameters import Resettable, first_weight
from titans_pytorch.utils.shapes import Float


class Gated(Resettable):
    """Attention output gated by memory output, both normalised with learned gains (Titans, section 4.2)."""

    def __init__(self, dim: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim)
        self.memory_norm = nn.RMSNorm(dim)

    def forward(self, attended: Float[Tensor, 'b n d'], retrieved: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n d']:
        weight = first_weight(self.attention_norm, self.memory_norm)
        dtype = attended.dtype if weight is None else weight.dtype  # autocast may have lowered that of the inputs
        return self.attention_norm(attended.to(dtype)) * self.memory_norm(retrieved.to(dtype)).sigmoid()
