"""Reference implementation of the scan over memory batches of a memory MLP: a loop that forms the weights before each
memory batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans_pytorch.ops.inner_gradient.reference import inner_gradient
from titans_pytorch.ops.proximal_steps import proximal_deltas, proximal_vector
from titans_pytorch.utils.precision import no_autocast
from titans_pytorch.utils.shapes import Float


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
    num_proximal_steps: int | None,
    operands: torch.dtype,
) -> tuple[Any, ...]:
    """The fields of `MemoryBatches`."""
    length = steps.shape[2]
    states = [torch.stack(own, dim=1) for own in (*matrices, *([] if gamma is None else [gamma]))]
    initial: list[list[Tensor]] = [[] for _ in states]
    # one list per matrix, over all memory batches
    all_inputs: list[list[Tensor]] = [[] for _ in matrices]
    all_deltas: list[list[Tensor]] = [[] for _ in matrices]
    gamma_updates, losses = [], []
    with no_autocast(keys):
        # not by slices: each slice's gradient would be as long as the whole tensor
        rows = (t.split(chunks_per_batch, dim=1) for t in (keys, values, step_sizes))
        batches = iter([*zip(*rows)])
        for block in zip(*(t.unbind(1) for t in (steps, initial_steps, final, initial_final))):
            block_steps, block_initial_steps, block_final, block_initial_final = block
            for own, state in zip(initial, states):
                own.append(state)
            updates: list[list[Tensor]] = [[] for _ in states]
            for first in range(0, length, chunks_per_batch):
                k, v, theta = next(batches)
                base = [
                    _combination(block_initial_steps[:, first], state, block_steps[:, first, :first], own)
                    for state, own in zip(states, updates)
                ]
                gain = None if gamma is None else base.pop()
                found = inner_gradient(k, v, theta, base, gain, None, [], None, eps, operands)
                inputs, deltas, gamma_update, loss = found
                if num_proximal_steps is not None:
                    common = theta, loss, num_proximal_steps
                    deltas = [proximal_deltas(x, delta, *common) for x, delta in zip(inputs, deltas)]
                    gamma_update = None if gamma_update is None else proximal_vector(gamma_update, *common)
                for index, (x, delta) in enumerate(zip(inputs, deltas)):
                    all_inputs[index].append(x)
                    all_deltas[index].append(delta)
                    updates[index].append((x.mT @ delta).to(states[index].dtype))
                if gamma_update is not None:
                    updates[-1].append(gamma_update)
                    gamma_updates.append(gamma_update)
                losses.append(loss)
            states = [
                torch.einsum('bkn, bn... -> bk...', block_final, torch.cat(own, dim=1))
                + torch.einsum('bki, bi... -> bk...', block_initial_final, state)
                for state, own in zip(states, updates)
            ]

    def of_blocks(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1).unflatten(1, (-1, length))

    stacked = [torch.stack(own, dim=1) for own in initial]
    gamma_initial = gamma_final = negative_gamma_gradient = None
    if gamma is not None:
        gamma_initial, gamma_final, negative_gamma_gradient = stacked.pop(), states.pop(), of_blocks(gamma_updates)
    of_inputs, of_deltas = ([of_blocks(own).flatten(2, 3) for own in rows] for rows in (all_inputs, all_deltas))
    return (
        [own.to(operands) for own in stacked], gamma_initial, states, gamma_final,
        of_inputs, of_deltas, negative_gamma_gradient, of_blocks(losses),
    )  # fmt: skip


def _combination(
    shares: Float[Tensor, 'bh k'],
    states: Float[Tensor, 'bh k ...'],
    steps: Float[Tensor, 'bh n'],
    updates: list[Tensor],
) -> Float[Tensor, 'bh ...']:
    """States and the updates of earlier memory batches, combined with their coefficients."""
    total = torch.einsum('bk, bk... -> b...', shares, states)
    return total + torch.einsum('bn, bn... -> b...', steps, torch.cat(updates, dim=1)) if updates else total
