"""Memory batches in a row, stored in a memory MLP by one operation.

A memory batch takes its gradients at the weights that the one before left, so that batches are a recurrence: for each
of r memory batches of n chunks, `record` at the weights, then for every parameter `ends`, whose states the next batch
starts with (`titans_pytorch.ops.inner_gradient` has the equations of both). `walk` is all of it. With state 0, the
weights, and the momentum of each order:

    hidden, Δ₁, Δ₂, descent, losses = record(keys_j, values_j, θ_j; W₁, W₂, γ)                       at state 0
    state_k ← Σ_c end[j, k, c] · X_cᵀ Δ_c + Σ_i end_starts[j, k, i] · state_i

where (X, Δ) are (keys, Δ₁) for W₁ and (hidden, Δ₂) for W₂, and for γ descent stands in place of X_cᵀ Δ_c. It is one
operation, forward and backward, that `torch.compile` does not look into: on a GPU one Triton kernel each way, elsewhere
its plain twin. It can be differentiated once. States are kept in float32, products are in the precision of autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.ops import _dispatch, inner_gradient
from titans_pytorch.ops.inner_gradient import FLOAT32_PRECISION, MOST_STATES, WIDEST
from titans_pytorch.utils.precision import no_autocast, operand_dtype
from titans_pytorch.utils.shapes import Float


class Walked(NamedTuple):
    """What there is not, without W₁ or γ, is empty."""

    first_starts: Float[Tensor, 'bh r k d e']
    """States of W₁ before each memory batch."""
    last_starts: Float[Tensor, 'bh r k e d']
    gamma_starts: Float[Tensor, 'bh r k d']
    first_end: Float[Tensor, 'bh k d e']
    """And after the last one."""
    last_end: Float[Tensor, 'bh k e d']
    gamma_end: Float[Tensor, 'bh k d']
    hidden: Float[Tensor, 'bh r t e']
    """gelu(k W₁), what the last matrix saw; in the precision of products, as both errors. t = n · m rows."""
    hidden_errors: Float[Tensor, 'bh r t e']
    """Δ₁"""
    errors: Float[Tensor, 'bh r t d']
    """Δ₂"""
    descent: Float[Tensor, 'bh r n d']
    """Minus the gradient of γ."""
    losses: Float[Tensor, 'bh r n m']
    """Unweighted."""


def walk(
    keys: Float[Tensor, 'bh rn m d'],
    values: Float[Tensor, 'bh rn m d'],
    step_sizes: Float[Tensor, 'bh rn m'],
    first: list[Tensor] | None,
    last: list[Tensor],
    gamma: list[Tensor] | None,
    end: Float[Tensor, 'bh r k n'],
    end_starts: Float[Tensor, 'bh r k k'],
    eps: float,
) -> Walked:
    """Stores r memory batches, one after the other.

    Args:
        first: before the first memory batch W₁ and its momentum of each order, k of (bh, d, e); `None` if the memory
            is one matrix.
        last: the same of W₂, k of (bh, e, d), or of the one matrix, k of (bh, d, d).
        gamma: the same of the norm's γ, k of (bh, d); `None` without.
        end: what is in each state, after a memory batch, of the update of each of its chunks: `Mixing.end`.
        end_starts: and of each state before it.
        eps: of the norm.
    """
    states = (first or [], last, gamma or [])
    return Walked(*_walk(keys, values, step_sizes, *states, end, end_starts, eps, operand_dtype(keys)))


def kernels_serve(keys: Tensor, values: Tensor, step_sizes: Tensor, states: list[Tensor], num_states: int) -> bool:
    """Whether `walk` of these is a kernel's, and as exact as PyTorch's own products; `num_states` of a parameter."""
    fits = 0 < keys.shape[-1] <= WIDEST and keys.numel() > 0 and 0 < num_states <= MOST_STATES
    return fits and _dispatch.kernels_take([keys, values, step_sizes], states)


def _kernel(keys: Tensor, end: Tensor, states: list[Tensor], operands: torch.dtype) -> Any | None:
    """The kernels' module; `None` where they do not run."""
    fits = 0 < keys.shape[-1] <= WIDEST and keys.numel() > 0 and end.shape[2] <= MOST_STATES
    if operands == torch.float64 or not fits or any(t.dtype != torch.float32 for t in (end, *states)):
        return None
    if not _dispatch.kernels_run_on(keys.device):
        return None
    # imported where they are used: without a GPU there need be no Triton
    from titans_pytorch.ops.memory_batch_scan import triton as batch_walk

    return batch_walk


# what `torch.compile` sees: operations known by their shapes


@torch.library.custom_op(
    'titans_pytorch::walk',
    mutates_args=(),
    schema='(Tensor keys, Tensor values, Tensor step_sizes, Tensor[] first, Tensor[] last, Tensor[] gamma, Tensor end, '
    'Tensor end_starts, float eps, ScalarType operands) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
)
def _walk(
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    first: list[Tensor],
    last: list[Tensor],
    gamma: list[Tensor],
    end: Tensor,
    end_starts: Tensor,
    eps: float,
    operands: torch.dtype,
) -> tuple[Tensor, ...]:
    args = (keys, values, step_sizes, first, last, gamma, end, end_starts, eps, operands)
    kernel = _kernel(keys, end, [*first, *last, *gamma, end_starts], operands)
    if kernel is not None:
        return kernel.forward(*args, FLOAT32_PRECISION)
    # γ is in full also where products are not
    with no_autocast(keys):
        return plain_walk(*args)


@torch.library.custom_op(
    'titans_pytorch::walk_backward',
    mutates_args=(),
    schema='(Tensor? d_first_starts, Tensor? d_last_starts, Tensor? d_gamma_starts, Tensor? d_first_end, '
    'Tensor? d_last_end, Tensor? d_gamma_end, Tensor? d_hidden, Tensor? d_hidden_errors, Tensor? d_errors, '
    'Tensor? d_descent, Tensor? d_losses, Tensor keys, Tensor values, Tensor step_sizes, Tensor end, '
    'Tensor end_starts, Tensor first_starts, Tensor last_starts, Tensor gamma_starts, Tensor hidden, '
    'Tensor hidden_errors, Tensor errors, Tensor descent, float eps, ScalarType operands) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
)
def _walk_backward(
    d_first_starts: Tensor | None,
    d_last_starts: Tensor | None,
    d_gamma_starts: Tensor | None,
    d_first_end: Tensor | None,
    d_last_end: Tensor | None,
    d_gamma_end: Tensor | None,
    d_hidden: Tensor | None,
    d_hidden_errors: Tensor | None,
    d_errors: Tensor | None,
    d_descent: Tensor | None,
    d_losses: Tensor | None,
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    end: Tensor,
    end_starts: Tensor,
    first_starts: Tensor,
    last_starts: Tensor,
    gamma_starts: Tensor,
    hidden: Tensor,
    hidden_errors: Tensor,
    errors: Tensor,
    descent: Tensor,
    eps: float,
    operands: torch.dtype,
) -> tuple[Tensor, ...]:
    of_starts, of_ends = (d_first_starts, d_last_starts, d_gamma_starts), (d_first_end, d_last_end, d_gamma_end)
    d_outputs = (*of_starts, *of_ends, d_hidden, d_hidden_errors, d_errors, d_descent, d_losses)
    starts = (first_starts, last_starts, gamma_starts)
    saved = (keys, values, step_sizes, end, end_starts, starts, hidden, hidden_errors, errors, descent, eps, operands)
    kernel = _kernel(keys, end, [*starts, end_starts], operands)
    if kernel is not None:
        return kernel.backward(d_outputs, *saved, FLOAT32_PRECISION)
    with no_autocast(keys):
        return plain_walk_backward(d_outputs, *saved)


@_walk.register_fake
def _(
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    first: list[Tensor],
    last: list[Tensor],
    gamma: list[Tensor],
    end: Tensor,
    end_starts: Tensor,
    eps: float,
    operands: torch.dtype,
) -> tuple[Tensor, ...]:
    (heads, batches, count, chunks), (rows, dim) = end.shape, keys.shape[2:]

    def of_states(own: list[Tensor], *axes: int) -> Tensor:
        return end.new_empty((*axes, count, *own[0].shape[1:]) if own else (0,))

    def of_rows(own: list[Tensor], width: int) -> Tensor:
        return keys.new_empty((heads, batches, chunks * rows, width) if own else (0,), dtype=operands)

    width = last[0].shape[1]
    return (
        *(of_states(own, heads, batches) for own in (first, last, gamma)),
        *(of_states(own, heads) for own in (first, last, gamma)),
        of_rows(first, width),
        of_rows(first, width),
        of_rows(last, dim),
        end.new_empty((heads, batches, chunks, dim) if gamma else (0,)),
        end.new_empty(heads, batches, chunks, rows),
    )


@_walk_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    keys, values, step_sizes, end, end_starts, *starts = args[11:19]
    of_states = [end.new_empty((0,) if own.ndim == 1 else (len(own), *own.shape[2:])) for own in starts]
    d_end, d_end_starts = end.new_empty(end.shape), end.new_empty(end_starts.shape)
    return *(t.new_empty(t.shape) for t in (keys, values, step_sizes)), *of_states, d_end, d_end_starts


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keys, values, step_sizes, first, last, gamma, end, end_starts, ctx.eps, ctx.operands = inputs
    starts, (hidden, hidden_errors, errors, descent) = output[:3], output[6:10]
    ctx.save_for_backward(keys, values, step_sizes, end, end_starts, *starts, hidden, hidden_errors, errors, descent)
    ctx.present = (bool(first), bool(last), bool(gamma))
    # what comes after a run may use one and not the other
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
    # what there is not has no gradient, though an empty one may come
    of_outputs = [None if d is None or d.numel() == 0 else d for d in d_outputs]
    came = _walk_backward(*of_outputs, *ctx.saved_tensors, ctx.eps, ctx.operands)
    of_states = [[*own.unbind(1)] if present else [] for own, present in zip(came[3:6], ctx.present)]
    return *came[:3], *of_states, *came[6:], None, None


_walk.register_autograd(_gradients, setup_context=_keep)
_dispatch.differentiated_once(_walk_backward)


# the plain twins


def plain_walk(
    keys: Float[Tensor, 'bh rn m d'],
    values: Float[Tensor, 'bh rn m d'],
    step_sizes: Float[Tensor, 'bh rn m'],
    first: list[Tensor],
    last: list[Tensor],
    gamma: list[Tensor],
    end: Float[Tensor, 'bh r k n'],
    end_starts: Float[Tensor, 'bh r k k'],
    eps: float,
    operands: torch.dtype,
) -> tuple[Tensor, ...]:
    states, starts, recorded = [first, last, [own.unsqueeze(1) for own in gamma]], [], []
    for run, own_end, own_starts in _batches((keys, values, step_sizes), end, end_starts):
        starts.append([torch.stack(own, dim=1) if own else end.new_empty(0) for own in states])
        came = inner_gradient.plain_record(*run, *_weights(states), None, eps, operands)
        recorded.append(came)
        states = [
            inner_gradient.plain_ends(own_end, own_starts, own, *factors) if own else []
            for own, factors in zip(states, _factors(run[0], came, operands))
        ]
    ended = [torch.stack(own, dim=1) if own else end.new_empty(0) for own in states]
    *of_rows, descent, losses = (_stacked(own) for own in zip(*recorded))
    *of_starts, of_gammas = (_stacked(own) for own in zip(*starts))
    return (
        *of_starts,
        _as_vectors(of_gammas),
        *ended[:2],
        _as_vectors(ended[2]),
        *(t.flatten(2, 3) if t.numel() else t for t in of_rows),
        descent,
        losses,
    )


def plain_walk_backward(
    d_outputs: tuple[Tensor | None, ...],
    keys: Float[Tensor, 'bh rn m d'],
    values: Float[Tensor, 'bh rn m d'],
    step_sizes: Float[Tensor, 'bh rn m'],
    end: Float[Tensor, 'bh r k n'],
    end_starts: Float[Tensor, 'bh r k k'],
    starts: tuple[Tensor, Tensor, Tensor],
    hidden: Tensor,
    hidden_errors: Tensor,
    errors: Tensor,
    descent: Tensor,
    eps: float,
    operands: torch.dtype,
) -> tuple[Tensor, ...]:
    """Gradients of `keys`, `values`, `step_sizes`, of the states of each parameter before the first memory batch
    (bh, k, …), of `end` and `end_starts`."""
    present = [own.numel() > 0 for own in starts]
    starts = (*starts[:2], starts[2].unsqueeze(-2))
    d_starts, d_ends = ([*d[:2], None if d[2] is None else d[2].unsqueeze(-2)] for d in (d_outputs[:3], d_outputs[3:6]))
    # of the network's rows, and of chunks
    recorded = [_by_chunks(t, end, keys) for t in (hidden, hidden_errors, errors)] + [descent]
    d_recorded = [None if d is None else _by_chunks(d, end, keys) for d in d_outputs[6:9]] + [d_outputs[9]]
    d_losses = d_outputs[10]

    # G of each state, after a memory batch
    states = [
        [*(torch.zeros_like(own[:, 0]) if d is None else d).unbind(1)] if there else []
        for own, d, there in zip(starts, d_ends, present)
    ]
    came: list[tuple[Tensor, ...]] = []
    batches = [*enumerate(_batches((keys, values, step_sizes), end, end_starts))]
    for batch, (run, own_end, own_starts) in reversed(batches):
        own = [t[:, batch] if t.numel() else t for t in recorded]
        d_own = [torch.zeros_like(t) if d is None else d[:, batch] for d, t in zip(d_recorded, own)]
        before = [[*t[:, batch].unbind(1)] if there else [] for t, there in zip(starts, present)]
        d_end, d_mix, d_keys = torch.zeros_like(own_end), torch.zeros_like(own_starts), torch.zeros_like(run[0])
        for which, factors in enumerate(_factors(run[0], (*own, end), operands)):
            if not present[which]:
                continue
            of_end, of_mix, states[which], d_inputs, d_errors = inner_gradient.plain_ends_backward(
                states[which], own_end, own_starts, before[which], *factors
            )
            d_end, d_mix = d_end + of_end, d_mix + of_mix
            # (keys, Δ₁), (hidden or keys, Δ₂), (1, descent)
            d_own[1 + which] = d_own[1 + which] + (d_errors.squeeze(-2) if which == 2 else d_errors)
            if which == 1 and present[0]:
                d_own[0] = d_own[0] + d_inputs
            elif which < 2:
                d_keys = d_keys + d_inputs

        of_keys, of_values, of_step_sizes, *of_weights = inner_gradient.plain_record_backward(
            (d_own[0], d_own[1], d_own[2], d_own[3], None if d_losses is None else d_losses[:, batch]),
            *run, *_weights(before), None, own[0], own[2], eps, operands,
        )  # fmt: skip
        for which, (d_start, of_weight) in enumerate(zip(d_starts, of_weights)):
            if present[which]:
                states[which][0] = states[which][0] + of_weight.view_as(states[which][0])
                if d_start is not None:
                    states[which] = [d + more for d, more in zip(states[which], d_start[:, batch].unbind(1))]
        came.append((d_keys + of_keys, of_values, of_step_sizes, d_end, d_mix))

    *of_rows, d_end, d_mix = (_stacked(own) for own in zip(*reversed(came)))
    of_states = [torch.stack(own, dim=1) if own else end.new_empty(0) for own in states]
    return *(d.flatten(1, 2) for d in of_rows), *of_states[:2], _as_vectors(of_states[2]), d_end, d_mix


Rows = tuple[Tensor, Tensor, Tensor]


def _batches(rows: Rows, end: Tensor, end_starts: Tensor) -> Iterator[tuple[Rows, Tensor, Tensor]]:
    """Of each memory batch its keys, values and step sizes, and what it leaves of updates and of states."""
    keys, values, step_sizes = (t.unflatten(1, (end.shape[1], end.shape[3])).unbind(1) for t in rows)
    yield from zip(zip(keys, values, step_sizes), end.unbind(1), end_starts.unbind(1))


def _weights(states: list[list[Tensor]]) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """W₁, W₂ and γ."""
    first, last, gamma = states
    return first[0] if first else None, last[0], gamma[0].squeeze(1) if gamma else None


def _factors(
    keys: Tensor, recorded: tuple[Tensor, ...], operands: torch.dtype
) -> list[tuple[Tensor, Tensor, torch.dtype]]:
    """Of each parameter X and Δ, and what their product is in. γ is a matrix of one row, for which X is 1."""
    hidden, hidden_errors, errors, descent, _ = recorded
    of_gamma = descent.unsqueeze(-2)
    seen = keys.to(errors.dtype)
    return [
        (seen, hidden_errors, operands),
        (hidden if hidden.numel() else seen, errors, operands),
        (torch.ones_like(of_gamma[..., :1]), of_gamma, descent.dtype),
    ]


def _by_chunks(t: Tensor, end: Tensor, keys: Tensor) -> Tensor:
    return t.unflatten(2, (end.shape[3], keys.shape[2])) if t.numel() else t


def _as_vectors(gammas: Tensor) -> Tensor:
    return gammas.squeeze(-2) if gammas.numel() else gammas


def _stacked(own: tuple[Tensor, ...]) -> Tensor:
    """Over memory batches, where there is something."""
    return torch.stack(own, dim=1) if own[0].numel() else own[0].new_empty(0)
