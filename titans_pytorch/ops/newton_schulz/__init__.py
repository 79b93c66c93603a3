"""Orthogonalisation of matrices by Newton–Schulz iteration, as Muon applies it to its updates (Jordan et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.ops import _dispatch
from titans_pytorch.ops.newton_schulz import reference
from titans_pytorch.utils.precision import operand_dtype
from titans_pytorch.utils.shapes import Float

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Jordan et al.'s coefficients: the steepest at 0 that still keep all singular values within about [0.7, 1.2]."""

STEPS, EPS = 5, 1e-7
"""Number of iterations, and the smallest norm to divide by, as in Muon."""

# shorter and longer side of the largest matrices that fit on chip together with the products of the backward pass
_LARGEST_IN_HALF = [(64, 256), (128, 128)]
_LARGEST = {torch.float32: [(64, 128)], torch.bfloat16: _LARGEST_IN_HALF, torch.float16: _LARGEST_IN_HALF}


def newton_schulz(
    matrices: Float[Tensor, '... i j'],
    steps: int = STEPS,
    eps: float = EPS,
    coefficients: tuple[float, float, float] = QUINTIC,
) -> Float[Tensor, '... i j']:
    """Roughly the nearest semi-orthogonal matrix to each of `matrices`: singular values are pushed towards 1.

    `steps` iterations of x ← a·x + (b·xxᵀ + c·(xxᵀ)²)·x on the matrix scaled to unit Frobenius norm; a zero
    matrix stays zero (`eps` bounds the norm from below).

    The result has the precision of `matrices`. Under autocast, products are in autocast's precision, and the sums
    between them in float32.

    The kernel is for Hopper GPUs; on others, less fits on chip.
    """
    operands = operand_dtype(matrices)
    if _dispatch.use_kernel([matrices], capability=_dispatch.HOPPER) and supports(matrices, operands):
        from titans_pytorch.ops.newton_schulz import triton

        flat = matrices.reshape(-1, *matrices.shape[-2:])
        a, b, c = coefficients
        out = triton.newton_schulz(flat, steps=steps, eps=eps, a=a, b=b, c=c, operands=operands)
        return out.view(matrices.shape)
    return reference.newton_schulz(matrices, steps, eps, coefficients)


def newtonschulz5(
    t: Float[Tensor, 'bh n ...'],
    steps: int = STEPS,
    eps: float = EPS,
    coefs: tuple[float, float, float] = QUINTIC,
) -> Float[Tensor, 'bh n ...']:
    """`newton_schulz` of each chunk's update of a parameter, under the reference's name; vectors stay as they are."""
    return newton_schulz(t, steps, eps, coefs) if t.ndim > 3 else t


def supports(matrices: Tensor, operands: torch.dtype) -> bool:
    short, long = sorted(matrices.shape[-2:])
    return matrices.numel() > 0 and any(
        short <= most_short and long <= most_long for most_short, most_long in _LARGEST.get(operands, [])
    )
