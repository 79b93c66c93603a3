"""Reference implementation of the final state: one product for all states."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.utils.precision import no_autocast
from titans_pytorch.utils.shapes import Float


def final_state(
    coefficients: Float[Tensor, 'bh k n'],
    initial_coefficients: Float[Tensor, 'bh k k'],
    initial_states: list[Float[Tensor, 'bh d e']],
    inputs: Float[Tensor, 'bh n m d'],
    deltas: Float[Tensor, 'bh n m e'],
    operands: torch.dtype,
) -> list[Float[Tensor, 'bh d e']]:
    num_states, dtype = len(initial_states), coefficients.dtype
    # the coefficient of each row in each state
    of_rows = coefficients.mT[:, :, None].expand(-1, -1, inputs.shape[2], -1).flatten(1, 2).unsqueeze(3)
    inputs, deltas = inputs.flatten(1, 2), deltas.flatten(1, 2)
    # scale the shorter of the two rows by them
    if inputs.shape[2] <= deltas.shape[2]:
        scaled = (of_rows * inputs.unsqueeze(2)).flatten(2).to(operands)
        changes = (scaled.mT @ deltas.to(operands)).to(dtype).unflatten(1, (num_states, -1)).unbind(1)
    else:
        scaled = (of_rows * deltas.unsqueeze(2)).flatten(2).to(operands)
        changes = (inputs.to(operands).mT @ scaled).to(dtype).unflatten(2, (num_states, -1)).unbind(2)

    final, of_states = [], initial_coefficients[..., None, None]
    with no_autocast(deltas):
        for state, change in enumerate(changes):
            for index in range(num_states) if state == 0 else range(1, state + 1):
                change = torch.addcmul(change, of_states[:, state, index], initial_states[index])
            final.append(change)
    return final
