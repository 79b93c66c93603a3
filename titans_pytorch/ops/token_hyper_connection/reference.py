"""Hyper-connections of a single token in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.ops.sinkhorn.reference import loop_in_log_space
from titans_pytorch.utils.shapes import Float


def token_hyper_connection(
    x: Float[Tensor, 'b s d'],
    pending: tuple[Float[Tensor, 'b s 1'], Float[Tensor, 'b 1 d']] | None,
    to_logits: Float[Tensor, 'l d'],
    bias: Float[Tensor, 's l'],
    iters: int,
    eps: float,
) -> tuple[Float[Tensor, 'b 1 d'], Float[Tensor, 'b s d'], Float[Tensor, 'b s l-s-1']]:
    streams, dtype = x.shape[1], x.dtype
    if pending is not None:
        write, branch_out = pending
        x = torch.addcmul(x, write, branch_out.to(dtype), value=2.0)
    x = x.to(bias.dtype)
    # normalisation comes last, as a factor on the logits
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=eps)
    logits = torch.addcdiv(bias, F.linear(x, to_logits), norm, value=x.shape[-1] ** 0.5)
    read, _, write = logits.sigmoid().tensor_split((1, streams + 1), dim=-1)
    mix = loop_in_log_space(logits[..., 1 : streams + 1], iters, eps)
    mixed = torch.bmm(torch.cat((read, mix), dim=-1).mT, x).to(dtype)
    return mixed[:, :1], mixed[:, 1:], write.to(dtype)
