"""Reference implementation of retrieval for a single token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.ops.norms import layer_norm
from titans_pytorch.utils.precision import network_autocast, network_rows
from titans_pytorch.utils.shapes import Float


def token_retrieval(
    projected: Float[Tensor, 'b 1 hd'],
    matrices: list[Float[Tensor, 'bh _ _']],
    query_norm: tuple[Float[Tensor, 'h 1 d'], float | None] | None,
    norm: tuple[Float[Tensor, 'bh d'], float | None] | None,
    gate: tuple[Float[Tensor, 'b 1 x'], Float[Tensor, 'h x']] | None,
    heads: int,
) -> Float[Tensor, 'b 1 hd']:
    queries = projected.unflatten(-1, (heads, -1)).transpose(1, 2)
    if query_norm is not None:
        gain, eps = query_norm
        queries = F.rms_norm(queries, queries.shape[-1:], eps=eps) * (gain + 1.0)

    dtype = matrices[0].dtype
    values = rows = network_rows(queries.flatten(0, 1), dtype)
    with network_autocast(dtype, projected.device):
        for layer, matrix in enumerate(matrices):
            values = torch.bmm(F.gelu(values) if layer > 0 else values, matrix)
        if norm is not None:
            gamma, norm_eps = norm
            assert norm_eps is not None
            values = torch.addcmul(rows, layer_norm(values, norm_eps), gamma.unsqueeze(-2) + 1.0)

    values = values.unflatten(0, (len(projected), heads))
    if gate is not None:
        inputs, weight = gate
        values = values * F.linear(inputs, weight).unflatten(-1, (heads, 1)).transpose(1, 2).sigmoid()
    return values.transpose(1, 2).flatten(2)
