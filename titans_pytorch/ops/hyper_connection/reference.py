"""Hyper-connections of a sequence in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.ops.sinkhorn import sinkhorn
from titans_pytorch.utils.precision import no_autocast
from titans_pytorch.utils.shapes import Float


def hyper_connection(
    x: list[Tensor], weights: list[Tensor], iters: int, eps: float
) -> tuple[
    Float[Tensor, 'b n d'],
    Float[Tensor, 'bs n d'] | Float[Tensor, ' 0'],
    Float[Tensor, 'bs n 1'] | Float[Tensor, ' 0'],
]:
    dtype, full = x[0].dtype, torch.promote_types(x[0].dtype, torch.float32)
    streams, adds = len(weights[1]), len(weights) == 8
    gamma, bias, to_read_and_mix, read_scale, mix_scale, *for_writing = (t.to(full) for t in weights)

    to_logits = to_read_and_mix[0] * torch.cat((read_scale, mix_scale.expand(streams)))
    if adds:
        write_bias, to_write, write_scale = for_writing
        to_logits = torch.cat((to_logits, (to_write * write_scale).unsqueeze(1)), dim=1)
        bias = torch.cat((bias, write_bias.unsqueeze(1)), dim=1)
    else:
        to_logits, bias = to_logits[:, :1], bias[:, :1]
    to_logits = to_logits * (gamma.unsqueeze(1) + 1)

    with no_autocast(x[0]):
        now = _by_position(x[0].to(full), streams)
        if len(x) > 1:
            write, branch_out = _by_position(x[1].to(full), streams), x[2].to(full).unsqueeze(2)
            now = torch.addcmul(now, write, branch_out, value=2.0)
        # normalisation comes last, as a factor on the logits
        norm = torch.linalg.vector_norm(now, dim=-1, keepdim=True).clamp(min=eps)
        logits = torch.addcdiv(bias, now @ to_logits, norm, value=now.shape[-1] ** 0.5)
        read = logits[..., :1].sigmoid()
        if not adds:
            return (read.mT @ now).squeeze(2).to(dtype), x[0].new_empty(0), now.new_empty(0)
        mixed = torch.cat((read, sinkhorn(logits[..., 1:-1], iters)), dim=-1).mT @ now
        branch_in, mixed = mixed[:, :, 0].to(dtype), _by_stream(mixed[:, :, 1:]).to(dtype)
        return branch_in, mixed, _by_stream(logits[..., -1:].sigmoid())


def _by_position(x: Float[Tensor, 'bs n d'], streams: int) -> Float[Tensor, 'b n s d']:
    return x.unflatten(0, (len(x) // streams, streams)).transpose(1, 2)


def _by_stream(x: Float[Tensor, 'b n s d']) -> Float[Tensor, 'bs n d']:
    return x.transpose(1, 2).flatten(0, 1)
