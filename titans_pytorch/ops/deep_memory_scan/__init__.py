"""Storing a series of memory batches in a memory MLP of any depth, with states kept once per block of memory batches.

With matrices W_1 to W_L, gelu between them and optionally a layer norm around them, the gradients of a memory batch of
keys k and values v, at the weights before it, are those of

    X_1 = k    h_l = X_l W_l    X_{l+1} = gelu(h_l)    Δ_L from the loss of h_L    Δ_l = (Δ_{l+1} W_{l+1}ᵀ) ∘ gelu′(h_l)

where the loss and Δ_L are those of `inner_gradient`. Within a block of n chunks, these weights are a combination of the
block's initial states (the weights, and the momentum of each order) and of the updates of earlier memory batches, with
the coefficients of momentum and decay. They are never formed:

    x W = Σ_k a_k · x state_k + ((x Xᵀ) ∘ A) Δ

with the rows X and Δ of the earlier memory batches, and likewise for Δ Wᵀ. Only the states pass from block to block:

    state_k ← Σ_c final[k, c] · X_cᵀ Δ_c + Σ_i initial_final[k, i] · state_i

Proximal steps (`titans_pytorch.ops.proximal_steps`) are taken from the gradients of a memory batch, chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.ops._dispatch import AMPERE, HOPPER, use_kernel
from titans_pytorch.ops.deep_memory_scan import reference
from titans_pytorch.ops.inner_gradient import WIDEST
from titans_pytorch.ops.memory_batch_scan import MemoryBatches
from titans_pytorch.utils.precision import operand_dtype
from titans_pytorch.utils.shapes import Float

MOST_ROWS = 64
"""Most rows in a block; a program of the kernels holds all of them."""
_MOST_MATRICES, _MOST_STATES, _MOST_UNITS = 4, 2, 1024


def deep_memory_scan(
    keys: Float[Tensor, 'bh rn m d'],
    values: Float[Tensor, 'bh rn m d'],
    step_sizes: Float[Tensor, 'bh rn m'],
    matrices: list[list[Tensor]],
    gamma: list[Float[Tensor, 'bh d']] | None,
    steps: Float[Tensor, 'bh r n n'],
    initial_steps: Float[Tensor, 'bh r n k'],
    final: Float[Tensor, 'bh r k n'],
    initial_final: Float[Tensor, 'bh r k k'],
    eps: float,
    chunks_per_batch: int,
    num_proximal_steps: int | None = None,
) -> MemoryBatches:
    """Store r blocks of n chunks; a block is one or more whole memory batches.

    Args:
        step_sizes: θ of each row.
        matrices: for each matrix (bh, d, e), its weights before the first block and its momentum of each order. Between
            the first and the last, matrices are square.
        gamma: the same for γ of the norm around the network; `None` without a norm.
        steps, initial_steps, final, initial_final: for each block, as in `memory.coefficients.Coefficients`.
        eps: ε of the norm.
        chunks_per_batch: chunks in a memory batch; divides n.
        num_proximal_steps: take proximal steps instead; this many of them add up at the same weights.

    States and sums are in their own precision, but the states before each block are returned in the precision of
    products, which is that of autocast or of the keys.
    """
    operands, coefficients = operand_dtype(keys), (steps, initial_steps, final, initial_final)
    states = [state for own in (*matrices, gamma or []) for state in own]
    rows, weights = (keys, values, step_sizes), [own[0] for own in matrices]
    in_block = steps.shape[2] * keys.shape[2]
    fits = _supports(weights, len(matrices[0]), in_block) and keys.numel() > 0
    if not (fits and use_kernel(rows, [*states, *coefficients], capability=_capability(keys.shape[3]))):
        return MemoryBatches(
            *reference.deep_memory_scan(
                *rows, matrices, gamma, *coefficients, eps, chunks_per_batch, num_proximal_steps, operands
            )
        )

    from titans_pytorch.ops.deep_memory_scan import triton

    # matrix by matrix, so that all states of one can be read as a single matrix
    flat = torch.cat([torch.stack(own, dim=1).flatten(1) for own in matrices], dim=1)
    of_gamma = None if gamma is None else torch.stack(gamma, dim=1)
    sizes = weights[0].shape[2], len(matrices), chunks_per_batch
    settings = torch.is_grad_enabled(), eps, num_proximal_steps, operands
    out = triton.deep_memory_scan(*rows, flat, of_gamma, *coefficients, *sizes, *settings)
    last_states, gamma_states, initial, inputs, deltas, gamma_updates, losses = out[:7]

    def by_matrix(flat: Tensor) -> list[Tensor]:
        parts = flat.split([len(own) * own[0][0].numel() for own in matrices], dim=-1)
        return [part.unflatten(-1, (len(own), *own[0].shape[1:])) for part, own in zip(parts, matrices)]

    widths = [keys.shape[3], *(own[0].shape[2] for own in matrices)]
    k = keys.to(operands).unflatten(1, steps.shape[1:3]).flatten(2, 3)
    # rows of all matrices are as long as those of the widest one
    of_inputs = [k, *(x[..., :width] for x, width in zip(inputs.unbind(0)[1:], widths[1:]))]
    of_deltas = [d[..., :width] for d, width in zip(deltas.unbind(0), widths[1:])]
    gamma_initial = gamma_final = negative_gamma_gradient = None
    if gamma is not None:
        gamma_initial, last = gamma_states.split((steps.shape[1], 1), dim=1)
        gamma_final = last.squeeze(1)
        negative_gamma_gradient = gamma_updates.unflatten(2, (-1, keys.shape[2])).sum(dim=3)
    return MemoryBatches(
        by_matrix(initial), gamma_initial, by_matrix(last_states), gamma_final,
        of_inputs, of_deltas, negative_gamma_gradient, losses,
    )  # fmt: skip


def has_kernel(matrices: list[Float[Tensor, 'bh _d _e']], num_states: int, rows: int) -> bool:
    """Whether kernels run for memory batches of this many rows, given the weights of each matrix and its number of
    states."""
    runs = use_kernel(matrices, matrices, capability=_capability(matrices[0].shape[1]))
    return runs and _supports(matrices, num_states, rows)


def _capability(dim: int) -> int:
    """The compute capability with enough shared memory for rows of this many features."""
    return AMPERE if dim <= 64 else HOPPER


def _supports(matrices: list[Tensor], num_states: int, rows_of_block: int) -> bool:
    """Whether the kernels' limits allow this; a block may be a single memory batch."""
    dim, width = matrices[0].shape[1:]
    fits = rows_of_block <= MOST_ROWS and dim <= WIDEST and width <= _MOST_UNITS
    shapes = [(dim, width), *((width, width) for _ in matrices[2:]), (width, dim)]
    of_one_width = [tuple(matrix.shape[1:]) for matrix in matrices] == shapes
    return fits and of_one_width and 2 <= len(matrices) <= _MOST_MATRICES and num_states <= _MOST_STATES
