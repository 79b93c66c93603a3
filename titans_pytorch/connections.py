"""Hyper-connections (arXiv 2409.19606, mHC: 2512.24880) for one token: the package's numbers, in a tenth of its steps.

Gains and scales of a connection are multiplied into one matrix beforehand, so that what is left for a token is a norm,
a product with that matrix, Sinkhorn's iteration and a mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from titans_pytorch.shapes import Float
from titans_pytorch.sinkhorn import sinkhorn_of_few

AddResidual = Callable[[Tensor], Tensor]


class FoldedConnection(NamedTuple):
    """What a connection computes from a normalised stream: logits to read it, to mix it on, and to write to it."""

    to_logits: Float[Tensor, 'd l']
    bias: Float[Tensor, 's l']


def folded(connection: Any) -> FoldedConnection | None:
    """The connection's weights as they are now; `None` for a plain residual, which has none."""
    if not hasattr(connection, 'static_alpha'):
        return None
    assert connection.num_fracs == connection.num_input_views == len(connection.dynamic_alpha_fn) == 1
    streams, dim = len(connection.static_alpha), connection.norm.gamma.shape[0]

    scales = (connection.pre_branch_scale, connection.residual_scale.expand(streams))
    to_logits = connection.dynamic_alpha_fn[0] * torch.cat(scales)
    bias = connection.static_alpha
    if connection.add_branch_out_to_residual:
        to_write = connection.dynamic_beta_fn.reshape(dim, 1) * connection.h_post_scale
        to_logits = torch.cat((to_logits, to_write), dim=1)
        bias = torch.cat((bias, connection.static_beta.reshape(streams, 1)), dim=1)
    gain = connection.norm.gamma.unsqueeze(1) + 1.0
    return FoldedConnection((to_logits * gain).float(), bias.float())


def connect(
    connection: Module, weights: FoldedConnection | None, x: Float[Tensor, 'b s d']
) -> tuple[Float[Tensor, 'b 1 d'], AddResidual]:
    """What the branch reads of the streams, and the function that writes its output to them."""
    if weights is None:
        return connection(x)
    batch, streams, dtype = x.shape[0], x.shape[1], x.dtype
    x = x.float()
    logits = torch.baddbmm(weights.bias, _normed(x), weights.to_logits.expand(batch, -1, -1))
    read, _, write = logits.sigmoid().tensor_split((1, streams + 1), dim=-1)
    mix = sinkhorn_of_few(logits[..., 1 : streams + 1])
    mixed = torch.bmm(torch.cat((read, mix), dim=-1).mT, x).to(dtype)
    branch_in, residual = mixed[:, :1], mixed[:, 1:]

    def add_residual(branch_out: Float[Tensor, 'b 1 d']) -> Float[Tensor, 'b s d']:
        return torch.addcmul(residual, write.to(dtype), branch_out.to(dtype), value=2.0)

    return branch_in, add_residual


def _normed(x: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
    """√d · x / ‖x‖: on a GPU by what is a single kernel, on a CPU by the fewest operations."""
    dim = x.shape[-1]
    if x.is_cuda:
        return F.rms_norm(x, (dim,), eps=1e-24)
    return x * (dim**0.5 / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12))
