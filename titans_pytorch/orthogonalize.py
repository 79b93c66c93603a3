"""Orthogonalising a matrix by Newton–Schulz iteration, as Muon does to its updates (Jordan et al., 2024)."""

from __future__ import annotations

from torch import Tensor

from titans_pytorch.shapes import Float

# Jordan et al.'s quintic: the steepest at 0 that still keeps every singular value within about [0.7, 1.2]
QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(
    matrices: Float[Tensor, '... i j'],
    steps: int = 5,
    eps: float = 1e-7,
    coefficients: tuple[float, float, float] = QUINTIC,
) -> Float[Tensor, '... i j']:
    """The nearest semi-orthogonal matrix to each of `matrices`, roughly: singular values are pushed towards 1.

    `steps` iterations of x ← a·x + (b·xxᵀ + c·(xxᵀ)²)·x on the matrix scaled to unit Frobenius norm; a zero
    matrix stays zero (`eps` bounds the norm from below).
    """
    a, b, c = coefficients

    # xxᵀ is formed over the shorter side
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)

    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x

    return x.mT if tall else x
