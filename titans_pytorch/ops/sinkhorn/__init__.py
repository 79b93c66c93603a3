"""Doubly stochastic matrices by Sinkhorn's iteration, with which hyper-connections mix their residual streams (mHC)."""

from __future__ import annotations

from torch import Tensor

from titans_pytorch.ops._dispatch import VOLTA, use_kernel
from titans_pytorch.ops.sinkhorn import reference
from titans_pytorch.utils.checks import check_floating
from titans_pytorch.utils.precision import at_least_float32
from titans_pytorch.utils.shapes import Float

EPS = 1e-12
"""Lower bound on the sums to divide by, as in `torch.nn.functional.normalize`."""

_LARGEST = 16
"""Most rows in a matrix, which must fit in a program."""


def sinkhorn(log_alpha: Float[Tensor, '... s s'], iters: int = 20) -> Float[Tensor, '... s s']:
    """exp(`log_alpha`) with its columns and then its rows divided by their sums, `iters` times over.

    After enough iterations, all rows and columns sum to 1; rows do after each iteration, because they come last.
    Results are those of `hyper_connections`: computed in float32 or float64, and returned in the precision of
    `log_alpha`.

    Source: Sinkhorn and Knopp, 1967; for residual streams, Xie et al., arXiv 2512.24880.
    """
    check_floating('log_alpha', log_alpha)
    if log_alpha.ndim < 2 or log_alpha.shape[-1] != log_alpha.shape[-2]:
        raise ValueError(f'log_alpha must hold square matrices (…, s, s), got {tuple(log_alpha.shape)}')
    if iters <= 0:
        return log_alpha
    full = at_least_float32(log_alpha)
    if use_kernel([full], capability=VOLTA) and full.shape[-1] <= _LARGEST:
        from titans_pytorch.ops.sinkhorn import triton

        return triton.sinkhorn(full, iters=iters, eps=EPS).to(log_alpha.dtype)
    return reference.sinkhorn(full, iters, EPS).to(log_alpha.dtype)
