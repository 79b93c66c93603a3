"""Sequential scan over memory batches under spectral norm, which are stored in a memory MLP one after another.

Gradients are taken at the weights W that the previous memory batch left, or, with a share of another memory's weights,
at W + share_c · P_c. For each memory batch and each of its chunks c, with momentum gates η, retention κ and scales s:

    X, Δ, g, losses = inner_gradient(keys, values, θ; W + share · P)
    S_c = η_c S_{c−1} + s_c · X_cᵀ Δ_c        W_c = κ_c W_{c−1} + newton_schulz(S_c)

for each matrix, and for γ both recurrences with its negative gradient g, without Newton–Schulz.

A single operation does all this, so that for each memory batch nothing is launched, traced or copied except the kernels
of its parts. There is no plain counterpart here: where it does not run, `SpectralBackend` calls the parts one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.ops import inner_gradient, momentum_scan, newton_schulz
from titans_pytorch.ops._dispatch import HOPPER, MOST_ENTRIES, use_kernel
from titans_pytorch.ops.inner_gradient import PreviousWeights
from titans_pytorch.utils.precision import operand_dtype
from titans_pytorch.utils.shapes import Float


class ScannedWeights(NamedTuple):
    """Results of the scan. Lists have an entry for each matrix, and one for γ if there is a norm around the network."""

    over_time: list[Float[Tensor, 'bh _steps ...']]
    """Weights before each chunk and after the last, in the precision of products; γ in float32."""
    ends: list[Float[Tensor, 'j bh ...']]
    """Weights after each memory batch, in float32."""
    momentum_ends: list[Float[Tensor, 'j bh ...']]
    """Momentum after each memory batch; empty without momentum."""
    losses: Float[Tensor, 'bh n m']
    """Losses of the rows before they are stored, unweighted."""


def has_kernel(
    rows: tuple[Tensor, Tensor, Tensor],
    matrices: list[Float[Tensor, 'bh _d _e']],
    states: Iterable[Tensor],
    residual: PreviousWeights | None,
) -> bool:
    """Whether `spectral_memory_scan` runs for these keys, values and step sizes, weights of a memory MLP, further
    weights and momentum, and residual weights."""
    keys = rows[0]
    of_residual = [] if residual is None else [residual.shares, *_listed(residual.matrices, residual.gamma)]
    operands, chunks = operand_dtype(keys), keys.shape[1]
    return (
        use_kernel([*rows, *of_residual], [*matrices, *states], capability=HOPPER)
        and inner_gradient.supports(keys, rows[1], matrices, [] if residual is None else residual.matrices)
        and all(newton_schulz.supports(w, operands) for w in matrices)
        and all((chunks + 1) * w[0].numel() < MOST_ENTRIES for w in matrices)
        and keys.shape[2] <= momentum_scan.MOST_ROWS
    )


def spectral_memory_scan(
    rows: tuple[Float[Tensor, 'bh n m d'], Float[Tensor, 'bh n m d'], Float[Tensor, 'bh n m']],
    base: tuple[list[Float[Tensor, 'bh _d _e']], Float[Tensor, 'bh d'] | None],
    newest: tuple[list[Float[Tensor, 'bh _d _e']], Float[Tensor, 'bh d'] | None],
    momentum: tuple[list[Float[Tensor, 'bh _d _e']], Float[Tensor, 'bh d'] | None] | None,
    log_retention: Float[Tensor, 'bh n'],
    log_gates: Float[Tensor, 'bh n'] | None,
    scales: list[Float[Tensor, 'bh n']] | None,
    residual: PreviousWeights | None,
    lengths: list[int],
    eps: float,
) -> ScannedWeights:
    """Store memory batches; see `has_kernel`.

    Args:
        rows: keys, values and θ, the weight of each row's loss.
        base: matrices and γ (`None` without a norm) where gradients of the first memory batch are taken.
        newest: weights before the first chunk, from which updates continue.
        momentum: momentum before the first chunk; `None` without momentum.
        log_retention: log κ.
        log_gates: log η; `None` without momentum.
        scales: s of each matrix, then of γ; `None` for 1.
        residual: P and its shares.
        lengths: number of chunks in each memory batch.
        eps: ε of the norm.

    Products are in the precision of autocast or of the keys, states in float32.
    """
    from titans_pytorch.ops.spectral_memory_scan import triton

    of_base, of_newest, of_momentum = (_listed(*weights) for weights in (base, newest, momentum or ([], None)))
    shares = None if residual is None else residual.shares
    previous = [] if residual is None else _listed(residual.matrices, residual.gamma)
    tensors = (*rows, of_base, of_newest, of_momentum, log_retention, log_gates, scales or [], shares, previous)
    present = [t for own in tensors for t in (own if isinstance(own, list) else [own]) if t is not None]
    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in present)
    iteration = newton_schulz.STEPS, newton_schulz.EPS, [*newton_schulz.QUINTIC]
    settings = lengths, len(base[0]), eps, *iteration, keeps, operand_dtype(rows[0])
    outputs = triton.spectral_memory_scan(*tensors, *settings)
    over_time, ends, momentum_ends = (
        [t for t in outputs[first : first + triton.SLOTS] if t.numel() > 0] for first in triton.LISTS
    )
    return ScannedWeights(over_time, ends, momentum_ends, outputs[triton.LOSSES])


def _listed(matrices: list[Tensor], gamma: Tensor | None) -> list[Tensor]:
    return matrices if gamma is None else [*matrices, gamma]
