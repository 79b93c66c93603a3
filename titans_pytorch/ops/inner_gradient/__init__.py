"""What a run of chunks costs a memory MLP, in few operations: its factors and the states after it.

`record` is the forward of `MemoryMLP` at base weights, with or without `ResidualNorm` around it, and the gradient of
the default loss by each product, written out; its own backward is the second derivative of the network. `ends` adds
up what a run leaves in a matrix and in its momentum. Each is one operation, forward and backward, that
`torch.compile` does not look into: Triton kernels on a GPU, and elsewhere their plain twins. Both can be
differentiated once.

For one row with key k, value v and step size θ, two matrices W₁ and W₂ and the gain 1 + γ of the norm:

    h = k W₁    a = gelu(h)    y = a W₂    x̂ = (y − mean y) · r, r = (var y + eps)^−½    p = x̂ ∘ (1 + γ) + k
    loss = mean (p − v)²
    s = −θ ∂loss/∂p = −(2θ/d) (p − v)    u = s ∘ (1 + γ)
    Δ₂ = r · P(u) with P(u) = u − mean u − x̂ · mean(u ∘ x̂)    Δ₁ = (Δ₂ W₂ᵀ) ∘ gelu′(h)

and −θ ∂loss/∂γ = s ∘ x̂. Without the norm p = y and Δ₂ = s; with one matrix y = k W₂, and there is no Δ₁.

Each of W₁, W₂ and γ may have a share of another memory's added, P_c before chunk c: W + share_c · P_c. With G_c, the
gradient of that sum, the gradient of W is Σ_c G_c, that of P_c is share_c · G_c, and that of share_c is ⟨G_c, P_c⟩
over all three.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.ops import _dispatch
from titans_pytorch.ops.norms import standardise
from titans_pytorch.utils.precision import operand_dtype
from titans_pytorch.utils.shapes import Float

# features of a row that a kernel keeps on chip whole
WIDEST = 128
# the weights, and the momentum of each order
MOST_STATES = 4
# in full, also where PyTorch may use TF32: each memory batch builds on the one before, and errors grow
FLOAT32_PRECISION = 'tf32x3'

Recorded = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Added(NamedTuple):
    """Another memory's weights before each chunk, a share of which is added to the base weights: of the same ones."""

    shares: Float[Tensor, 'bh n']
    first: Float[Tensor, 'bh n d e'] | None
    last: Float[Tensor, 'bh n e d']
    gamma: Float[Tensor, 'bh n d'] | None


def record(
    keys: Float[Tensor, 'bh n m d'],
    values: Float[Tensor, 'bh n m d'],
    step_sizes: Float[Tensor, 'bh n m'],
    first: Float[Tensor, 'bh d e'] | None,
    last: Float[Tensor, 'bh e d'],
    gamma: Float[Tensor, 'bh d'] | None,
    eps: float,
    added: Added | None = None,
) -> Recorded:
    """One forward and one gradient of a memory MLP for every row, all at the same weights, or at those of its chunk.

    Args:
        first: W₁; `None` if the memory is one matrix.
        last: W₂, or the one matrix (bh, d, d).
        gamma: γ of the norm around the network; `None` without.
        eps: of that norm.
        added: what makes weights differ from chunk to chunk.

    Returns:
        what the last matrix saw, gelu(h) (bh, n, m, e); the errors Δ₁ (bh, n, m, e) and Δ₂ (bh, n, m, d) of the
        products, minus their gradients; minus the gradient of γ per chunk (bh, n, d); and unweighted losses
        (bh, n, m). What there is not, without `first` or `gamma`, is empty. Inputs and errors come in the precision
        of the products: under autocast its own.
    """
    weights = [w for w in (first, last, gamma) if w is not None]
    if not torch.is_grad_enabled() and not kernels_serve_record(keys, values, step_sizes, weights, added):
        # an operation is for autograd's sake and the kernels'; without it the compiler may look inside
        return plain_record(keys, values, step_sizes, first, last, gamma, added, eps, operand_dtype(keys))
    others = (None,) * 4 if added is None else added
    return _record(keys, values, step_sizes, first, last, gamma, *others, eps, operand_dtype(keys))


def ends(
    end: Float[Tensor, 'bh k n'],
    end_starts: Float[Tensor, 'bh k k'],
    starts: list[Tensor],
    inputs: Float[Tensor, 'bh n m d'],
    errors: Float[Tensor, 'bh n m e'],
) -> list[Tensor]:
    """Each state of a matrix after a run, (bh, d, e), given those before it, `starts`, and what each row changes:

    state_k = Σ_c end[k, c] · X_cᵀ Δ_c + Σ_j end_starts[k, j] · start_j
    """
    return _ends(end, end_starts, starts, inputs, errors, operand_dtype(errors))


def kernels_serve_record(
    keys: Tensor, values: Tensor, step_sizes: Tensor, weights: list[Tensor], added: Added | None = None
) -> bool:
    """Whether `record` of these is a kernel's, and as exact as PyTorch's own products."""
    rows_fit = 0 < keys.shape[-1] <= WIDEST and keys.numel() > 0
    others = [t for t in added or () if t is not None]
    return rows_fit and _dispatch.kernels_take([keys, values, step_sizes, *others], weights)


def kernels_serve_ends(end: Tensor, end_starts: Tensor, starts: list[Tensor], inputs: Tensor, errors: Tensor) -> bool:
    """The same for `ends`."""
    rows_fit = 0 < min(inputs.shape[-1], errors.shape[-1]) <= WIDEST and inputs.numel() > 0
    return (
        rows_fit and len(starts) <= MOST_STATES and _dispatch.kernels_take([inputs, errors], [end, end_starts, *starts])
    )


def _kernels(device: torch.device, operands: torch.dtype) -> tuple[Any, Any] | None:
    """The kernels of both operations; `None` where they do not run."""
    if operands == torch.float64 or not _dispatch.kernels_run_on(device):
        return None
    # imported where they are used: without a GPU there need be no Triton
    from titans_pytorch.ops.final_state import triton as ends
    from titans_pytorch.ops.inner_gradient import triton as record

    return record, ends


# what `torch.compile` sees: operations known by their shapes


@torch.library.custom_op(
    'titans_pytorch::record',
    mutates_args=(),
    schema='(Tensor keys, Tensor values, Tensor step_sizes, Tensor? first, Tensor last, Tensor? gamma, '
    'Tensor? shares, Tensor? add_first, Tensor? add_last, Tensor? add_gamma, float eps, ScalarType operands) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor)',
)
def _record(
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    first: Tensor | None,
    last: Tensor,
    gamma: Tensor | None,
    shares: Tensor | None,
    add_first: Tensor | None,
    add_last: Tensor | None,
    add_gamma: Tensor | None,
    eps: float,
    operands: torch.dtype,
) -> Recorded:
    inputs = (keys, values, step_sizes, first, last, gamma, _added(shares, add_first, add_last, add_gamma))
    kernels = _kernels(keys.device, operands)
    if kernels is None:
        return plain_record(*inputs, eps, operands)
    kernel, _ = kernels
    return kernel.forward(*inputs, eps, operands, FLOAT32_PRECISION)


@torch.library.custom_op(
    'titans_pytorch::record_backward',
    mutates_args=(),
    schema='(Tensor d_hidden, Tensor d_hidden_errors, Tensor d_errors, Tensor d_descent, Tensor? d_losses, '
    'Tensor keys, Tensor values, Tensor step_sizes, Tensor? first, Tensor last, Tensor? gamma, '
    'Tensor? shares, Tensor? add_first, Tensor? add_last, Tensor? add_gamma, '
    'Tensor hidden, Tensor errors, float eps, ScalarType operands) -> Tensor[]',
)
def _record_backward(
    d_hidden: Tensor,
    d_hidden_errors: Tensor,
    d_errors: Tensor,
    d_descent: Tensor,
    d_losses: Tensor | None,
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    first: Tensor | None,
    last: Tensor,
    gamma: Tensor | None,
    shares: Tensor | None,
    add_first: Tensor | None,
    add_last: Tensor | None,
    add_gamma: Tensor | None,
    hidden: Tensor,
    errors: Tensor,
    eps: float,
    operands: torch.dtype,
) -> list[Tensor]:
    d_outputs = (d_hidden, d_hidden_errors, d_errors, d_descent, d_losses)
    added = _added(shares, add_first, add_last, add_gamma)
    saved = (keys, values, step_sizes, first, last, gamma, added, hidden, errors)
    kernels = _kernels(keys.device, operands)
    if kernels is None:
        return plain_record_backward(d_outputs, *saved, eps, operands)
    kernel, _ = kernels
    return kernel.backward(d_outputs, *saved, eps, operands, FLOAT32_PRECISION)


@torch.library.custom_op(
    'titans_pytorch::ends',
    mutates_args=(),
    schema='(Tensor end, Tensor end_starts, Tensor[] starts, Tensor inputs, Tensor errors, ScalarType operands) '
    '-> Tensor[]',
)
def _ends(
    end: Tensor, end_starts: Tensor, starts: list[Tensor], inputs: Tensor, errors: Tensor, operands: torch.dtype
) -> list[Tensor]:
    kernels = _kernels(inputs.device, operands)
    if kernels is None:
        return plain_ends(end, end_starts, starts, inputs, errors, operands)
    _, kernel = kernels
    return kernel.forward(end, end_starts, starts, inputs, errors, operands, FLOAT32_PRECISION)


@torch.library.custom_op(
    'titans_pytorch::ends_backward',
    mutates_args=(),
    schema='(Tensor[] d_states, Tensor end, Tensor end_starts, Tensor[] starts, Tensor inputs, Tensor errors, '
    'ScalarType operands) -> (Tensor, Tensor, Tensor[], Tensor, Tensor)',
)
def _ends_backward(
    d_states: list[Tensor],
    end: Tensor,
    end_starts: Tensor,
    starts: list[Tensor],
    inputs: Tensor,
    errors: Tensor,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    kernels = _kernels(inputs.device, operands)
    if kernels is None:
        return plain_ends_backward(d_states, end, end_starts, starts, inputs, errors, operands)
    _, kernel = kernels
    return kernel.backward(d_states, end, end_starts, starts, inputs, errors, operands, FLOAT32_PRECISION)


def _added(shares: Tensor | None, first: Tensor | None, last: Tensor | None, gamma: Tensor | None) -> Added | None:
    return None if shares is None or last is None else Added(shares, first, last, gamma)


def _empty_like(t: Tensor | None, like: Tensor) -> Tensor:
    """Contiguous; of no size for nothing."""
    return like.new_empty(0) if t is None else t.new_empty(t.shape)


@_record.register_fake
def _(
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    first: Tensor | None,
    last: Tensor,
    gamma: Tensor | None,
    shares: Tensor | None,
    add_first: Tensor | None,
    add_last: Tensor | None,
    add_gamma: Tensor | None,
    eps: float,
    operands: torch.dtype,
) -> Recorded:
    rows, (chunks, dim) = keys.shape[:3], (keys.shape[1], keys.shape[3])
    hidden = (0,) if first is None else (*rows, first.shape[-1])
    return (
        keys.new_empty(hidden, dtype=operands),
        keys.new_empty(hidden, dtype=operands),
        keys.new_empty(keys.shape, dtype=operands),
        last.new_empty((0,) if gamma is None else (len(last), chunks, dim)),
        last.new_empty(rows),
    )


@_record_backward.register_fake
def _(
    d_hidden: Tensor,
    d_hidden_errors: Tensor,
    d_errors: Tensor,
    d_descent: Tensor,
    d_losses: Tensor | None,
    keys: Tensor,
    values: Tensor,
    step_sizes: Tensor,
    first: Tensor | None,
    last: Tensor,
    *rest: Any,
) -> list[Tensor]:
    gamma_and_added = rest[:5]
    return [_empty_like(t, last) for t in (keys, values, step_sizes, first, last, *gamma_and_added)]


@_ends.register_fake
def _(end: Tensor, end_starts: Tensor, starts: list[Tensor], *rest: Any) -> list[Tensor]:
    return [_empty_like(start, end) for start in starts]


@_ends_backward.register_fake
def _(
    d_states: list[Tensor],
    end: Tensor,
    end_starts: Tensor,
    starts: list[Tensor],
    inputs: Tensor,
    errors: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    d_end, d_end_starts, d_inputs, d_errors = (_empty_like(t, end) for t in (end, end_starts, inputs, errors))
    return d_end, d_end_starts, [_empty_like(start, end) for start in starts], d_inputs, d_errors


def _keep_record(ctx: Any, inputs: tuple[Any, ...], output: Recorded) -> None:
    *tensors, ctx.eps, ctx.operands = inputs
    ctx.save_for_backward(*tensors, *output[:3])
    ctx.chunk_shape = output[3].shape
    # losses are seldom learned from
    ctx.set_materialize_grads(False)


def _record_gradients(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, hidden, hidden_errors, errors = ctx.saved_tensors
    last = inputs[4]
    d_hidden, d_hidden_errors, d_errors, d_descent, d_losses = d_outputs
    gradients = _record_backward(
        torch.zeros_like(hidden) if d_hidden is None else d_hidden,
        torch.zeros_like(hidden_errors) if d_hidden_errors is None else d_hidden_errors,
        torch.zeros_like(errors) if d_errors is None else d_errors,
        last.new_zeros(ctx.chunk_shape) if d_descent is None else d_descent,
        d_losses,
        *inputs,
        hidden,
        errors,
        ctx.eps,
        ctx.operands,
    )
    return *(None if t is None else gradient for t, gradient in zip(inputs, gradients)), None, None


def _keep_ends(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    end, end_starts, starts, rows, errors, ctx.operands = inputs
    ctx.save_for_backward(end, end_starts, rows, errors, *starts)


def _ends_gradients(ctx: Any, d_states: list[Tensor]) -> tuple[Any, ...]:
    end, end_starts, inputs, errors, *starts = ctx.saved_tensors
    return *_ends_backward(d_states, end, end_starts, starts, inputs, errors, ctx.operands), None


_record.register_autograd(_record_gradients, setup_context=_keep_record)
_ends.register_autograd(_ends_gradients, setup_context=_keep_ends)
_dispatch.differentiated_once(_record_backward, _ends_backward)


# the plain twins


def plain_record(
    keys: Float[Tensor, 'bh n m d'],
    values: Float[Tensor, 'bh n m d'],
    step_sizes: Float[Tensor, 'bh n m'],
    first: Float[Tensor, 'bh d e'] | None,
    last: Float[Tensor, 'bh e d'],
    gamma: Float[Tensor, 'bh d'] | None,
    added: Added | None,
    eps: float,
    operands: torch.dtype,
) -> Recorded:
    dtype, dim = last.dtype, keys.shape[-1]
    first, last, gamma = _together(first, last, gamma, added)
    times = _products(operands, dtype)
    k, theta = keys.to(dtype), step_sizes.to(dtype).unsqueeze(-1)

    h = None if first is None else times(k, first)
    a = k if h is None else F.gelu(h)
    y = times(a, last)
    gain = _gain(gamma)
    unit, inverse = (y, None) if gain is None else standardise(y, eps)
    difference = (y if gain is None else unit * gain + k) - values.to(dtype)

    # s = −(2θ/d) (p − v)
    descent = theta * difference * (-2 / dim)
    errors = descent if gain is None or inverse is None else inverse * _tangent(descent * gain, unit)[0]
    none = keys.new_empty(0, dtype=operands)
    hidden, hidden_errors = none, none.clone()
    if h is not None:
        # Δ₁ = (Δ₂ W₂ᵀ) ∘ gelu′(h)
        hidden, hidden_errors = a.to(operands), gelu_backward(times(errors, last.mT), h).to(operands)
    of_gamma = last.new_empty(0) if gain is None else (descent * unit).sum(dim=2)
    return hidden, hidden_errors, errors.to(operands), of_gamma, difference.square().mean(dim=-1)


def plain_record_backward(
    d_outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    keys: Float[Tensor, 'bh n m d'],
    values: Float[Tensor, 'bh n m d'],
    step_sizes: Float[Tensor, 'bh n m'],
    first: Float[Tensor, 'bh d e'] | None,
    last: Float[Tensor, 'bh e d'],
    gamma: Float[Tensor, 'bh d'] | None,
    added: Added | None,
    hidden: Tensor,
    errors: Tensor,
    eps: float,
    operands: torch.dtype,
) -> list[Tensor]:
    """Gradients of `keys`, `values`, `step_sizes`, `first`, `last`, `gamma` and all in `added`; d_x is that of x."""
    dtype, dim = last.dtype, keys.shape[-1]
    first, last, gamma = _together(first, last, gamma, added)
    times, outer = _products(operands, dtype), _outer if added is None else _outer_of_chunks
    all_rows = (1, 2) if added is None else 2
    d_hidden, d_hidden_errors, d_errors, d_descent, d_losses = (None if t is None else t.to(dtype) for t in d_outputs)
    assert d_hidden is not None and d_hidden_errors is not None and d_errors is not None and d_descent is not None
    k, theta = keys.to(dtype), step_sizes.to(dtype).unsqueeze(-1)

    # the forward again
    h = None if first is None else times(k, first)
    y = times(k if h is None else F.gelu(h), last)
    gain = _gain(gamma)
    unit, inverse = (y, None) if gain is None else standardise(y, eps)
    difference = (y if gain is None else unit * gain + k) - values.to(dtype)
    descent = theta * difference * (-2 / dim)

    # Δ₁ = g ∘ gelu′(h) with g = Δ₂ W₂ᵀ
    d_g = None
    if h is not None:
        d_g = gelu_backward(d_hidden_errors, h)
        d_errors = d_errors + times(d_g, last)

    d_gamma, d_unit, d_inverse = None, None, None
    delta, d_s = descent, d_errors
    if gain is not None:
        assert inverse is not None
        # Δ₂ = r · P(u), and P is symmetric; but it is made of x̂ as well
        tangent, along = _tangent(descent * gain, unit)
        delta = inverse * tangent
        d_inverse = (d_errors * tangent).sum(dim=-1, keepdim=True)
        d_errors = inverse * d_errors
        d_u, d_along = _tangent(d_errors, unit)
        d_unit = -along * d_errors - d_along * (descent * gain)
        # u = s ∘ (1 + γ), and the descent of γ is Σ s ∘ x̂
        d_chunk = d_descent.unsqueeze(2)
        d_s = d_u * gain + d_chunk * unit
        d_unit = d_unit + d_chunk * descent
        d_gamma = (d_u * descent).sum(dim=all_rows)

    # s = −(2θ/d) (p − v), loss = mean (p − v)²
    d_theta = (d_s * difference).sum(dim=-1) * (-2 / dim)
    d_prediction = d_s * theta * (-2 / dim)
    if d_losses is not None:
        d_prediction = d_prediction + d_losses.unsqueeze(-1) * difference * (2 / dim)

    d_keys = torch.zeros_like(k)
    d_y = d_prediction
    if gain is not None:
        assert inverse is not None and d_inverse is not None and d_unit is not None and d_gamma is not None
        # p = x̂ ∘ (1 + γ) + k
        d_keys = d_prediction
        d_gamma = d_gamma + (d_prediction * unit).sum(dim=all_rows)
        d_unit = d_unit + d_prediction * gain
        # x̂ = (y − mean y) · r, and ∂r/∂y = −r² x̂ / d
        d_y = inverse * (_tangent(d_unit, unit)[0] - d_inverse * inverse * unit / dim)

    d_first = None
    if h is None or first is None or d_g is None:
        d_keys = d_keys + times(d_y, last.mT)
        d_last = outer(k, d_y, operands, dtype)
    else:
        bent = d_hidden_errors * times(delta, last.mT) * _gelu_curvature(h)
        d_h = gelu_backward(d_hidden + times(d_y, last.mT), h) + bent
        d_keys = d_keys + times(d_h, first.mT)
        d_last = outer(hidden, d_y, operands, dtype) + outer(d_g, errors, operands, dtype)
        d_first = outer(k, d_h, operands, dtype)

    of_rows = zip((d_keys, -d_prediction, d_theta), (keys, values, step_sizes))
    of_weights = _apart([d_first, d_last, d_gamma], added)
    return [
        *(gradient.to(t.dtype) for gradient, t in of_rows),
        *(last.new_empty(0) if t is None else t for t in of_weights),
    ]


def _together(
    first: Tensor | None, last: Tensor, gamma: Tensor | None, added: Added | None
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The weights of all chunks (bh, …), or of each chunk (bh, n, …): W + share_c · P_c."""
    if added is None:
        return first, last, gamma

    def together(base: Tensor, other: Tensor | None) -> Tensor:
        assert other is not None
        return base.unsqueeze(1) + _per_chunk(added.shares.to(base.dtype), other)

    return (
        None if first is None else together(first, added.first),
        together(last, added.last),
        None if gamma is None else together(gamma, added.gamma),
    )


def _apart(of_weights: list[Tensor | None], added: Added | None) -> list[Tensor | None]:
    """Gradients of base weights and of all in `added`, given those of their sums G_c (bh, n, …): Σ_c G_c, ⟨G_c, P_c⟩
    and share_c · G_c."""
    if added is None:
        return [*of_weights, None, None, None, None]
    shares, *others = added
    both = [(g, other) for g, other in zip(of_weights, others) if g is not None and other is not None]
    of_shares = torch.stack([(g * other).flatten(2).sum(dim=-1) for g, other in both]).sum(dim=0)
    of_base = [None if g is None else g.sum(dim=1) for g in of_weights]
    of_others = [
        None if g is None or other is None else _per_chunk(shares.to(g.dtype), g).to(other.dtype)
        for g, other in zip(of_weights, others)
    ]
    return [*of_base, of_shares.to(shares.dtype), *of_others]


def plain_ends(
    end: Float[Tensor, 'bh k n'],
    end_starts: Float[Tensor, 'bh k k'],
    starts: list[Tensor],
    inputs: Float[Tensor, 'bh n m d'],
    errors: Float[Tensor, 'bh n m e'],
    operands: torch.dtype,
) -> list[Tensor]:
    states = []
    for share, of_starts in zip(end.unbind(1), end_starts.unbind(1)):
        state = _outer(share[..., None, None] * inputs, errors, operands, end.dtype)
        for of_start, start in zip(of_starts.unbind(-1), starts):
            state = state + of_start[:, None, None] * start
        states.append(state)
    return states


def plain_ends_backward(
    d_states: list[Tensor],
    end: Float[Tensor, 'bh k n'],
    end_starts: Float[Tensor, 'bh k k'],
    starts: list[Tensor],
    inputs: Float[Tensor, 'bh n m d'],
    errors: Float[Tensor, 'bh n m e'],
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    """Gradients of `end`, `end_starts`, `starts`, `inputs` and `errors`."""
    times = _products(operands, end.dtype)
    shares = end[..., None, None].unbind(1)
    # X_t Gₖ, with the gradient Gₖ of state k
    through = [times(inputs, d_state) for d_state in d_states]
    back = [times(share * errors, d_state.mT) for share, d_state in zip(shares, d_states)]
    d_end = torch.stack([(x * errors).sum(dim=(2, 3)) for x in through], dim=1)
    d_errors = sum(share * x for share, x in zip(shares, through))
    d_inputs = sum(back)
    flat, flat_starts = (torch.stack(own, dim=1).flatten(2) for own in (d_states, starts))
    d_end_starts = flat @ flat_starts.mT
    d_starts = (end_starts.mT @ flat).unflatten(2, starts[0].shape[1:])
    assert isinstance(d_errors, Tensor) and isinstance(d_inputs, Tensor)
    return (
        d_end,
        d_end_starts,
        [d_start.clone() for d_start in d_starts.unbind(1)],
        d_inputs.to(inputs.dtype),
        d_errors.to(errors.dtype),
    )


def _products(operands: torch.dtype, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """x, w → x w for rows x (bh, n, m, d) and one matrix w (bh, d, e) for all of them, or one for each chunk."""

    def times(x: Tensor, w: Tensor) -> Tensor:
        if w.ndim == 4:
            return (x.to(operands) @ w.to(operands)).to(dtype)
        return (x.flatten(1, 2).to(operands) @ w.to(operands)).to(dtype).unflatten(1, x.shape[1:3])

    return times


def _outer(x: Tensor, y: Tensor, operands: torch.dtype, dtype: torch.dtype) -> Float[Tensor, 'bh d e']:
    """Σ xᵀ y over all rows."""
    return (x.flatten(1, 2).to(operands).mT @ y.flatten(1, 2).to(operands)).to(dtype)


def _outer_of_chunks(x: Tensor, y: Tensor, operands: torch.dtype, dtype: torch.dtype) -> Float[Tensor, 'bh n d e']:
    """Σ xᵀ y over the rows of each chunk."""
    return (x.to(operands).mT @ y.to(operands)).to(dtype)


def _per_chunk(shares: Float[Tensor, 'bh n'], of_chunks: Float[Tensor, 'bh n ...']) -> Float[Tensor, 'bh n ...']:
    return shares.reshape(*shares.shape, *(1,) * (of_chunks.ndim - 2)) * of_chunks


def _gain(gamma: Float[Tensor, 'bh d'] | Float[Tensor, 'bh n d'] | None) -> Float[Tensor, 'bh n 1 d'] | None:
    """1 + γ, of all chunks or of each"""
    return None if gamma is None else gamma.reshape(len(gamma), -1, 1, gamma.shape[-1]) + 1


def _tangent(u: Tensor, unit: Tensor) -> tuple[Float[Tensor, '... d'], Float[Tensor, '... 1']]:
    """P(u) = u − mean u − x̂ · mean(u ∘ x̂), and the second mean"""
    along = (u * unit).mean(dim=-1, keepdim=True)
    return u - u.mean(dim=-1, keepdim=True) - unit * along, along


def gelu_backward(d_a: Tensor, h: Tensor) -> Tensor:
    """d_a ∘ gelu′(h)"""
    return torch.ops.aten.gelu_backward(d_a, h)


def _gelu_curvature(h: Tensor) -> Tensor:
    """gelu″ = (2 − h²) φ, with the density φ of the normal distribution"""
    squared = h.square()
    return (2 - squared) * (-squared / 2).exp() / math.sqrt(2 * math.pi)
