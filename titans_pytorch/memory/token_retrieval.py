"""Retrieval for a single token from any memory, as decoding does it, between the projections around the heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Module

from titans_pytorch.memory.fast_weights import Weights
from titans_pytorch.memory.modules import MultiheadRMSNorm
from titans_pytorch.memory.token_step import predict
from titans_pytorch.memory_models import ResidualNorm, inner_mlp, mlp_matrices
from titans_pytorch.ops.token_retrieval import token_retrieval
from titans_pytorch.utils.functional import is_intercepted
from titans_pytorch.utils.precision import in_module_precision, network_autocast, network_rows
from titans_pytorch.utils.shapes import Float


class Retrieval(NamedTuple):
    """What a memory's heads are, and what is around each."""

    heads: int
    model: Module
    broadcasts: bool
    """Whether `model` takes weights with axes in front as it is."""
    query_norm: Module
    value_norm: Module
    gate: nn.Sequential | None
    """A linear map to logits for each head, and what makes factors of them."""
    dtype: torch.dtype
    """Of the module."""


def retrieve_one(
    parts: Retrieval, weights: Weights, projected: Float[Tensor, 'b 1 hd'], normed: Float[Tensor, 'b 1 d']
) -> Float[Tensor, 'b 1 hd']:
    """What each head's memory answers, gated.

    Args:
        weights: of the memories, (bh, …) by parameter.
        projected: the query of each head, not normalised yet.
        normed: the input, which the gate looks at.
    """
    if _is_plain(parts):
        norm, query_norm = parts.model.norm if isinstance(parts.model, ResidualNorm) else None, parts.query_norm
        gate = None
        if parts.gate is not None:
            to_gate = parts.gate[0]
            assert isinstance(to_gate, nn.Linear)
            gate = normed, to_gate.weight
        return token_retrieval(
            projected,
            mlp_matrices(parts.model, weights),
            (query_norm.gamma, query_norm.rmsnorm.eps) if isinstance(query_norm, MultiheadRMSNorm) else None,
            None if norm is None else (weights['norm.gamma'], norm.eps),
            gate,
            parts.heads,
        )
    queries = parts.query_norm(projected.unflatten(-1, (parts.heads, -1)).transpose(1, 2))
    with network_autocast(parts.dtype, projected.device):
        rows = network_rows(queries.flatten(0, 1), parts.dtype)
        values = in_module_precision(predict(parts.model, weights, rows, parts.broadcasts), parts.dtype)
    values = parts.value_norm(values.unflatten(0, (-1, parts.heads)))
    if parts.gate is not None:
        values = values * parts.gate(normed)
    return values.transpose(1, 2).flatten(2)


def _is_plain(parts: Retrieval) -> bool:
    """True if `token_retrieval` computes all of it: a memory MLP of one or two matrices, the default norms and gate,
    and no hooks."""
    mlp, gate = inner_mlp(parts.model), parts.gate
    if mlp is None or len(mlp.weights) > 2 or parts.dtype not in (torch.float32, torch.float64):
        return False
    if type(parts.query_norm) not in (nn.Identity, MultiheadRMSNorm) or type(parts.value_norm) is not nn.Identity:
        return False
    if gate is not None and (type(gate[0]) is not nn.Linear or gate[0].out_features != parts.heads):
        return False
    around = (parts.query_norm, parts.value_norm) if gate is None else (parts.query_norm, parts.value_norm, *gate)
    return not is_intercepted(around)
