"""Reference implementation of the scan over memory batches: a loop over the operations on a single one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans_pytorch.ops.final_state.reference import final_state
from titans_pytorch.ops.inner_gradient.reference import inner_gradient
from titans_pytorch.utils.precision import no_autocast
from titans_pytorch.utils.shapes import Float


def memory_batch_scan(
    keys: Float[Tensor, 'bh rn m d'],
    values: Float[Tensor, 'bh rn m d'],
    step_sizes: Float[Tensor, 'bh rn m'],
    matrices: list[list[Float[Tensor, 'bh _d _e']]],
    gamma: list[Float[Tensor, 'bh d']] | None,
    coefficients: Float[Tensor, 'bh r k n'],
    initial_coefficients: Float[Tensor, 'bh r k k'],
    eps: float,
    operands: torch.dtype,
) -> tuple[Any, ...]:
    """The fields of `MemoryBatches`, with each memory batch as a block."""
    initial, initial_gamma, of_rows = [], [], []
    # not by slices: each slice's gradient would be as long as the whole tensor
    rows = (t.split(coefficients.shape[3], dim=1) for t in (keys, values, step_sizes))
    for k, v, theta, own, own_initial in zip(*rows, coefficients.unbind(1), initial_coefficients.unbind(1)):
        initial.append([torch.stack(states, dim=1) for states in matrices])
        weights, own_gamma = [states[0] for states in matrices], None if gamma is None else gamma[0]
        found = inner_gradient(k, v, theta, weights, own_gamma, None, [], None, eps, operands)
        of_rows.append(found)
        inputs, deltas, gamma_update, _ = found

        updates = zip(matrices, inputs, deltas)
        matrices = [final_state(own, own_initial, *update, operands) for update in updates]
        if gamma is not None:
            with no_autocast(keys):
                initial_gamma.append(torch.stack(gamma, dim=1))
                gamma = [*(own @ gamma_update + own_initial @ initial_gamma[-1]).unbind(1)]

    def of_batches(parts: Any) -> Tensor:
        return torch.stack([*parts], dim=1)

    all_inputs, all_deltas, gamma_updates, losses = zip(*of_rows)
    by_matrix = ([of_batches(own).flatten(2, 3) for own in zip(*parts)] for parts in (all_inputs, all_deltas))
    return (
        [of_batches(own) for own in zip(*initial)], None if gamma is None else of_batches(initial_gamma),
        [of_batches(states) for states in matrices], None if gamma is None else of_batches(gamma),
        *by_matrix, None if gamma is None else of_batches(gamma_updates), of_batches(losses),
    )  # fmt: skip
