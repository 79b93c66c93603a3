"""Retrieval for a single token in decoding: one operation between the projections to queries and from heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Module

from titans_pytorch.memory.fast_weights import Weights
from titans_pytorch.memory.modules import MultiheadRMSNorm, SplitHeads, is_norm_of_heads, logits_of
from titans_pytorch.memory_models import PlainMLP
from titans_pytorch.ops.token_retrieval import token_retrieval
from titans_pytorch.utils.plain import is_plain, is_plain_linear
from titans_pytorch.utils.shapes import Float


class PlainRetrieval(NamedTuple):
    """The parts of a memory that retrieval uses, in cases that the operation `token_retrieval` covers."""

    heads: int
    mlp: PlainMLP
    """One or two matrices."""
    query_norm: MultiheadRMSNorm | None
    to_gate: nn.Linear | None
    """Matrix to a logit for each head."""

    @classmethod
    def of(
        cls,
        heads: int,
        mlp: PlainMLP | None,
        split: Module,
        query_norm: Module,
        value_norm: Module,
        gate: Module | None,
        dtype: torch.dtype,
    ) -> PlainRetrieval | None:
        """`None` for what the operation does not cover: other networks, norms and gates, half precision, hooks.

        Args:
            split: splits queries into heads.
            gate: maps tokens to gates.
            dtype: precision of the memory's module.
        """
        if mlp is None or len(mlp.matrices) > 2 or dtype not in (torch.float32, torch.float64):
            return None
        if not (is_plain(split, SplitHeads) and is_norm_of_heads(query_norm) and is_plain(value_norm, nn.Identity)):
            return None
        to_gate: Any = logits_of(gate)
        is_linear = to_gate is not None and is_plain_linear(to_gate)
        if gate is not None and (not is_linear or to_gate.out_features != heads or to_gate.bias is not None):
            return None
        return cls(heads, mlp, query_norm if isinstance(query_norm, MultiheadRMSNorm) else None, to_gate)

    def __call__(
        self, weights: Weights, projected: Float[Tensor, 'b 1 hd'], normed: Float[Tensor, 'b 1 d']
    ) -> Float[Tensor, 'b 1 hd']:
        """Compute the gated values of all heads.

        Args:
            weights: weights of the memories, (bh, …) by parameter.
            projected: queries of all heads, not yet normalised.
            normed: input of the gate.
        """
        matrices, gamma = self.mlp.of_weights(weights)
        return token_retrieval(
            projected,
            matrices,
            None if self.query_norm is None else (self.query_norm.gamma, self.query_norm.rmsnorm.eps),
            None if gamma is None else (gamma, self.mlp.eps),
            None if self.to_gate is None else (normed, self.to_gate.weight),
            self.heads,
        )
