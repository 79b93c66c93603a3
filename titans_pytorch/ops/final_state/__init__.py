"""Final state of a matrix after a block of chunks: its weights, and its momentum of each order."""

from __future__ import annotations

from torch import Tensor

from titans_pytorch.ops._dispatch import has_short_offsets, use_kernel
from titans_pytorch.ops.final_state import reference
from titans_pytorch.utils.precision import operand_dtype
from titans_pytorch.utils.shapes import Float

WIDEST = 128
"""Most features of the shorter of inputs and deltas, which must fit on chip whole."""
MOST_STATES = 4
"""Most states: the weights, and the momentum of up to three orders."""


def final_state(
    coefficients: Float[Tensor, 'bh k n'],
    initial_coefficients: Float[Tensor, 'bh k k'],
    initial_states: list[Float[Tensor, 'bh d e']],
    inputs: Float[Tensor, 'bh n m d'],
    deltas: Float[Tensor, 'bh n m e'],
) -> list[Float[Tensor, 'bh d e']]:
    """Compute each state after n chunks, where chunk c updates the matrix by X_cᵀ Δ_c:

        final_k = Σ_c coefficients[k, c] · X_cᵀ Δ_c + Σ_j initial_coefficients[k, j] · initial_j

    Args:
        coefficients: coefficient of each chunk's update in each state.
        initial_coefficients: coefficient of each initial state in each final state. State 0 is the weights, the others
            are the momentum of each order. Momentum contains no weights and no momentum of a later order: entries (k,
            0) and (k, j > k) for k > 0 are zero and need not be read.
        initial_states: the k states before the block.
        inputs: X, the rows that each chunk sent through the matrix.
        deltas: Δ, the negative gradients of their products.

    States are in the precision of `coefficients`, products in the precision of autocast or of `deltas`.
    """
    tensors = (coefficients, initial_coefficients, initial_states, inputs, deltas)
    operands = operand_dtype(deltas)
    if use_kernel([inputs, deltas], [coefficients, initial_coefficients, *initial_states]) and _supports(*tensors):
        from titans_pytorch.ops.final_state import triton

        return triton.final_state(*tensors, operands)
    return reference.final_state(*tensors, operands)


def _supports(
    coefficients: Tensor, initial_coefficients: Tensor, initial_states: list[Tensor], inputs: Tensor, deltas: Tensor
) -> bool:
    narrow = min(inputs.shape[-1], deltas.shape[-1]) <= WIDEST
    return narrow and inputs.numel() > 0 and len(initial_states) <= MOST_STATES and has_short_offsets(inputs, deltas)
