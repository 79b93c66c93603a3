"""What a memory retrieves for a single token, as decoding does it, between the projections before and after its heads.

On a GPU it is one kernel for a `MemoryMLP` of one or two matrices; elsewhere, and for all others, there are plain
operations.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Module

from titans_pytorch.memory.backends.base import Backend
from titans_pytorch.memory.fast_weights import Weights
from titans_pytorch.memory.modules import MultiheadRMSNorm
from titans_pytorch.memory_models import ResidualNorm, inner_mlp, mlp_matrices
from titans_pytorch.ops import _dispatch
from titans_pytorch.utils.precision import in_module_precision, network_autocast, network_rows
from titans_pytorch.utils.shapes import Float

USE_KERNEL: bool | None = None
"""Whether the Triton kernel retrieves. Default: on CUDA devices, where there is Triton."""


class Retrieval(NamedTuple):
    """What a memory's heads are, and what is around each."""

    heads: int
    backend: Backend
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
    kernel = _kernel_for(parts, weights, projected)
    if kernel is None:
        return plain_retrieve_one(parts, weights, projected, normed)
    norm = parts.backend.network.norm if isinstance(parts.backend.network, ResidualNorm) else None
    return kernel.retrieve(
        projected,
        mlp_matrices(parts.backend.network, weights),
        _gain_and_eps(parts.query_norm),
        None if norm is None else (weights['norm.gamma'], norm.eps),
        None if parts.gate is None else (normed, parts.gate[0].weight),
        parts.heads,
    )


def _kernel_for(parts: Retrieval, weights: Weights, projected: Tensor) -> Any:
    """The kernel, if it is to be used and computes this: in float32, and without a gradient."""
    asked = projected.is_cuda if USE_KERNEL is None else USE_KERNEL
    if not (asked and _dispatch.kernels_are_on()) or torch.is_grad_enabled():
        return None
    kernel = _kernel()
    mlp = inner_mlp(parts.backend.network)
    if kernel is None or mlp is None or len(mlp.weights) > 2:
        return None
    if type(parts.query_norm) not in (nn.Identity, MultiheadRMSNorm) or type(parts.value_norm) is not nn.Identity:
        return None
    if parts.gate is not None and (type(parts.gate[0]) is not nn.Linear or parts.gate[0].out_features != parts.heads):
        return None
    if parts.dtype != torch.float32 or any(w.dtype != torch.float32 or not w.is_contiguous() for w in weights.values()):
        return None
    fits = all(matrix.numel() <= kernel.LARGEST for matrix in mlp.weights)
    return kernel if fits else None


@functools.cache
def _kernel() -> Any:
    """Imported where it is used: without a GPU there need be no Triton."""
    try:
        from titans_pytorch.ops.token_retrieval import triton as kernel
    except ImportError:
        return None
    return kernel


def _gain_and_eps(norm: Module) -> tuple[Float[Tensor, 'h 1 d'], float] | None:
    if not isinstance(norm, MultiheadRMSNorm):
        return None
    eps = norm.rmsnorm.eps
    return norm.gamma, torch.finfo(torch.float32).eps if eps is None else eps


def plain_retrieve_one(
    parts: Retrieval, weights: Weights, projected: Float[Tensor, 'b 1 hd'], normed: Float[Tensor, 'b 1 d']
) -> Float[Tensor, 'b 1 hd']:
    queries = parts.query_norm(projected.unflatten(-1, (parts.heads, -1)).transpose(1, 2))
    with network_autocast(parts.dtype, projected.device):
        rows = network_rows(queries.flatten(0, 1), parts.dtype)
        values = in_module_precision(parts.backend.apply(weights, rows), parts.dtype)
    values = parts.value_norm(values.unflatten(0, (-1, parts.heads)))
    if parts.gate is not None:
        values = values * parts.gate(normed)
    return values.transpose(1, 2).flatten(2)
