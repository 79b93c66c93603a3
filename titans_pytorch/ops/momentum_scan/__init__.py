"""Momentum and weights over a run of chunks that need a matrix for each, as with spectral norm: three operations.

With spectral norm the momentum is orthogonalised before it goes into the weights, so that a chunk's matrix must be
formed. What there is to do is two recurrences (Titans eq. 10, 13) around Newton–Schulz, for rows X_c and errors Δ_c of
chunk c, gates η and κ = 1 − α, and a factor s:

    S_c = η_c S_{c−1} + s_c · X_cᵀ Δ_c        `momenta`
    O_c = newton_schulz(S_c)
    W_c = κ_c W_{c−1} + O_c                   `weights_over_time`

`vectors_over_time` is both recurrences at once, without Newton–Schulz, from updates that are given. Each is one
operation, forward and backward, that `torch.compile` does not look into: Triton kernels on a GPU, and elsewhere their
plain twins. All can be differentiated once. States are kept in float32, in whatever precision they are handed on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from titans_pytorch.ops import _dispatch
from titans_pytorch.utils.shapes import Float

# features of the shorter side of a matrix, which a kernel keeps on chip whole, and rows of a chunk
WIDEST, MOST_ROWS = 128, 16
# entries of a head's states, all chunks together: places among them are 32 bits long
MOST_ENTRIES = 2**31
# in full, also where PyTorch may use TF32: errors of a state add up
FLOAT32_PRECISION = 'tf32x3'
SERVED = (torch.float32, torch.bfloat16, torch.float16)


def momenta(
    inputs: Float[Tensor, 'bh n m d'],
    errors: Float[Tensor, 'bh n m e'],
    scales: Float[Tensor, 'bh n'] | None,
    gates: Float[Tensor, 'bh n'] | None,
    start: Float[Tensor, 'bh d e'] | None,
    out_dtype: torch.dtype,
) -> tuple[Float[Tensor, 'bh n d e'], Float[Tensor, 'bh d e']]:
    """S_c = η_c S_{c−1} + s_c · X_cᵀ Δ_c

    Args:
        scales: s; `None` for 1.
        gates: η, in (0, 1); `None` without momentum, which is S_c = s_c · X_cᵀ Δ_c.
        start: S_{−1}; `None` for 0.
        out_dtype: of the first that is returned: what Newton–Schulz computes its products in. In the backward pass
            products are in this precision too, or in that of the rows if it is lower.

    Returns:
        the momentum after each chunk, and after the last, in float32.
    """
    return _momenta(inputs, errors, scales, gates, start, out_dtype)


def weights_over_time(
    updates: Float[Tensor, 'bh n ...'],
    keep: Float[Tensor, 'bh n'],
    start: Float[Tensor, 'bh ...'],
    out_dtype: torch.dtype,
) -> tuple[Float[Tensor, 'bh n ...'], Float[Tensor, 'bh ...']]:
    """W_c = κ_c W_{c−1} + O_c

    Args:
        updates: O, orthogonal or not; matrices or vectors.
        keep: κ = 1 − α.
        start: W_{−1}.
        out_dtype: of the first that is returned.

    Returns:
        the weights before each chunk, W_{−1} to W_{n−2}, and those after the last, in float32.
    """
    before, end, _, _ = _over_time(updates.flatten(2), None, None, keep, None, start.flatten(1), out_dtype)
    return before.view(updates.shape), end.view(start.shape)


def vectors_over_time(
    updates: Float[Tensor, 'bh n f'],
    scales: Float[Tensor, 'bh n'] | None,
    gates: Float[Tensor, 'bh n'] | None,
    keep: Float[Tensor, 'bh n'],
    momentum_start: Float[Tensor, 'bh f'] | None,
    weight_start: Float[Tensor, 'bh f'],
) -> tuple[Float[Tensor, 'bh n f'], Float[Tensor, 'bh f'], Float[Tensor, 'bh f'] | None]:
    """S_c = η_c S_{c−1} + s_c · u_c, W_c = κ_c W_{c−1} + S_c

    Returns:
        the weights before each chunk, W_{−1} to W_{n−2}, those after the last, and the momentum after the last;
        `None` without momentum, where W_c = κ_c W_{c−1} + s_c · u_c.
    """
    momentum_start = None if gates is None else momentum_start
    args = (updates, scales, gates, keep, momentum_start, weight_start, weight_start.dtype)
    before, weight_end, momentum_end, _ = _over_time(*args)
    return before, weight_end, None if gates is None else momentum_end


def kernels_serve(rows: Float[Tensor, 'bh n m d'], weights: list[Tensor]) -> bool:
    """Whether a run of these chunks is the kernels' for all parameters of a memory, (bh, d, e) or (bh, f)."""
    chunks, count = rows.shape[1:3]
    fit = all(_fits(chunks, count, weight.shape[1:]) for weight in weights)
    return fit and rows.dtype in SERVED and _all_float32(weights) and _dispatch.kernels_run_on(rows.device)


def _kernels_take_rows(inputs: Tensor, errors: Tensor, states: list[Tensor]) -> bool:
    _, chunks, rows, dim = inputs.shape
    fit = inputs.numel() > 0 and _fits(chunks, rows, (dim, errors.shape[-1]))
    served = inputs.dtype in SERVED and errors.dtype in SERVED and _all_float32(states)
    return fit and served and _dispatch.kernels_run_on(inputs.device)


def _kernels_take_updates(updates: Tensor, states: list[Tensor]) -> bool:
    fit = updates.numel() > 0 and updates.shape[1] * updates.shape[2] < MOST_ENTRIES
    return fit and updates.dtype in SERVED and _all_float32(states) and _dispatch.kernels_run_on(updates.device)


def _fits(chunks: int, rows: int, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of this shape, and chunks of so many rows, are not too large."""
    narrow = 0 < min(shape) and (len(shape) == 1 or min(shape) <= WIDEST)
    return 0 < rows <= MOST_ROWS and narrow and chunks * math.prod(shape) < MOST_ENTRIES


def _all_float32(states: list[Tensor]) -> bool:
    return all(t.dtype == torch.float32 for t in states)


def _kernels() -> Any:
    # imported where they are used: without a GPU there need be no Triton
    from titans_pytorch.ops.momentum_scan import triton as spectral_run

    return spectral_run


def _those(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


# what `torch.compile` sees: operations known by their shapes


@torch.library.custom_op(
    'titans_pytorch::momenta',
    mutates_args=(),
    schema='(Tensor inputs, Tensor errors, Tensor? scales, Tensor? gates, Tensor? start, ScalarType out_dtype) '
    '-> (Tensor, Tensor)',
)
def _momenta(
    inputs: Tensor,
    errors: Tensor,
    scales: Tensor | None,
    gates: Tensor | None,
    start: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if _kernels_take_rows(inputs, errors, _those(scales, gates, start)):
        return _kernels().momenta(inputs, errors, scales, gates, start, out_dtype)
    return plain_momenta(inputs, errors, scales, gates, start, out_dtype)


@torch.library.custom_op(
    'titans_pytorch::momenta_backward',
    mutates_args=(),
    schema='(Tensor? d_every, Tensor? d_end, Tensor inputs, Tensor errors, Tensor? scales, Tensor? gates, '
    'Tensor? start, Tensor every) -> (Tensor, Tensor, Tensor, Tensor)',
)
def _momenta_backward(
    d_every: Tensor | None,
    d_end: Tensor | None,
    inputs: Tensor,
    errors: Tensor,
    scales: Tensor | None,
    gates: Tensor | None,
    start: Tensor | None,
    every: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = (d_every, d_end, inputs, errors, scales, gates, start, every)
    if _kernels_take_rows(inputs, errors, _those(scales, gates, start)):
        return _kernels().momenta_backward(*args, FLOAT32_PRECISION)
    return plain_momenta_backward(*args)


@torch.library.custom_op(
    'titans_pytorch::over_time',
    mutates_args=(),
    schema='(Tensor updates, Tensor? scales, Tensor? gates, Tensor keep, Tensor? momentum_start, '
    'Tensor weight_start, ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor)',
)
def _over_time(
    updates: Tensor,
    scales: Tensor | None,
    gates: Tensor | None,
    keep: Tensor,
    momentum_start: Tensor | None,
    weight_start: Tensor,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With the momentum before each chunk, which the backward needs."""
    args = (updates, scales, gates, keep, momentum_start, weight_start, out_dtype)
    if _kernels_take_updates(updates, _those(scales, gates, keep, momentum_start, weight_start)):
        return _kernels().over_time(*args)
    return plain_over_time(*args)


@torch.library.custom_op(
    'titans_pytorch::over_time_backward',
    mutates_args=(),
    schema='(Tensor? d_before, Tensor? d_weight_end, Tensor? d_momentum_end, Tensor updates, Tensor? scales, '
    'Tensor? gates, Tensor keep, Tensor? momentum_start, Tensor before, Tensor momenta) '
    '-> (Tensor, Tensor, Tensor, Tensor)',
)
def _over_time_backward(
    d_before: Tensor | None,
    d_weight_end: Tensor | None,
    d_momentum_end: Tensor | None,
    updates: Tensor,
    scales: Tensor | None,
    gates: Tensor | None,
    keep: Tensor,
    momentum_start: Tensor | None,
    before: Tensor,
    momenta: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args: Any = (d_before, d_weight_end, d_momentum_end, updates, scales, gates, keep, momentum_start, before, momenta)
    if _kernels_take_updates(updates, _those(scales, gates, keep, momentum_start)):
        return _kernels().over_time_backward(*args)
    return plain_over_time_backward(*args)


def _states_dtype(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _like_start(start: Tensor | None, like: Tensor) -> Tensor:
    """Contiguous; of no size for nothing."""
    return like.new_empty((0,) if start is None else start.shape, dtype=_states_dtype(like))


@_momenta.register_fake
def _(inputs: Tensor, errors: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    heads, chunks, _, dim = inputs.shape
    every = inputs.new_empty(heads, chunks, dim, errors.shape[-1], dtype=rest[-1])
    return every, inputs.new_empty(heads, dim, errors.shape[-1], dtype=_states_dtype(inputs))


@_momenta_backward.register_fake
def _(
    d_every: Tensor | None,
    d_end: Tensor | None,
    inputs: Tensor,
    errors: Tensor,
    scales: Tensor | None,
    gates: Tensor | None,
    start: Tensor | None,
    every: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_factors = inputs.new_empty(len(_those(scales, gates)), *inputs.shape[:2], dtype=_states_dtype(inputs))
    return inputs.new_empty(inputs.shape), errors.new_empty(errors.shape), d_factors, _like_start(start, inputs)


@_over_time.register_fake
def _(
    updates: Tensor, scales: Tensor | None, gates: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, _, features = updates.shape
    dtype = _states_dtype(updates)
    return (
        updates.new_empty(updates.shape, dtype=rest[-1]),
        updates.new_empty(heads, features, dtype=dtype),
        updates.new_empty((0,) if gates is None else (heads, features), dtype=dtype),
        updates.new_empty((0,) if gates is None else updates.shape, dtype=dtype),
    )


@_over_time_backward.register_fake
def _(
    d_before: Tensor | None,
    d_weight_end: Tensor | None,
    d_momentum_end: Tensor | None,
    updates: Tensor,
    scales: Tensor | None,
    gates: Tensor | None,
    keep: Tensor,
    momentum_start: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, (heads, chunks, features) = _states_dtype(updates), updates.shape
    return (
        updates.new_empty(updates.shape),
        updates.new_empty(len(_those(scales, gates, keep)), heads, chunks, dtype=dtype),
        _like_start(momentum_start, updates),
        updates.new_empty(heads, features, dtype=dtype),
    )


def _keep_momenta(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[0])
    # what comes after a run may use one and not the other
    ctx.set_materialize_grads(False)


def _momenta_gradients(ctx: Any, d_every: Tensor | None, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_every is None and d_end is None:
        return (None,) * 6
    _, _, scales, gates, start, _ = ctx.saved_tensors
    d_inputs, d_errors, d_factors, d_start = _momenta_backward(d_every, d_end, *ctx.saved_tensors)
    d_scales, d_gates = _dealt(d_factors, scales, gates)
    return d_inputs, d_errors, d_scales, d_gates, None if start is None else d_start, None


def _keep_over_time(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _ = inputs
    before, _, _, momenta = output
    ctx.save_for_backward(*tensors, before, momenta)
    ctx.mark_non_differentiable(momenta)
    ctx.set_materialize_grads(False)


def _over_time_gradients(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    _, scales, gates, keep, momentum_start, _, _ = ctx.saved_tensors
    d_before, d_weight_end, d_momentum_end, _ = d_outputs
    # without gates there is none, though an empty one may come
    d_momentum_end = None if gates is None else d_momentum_end
    if d_before is None and d_weight_end is None and d_momentum_end is None:
        return (None,) * 7
    d_updates, d_factors, d_momentum_start, d_weight_start = _over_time_backward(
        d_before, d_weight_end, d_momentum_end, *ctx.saved_tensors
    )
    d_scales, d_gates, d_keep = _dealt(d_factors, scales, gates, keep)
    of_momentum = None if momentum_start is None else d_momentum_start
    return d_updates, d_scales, d_gates, d_keep, of_momentum, d_weight_start, None


def _dealt(d_factors: Tensor, *factors: Tensor | None) -> list[Tensor | None]:
    """The gradient of each factor, of those that there are."""
    gradients = iter(d_factors.unbind(0))
    return [None if factor is None else next(gradients) for factor in factors]


_momenta.register_autograd(_momenta_gradients, setup_context=_keep_momenta)
_over_time.register_autograd(_over_time_gradients, setup_context=_keep_over_time)
_dispatch.differentiated_once(_momenta_backward, _over_time_backward)


# the plain twins


def plain_momenta(
    inputs: Float[Tensor, 'bh n m d'],
    errors: Float[Tensor, 'bh n m e'],
    scales: Float[Tensor, 'bh n'] | None,
    gates: Float[Tensor, 'bh n'] | None,
    start: Float[Tensor, 'bh d e'] | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    dtype = _states_dtype(inputs)
    with torch.autocast(inputs.device.type, enabled=False):
        states = inputs.to(dtype).mT @ errors.to(dtype)
    if scales is not None:
        states = states * scales[..., None, None]
    if gates is not None:
        # S_c = η_c S_{c−1} + u_c
        last = torch.zeros_like(states[:, 0]) if start is None else start
        over_chunks = []
        for update, gate in zip(states.unbind(1), gates.unbind(1)):
            last = gate[:, None, None] * last + update
            over_chunks.append(last)
        states = torch.stack(over_chunks, dim=1)
    every = states.to(out_dtype)
    return every, states[:, -1].clone()


def plain_momenta_backward(
    d_every: Float[Tensor, 'bh n d e'] | None,
    d_end: Float[Tensor, 'bh d e'] | None,
    inputs: Float[Tensor, 'bh n m d'],
    errors: Float[Tensor, 'bh n m e'],
    scales: Float[Tensor, 'bh n'] | None,
    gates: Float[Tensor, 'bh n'] | None,
    start: Float[Tensor, 'bh d e'] | None,
    every: Float[Tensor, 'bh n d e'],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `inputs`, `errors`, of `scales` and `gates`, stacked, those that there are, and of `start`."""
    dtype, chunks = _states_dtype(inputs), inputs.shape[1]
    d_states = torch.zeros_like(every, dtype=dtype) if d_every is None else d_every.to(dtype, copy=True)
    if d_end is not None:
        d_states[:, -1] += d_end
    if gates is not None:
        # H_c = d_every_c + η_{c+1} H_{c+1}
        for chunk in reversed(range(chunks - 1)):
            d_states[:, chunk] += gates[:, chunk + 1, None, None] * d_states[:, chunk + 1]

    # u = s · Xᵀ Δ
    x, delta = inputs.to(dtype), errors.to(dtype)
    with torch.autocast(inputs.device.type, enabled=False):
        d_inputs, d_errors = delta @ d_states.mT, x @ d_states
    d_factors = []
    if scales is not None:
        d_factors.append((d_inputs * x).sum(dim=(2, 3)))
        d_inputs, d_errors = (scales[..., None, None] * d for d in (d_inputs, d_errors))
    d_start = _like_start(start, inputs).zero_()
    if gates is not None:
        first = torch.zeros_like(d_states[:, 0]) if start is None else start
        before = torch.cat((first.unsqueeze(1), every[:, :-1].to(dtype)), dim=1)
        d_factors.append((d_states * before).sum(dim=(2, 3)))
        if start is not None:
            d_start = gates[:, 0, None, None] * d_states[:, 0]
    stacked = torch.stack(d_factors) if d_factors else x.new_empty(0, *x.shape[:2])
    return d_inputs.to(inputs.dtype), d_errors.to(errors.dtype), stacked, d_start


def plain_over_time(
    updates: Float[Tensor, 'bh n f'],
    scales: Float[Tensor, 'bh n'] | None,
    gates: Float[Tensor, 'bh n'] | None,
    keep: Float[Tensor, 'bh n'],
    momentum_start: Float[Tensor, 'bh f'] | None,
    weight_start: Float[Tensor, 'bh f'],
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _states_dtype(updates)
    scaled = updates.to(dtype) if scales is None else scales.unsqueeze(-1) * updates.to(dtype)
    weight, momentum = weight_start.to(dtype), torch.zeros_like(scaled[:, 0])
    if momentum_start is not None:
        momentum = momentum_start.to(dtype)
    weights, momenta = [], []
    for chunk, update in enumerate(scaled.unbind(1)):
        weights.append(weight)
        momenta.append(momentum)
        # S_c = η_c S_{c−1} + u_c, W_c = κ_c W_{c−1} + S_c
        momentum = update if gates is None else gates[:, chunk, None] * momentum + update
        weight = keep[:, chunk, None] * weight + momentum
    before = torch.stack(weights, dim=1).to(out_dtype)
    if gates is None:
        return before, weight, weight.new_empty(0), weight.new_empty(0)
    return before, weight, momentum, torch.stack(momenta, dim=1)


def plain_over_time_backward(
    d_before: Float[Tensor, 'bh n f'] | None,
    d_weight_end: Float[Tensor, 'bh f'] | None,
    d_momentum_end: Float[Tensor, 'bh f'] | None,
    updates: Float[Tensor, 'bh n f'],
    scales: Float[Tensor, 'bh n'] | None,
    gates: Float[Tensor, 'bh n'] | None,
    keep: Float[Tensor, 'bh n'],
    momentum_start: Float[Tensor, 'bh f'] | None,
    before: Float[Tensor, 'bh n f'],
    momenta: Float[Tensor, 'bh n f'],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `updates`, of `scales`, `gates` and `keep`, stacked, those that there are, and of both starts."""
    dtype = _states_dtype(updates)
    nothing = torch.zeros_like(updates[:, 0], dtype=dtype)
    d_weight = nothing if d_weight_end is None else d_weight_end.to(dtype)
    d_momentum = nothing if d_momentum_end is None else d_momentum_end.to(dtype)
    of_weights, of_momenta = [], []
    for chunk in reversed(range(updates.shape[1])):
        # G_c = d_before_{c+1} + κ_{c+1} G_{c+1}, H_c = G_c + η_{c+1} H_{c+1}
        d_momentum = d_momentum + d_weight
        of_weights.append(d_weight)
        of_momenta.append(d_momentum)
        d_momentum = nothing if gates is None else gates[:, chunk, None] * d_momentum
        d_weight = keep[:, chunk, None] * d_weight
        if d_before is not None:
            d_weight = d_weight + d_before[:, chunk].to(dtype)
    d_weights, d_scaled = (torch.stack(own[::-1], dim=1) for own in (of_weights, of_momenta))

    d_factors = []
    if scales is not None:
        d_factors.append((d_scaled * updates.to(dtype)).sum(dim=2))
    if gates is not None:
        d_factors.append((d_scaled * momenta).sum(dim=2))
    d_factors.append((d_weights * before.to(dtype)).sum(dim=2))
    d_updates = d_scaled if scales is None else scales.unsqueeze(-1) * d_scaled
    of_momentum = nothing.new_empty(0) if momentum_start is None else d_momentum
    return d_updates.to(updates.dtype), torch.stack(d_factors), of_momentum, d_weight
