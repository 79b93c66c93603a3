"""Sequential scan over memory batches, which are stored in a memory MLP one after the other.

The gradients of a memory batch are taken at the weights that the one before left, so that batches are a recurrence.
For each of r memory batches of n chunks, with state 0 the weights and the others the momentum of each order:

    X₂, Δ₁, Δ₂, g, losses = inner_gradient(keys_j, values_j, θ_j; W₁, W₂, γ)        at state 0
    state_k ← Σ_c coefficients[j, k, c] · X_cᵀ Δ_c + Σ_i initial_coefficients[j, k, i] · state_i

where (X, Δ) are (keys, Δ₁) for W₁ and (X₂, Δ₂) for W₂, and for γ its negative gradient g stands in place of X_cᵀ Δ_c.
"""

from __future__ import annotations

from collections.abc import Sequence
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
# states in memory are faster (measured: 32 and 64)
_MOST_ROWS, _MOST_FEATURES, _MOST_UNITS = 32, 64, 512


class MemoryBatches(NamedTuple):
    """States and inner gradients of r memory batches of t = n · m rows; fields of absent parameters are `None`."""

    first_initial: Float[Tensor, 'bh _r k d e'] | None
    """States of W₁ before each block of memory batches."""
    last_initial: Float[Tensor, 'bh _r k e d']
    gamma_initial: Float[Tensor, 'bh _r k d'] | None
    first_final: Float[Tensor, 'bh k d e'] | None
    """And after the last one."""
    last_final: Float[Tensor, 'bh k e d']
    gamma_final: Float[Tensor, 'bh k d'] | None
    hidden: Float[Tensor, 'bh r t e'] | None
    """gelu(k W₁), the inputs of the last matrix, in the precision of products, as the deltas."""
    hidden_deltas: Float[Tensor, 'bh r t e'] | None
    """Δ₁"""
    deltas: Float[Tensor, 'bh r t d']
    """Δ₂"""
    negative_gamma_gradient: Float[Tensor, 'bh r n d'] | None
    losses: Float[Tensor, 'bh r n m']
    """Unweighted."""


def memory_batch_scan(
    keys: Float[Tensor, 'bh rn m d'],
    values: Float[Tensor, 'bh rn m d'],
    step_sizes: Float[Tensor, 'bh rn m'],
    first: list[Float[Tensor, 'bh d e']] | None,
    last: list[Float[Tensor, 'bh e d']],
    gamma: list[Float[Tensor, 'bh d']] | None,
    coefficients: Float[Tensor, 'bh r k n'],
    initial_coefficients: Float[Tensor, 'bh r k k'],
    eps: float,
    batches_per_block: int = 1,
    num_proximal_steps: int | None = None,
) -> MemoryBatches:
    """Stores r memory batches, one after the other.

    Args:
        first: W₁ before the first memory batch and its momentum of each order; `None` if the memory is one matrix.
        last: the same of W₂, or of the one matrix (bh, d, d).
        gamma: the same of the norm's γ; `None` without.
        coefficients: of each chunk's update, in each state after its memory batch.
        initial_coefficients: of each state before a memory batch, in each state after it, structured as those of
            `final_state`.
        eps: of the norm.
        batches_per_block: memory batches of a block; states are returned for each block. It divides r.
        num_proximal_steps: take proximal steps instead, of which so many are added up at the same weights (see
            `titans_pytorch.ops.proximal_steps`); Δ₁, Δ₂ and g are theirs then.

    States are in their own precision, products in that of autocast or of the keys.
    """
    operands = operand_dtype(keys)
    rows, coefficients_of_states = (keys, values, step_sizes), (coefficients, initial_coefficients)
    states = (*(first or ()), *last, *(gamma or ()), *coefficients_of_states)
    uses_kernel = use_kernel(rows, states) and keys.numel() > 0
    in_batch = coefficients.shape[3] * keys.shape[2]
    if uses_kernel and first is not None and fits_on_chip(first[0], len(first), in_batch):
        from titans_pytorch.ops.memory_batch_scan import triton_on_chip

        stacked = [None if own is None else torch.stack(own, dim=1) for own in (first, last, gamma)]
        settings = batches_per_block, torch.is_grad_enabled(), eps, num_proximal_steps, operands
        outputs = triton_on_chip.memory_batch_scan_on_chip(*rows, *stacked, *coefficients_of_states, *settings)
        out = _present(outputs[: len(MemoryBatches._fields)])
        if gamma is None or out.negative_gamma_gradient is None:
            return out
        of_rows = out.negative_gamma_gradient.unflatten(2, (-1, keys.shape[2]))
        return out._replace(negative_gamma_gradient=of_rows.sum(dim=3))

    tensors = (*rows, first or [], last, gamma or [], *coefficients_of_states)
    if uses_kernel and num_proximal_steps is None and keys.shape[-1] <= WIDEST and len(last) <= MOST_STATES:
        from titans_pytorch.ops.memory_batch_scan import triton

        out = _present(triton.memory_batch_scan(*tensors, eps, operands))
    else:
        out = MemoryBatches._make(reference.memory_batch_scan(*tensors, eps, num_proximal_steps, operands))
    if batches_per_block == 1:
        return out
    initial = (None if t is None else t[:, ::batches_per_block] for t in out[:3])
    return MemoryBatches._make((*initial, *out[3:]))


def _present(outputs: Sequence[Tensor]) -> MemoryBatches:
    """The outputs of a kernel, where absent ones are empty."""
    return MemoryBatches._make(None if t.numel() == 0 else t for t in outputs)


def fits_on_chip(first: Float[Tensor, 'bh d e'], num_states: int, rows: int) -> bool:
    """Whether kernels can keep the states of a memory MLP on chip, given W₁ and the rows of a memory batch."""
    dim, width = first.shape[1:]
    return num_states <= 2 and dim <= _MOST_FEATURES and width <= _MOST_UNITS and rows <= _MOST_ROWS
