"""Proximal steps inside a kernel: those of `titans_pytorch.ops.proximal_steps`, and their gradients.

The rows of a memory batch are held together. `together` is 1 for two rows of the same chunk and otherwise 0, which
makes the systems of all chunks a single block-diagonal one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_pytorch.ops import proximal_steps
from titans_pytorch.ops._triton import multiply_add

LARGEST, NOTHING = tl.constexpr(proximal_steps.LARGEST), tl.constexpr(proximal_steps.NOTHING)


@triton.jit
def curvatures(norms, weighted, num_steps):  # type: ignore[no-untyped-def]
    """c = ‖θ ∂ℓ/∂a‖² / 2θℓ for all steps that add up; for the backward pass, also c / `norms` and −c / `weighted`."""
    some = 2 * weighted > NOTHING
    of_norm = tl.where(some, num_steps / tl.where(some, 2 * weighted, 1.0), 0.0)
    c = of_norm * norms
    return c, of_norm, -c / tl.where(some, weighted, 1.0)


@triton.jit
def _diagonal(matrix, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    return tl.sum(tl.where(row == column, matrix, 0.0), axis=1)


@triton.jit
def shares(products, c, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The share of each row that is stored; it is below 1 where the row's curvature along its own part of the step
    exceeds the limit."""
    own = c * _diagonal(products, ROWS)
    return LARGEST / tl.where(own > LARGEST, own, LARGEST)


@triton.jit
def through_system(matches, products, together, c, share, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradients of c, and of the products X Xᵀ added to their transpose.

    With s the share of a row and o its own part, the step solves s o = Δ + s c ∘ (X Xᵀ Δ). Where the limit applies, s c
    (X Xᵀ)_ii is constant, and s has the gradient λ_i · o_i − c_i Σ_j (X Xᵀ)_ij λ_i · Δ_j = λ_i · Δ_i / s_i.

    Args:
        matches: λ Δᵀ, where λ is the transposed inverse times the gradient of Δ.
    """
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    own_product, own_match = _diagonal(products, ROWS), _diagonal(matches, ROWS)
    limited = share < 1.0
    d_c = -share * tl.sum(products * matches, axis=1) - tl.where(limited, own_match / tl.where(limited, c, 1.0), 0.0)
    d_products = -(share * c)[:, None] * matches * together
    of_share = tl.where(limited, own_match / tl.where(limited, own_product, 1.0), 0.0)
    d_products -= tl.where(row == column, of_share[:, None], 0.0)
    return d_c, d_products + tl.trans(d_products)


@triton.jit
def vector_steps(  # type: ignore[no-untyped-def]
    of_rows, weighted, together, num_steps, PRECISION: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr
):
    """For each row, the sum of its chunk's rows, which is the gradient of a vector, and 1 + c of the vector's step."""
    total = multiply_add(tl.zeros((ROWS, DIM), tl.float32), together, of_rows, PRECISION, tl.float32)
    c, of_norm, of_weighted = curvatures(
        tl.sum(total * total, axis=1), tl.sum(together * weighted[None, :], axis=1), num_steps
    )  # fmt: skip
    return total, 1.0 + c, of_norm, of_weighted


@triton.jit
def through_vector_steps(  # type: ignore[no-untyped-def]
    d_steps, of_rows, weighted, together, num_steps, PRECISION: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr
):
    """The gradients of the rows and of θℓ, from the gradient of each row's part of the step."""
    total, divisor, of_norm, of_weighted = vector_steps(
        of_rows, weighted, together, num_steps, PRECISION, ROWS, DIM
    )  # fmt: skip
    d_divisor = -tl.sum(together * tl.sum(d_steps * of_rows, axis=1)[None, :], axis=1) / (divisor * divisor)
    d_rows = d_steps / divisor[:, None] + 2 * (d_divisor * of_norm)[:, None] * total
    return d_rows, d_divisor * of_weighted
