"""Retrieval over a sequence: queries through a memory MLP whose matrices change over time and are never formed.

A block of n chunks holds each matrix in factored form: its initial states and, for every chunk, the rows X that it was
applied to and the negative gradients Δ of their products. Rows x of step i, which read the weights before chunk i,
become

    x W_i = Σ_k initial_coefficients[i, k] · x initial_k + ((x Xᵀ) ∘ coefficients[i]) Δ

This is attention without a softmax. A query q of step i goes through the network as

    x_1 = q    x_{l+1} = gelu(x_l W_l,i)    y = x_L W_L,i    out = LN(y) ∘ (1 + γ_i) + q

with its matrices W_1 to W_L. Without the norm, out = y.
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
    """A matrix over r blocks of n chunks; each block has t stored rows, equally many for every chunk."""

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
    """Send queries through a memory MLP; queries of step i read the weights before chunk i of their block.

    Args:
        coefficients: coefficient of chunk j's update X_jᵀ Δ_j in the weights before chunk i; only the part below the
            diagonal is read, and the gradient of the rest is zero.
        initial_coefficients: coefficient of each initial state.
        matrices: W_1 to W_L, from d features to d. There are kernels for one matrix (…, d, d), and for two, (…, d, e)
            and (…, e, d).
        gamma: γ of the norm around the network, for each step; `None` without a norm.
        eps: ε of that norm.

    Any tensor may be a view. A kernel copies a tensor only if its last axis (for initial states, its last two) is not
    contiguous.

    Returns:
        the output of the network: with the norm in float32 (float64), without it in the precision of products, which
        under autocast is autocast's.
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
    # entries of a block's scores and hidden rows
    return present and narrow and max(stored, width) * max(stored, width, steps * rows) < MOST_ENTRIES
