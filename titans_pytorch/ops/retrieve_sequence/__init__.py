"""Retrieval over a sequence: queries through a memory MLP whose matrices change over time and are never formed.

A block of n chunks holds each matrix factored: its initial states, and of every chunk the rows X that the matrix saw
and the negative gradients Δ of their products. Rows x of step i, which read the weights before chunk i, go through

    x W_i = Σ_k initial_coefficients[i, k] · x initial_k + ((x Xᵀ) ∘ coefficients[i]) Δ

which is attention without a softmax, and a query q of step i through the network

    x_1 = q    x_{l+1} = gelu(x_l W_l,i)    y = x_L W_L,i    out = LN(y) ∘ (1 + γ_i) + q

with its matrices W_1 to W_L. Without the norm out = y.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from titans_pytorch.ops._dispatch import MOST_ENTRIES, use_kernel
from titans_pytorch.ops.final_state import MOST_STATES
from titans_pytorch.ops.inner_gradient import WIDEST
from titans_pytorch.ops.retrieve_sequence import reference
from titans_pytorch.ops.retrieve_sequence.reference import blocks_at_once, factored_linear
from titans_pytorch.utils.precision import operand_dtype
from titans_pytorch.utils.shapes import Float

__all__ = ['FactoredMatrix', 'blocks_at_once', 'factored_linear', 'retrieve_sequence']


class FactoredMatrix(NamedTuple):
    """A matrix over r blocks of n chunks, with t stored rows in each block, as many of every chunk."""

    initial_states: Float[Tensor, 'bh r k d e']
    """Its weights, and its momentum of each order, before each block."""
    inputs: Float[Tensor, 'bh r t d']
    deltas: Float[Tensor, 'bh r t e']


def retrieve_sequence(
    queries: Float[Tensor, 'bh r n c d'],
    coefficients: Float[Tensor, 'bh r n n'],
    initial_coefficients: Float[Tensor, 'bh r n k'],
    matrices: list[FactoredMatrix],
    gamma: Float[Tensor, 'bh r n d'] | None,
    eps: float,
) -> Float[Tensor, 'bh r n c d']:
    """Queries through a memory MLP, those of step i with the weights before chunk i of their block.

    Args:
        coefficients: of chunk j's update X_jᵀ Δ_j, in the weights before chunk i; only the part below the diagonal is
            read, and the gradient of the rest is zero.
        initial_coefficients: of each initial state.
        matrices: W_1 to W_L, from d features to d. There are kernels for one (…, d, d), and for two (…, d, e) and
            (…, e, d).
        gamma: γ of the norm around the network, in each step; `None` without.
        eps: of that norm.

    Any tensor may be a view; a kernel copies only the last axis unless it is contiguous, and that of initial states
    with the axis before it.

    Returns:
        what the layers give one after the other: in float32 (float64) with the norm, and without it in the precision
        of products, which under autocast is its own.
    """
    factors, states = [queries, *(t for own in matrices for t in own)], [coefficients, initial_coefficients, gamma]
    if use_kernel(factors, states) and _supports(queries, initial_coefficients, matrices):
        from titans_pytorch.ops.retrieve_sequence import triton

        first, last = [(None, None, None), *matrices][-2:]
        tensors = (queries, coefficients, initial_coefficients, *first, *last, gamma)
        return triton.retrieve_sequence(*tensors, eps, operand_dtype(queries))[0]
    return reference.retrieve_sequence(queries, coefficients, initial_coefficients, matrices, gamma, eps)


def _supports(queries: Tensor, initial_coefficients: Tensor, matrices: list[FactoredMatrix]) -> bool:
    steps, rows, dim = queries.shape[2:]
    stored, width = matrices[-1].inputs.shape[2:]
    present = queries.numel() > 0 and stored > 0 and width > 0
    narrow = len(matrices) <= 2 and dim <= WIDEST and initial_coefficients.shape[-1] <= MOST_STATES
    # a block's scores and hidden rows
    return present and narrow and max(stored, width) * max(stored, width, steps * rows) < MOST_ENTRIES
