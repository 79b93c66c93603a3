"""Momentum and weights over a block of chunks where each chunk needs its matrix, as with spectral norm: three scans.

With spectral norm, momentum is orthogonalised before it enters the weights, so each chunk's matrix must be formed. That
gives two recurrences (Titans eq. 10, 13) around Newton–Schulz. With the inputs X_c of a matrix over the rows of chunk
c, the negative gradients Δ_c of its outputs, momentum gates η, retention κ = 1 − α, and a scale s:

    S_c = η_c S_{c−1} + s_c · X_cᵀ Δ_c        `momentum_scan`
    O_c = newton_schulz(S_c)
    W_c = κ_c W_{c−1} + O_c                   `weight_scan`

`vector_scan` is both recurrences together, without Newton–Schulz, for given updates. Gates are passed as logarithms, so
that saturated gates have finite gradients. States are kept in at least float32, whatever precision they are returned
in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.ops._dispatch import MOST_ENTRIES, has_short_offsets, use_kernel
from titans_pytorch.ops.momentum_scan import reference
from titans_pytorch.utils.shapes import Float

# most features on the shorter side of a matrix, which a kernel keeps on chip whole, and most rows in a chunk
_WIDEST, MOST_ROWS = 128, 64


def momentum_scan(
    inputs: Float[Tensor, 'bh n m d'],
    deltas: Float[Tensor, 'bh n m e'],
    scales: Float[Tensor, 'bh n'] | None,
    log_gates: Float[Tensor, 'bh n'] | None,
    start: Float[Tensor, 'bh d e'] | None,
    out_dtype: torch.dtype,
) -> tuple[Float[Tensor, 'bh n d e'], Float[Tensor, 'bh d e']]:
    """Compute the momentum after each chunk, S_c = η_c S_{c−1} + s_c · X_cᵀ Δ_c; also the last one in at least float32.

    Args:
        inputs: X, the rows that went through the matrix.
        deltas: Δ, the negative gradients of its outputs.
        scales: s; `None` for 1.
        log_gates: log η; `None` without momentum, in which case S_c = s_c · X_cᵀ Δ_c.
        start: S_{−1}; `None` for 0.
        out_dtype: dtype of the first result, the precision of products in Newton–Schulz. In the kernel's backward pass,
            products are in this precision too, or in the precision of the rows if that is lower.
    """
    states = (scales, log_gates, start)
    if use_kernel([inputs, deltas], states) and _supports_matrices(inputs, deltas):
        from titans_pytorch.ops.momentum_scan import triton

        return triton.momentum_scan(inputs, deltas, scales, log_gates, start, out_dtype)
    return reference.momentum_scan(inputs, deltas, scales, log_gates, start, out_dtype)


def weight_scan(
    updates: Float[Tensor, 'bh n ...'],
    log_retention: Float[Tensor, 'bh n'],
    start: Float[Tensor, 'bh ...'],
    out_dtype: torch.dtype,
) -> tuple[Float[Tensor, 'bh n ...'], Float[Tensor, 'bh ...']]:
    """Compute the weights before each chunk, with W_c = κ_c W_{c−1} + O_c, and after the last in at least float32.

    Args:
        updates: O, matrices or vectors.
        log_retention: log κ.
        start: W_{−1}, the first of the weights returned.
        out_dtype: dtype of the first result.
    """
    before, end, _ = _scan(updates.flatten(2), None, None, log_retention, None, start.flatten(1), out_dtype)
    return before.unflatten(2, updates.shape[2:]), end.view(start.shape)


def vector_scan(
    updates: Float[Tensor, 'bh n f'],
    scales: Float[Tensor, 'bh n'] | None,
    log_gates: Float[Tensor, 'bh n'] | None,
    log_retention: Float[Tensor, 'bh n'],
    momentum_start: Float[Tensor, 'bh f'] | None,
    weight_start: Float[Tensor, 'bh f'],
) -> tuple[Float[Tensor, 'bh n f'], Float[Tensor, 'bh f'], Float[Tensor, 'bh f'] | None]:
    """Compute the weights before each chunk, the weights after the last, and the momentum after the last, with S_c =
    η_c S_{c−1} + s_c · u_c and W_c = κ_c W_{c−1} + S_c.

    Without `log_gates` there is no momentum: W_c = κ_c W_{c−1} + s_c · u_c, and the last result is `None`.
    """
    momentum_start = None if log_gates is None else momentum_start
    return _scan(updates, scales, log_gates, log_retention, momentum_start, weight_start, weight_start.dtype)


def _scan(
    updates: Float[Tensor, 'bh n f'],
    scales: Float[Tensor, 'bh n'] | None,
    log_gates: Float[Tensor, 'bh n'] | None,
    log_retention: Float[Tensor, 'bh n'],
    momentum_start: Float[Tensor, 'bh f'] | None,
    weight_start: Float[Tensor, 'bh f'],
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    states = (scales, log_gates, log_retention, momentum_start, weight_start)
    if use_kernel([updates], states) and _supports_vectors(updates):
        from titans_pytorch.ops.momentum_scan import triton

        before, weight_end, momentum_end, _ = triton.vector_scan(updates, *states, out_dtype)
        return before, weight_end, None if log_gates is None else momentum_end
    return reference.vector_scan(*(updates, *states), out_dtype)


def _supports_matrices(inputs: Tensor, deltas: Tensor) -> bool:
    _, chunks, rows, dim = inputs.shape
    width = deltas.shape[-1]
    narrow = 0 < min(dim, width) <= _WIDEST
    present = len(inputs) > 0 and 0 < chunks * dim * width < MOST_ENTRIES
    return narrow and 0 < rows <= MOST_ROWS and present and has_short_offsets(inputs, deltas)


def _supports_vectors(updates: Tensor) -> bool:
    short = updates.shape[1] * updates.shape[2] < MOST_ENTRIES and has_short_offsets(updates)
    return updates.numel() > 0 and short
