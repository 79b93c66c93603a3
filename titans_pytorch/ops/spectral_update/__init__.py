"""One chunk of `spectral_memory_scan`, for decoding: momentum and weights after it, from the factors of its gradients.

With momentum gate η, forgotten share α and scale s, for each matrix:

    S ← η S + s · Xᵀ Δ    W ← (1 − α) W + newton_schulz(S)

and for γ the same with its negative gradient g in place of Xᵀ Δ, without Newton–Schulz.

There is no plain counterpart here: where it does not run, `Backend.store_chunk` takes these steps one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pytorch.ops import newton_schulz
from titans_pytorch.ops._dispatch import HOPPER, use_kernel
from titans_pytorch.utils.shapes import Float

MOST_ROWS = 16
"""Most rows in a chunk, which the kernel multiplies one by one."""


class ChunkGates(NamedTuple):
    """Gates of one chunk."""

    decay_logits: Float[Tensor, ' bh']
    """Logits of α."""
    momentum_logits: Float[Tensor, ' bh'] | None
    """Logits of η; `None` without momentum."""
    scales: Float[Tensor, 'bh w'] | None
    """s of each parameter; `None` for 1."""
    scale_indices: list[int]
    """Indices into `scales`, one for each of the weights."""


def has_kernel(
    rows: Float[Tensor, 'bh m d'], weights: list[Tensor], momentum: list[Tensor], operands: torch.dtype
) -> bool:
    """Whether `spectral_update` runs for chunks of such rows, one or two matrices (d, e) and (e, d), possibly γ, and
    their momentum, with products in the precision `operands`."""
    states = (*weights, *momentum)
    matrices = [w for w in weights if w.ndim > 2]
    return (
        use_kernel((rows,), states, capability=HOPPER, has_backward=False)
        and rows.shape[1] <= MOST_ROWS
        and len(matrices) <= 2
        and all(w.is_contiguous() for w in states)
        and all(newton_schulz.supports(w, operands) for w in matrices)
    )


def spectral_update(
    inputs: list[Float[Tensor, 'bh m _d']],
    deltas: list[Float[Tensor, 'bh m _e']],
    of_gamma: Float[Tensor, 'bh d'] | None,
    weights: list[Tensor],
    momentum: list[Tensor],
    gates: ChunkGates,
    operands: torch.dtype,
) -> list[Tensor]:
    """The weights after a chunk, as new tensors; `momentum` is updated in place. See `has_kernel`.

    There is no gradient.

    Args:
        inputs, deltas: X and Δ for each matrix.
        of_gamma: g; `None` without γ.
        weights: matrices, then γ.
        momentum: the momentum of each; empty without momentum.
        operands: precision of products.
    """
    from titans_pytorch.ops.spectral_update import triton

    steps, eps, (a, b, c) = newton_schulz.STEPS, newton_schulz.EPS, newton_schulz.QUINTIC
    return triton.spectral_update(inputs, deltas, of_gamma, weights, momentum, *gates, steps, eps, a, b, c, operands)
