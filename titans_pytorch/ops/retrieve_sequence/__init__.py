"""Retrieval over a sequence: queries through a memory MLP whose matrices change over time and are never formed.

A block of n chunks holds each matrix factored: its initial states, and of every chunk the rows X that the matrix saw
and the negative gradients Δ of their products. Rows x of step i, which read the weights before chunk i, go through

    x W_i = Σ_k initial_coefficients[i, k] · x initial_k + ((x Xᵀ) ∘ coefficients[i]) Δ

which is attention without a softmax, and a query q of step i through the network

    h = q W₁_i    a = gelu(h)    y = a W₂_i    out = LN(y) ∘ (1 + γ_i) + q

Without the norm out = y; with one matrix y = q W₂_i.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from titans_pytorch.ops._dispatch import use_kernel
from titans_pytorch.ops.final_state import MOST_STATES
from titans_pytorch.ops.inner_gradient import WIDEST
from titans_pytorch.ops.retrieve_sequence import reference
from titans_pytorch.utils.precision import operand_dtype
from titans_pytorch.utils.shapes import Float

MOST_ENTRIES = 2**31
"""Entries of a block's scores or hidden rows, at most: offsets among them have 32 bits."""


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
    first: FactoredMatrix | None,
    last: FactoredMatrix,
    gamma: Float[Tensor, 'bh r n d'] | None,
    eps: float,
) -> Float[Tensor, 'bh r n c d']:
    """Queries through a memory MLP, those of step i with the weights before chunk i of their block.

    Args:
        coefficients: of chunk j's update X_jᵀ Δ_j, in the weights before chunk i; only the part below the diagonal is
            read, and the gradient of the rest is zero.
        initial_coefficients: of each initial state.
        first: W₁; `None` if the memory is one matrix.
        last: W₂, or the one matrix, with initial states (bh, r, k, d, d).
        gamma: γ of the norm around the network, in each step; `None` without.
        eps: of that norm.

    Any tensor may be a view; a kernel copies only the last axis unless it is contiguous, and that of initial states
    with the axis before it.

    Returns:
        what the layers give one after the other: in float32 (float64) with the norm, and without it in the precision
        of products, which under autocast is its own.
    """
    first_initial, first_inputs, first_deltas = (None, None, None) if first is None else first
    of_first = (first_initial, first_inputs, first_deltas)
    tensors = (queries, coefficients, initial_coefficients, *of_first, *last, gamma)
    rows = (queries, first_inputs, first_deltas, last.inputs, last.deltas)
    states = (coefficients, initial_coefficients, first_initial, last.initial_states, gamma)
    if use_kernel(rows, states) and _supports(queries, initial_coefficients, last):
        from titans_pytorch.ops.retrieve_sequence import triton

        return triton.retrieve_sequence(*tensors, eps, operand_dtype(queries))[0]
    return reference.retrieve_sequence(*tensors, eps)


def _supports(queries: Tensor, initial_coefficients: Tensor, last: FactoredMatrix) -> bool:
    steps, rows, dim = queries.shape[2:]
    stored, width = last.inputs.shape[2:]
    present = queries.numel() > 0 and stored > 0 and width > 0
    narrow = dim <= WIDEST and initial_coefficients.shape[-1] <= MOST_STATES
    return present and narrow and max(stored, width) * max(stored, width, steps * rows) < MOST_ENTRIES
