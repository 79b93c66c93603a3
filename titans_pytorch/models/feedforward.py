"""The feedforward of every block: gated by SiLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Linear, Module

from titans_pytorch.ops.token_linear import token_linear
from titans_pytorch.utils.checks import check_hidden_width
from titans_pytorch.utils.plain import is_plain_linear, plain_parts
from titans_pytorch.utils.shapes import Float


class GEGLU(Module):
    """One half of the features gated by SiLU of the other half: a SwiGLU, under the reference's name."""

    def forward(self, x: Float[Tensor, '... e']) -> Float[Tensor, '... e//2']:
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x


def FeedForward(dim: int, mult: float = 4) -> nn.Sequential:
    """A gated feedforward with as many weights as an ungated one of hidden width `mult` · `dim`."""
    dim_inner = check_hidden_width('ff_mult', dim, mult, gated=True)
    return nn.Sequential(nn.RMSNorm(dim), Linear(dim, dim_inner * 2), GEGLU(), Linear(dim_inner, dim))


def feedforward_of_token(feedforward: Module, x: Float[Tensor, 'b 1 d']) -> Float[Tensor, 'b 1 d']:
    """`feedforward(x)` for a single token; a `FeedForward` without hooks takes two operations."""
    parts = plain_parts(feedforward, None, None, GEGLU, None)
    if parts is None:
        return feedforward(x)
    norm, to_hidden, _, to_out = parts
    if not is_plain_linear(to_hidden, norm) or not is_plain_linear(to_out):
        return feedforward(x)
    hidden, _ = token_linear(x, to_hidden.weight, to_hidden.bias, (norm.weight, norm.eps), gated=True)
    return token_linear(hidden, to_out.weight, to_out.bias)[0]
