"""Reference implementation of the scan over memory batches: a loop over the operations on a single one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titans_pytorch.ops.final_state.reference import final_state
from titans_pytorch.ops.inner_gradient.reference import inner_gradient
from titans_pytorch.ops.proximal_steps import proximal_deltas, proximal_vector
from titans_pytorch.utils.precision import no_autocast
from titans_pytorch.utils.shapes import Float


def memory_batch_scan(
    keys: Float[Tensor, 'bh rn m d'],
    values: Float[Tensor, 'bh rn m d'],
    step_sizes: Float[Tensor, 'bh rn m'],
    first: list[Float[Tensor, 'bh d e']],
    last: list[Float[Tensor, 'bh e d']],
    gamma: list[Float[Tensor, 'bh d']],
    coefficients: Float[Tensor, 'bh r k n'],
    initial_coefficients: Float[Tensor, 'bh r k k'],
    eps: float,
    num_proximal_steps: int | None,
    operands: torch.dtype,
) -> tuple[Any, ...]:
    """The fields of `MemoryBatches`."""
    states: list[list[Tensor]] = [first, last, gamma]
    initial_states, gradients = [], []
    # not by slices, whose gradients would each be as long as the whole
    rows = (t.split(coefficients.shape[3], dim=1) for t in (keys, values, step_sizes))
    for k, v, theta, own, own_initial in zip(*rows, coefficients.unbind(1), initial_coefficients.unbind(1)):
        initial_states.append([_stacked(one) for one in states])
        first, last, gamma = states
        weights = first[0] if first else None, last[0], gamma[0] if gamma else None
        gradient = inner_gradient(k, v, theta, *weights, None, None, None, None, eps=eps, operands=operands)
        hidden, hidden_deltas, deltas, negative_gamma_gradient, losses = gradient
        k = k.to(deltas.dtype)
        if num_proximal_steps is not None:
            common = theta, losses, num_proximal_steps
            if hidden_deltas is not None:
                hidden_deltas = proximal_deltas(k, hidden_deltas, *common)
            deltas = proximal_deltas(k if hidden is None else hidden, deltas, *common)
            if negative_gamma_gradient is not None:
                negative_gamma_gradient = proximal_vector(negative_gamma_gradient, *common)
        gradients.append((hidden, hidden_deltas, deltas, negative_gamma_gradient, losses))

        if hidden_deltas is not None:
            first = final_state(own, own_initial, first, k, hidden_deltas, operands)
        last = final_state(own, own_initial, last, k if hidden is None else hidden, deltas, operands)
        if negative_gamma_gradient is not None:
            with no_autocast(k):
                final = own @ negative_gamma_gradient + own_initial @ torch.stack(gamma, dim=1)
            gamma = [*final.unbind(1)]
        states = [first, last, gamma]

    initial = (_stacked(one) for one in zip(*initial_states))
    *of_rows, of_gamma, all_losses = (_stacked(one) for one in zip(*gradients))
    of_rows = [None if t is None else t.flatten(2, 3) for t in of_rows]
    return *initial, *(_stacked(one) for one in states), *of_rows, of_gamma, all_losses


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Along a new second axis; `None` for absent ones."""
    present = [t for t in tensors if t is not None]
    return torch.stack(present, dim=1) if present else None
