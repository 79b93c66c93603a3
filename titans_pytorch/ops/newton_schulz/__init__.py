"""Orthogonalising a matrix by Newton–Schulz iteration, as Muon does to its updates (Jordan et al., 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titans_pytorch.ops import _dispatch
from titans_pytorch.ops.norms import inverse_length
from titans_pytorch.utils.precision import at_least_float32, operand_dtype
from titans_pytorch.utils.shapes import Float

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

    The result has the precision of `matrices`; under autocast products are lowered, and between them it is float32.

    On a Hopper GPU, matrices that fit on chip (up to 64 × 128, under autocast up to 128 × 128 or 64 × 256) are
    computed by one Triton kernel, which can be differentiated once; not in float64.
    """
    if matrices.dtype != torch.float64 and _kernel_runs_on(matrices.device):
        # imported where it is used: without a GPU there need be no Triton
        from titans_pytorch.ops.newton_schulz import triton as kernel

        operands = operand_dtype(matrices)
        if kernel.serves(matrices, operands):
            flat = matrices.reshape(-1, *matrices.shape[-2:])
            return kernel.newton_schulz(flat, steps, eps, *coefficients, operands).view(matrices.shape)
    lowers = matrices.dtype != torch.float64 and torch.is_autocast_enabled(matrices.device.type)
    return _by_loop(matrices.float() if lowers else matrices, steps, eps, coefficients).to(matrices.dtype)


def newtonschulz5(
    t: Float[Tensor, 'bh n ...'],
    steps: int = 5,
    eps: float = 1e-7,
    coefs: tuple[float, float, float] = QUINTIC,
) -> Float[Tensor, 'bh n ...']:
    """`newton_schulz` of what a parameter has for each chunk, under the reference's name; vectors stay as they are."""
    return newton_schulz(t, steps, eps, coefs) if t.ndim > 3 else t


def _by_loop(matrices: Tensor, steps: int, eps: float, coefficients: tuple[float, float, float]) -> Tensor:
    a, b, c = coefficients

    # xxᵀ is formed over the shorter side
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    squared = at_least_float32(x).square().sum(dim=(-2, -1), keepdim=True)
    x = (x * inverse_length(squared, eps)).to(matrices.dtype)

    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.add(torch.bmm(polynomial, x), x, alpha=a)

    return (x.mT if tall else x).view(matrices.shape)


def _kernel_runs_on(device: torch.device) -> bool:
    return _dispatch.kernels_are_on() and _is_hopper(device)


@torch.compiler.assume_constant_result
def _is_hopper(device: torch.device) -> bool:
    # elsewhere less fits on chip
    return device.type == 'cuda' and _dispatch.HAS_TRITON and torch.cuda.get_device_capability(device)[0] == 9
