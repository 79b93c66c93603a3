"""Reference implementation of the scan over blocks of a linear memory."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.ops.proximal_steps import LARGEST
from titans_pytorch.utils.precision import at_least_float32, no_autocast
from titans_pytorch.utils.shapes import Float


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
    own_coefficient: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States before each block and after the last, Δ, and the errors E with Δ = β E.

    Args:
        own_coefficient: coefficient of the updates of a row's own chunk in A.
    """
    num_states, dim = initial_steps.shape[3], keys.shape[3]
    with no_autocast(keys):
        k, v, strengths = rows_of_blocks(keys, values, step_sizes, steps, own_coefficient)
        weighted, keys_by_state = products(k, steps, initial_steps, chunks_per_batch, own_coefficient)
        # all that does not depend on the states, for all blocks at once: E = (from values) − (from states) · states
        right, system = torch.cat((v, keys_by_state), dim=-1), weighted * strengths.mT
        if own_coefficient:
            solved = torch.linalg.solve(system + torch.eye(system.shape[-1], dtype=k.dtype, device=k.device), right)
        else:
            # the diagonal, all ones, is not read
            solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        from_values, from_states = solved.split((v.shape[-1], num_states * dim), dim=-1)
        of_row = final.repeat_interleave(keys.shape[2], dim=3)
        to_states = (of_row.mT.unsqueeze(-1) * k.unsqueeze(3)).flatten(3).mT

        state = torch.cat(states, dim=1)
        initial, errors, deltas = [], [], []
        parts = (from_values, from_states, strengths, to_states, initial_final)
        for values_part, states_part, strength, to_state, mix in zip(*(t.unbind(1) for t in parts)):
            initial.append(state)
            errors.append(torch.baddbmm(values_part, states_part, state, alpha=-1))
            deltas.append(strength * errors[-1])
            carried = (mix @ state.unflatten(1, (num_states, dim)).flatten(2)).view_as(state)
            state = torch.baddbmm(carried, to_state, deltas[-1])

        initial_states = torch.stack(initial, dim=1).unflatten(2, (num_states, dim))
        final_states = state.unflatten(1, (num_states, dim))
        return initial_states, final_states, torch.stack(deltas, dim=1), torch.stack(errors, dim=1)


def errors_at_base(
    keys: Float[Tensor, 'bh rn m d'],
    values: Float[Tensor, 'bh rn m e'],
    step_sizes: Float[Tensor, 'bh rn m'],
    steps: Float[Tensor, 'bh r n n'],
    initial_steps: Float[Tensor, 'bh r n k'],
    chunks_per_batch: int,
    own_coefficient: int,
    initial: Float[Tensor, 'bh r k d e'],
    errors: Float[Tensor, 'bh r t e'],
) -> Float[Tensor, 'bh r t e']:
    """V − K W_base, given the states before each block and E."""
    with no_autocast(keys):
        k, v, strengths = rows_of_blocks(keys, values, step_sizes, steps, own_coefficient)
        weighted, keys_by_state = products(k, steps, initial_steps, chunks_per_batch, 0)
        return v - keys_by_state @ initial.flatten(2, 3) - weighted @ (strengths * errors)


def rows_of_blocks(
    keys: Tensor, values: Tensor, step_sizes: Tensor, steps: Float[Tensor, 'bh r n n'], own_coefficient: int
) -> tuple[Float[Tensor, 'bh r t d'], Float[Tensor, 'bh r t e'], Float[Tensor, 'bh r t 1']]:
    """K, V and β; β is limited where a row's curvature along its own part of the step would exceed `LARGEST`."""
    k, v, theta = (at_least_float32(t).unflatten(1, steps.shape[1:3]).flatten(2, 3) for t in (keys, values, step_sizes))
    beta = theta * (2 / v.shape[-1])
    if own_coefficient:
        curvatures = beta * own_coefficient * k.square().sum(dim=-1)
        beta = beta * LARGEST / curvatures.clamp(min=LARGEST)
    return k, v, beta.unsqueeze(-1)


def products(
    k: Float[Tensor, 'bh r t d'],
    steps: Float[Tensor, 'bh r n n'],
    initial_steps: Float[Tensor, 'bh r n k'],
    chunks_per_batch: int,
    own_coefficient: int,
) -> tuple[Float[Tensor, 'bh r t t'], Float[Tensor, 'bh r t kd']]:
    """A ∘ K Kᵀ, and a_k ∘ K for all states k side by side."""
    length, rows = steps.shape[2], k.shape[2] // steps.shape[2]

    def of_rows(coefficients: Tensor, dim: int) -> Tensor:
        return coefficients.repeat_interleave(rows, dim=dim)

    # chunk c takes its gradient at the weights before the first chunk of its memory batch
    base = torch.arange(length, device=k.device) // chunks_per_batch * chunks_per_batch
    coefficients = steps.index_select(2, base)
    if own_coefficient:
        coefficients = coefficients + own_coefficient * torch.eye(length, dtype=steps.dtype, device=steps.device)
    at_initial = of_rows(initial_steps.index_select(2, base), 2)
    weighted = of_rows(of_rows(coefficients, 2), 3) * (k @ k.mT)
    return weighted, (at_initial.unsqueeze(-1) * k.unsqueeze(3)).flatten(3)
