"""The kernels of the inner gradient, of momentum, of Newton–Schulz and of weights, launched in turn.

Weights before each chunk are written directly to their places among those of all chunks, and so are the gradients of
residual weights, which are just as large. What only the gradient needs is kept in flat buffers, one memory batch after
another, so that each memory batch's part is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._streams import side_by_side
from titans_pytorch.ops.inner_gradient import triton as inner_gradient
from titans_pytorch.ops.momentum_scan import triton as scans
from titans_pytorch.ops.newton_schulz.triton import orthogonalise, orthogonalise_backward

# Outputs: lists with a slot for each of two matrices and for γ, in the order of the parameters, with absent ones empty;
# then the losses; and then what only the gradient needs.
SLOTS = 3
OVER_TIME, ENDS, MOMENTUM_ENDS, LOSSES, OF_ROWS, OF_GAMMA, MOMENTA, NUM_OUTPUTS = 0, 3, 6, 9, 10, 13, 14, 17
LISTS = OVER_TIME, ENDS, MOMENTUM_ENDS


class _Arguments(NamedTuple):
    """The arguments of `_forward`."""

    keys: Tensor
    values: Tensor
    step_sizes: Tensor
    base: list[Tensor]
    newest: list[Tensor]
    momentum: list[Tensor]
    log_retention: Tensor
    log_gates: Tensor | None
    scales: list[Tensor]
    shares: Tensor | None
    previous: list[Tensor]
    lengths: list[int]
    num_matrices: int
    eps: float
    steps: int
    least_norm: float
    coefficients: list[float]
    keeps: bool
    operands: torch.dtype

    @property
    def iteration(self) -> tuple[Any, ...]:
        """Settings of Newton–Schulz."""
        return self.steps, self.least_norm, *self.coefficients, self.operands


class _Parameter(NamedTuple):
    """A matrix or γ in one memory batch: its states before and after it, and over its chunks."""

    newest: Tensor  # bh …
    end: Tensor  # bh …
    momentum: Tensor | None  # bh …
    momentum_end: Tensor | None  # bh …
    before: Tensor  # bh n f, the weights before each chunk
    momenta: Any  # of a matrix bh n d e, after each chunk; of γ bh n d, before each chunk
    scale: Tensor | None  # bh n


class _Batch(NamedTuple):
    """One memory batch."""

    number: int
    span: slice
    """Which of all chunks it holds."""
    gradient: inner_gradient.Arguments
    """What its gradients are computed from."""
    of_rows: tuple[Tensor, Tensor, Tensor, Tensor]
    """Hidden activations, their deltas, the other deltas, and the negative gradient of γ; absent ones are empty."""
    factors: list[tuple[Tensor, Tensor]]
    """X and Δ of each matrix."""
    log_retention: Tensor
    log_gates: Tensor | None
    parameters: list[_Parameter]


def _outputs(*arguments: Any) -> list[Tensor]:
    given = _Arguments(*arguments)
    newest, momentum, lengths, operands = given.newest, given.momentum, given.lengths, given.operands
    keys, num_matrices = given.keys, given.num_matrices
    heads, chunks, rows, dim = keys.shape
    kept = chunks if given.keeps else max(lengths)
    outputs = [newest[0].new_empty(0) for _ in range(NUM_OUTPUTS)]
    for index, w in enumerate(newest):
        is_matrix = index < num_matrices
        dtype = operands if is_matrix else w.dtype
        outputs[OVER_TIME + index] = w.new_empty(heads, chunks + 1, *w.shape[1:], dtype=dtype)
        outputs[ENDS + index] = w.new_empty(len(lengths), *w.shape)
        if momentum:
            outputs[MOMENTUM_ENDS + index] = w.new_empty(len(lengths), *w.shape)
        if is_matrix or momentum:
            outputs[MOMENTA + index] = w.new_empty(kept * w.numel(), dtype=dtype)
    outputs[LOSSES] = newest[0].new_empty(heads, chunks, rows)
    of_hidden = kept * heads * rows * newest[0].shape[2] if num_matrices == 2 else 0
    for index, numel in enumerate((of_hidden, of_hidden, kept * heads * rows * dim)):
        outputs[OF_ROWS + index] = keys.new_empty(numel, dtype=operands)
    of_gamma = kept * heads * dim if len(newest) > num_matrices else 0
    outputs[OF_GAMMA] = newest[0].new_empty(of_gamma)
    return outputs


def _forward(
    keys: Tensor,  # bh n m d
    values: Tensor,  # bh n m d
    step_sizes: Tensor,  # bh n m
    base: list[Tensor],  # bh d e, bh e d, bh d
    newest: list[Tensor],  # the same
    momentum: list[Tensor],  # the same, or empty
    log_retention: Tensor,  # bh n
    log_gates: Tensor | None,  # bh n
    scales: list[Tensor],  # bh n, of each parameter; or empty
    shares: Tensor | None,  # bh n
    previous: list[Tensor],  # bh n d e, bh n e d, bh n d; or empty
    lengths: list[int],
    num_matrices: int,
    eps: float,
    steps: int,  # of Newton–Schulz
    least_norm: float,
    coefficients: list[float],
    keeps: bool,  # whether there will be a gradient
    operands: torch.dtype,
) -> list[Tensor]:
    given = _Arguments(
        keys, values, step_sizes, base, newest, momentum, log_retention, log_gates, scales, shares, previous,
        lengths, num_matrices, eps, steps, least_norm, coefficients, keeps, operands,
    )  # fmt: skip
    outputs, losses = _outputs(*given), []
    for batch in _batches([*outputs[:LOSSES], *outputs[LOSSES + 1 :]], given):
        losses.append(newest[0].new_empty(batch.gradient.step_sizes.shape))
        inner_gradient.write_gradients((*batch.of_rows, losses[-1]), batch.gradient)
        side_by_side(*(partial(_store, batch, index, given) for index in range(len(newest))))
    for index in range(len(newest)):
        outputs[OVER_TIME + index][:, -1] = outputs[ENDS + index][-1]
    torch.cat(losses, dim=1, out=outputs[LOSSES])
    return outputs


def _store(batch: _Batch, index: int, given: _Arguments) -> None:
    """Compute momentum and weights of a parameter after a memory batch, and before each of its chunks."""
    own = batch.parameters[index]
    if index >= given.num_matrices:
        scans.write_weights(
            own.before, own.end, own.momentum_end, own.momenta,
            batch.of_rows[-1], own.scale, batch.log_gates, batch.log_retention, own.momentum, own.newest,
        )  # fmt: skip
        return
    momenta = own.momenta
    momentum_end = torch.empty_like(own.newest) if own.momentum_end is None else own.momentum_end
    scans.write_momentum(momenta, momentum_end, *batch.factors[index], own.scale, batch.log_gates, own.momentum)
    updates = orthogonalise(momenta.flatten(0, 1), *given.iteration).view_as(momenta).flatten(2)
    scans.write_weights(
        own.before, own.end, None, None, updates, None, None, batch.log_retention, None, own.newest.flatten(1)
    )


def _backward(d_outputs: list[Any], *saved_and_given: Any) -> list[Any]:
    saved, given = saved_and_given[: NUM_OUTPUTS - 1], _Arguments(*saved_and_given[NUM_OUTPUTS - 1 :])
    # absent outputs are empty, and so are their gradients
    d_outputs = [None if d is None or d.numel() == 0 else d for d in d_outputs]
    d_over_time, d_ends, d_momentum_ends = (d_outputs[first : first + SLOTS] for first in LISTS)
    d_losses = d_outputs[LOSSES]

    # from the next memory batch: the gradients of the weights from which its updates continue, of the same weights as
    # those where its gradients are taken, and of momentum
    d_weights: Sequence[Any] = [None if d is None else d[:, -1].float() for d in d_over_time]
    d_base: Sequence[Any] = [None] * SLOTS
    d_momentum: Sequence[Any] = [None] * SLOTS
    d_previous = [t.new_empty(t.shape) for t in given.previous]
    rows_of_batches, gates_of_batches = [], []
    for batch in reversed(_batches(saved, given)):
        hidden, _, deltas, _ = batch.of_rows
        d_states = [
            (
                None if d_over_time[index] is None else d_over_time[index][:, batch.span].flatten(2),
                [d_weights[index], d_base[index], _at(d_ends[index], batch.number)],
                [d_momentum[index], _at(d_momentum_ends[index], batch.number)],
            )
            for index in range(len(given.newest))
        ]
        d_parameters = side_by_side(
            *(partial(_parameter_backward, *own, batch, index, given) for index, own in enumerate(d_states))
        )
        d_updates, d_weights, d_momentum, gates_of_parameters = zip(*d_parameters)
        gates_of_batches.append(gates_of_parameters)
        of_inputs, of_deltas = zip(*d_updates[: given.num_matrices])
        d_of_gamma = d_updates[-1] if len(d_updates) > given.num_matrices else None
        d_hidden, d_hidden_deltas = (of_inputs[1], of_deltas[0]) if given.num_matrices == 2 else (None, None)
        d_own_losses = None if d_losses is None else d_losses[:, batch.span]
        d_keys, d_values, d_step_sizes, *d_at, d_shares = inner_gradient.second_derivatives(
            _slots([t[:, batch.span] for t in d_previous], given.num_matrices),
            (d_hidden, d_hidden_deltas, of_deltas[-1], d_of_gamma, d_own_losses),
            hidden,
            deltas,
            batch.gradient,
        )
        rows_of_batches.append([d_keys.add_(of_inputs[0]), d_values, d_step_sizes, d_shares])
        d_base = [d for d in d_at if d is not None]

    # for retention, momentum gates and scales: each parameter's parts in each memory batch
    of_retention, of_gates, of_scales = zip(*(zip(*of_batches) for of_batches in zip(*gates_of_batches)))
    d_rows, d_retention, d_gates, d_scales = side_by_side(
        lambda: [_joined(of_batches) for of_batches in zip(*rows_of_batches)],
        lambda: _total(of_retention),
        lambda: _total(of_gates),
        lambda: [_total([of_batches]) for of_batches in of_scales if of_batches[0] is not None],
    )
    return [
        *d_rows[:3],
        d_base,
        [d.view_as(w) for d, w in zip(d_weights, given.newest)],
        d_momentum[: len(given.momentum)],
        d_retention,
        d_gates,
        d_scales,
        d_rows[3],
        d_previous,
    ]


def _parameter_backward(
    d_before: Tensor | None,
    of_end: Sequence[Tensor | None],  # terms of the gradient of the weights after a memory batch
    of_momentum_end: Sequence[Tensor | None],
    batch: _Batch,
    index: int,
    given: _Arguments,
) -> tuple[Any, ...]:
    """The gradients of a matrix's X and Δ, or of the negative gradient of γ; of the weights and the momentum before a
    memory batch; and parts of those of retention, gates and scales."""
    own = batch.parameters[index]
    momenta, d_end, d_momentum_end = own.momenta, _added(of_end), _added(of_momentum_end)
    if index >= given.num_matrices:
        d_update, d_scale, d_gates, d_retention, d_momentum, d_newest = scans.weight_gradients(
            d_before, d_end, d_momentum_end, own.before, momenta,
            batch.of_rows[-1], own.scale, batch.log_gates, batch.log_retention, own.momentum, own.newest,
        )  # fmt: skip
        return d_update, d_newest, d_momentum, (d_retention, d_gates, d_scale)
    d_updates, _, _, d_retention, _, d_newest = scans.weight_gradients(
        d_before, d_end, None, own.before, None,
        momenta.flatten(2), None, None, batch.log_retention, None, own.newest.flatten(1),
    )  # fmt: skip
    matrices = momenta.flatten(0, 1)
    (d_matrices,) = orthogonalise_backward(d_updates.view_as(matrices), matrices, *given.iteration)
    inputs, deltas = batch.factors[index]
    d_inputs, d_deltas, d_scale, d_gates, d_momentum = scans.momentum_gradients(
        d_matrices.view_as(momenta), d_momentum_end,
        momenta, inputs, deltas, own.scale, batch.log_gates, own.momentum,
    )  # fmt: skip
    return (d_inputs, d_deltas), d_newest, d_momentum, (d_retention, d_gates, d_scale)


spectral_memory_scan = register_kernel(
    'spectral_memory_scan',
    _forward,
    _backward,
    outputs=_outputs,
    saved=[index for index in range(NUM_OUTPUTS) if index != LOSSES],
    not_differentiable=range(LOSSES + 1, NUM_OUTPUTS),
    materialize_grads=False,
)


def _batches(saved: Sequence[Tensor], given: _Arguments) -> list[_Batch]:
    """The memory batches as views of the arguments and of all outputs except the losses."""
    keys, num_matrices = given.keys, given.num_matrices
    low_keys = keys.to(given.operands)
    over_time, ends, momentum_ends = (saved[first : first + SLOTS] for first in LISTS)
    of_rows, momenta = saved[OF_ROWS - 1 : MOMENTA - 1], saved[MOMENTA - 1 :]
    heads, _, rows, dim = keys.shape
    width = given.newest[0].shape[2]
    shapes = [(rows, width), (rows, width), (rows, dim), (dim,)]
    batches = []
    for index, stop in enumerate(accumulate(given.lengths)):
        span = slice(stop - given.lengths[index], stop)
        kept = span if given.keeps else slice(0, given.lengths[index])
        newest, momentum = given.newest, given.momentum
        if index > 0:
            newest, momentum = ([t[index - 1] for t in states if t.numel() > 0] for states in (ends, momentum_ends))
        hidden, hidden_deltas, deltas, of_gamma = (
            _of_chunks(t, heads, kept, shape) for t, shape in zip(of_rows, shapes)
        )
        parameters = [
            _Parameter(
                newest=w,
                end=ends[p][index],
                momentum=momentum[p] if momentum else None,
                momentum_end=momentum_ends[p][index] if momentum else None,
                before=over_time[p][:, span].flatten(2),
                momenta=_of_chunks(momenta[p], heads, kept, w.shape[1:]) if momenta[p].numel() > 0 else None,
                scale=given.scales[p][:, span] if given.scales else None,
            )
            for p, w in enumerate(newest)
        ]
        factors = [(low_keys[:, span], hidden_deltas), (hidden, deltas)]
        batch = _Batch(
            number=index,
            span=span,
            gradient=inner_gradient.Arguments(
                keys[:, span],
                given.values[:, span],
                given.step_sizes[:, span],
                *_slots(given.base if index == 0 else newest, num_matrices),
                None if given.shares is None else given.shares[:, span],
                *_slots([t[:, span] for t in given.previous], num_matrices),
                given.eps,
                given.operands,
            ),
            of_rows=(hidden, hidden_deltas, deltas, of_gamma),
            factors=factors if num_matrices == 2 else [(low_keys[:, span], deltas)],
            log_retention=given.log_retention[:, span],
            log_gates=None if given.log_gates is None else given.log_gates[:, span],
            parameters=parameters,
        )
        batches.append(batch)
    return batches


def _of_chunks(flat: Tensor, heads: int, chunks: slice, shape: Sequence[int]) -> Tensor:
    """A memory batch's part (bh, n, …) of a flat buffer of all chunks; empty if the buffer is."""
    if flat.numel() == 0:
        return flat
    number = chunks.stop - chunks.start
    per_chunk = heads * prod(shape)
    return flat.narrow(0, chunks.start * per_chunk, number * per_chunk).view(heads, number, *shape)


def _slots(weights: list[Tensor], num_matrices: int) -> tuple[Any, Any, Any]:
    """First matrix, last matrix and γ, as kernels of the inner gradient take them; a single matrix is the last."""
    if not weights:
        return None, None, None
    *first, last = weights[:num_matrices]
    gamma = weights[num_matrices:]
    return first[0] if first else None, last, gamma[0] if gamma else None


def _at(of_batches: Tensor | None, number: int) -> Tensor | None:
    """The gradient of the part of an output that belongs to one memory batch."""
    return None if of_batches is None else of_batches[number]


def _added(terms: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of all gradients that are not absent."""
    present = [d for d in terms if d is not None]
    return reduce(lambda total, d: total + d.reshape(total.shape), present) if present else None


def _joined(backwards: Sequence[Any]) -> Tensor | None:
    """Join the parts of all memory batches, which are given from the last to the first."""
    return None if backwards[0] is None else torch.cat([*backwards[::-1]], dim=1)


def _total(of_parameters: Sequence[Sequence[Any]]) -> Tensor | None:
    """The gradient (bh, n) of what parameters share, from each one's parts (bh, n, _) in each memory batch."""
    parts: Any = [_joined(own) for own in of_parameters]
    if parts[0] is None:
        return None
    return (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]).sum(dim=-1)
