"""Storing a series of memory batches in a linear memory, M(k) = k W, without a step for each memory batch.

The gradient of a row is that of a squared error at the weights at the start of its memory batch, so its update is kᵀ δ
with δ = β ε, ε = v − k W_base and β = 2 θ / d. Within a block of n chunks, W_base is itself a combination of the
block's initial states and of the updates of earlier memory batches, with the coefficients of momentum and decay. The ε
of a block, which are the rows of E, are therefore the solution of a single unit lower triangular system:

    (I + (A ∘ K Kᵀ) diag(β)) E = V − Σ_k a_k ∘ K state_k    and    Δ = diag(β) E

where A holds the coefficient of each row's update in the base weights of each other row, and a_k the coefficient of
each initial state. Only the states pass from block to block:

    state_k ← Σ_c final[k, c] · K_cᵀ Δ_c + Σ_i initial_final[k, i] · state_i

With chunks and memory batches of one token this is the gated delta rule (arXiv 2412.06464), with momentum.

Proximal steps (`titans_pytorch.ops.proximal_steps`) are linear too, because the curvature of a row is β times the
number of steps that add up. In A, that number then becomes the coefficient of the updates of a row's own chunk, so the
system is triangular only in blocks of chunks, and E holds the errors at the end of each step. The limit on the
curvature becomes a limit on θ here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.ops._dispatch import use_kernel
from titans_pytorch.ops.final_state import MOST_STATES
from titans_pytorch.ops.linear_memory_scan import reference
from titans_pytorch.utils.precision import operand_dtype
from titans_pytorch.utils.shapes import Float

MOST_ROWS = 64
"""Most rows in a block; a program of the kernels holds all of them."""
# most features of all states together, each padded to a power of two, and most features of one state
_MOST_FEATURES, _WIDEST = 256, 128


class LinearBlocks(NamedTuple):
    """States and updates of r blocks of t = n · m rows."""

    initial: Float[Tensor, 'bh r k d e']
    """States before each block: the weights and the momentum of each order."""
    final: Float[Tensor, 'bh k d e']
    """States after the last block."""
    deltas: Float[Tensor, 'bh r t e']
    """Δ, in the precision of products."""
    losses: Float[Tensor, 'bh r n m'] | None
    """Mean squared errors of the rows before they are stored, unweighted."""


def linear_memory_scan(
    keys: Float[Tensor, 'bh rn m d'],
    values: Float[Tensor, 'bh rn m e'],
    step_sizes: Float[Tensor, 'bh rn m'],
    states: list[Float[Tensor, 'bh d e']],
    steps: Float[Tensor, 'bh r n n'],
    initial_steps: Float[Tensor, 'bh r n k'],
    final: Float[Tensor, 'bh r k n'],
    initial_final: Float[Tensor, 'bh r k k'],
    chunks_per_batch: int,
    num_proximal_steps: int | None = None,
    with_losses: bool = True,
) -> LinearBlocks:
    """Store r blocks of n chunks; a block is one or more whole memory batches.

    Args:
        step_sizes: θ of each row.
        states: the weights before the first block and the momentum of each order.
        steps, initial_steps, final, initial_final: for each block, as in `memory.coefficients.Coefficients`.
        chunks_per_batch: chunks in a memory batch; divides n.
        num_proximal_steps: take proximal steps instead; this many of them add up at the same weights.

    States, gates and sums are in at least float32, and so is the inverse of the system, because it amplifies rounding
    errors. If operands are in half precision, the kernel's other products are in TF32.
    """
    operands, (length, rows) = operand_dtype(keys), (steps.shape[2], keys.shape[2])
    own_coefficient = num_proximal_steps or 0
    coefficients = (steps, initial_steps, final, initial_final)
    if use_kernel([keys, values, step_sizes], [*states, *coefficients]) and _supports(keys, states, length * rows):
        from titans_pytorch.ops.linear_memory_scan import triton

        stacked = torch.stack(states, dim=1)
        initial, last, deltas, errors, *_ = triton.linear_memory_scan(
            keys, values, step_sizes, stacked, *coefficients, chunks_per_batch, own_coefficient, operands
        )
    else:
        initial, last, deltas, errors = reference.linear_memory_scan(
            keys, values, step_sizes, states, *coefficients, chunks_per_batch, own_coefficient
        )
    if not with_losses:
        return LinearBlocks(initial, last, deltas.to(operands), None)
    if own_coefficient:
        # losses are taken before the step, but E at its end
        given = keys, values, step_sizes, steps, initial_steps, chunks_per_batch, own_coefficient
        errors = reference.errors_at_base(*given, initial, errors)
    losses = errors.square().mean(dim=-1).unflatten(2, (length, rows))
    return LinearBlocks(initial, last, deltas.to(operands), losses)


def _supports(keys: Tensor, states: list[Tensor], rows: int) -> bool:
    dim, width = states[0].shape[1:]
    padded = _power_of_two(len(states)) * _power_of_two(dim)
    on_chip = padded <= _MOST_FEATURES and max(dim, width) <= _WIDEST and rows <= MOST_ROWS
    return on_chip and keys.numel() > 0 and len(states) <= MOST_STATES


def _power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()
