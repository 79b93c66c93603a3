"""Reference implementation of the scan over blocks of a linear memory."""

from __future__ import annotations

import torch
from torch import Tensor

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
    own_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States before each block and after the last, Δ, and the errors E with Δ = β E.

    Args:
        own_steps: the coefficient, in A, of the updates of a row's own chunk.
    """
    blocks, length, num_states = initial_steps.shape[1:]
    rows_of_chunk, dim = keys.shape[2:]

    def rows(t: Tensor) -> Tensor:
        return at_least_float32(t).unflatten(1, (blocks, length)).flatten(2, 3)

    def of_rows(coefficients: Tensor, dim: int) -> Tensor:
        return coefficients.repeat_interleave(rows_of_chunk, dim=dim)

    with no_autocast(keys):
        k, v, theta = rows(keys), rows(values), rows(step_sizes)
        strengths = (theta * (2 / v.shape[-1])).unsqueeze(-1)
        # chunk c takes its gradient at the weights before the first chunk of its memory batch
        base = torch.arange(length, device=k.device) // chunks_per_batch * chunks_per_batch
        coefficients = steps.index_select(2, base)
        if own_steps:
            coefficients = coefficients + own_steps * torch.eye(length, dtype=steps.dtype, device=steps.device)
        weighted = of_rows(of_rows(coefficients, 2), 3) * (k @ k.mT)
        at_initial = of_rows(initial_steps.index_select(2, base), 2)

        # what does not depend on the states, for all blocks at once: E = (from values) − (from states) · states
        keys_by_state = (at_initial.unsqueeze(-1) * k.unsqueeze(3)).flatten(3)
        right, system = torch.cat((v, keys_by_state), dim=-1), weighted * strengths.mT
        if own_steps:
            solved = torch.linalg.solve(system + torch.eye(system.shape[-1], dtype=k.dtype, device=k.device), right)
        else:
            # the diagonal, of ones, is not read
            solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        from_values, from_states = solved.split((v.shape[-1], num_states * dim), dim=-1)
        to_states = (of_rows(final, 3).mT.unsqueeze(-1) * k.unsqueeze(3)).flatten(3).mT

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
