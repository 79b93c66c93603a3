"""Queries of a whole sequence through a memory MLP whose matrices change over time, as one operation.

A run of n chunks holds each matrix factored (`fast_weights.py`): states at its start, and of every chunk the rows X
that the matrix saw and their errors Δ. Rows x of step i, which read the weights before chunk i, go through

    x W_i = Σ_k share[i, k] · x start_k + ((x Xᵀ) ∘ mix[i]) Δ

and a query q of step i through the network

    h = q W₁_i    a = gelu(h)    y = a W₂_i    out = LN(y) ∘ (1 + γ_i) + q

Without the norm out = y; with one matrix y = q W₂_i. mix[i] is one number for each chunk, and only chunks before i
count: what stands in `mix` on the diagonal and above is not read, and its gradient is zero.

With G the gradient by x W_i, P = x Xᵀ and D = G Δᵀ, both of each row and stored row, the way back through a matrix is

    x: Σ_k share_k · G start_kᵀ + (D ∘ mix) X    start_k: Σ_i share[i, k] · xᵀ G    share_k: ⟨x start_k, G⟩
    X: (D ∘ mix)ᵀ x                              Δ: (P ∘ mix)ᵀ G                    mix: Σ over rows of D ∘ P

It is one operation, forward and backward, that `torch.compile` does not look into: Triton kernels on a GPU, and
elsewhere its plain twin. It can be differentiated once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.ops import _dispatch, inner_gradient
from titans_pytorch.ops.norms import standardise
from titans_pytorch.utils.precision import no_autocast, operand_dtype
from titans_pytorch.utils.shapes import Float

# entries of a run's scores or hidden rows: places among them are 32 bits long
MOST_ENTRIES = 2**31

Retrieved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Matrix(NamedTuple):
    """A matrix over r runs of n chunks, in each of which t rows were stored, as many in every chunk."""

    starts: Float[Tensor, 'bh r k d e']
    inputs: Float[Tensor, 'bh r t d']
    errors: Float[Tensor, 'bh r t e']


class Parts(NamedTuple):
    """What the operation takes, in order; `first` is that of W₁, absent if the memory is one matrix."""

    queries: Float[Tensor, 'bh r n c d']
    mix: Float[Tensor, 'bh r n n']
    shares: Float[Tensor, 'bh r n k']
    first_starts: Float[Tensor, 'bh r k d e'] | None
    first_inputs: Float[Tensor, 'bh r t d'] | None
    first_errors: Float[Tensor, 'bh r t e'] | None
    last_starts: Float[Tensor, 'bh r k e d']
    last_inputs: Float[Tensor, 'bh r t e']
    last_errors: Float[Tensor, 'bh r t d']
    gamma: Float[Tensor, 'bh r n d'] | None


def retrieve(
    queries: Float[Tensor, 'bh r n c d'],
    mix: Float[Tensor, 'bh r n n'],
    shares: Float[Tensor, 'bh r n k'],
    first: Matrix | None,
    last: Matrix,
    gamma: Float[Tensor, 'bh r n d'] | None,
    eps: float,
) -> Float[Tensor, 'bh r n c d']:
    """Queries through a memory MLP, those of step i with the weights before chunk i of their run.

    Args:
        mix: of chunk j's X Δ, in the matrices before chunk i; only its part below the diagonal is read.
        shares: of each start.
        first: W₁; `None` if the memory is one matrix.
        last: W₂, or the one matrix, with starts (bh, r, k, d, d).
        gamma: γ of the norm around the network, in each step; `None` without the norm.
        eps: of that norm.

    Any tensor may be a view, of which only the last axis is copied unless it is in one piece, and that of `starts`
    with the axis before it.

    Returns:
        what the layers give one after the other: in float32 (float64) with the norm, and without it in the precision
        of the products, which under autocast is its own.
    """
    parts = _parts(queries, mix, shares, first, last, gamma)
    return _retrieve(*parts, eps, operand_dtype(queries))[0]


def kernels_serve(
    queries: Tensor, mix: Tensor, shares: Tensor, first: Matrix | None, last: Matrix, gamma: Tensor | None
) -> bool:
    """Whether `retrieve` of these is a kernel's, and as exact as PyTorch's own products."""
    parts = _parts(queries, mix, shares, first, last, gamma)
    rows = [queries, parts.first_inputs, parts.first_errors, parts.last_inputs, parts.last_errors]
    states = [mix, shares, parts.first_starts, parts.last_starts, gamma]
    return _fits(parts) and _dispatch.kernels_take(_those(rows), _those(states))


def _parts(
    queries: Tensor, mix: Tensor, shares: Tensor, first: Matrix | None, last: Matrix, gamma: Tensor | None
) -> Parts:
    starts, inputs, errors = (None, None, None) if first is None else first
    return Parts(queries, mix, shares, starts, inputs, errors, *last, gamma)


def _fits(parts: Parts) -> bool:
    """Whether sizes are those of the kernels."""
    steps, rows, dim = parts.queries.shape[2:]
    stored, width = parts.last_inputs.shape[2:]
    there = parts.queries.numel() > 0 and stored > 0 and width > 0
    narrow = dim <= inner_gradient.WIDEST and parts.shares.shape[-1] <= inner_gradient.MOST_STATES
    return there and narrow and max(stored, width) * max(stored, width, steps * rows) < MOST_ENTRIES


def _kernels(parts: Parts, operands: torch.dtype) -> Any:
    """The module of the kernels; `None` where they do not run."""
    in_float32 = all(t.dtype == torch.float32 for t in (parts.mix, parts.shares, parts.last_starts))
    served = operands != torch.float64 and in_float32 and _fits(parts)
    if not served or not _dispatch.kernels_run_on(parts.queries.device):
        return None
    # imported where they are used: without a GPU there need be no Triton
    from titans_pytorch.ops.retrieve_sequence import triton as retrieval

    return retrieval


def _those(tensors: list[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


# what `torch.compile` sees: operations known by their shapes

_PARTS = (
    'Tensor queries, Tensor mix, Tensor shares, Tensor? first_starts, Tensor? first_inputs, Tensor? first_errors, '
    'Tensor last_starts, Tensor last_inputs, Tensor last_errors, Tensor? gamma'
)


@torch.library.custom_op(
    'titans_pytorch::retrieve',
    mutates_args=(),
    schema=f'({_PARTS}, float eps, ScalarType operands) -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
)
def _retrieve(
    queries: Tensor,
    mix: Tensor,
    shares: Tensor,
    first_starts: Tensor | None,
    first_inputs: Tensor | None,
    first_errors: Tensor | None,
    last_starts: Tensor,
    last_inputs: Tensor,
    last_errors: Tensor,
    gamma: Tensor | None,
    eps: float,
    operands: torch.dtype,
) -> Retrieved:
    """With what the backward needs: y, of which there is only `out` without the norm; h; and of the queries' rows
    and each stored row the scores of the first matrix, mixed, and of the last, not mixed. Scores of stored rows that
    no row of the same tile reads may be anything."""
    first = (first_starts, first_inputs, first_errors)
    parts = Parts(queries, mix, shares, *first, last_starts, last_inputs, last_errors, gamma)
    kernels = _kernels(parts, operands)
    if kernels is None:
        return plain_retrieve(parts, eps, operands)
    return kernels.forward(*parts, eps, operands, inner_gradient.FLOAT32_PRECISION)


@torch.library.custom_op(
    'titans_pytorch::retrieve_backward',
    mutates_args=(),
    schema=f'(Tensor d_out, {_PARTS}, Tensor product, Tensor hidden, Tensor first_scores, Tensor last_scores, '
    'float eps, ScalarType operands) -> Tensor[]',
)
def _retrieve_backward(
    d_out: Tensor,
    queries: Tensor,
    mix: Tensor,
    shares: Tensor,
    first_starts: Tensor | None,
    first_inputs: Tensor | None,
    first_errors: Tensor | None,
    last_starts: Tensor,
    last_inputs: Tensor,
    last_errors: Tensor,
    gamma: Tensor | None,
    product: Tensor,
    hidden: Tensor,
    first_scores: Tensor,
    last_scores: Tensor,
    eps: float,
    operands: torch.dtype,
) -> list[Tensor]:
    first = (first_starts, first_inputs, first_errors)
    parts = Parts(queries, mix, shares, *first, last_starts, last_inputs, last_errors, gamma)
    kernels = _kernels(parts, operands)
    if kernels is None:
        return plain_retrieve_backward(d_out, parts, eps, operands)
    saved = (product, hidden, first_scores, last_scores)
    return kernels.backward(d_out, *parts, *saved, eps, operands, inner_gradient.FLOAT32_PRECISION)


def _out_dtype(parts: Parts, operands: torch.dtype) -> torch.dtype:
    return operands if parts.gamma is None else parts.last_starts.dtype


@_retrieve.register_fake
def _(*args: Any) -> Retrieved:
    *tensors, _, operands = args
    parts = Parts(*tensors)
    queries, (stored, width) = parts.queries, parts.last_inputs.shape[2:]
    heads, runs, steps, rows, _ = queries.shape
    one = parts.first_starts is None

    def of_rows(columns: int, absent: bool = False) -> Tensor:
        return queries.new_empty((0,) if absent else (heads, runs, steps * rows, columns), dtype=operands)

    product = (0,) if parts.gamma is None else (heads, runs, steps * rows, queries.shape[-1])
    return (
        queries.new_empty(queries.shape, dtype=_out_dtype(parts, operands)),
        parts.last_starts.new_empty(product),
        of_rows(width, one),
        of_rows(stored, one),
        of_rows(stored),
    )


@_retrieve_backward.register_fake
def _(d_out: Tensor, *args: Any) -> list[Tensor]:
    return [_empty_like(t, d_out) for t in Parts(*args[:10])]


def _empty_like(t: Tensor | None, like: Tensor) -> Tensor:
    """Contiguous; of no size for nothing."""
    return like.new_empty(0) if t is None else t.new_empty(t.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Retrieved) -> None:
    *tensors, ctx.eps, ctx.operands = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 12
    saved = ctx.saved_tensors  # once: under activation checkpointing they are there but once
    gradients = _retrieve_backward(d_out, *saved, ctx.eps, ctx.operands)
    return *(None if t is None else own for t, own in zip(saved, gradients)), None, None


_retrieve.register_autograd(_gradients, setup_context=_keep)
_dispatch.differentiated_once(_retrieve_backward)


# the plain twin


def plain_retrieve(parts: Parts, eps: float, operands: torch.dtype) -> Retrieved:
    dtype, queries = parts.last_starts.dtype, parts.queries
    steps, rows, _ = queries.shape[2:]
    first, last = _Over.of(parts, operands)
    q = queries.flatten(2, 3).to(dtype)
    x, hidden, first_scores = q, queries.new_empty(0, dtype=operands), queries.new_empty(0, dtype=operands)
    if first is not None:
        h, scores = first.linear(q)
        x, hidden, first_scores = F.gelu(h), h.to(operands), (scores * first.mix).to(operands)

    y, scores = last.linear(x)
    out, product = y, queries.new_empty(0, dtype=dtype)
    if parts.gamma is not None:
        gain = 1 + parts.gamma.repeat_interleave(rows, dim=2)
        out, product = standardise(y, eps)[0] * gain + q, y
    out = out.unflatten(2, (steps, rows)).to(_out_dtype(parts, operands))
    return out, product, hidden, first_scores, scores.to(operands)


def plain_retrieve_backward(d_out: Tensor, parts: Parts, eps: float, operands: torch.dtype) -> list[Tensor]:
    """The gradient of each of `parts`; of no size for what is absent."""
    dtype, queries = parts.last_starts.dtype, parts.queries
    steps, rows, _ = queries.shape[2:]
    first, last = _Over.of(parts, operands)
    q, d_y = queries.flatten(2, 3).to(dtype), d_out.flatten(2, 3).to(dtype)

    # the forward again
    h = None if first is None else first.linear(q)[0]
    x = q if h is None else F.gelu(h)

    d_q, d_gamma = torch.zeros_like(q), None
    if parts.gamma is not None:
        # out = x̂ ∘ (1 + γ) + q, x̂ = (y − mean y) · r
        unit, inverse = standardise(last.linear(x)[0], eps)
        gain = 1 + parts.gamma.repeat_interleave(rows, dim=2)
        d_q, d_gamma = d_y, (d_y * unit).unflatten(2, (steps, rows)).sum(dim=3)
        d_y = inverse * inner_gradient._tangent(d_y * gain, unit)[0]

    d_x, d_mix, d_shares, *of_last = last.linear_backward(x, d_y)
    of_first: tuple[Tensor | None, ...] = (None,) * 3
    if first is not None and h is not None:
        d_x, of_mix, of_shares, *others = first.linear_backward(q, inner_gradient.gelu_backward(d_x, h))
        d_mix, d_shares, of_first = d_mix + of_mix, d_shares + of_shares, (*others,)
    gradients = ((d_q + d_x).view(queries.shape), d_mix, d_shares, *of_first, *of_last, d_gamma)
    return [
        d_out.new_empty(0) if t is None or own is None else own.to(t.dtype).contiguous()
        for t, own in zip(parts, gradients)
    ]


class _Over(NamedTuple):
    """A matrix over time, and what each row has of each stored row and start."""

    matrix: Matrix
    mix: Float[Tensor, 'bh r s t']
    shares: Float[Tensor, 'bh r k s 1']
    steps: int
    operands: torch.dtype

    @classmethod
    def of(cls, parts: Parts, operands: torch.dtype) -> tuple[_Over | None, _Over]:
        steps, rows = parts.queries.shape[2:4]
        stored = parts.last_inputs.shape[2] // steps
        mix = parts.mix.tril(-1).repeat_interleave(rows, dim=2).repeat_interleave(stored, dim=3)
        shares = parts.shares.repeat_interleave(rows, dim=2).mT.unsqueeze(-1)
        last = cls(Matrix(parts.last_starts, parts.last_inputs, parts.last_errors), mix, shares, steps, operands)
        if parts.first_starts is None or parts.first_inputs is None or parts.first_errors is None:
            return None, last
        return last._replace(matrix=Matrix(parts.first_starts, parts.first_inputs, parts.first_errors)), last

    def times(self, x: Tensor, w: Tensor) -> Tensor:
        with no_autocast(x):
            return (x.to(self.operands) @ w.to(self.operands)).to(self.matrix.starts.dtype)

    def linear(self, x: Float[Tensor, 'bh r s d']) -> tuple[Float[Tensor, 'bh r s e'], Float[Tensor, 'bh r s t']]:
        """Rows of every step through that step's matrix; and their scores, not mixed."""
        starts, inputs, errors = self.matrix
        # Σ_k share[i, k] · x start_k + ((x Xᵀ) ∘ mix[i]) Δ
        scores = self.times(x, inputs.mT)
        of_starts = (self.shares * self.times(x.unsqueeze(2), starts)).sum(dim=2)
        return of_starts + self.times(scores * self.mix, errors), scores

    def linear_backward(self, x: Float[Tensor, 'bh r s d'], g: Float[Tensor, 'bh r s e']) -> list[Tensor]:
        """Gradients of rows, `mix` of each pair of chunks, `shares`, starts, inputs and errors."""
        starts, inputs, errors = self.matrix
        scores, of_scores = self.times(x, inputs.mT), self.times(g, errors.mT)
        mixed = of_scores * self.mix
        back = self.times(g.unsqueeze(2), starts.mT)
        d_x = (self.shares * back).sum(dim=2) + self.times(mixed, inputs)
        chunks = (self.steps, -1)
        d_mix = (of_scores * scores).unflatten(3, chunks).unflatten(2, chunks).sum(dim=(3, 5)).tril(-1)
        d_shares = (x.unsqueeze(2) * back).sum(dim=-1).unflatten(3, chunks).sum(dim=-1).mT
        d_starts = self.times((self.shares * x.unsqueeze(2)).mT, g.unsqueeze(2))
        return [d_x, d_mix, d_shares, d_starts, self.times(mixed.mT, x), self.times((scores * self.mix).mT, g)]
