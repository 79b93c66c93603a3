"""Sequential scan over memory batches, which are stored in a memory MLP one after another.

The gradients of a memory batch are taken at the weights that the previous one left, so the batches form a recurrence.
For each memory batch j of n chunks, where state 0 is the weights and the others are the momentum of each order:

    X, Δ, g, losses = inner_gradient(keys_j, values_j, θ_j; W, γ)        at state 0
    state_k ← Σ_c coefficients[j, k, c] · X_cᵀ Δ_c + Σ_i initial_coefficients[j, k, i] · state_i

for each matrix, and for γ with its negative gradient g in place of X_cᵀ Δ_c.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.ops._dispatch import use_kernel
from titans_pytorch.ops.final_state import MOST_STATES
from titans_pytorch.ops.inner_gradient import WIDEST
from titans_pytorch.ops.memory_batch_scan import reference
from titans_pytorch.utils.precision import operand_dtype
from titans_pytorch.utils.shapes import Float

# limits of the kernels that keep states on chip: rows of a memory batch, features, hidden features. With more rows,
# keeping states in memory is faster (measured: 32 and 64)
_MOST_ROWS, _MOST_FEATURES, _MOST_UNITS = 32, 64, 512


class MemoryBatches(NamedTuple):
    """States and updates of r blocks of one or more memory batches, with t = n · m rows each. Lists have an entry for
    each matrix."""

    initial: list[Float[Tensor, 'bh r k _d _e']]
    """States before each block; a kernel returns them in the precision of products."""
    gamma_initial: Float[Tensor, 'bh r k d'] | None
    """The same for γ of the norm; `None` without a norm."""
    final: list[Float[Tensor, 'bh k _d _e']]
    """States after the last block."""
    gamma_final: Float[Tensor, 'bh k d'] | None
    inputs: list[Float[Tensor, 'bh r t _d']]
    """X, in the precision of products, like Δ."""
    deltas: list[Float[Tensor, 'bh r t _e']]
    """Δ, or the factors of proximal steps if these were taken."""
    negative_gamma_gradient: Float[Tensor, 'bh r n d'] | None
    losses: Float[Tensor, 'bh r n m'] | None
    """Losses before the rows are stored, unweighted; `None` if they will not be read."""


def memory_batch_scan(
    keys: Float[Tensor, 'bh rn m d'],
    values: Float[Tensor, 'bh rn m d'],
    step_sizes: Float[Tensor, 'bh rn m'],
    matrices: list[list[Float[Tensor, 'bh _d _e']]],
    gamma: list[Float[Tensor, 'bh d']] | None,
    coefficients: Float[Tensor, 'bh j k n'],
    initial_coefficients: Float[Tensor, 'bh j k k'],
    eps: float,
    batches_per_block: int = 1,
) -> MemoryBatches:
    """Store memory batches, one after another.

    Args:
        matrices: for each matrix, its weights before the first memory batch and its momentum of each order. There are
            kernels for one matrix (bh, d, d), and for two, (bh, d, e) and (bh, e, d).
        gamma: the same for γ of the norm around the network; `None` without a norm.
        coefficients: coefficient of each chunk's update in each state after its memory batch.
        initial_coefficients: coefficient of each state before a memory batch in each state after it, structured as in
            `final_state`.
        eps: ε of the norm.
        batches_per_block: number of memory batches in a block, which divides the number of all; states are returned per
            block.

    States are in their own precision, products in the precision of autocast or of the keys.
    """
    rows, of_states = (keys, values, step_sizes), (coefficients, initial_coefficients)
    operands, chunks, num_states = operand_dtype(keys), coefficients.shape[3], len(matrices[0])
    settings = coefficients.requires_grad, eps, operands
    uses_kernel = use_kernel(rows, [*chain(*matrices, gamma or []), *of_states]) and keys.numel() > 0
    if uses_kernel and fits_on_chip([own[0] for own in matrices], num_states, chunks * keys.shape[2]):
        from titans_pytorch.ops.memory_batch_scan import triton_on_chip

        stacked = (None if own is None else torch.stack(own, dim=1) for own in (*matrices, gamma))
        options = batches_per_block, torch.is_grad_enabled(), *settings
        outputs = triton_on_chip.memory_batch_scan_on_chip(*rows, *stacked, *of_states, *options)
        batches = _of_kernel(keys.to(operands), chunks, *outputs[: triton_on_chip.FOR_BACKWARD.start])
        gamma_updates = batches.negative_gamma_gradient
        if gamma_updates is not None:
            gamma_updates = gamma_updates.unflatten(2, (chunks, -1)).sum(dim=3)
        return _in_blocks(batches._replace(negative_gamma_gradient=gamma_updates), batches_per_block)

    in_memory = len(matrices) <= 2 and num_states <= MOST_STATES and keys.shape[-1] <= WIDEST
    if uses_kernel and in_memory:
        from titans_pytorch.ops.memory_batch_scan import triton

        first, last = [[], *matrices][-2:]
        outputs = triton.memory_batch_scan(*rows, first, last, gamma or [], *of_states, *settings)
        batches = _of_kernel(keys.to(operands), chunks, *outputs)
    else:
        batches = MemoryBatches(*reference.memory_batch_scan(*rows, matrices, gamma, *of_states, eps, operands))
    initial = [own[:, ::batches_per_block] for own in batches.initial]
    gamma_initial = None if batches.gamma_initial is None else batches.gamma_initial[:, ::batches_per_block]
    return _in_blocks(batches._replace(initial=initial, gamma_initial=gamma_initial), batches_per_block)


def _of_kernel(keys: Tensor, chunks: int, *outputs: Tensor) -> MemoryBatches:
    """Outputs of a kernel, in which absent ones are empty; each memory batch is a block."""
    first, last, gamma, first_final, last_final, gamma_final, hidden, hidden_deltas, deltas, gamma_updates, losses = (
        None if t.numel() == 0 else t for t in outputs
    )
    inputs = keys.unflatten(1, (-1, chunks)).flatten(2, 3)

    def of_matrices(*tensors: Tensor | None) -> list[Tensor]:
        return [t for t in tensors if t is not None]

    return MemoryBatches(
        of_matrices(first, last), gamma, of_matrices(first_final, last_final), gamma_final,
        of_matrices(inputs, hidden), of_matrices(hidden_deltas, deltas), gamma_updates, losses,  # type: ignore[arg-type]
    )  # fmt: skip


def _in_blocks(batches: MemoryBatches, batches_per_block: int) -> MemoryBatches:
    """Put the rows of a block's memory batches together."""

    def of_block(t: Float[Tensor, 'bh j t ...']) -> Float[Tensor, 'bh r _t ...']:
        return t if batches_per_block == 1 else t.unflatten(1, (-1, batches_per_block)).flatten(2, 3)

    inputs, deltas = ([of_block(t) for t in own] for own in (batches.inputs, batches.deltas))
    others = (None if t is None else of_block(t) for t in (batches.negative_gamma_gradient, batches.losses))
    return MemoryBatches(*batches[:4], inputs, deltas, *others)


def fits_on_chip(matrices: list[Float[Tensor, 'bh _d _e']], num_states: int, rows: int) -> bool:
    """Whether kernels can keep the states of a memory MLP on chip, given its weights and the rows of a memory batch."""
    dim, width = matrices[0].shape[1:]
    fits = num_states <= 2 and dim <= _MOST_FEATURES and width <= _MOST_UNITS and rows <= _MOST_ROWS
    return fits and len(matrices) == 2
