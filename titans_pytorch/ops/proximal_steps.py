"""Proximal steps: gradients of a chunk, taken at the weights to which its step leads.

A step that minimises loss plus distance has its gradient taken at its end. Every loss ℓ is the square of an error, and
the error is assumed to be linear in what the step moves (Gauss–Newton). After a move by δ along its negative gradient
g, the loss then has the gradient (1 − δ ‖g‖ / 2ℓ) · g, and δ solves a linear equation. If nothing else moved, it would
be

    δ = θ ‖g‖ / (1 + c)    with the curvature    c = θ ‖g‖² / 2ℓ

so a large step is a Polyak step, 2ℓ / ‖g‖, and no step goes further. The rows of a chunk are solved for together.

This is the Levenberg–Marquardt method with a block-diagonal approximation: each parameter and each chunk takes its step
independently, and the Jacobian of a product is replaced by its norm in the direction of the error. When steps add up,
those of several parameters or of the chunks of a memory batch, each would correct the whole error, so their number
multiplies the curvature. For one matrix and a memory batch of one chunk, nothing is approximated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.ops.inverse import inverse
from titans_pytorch.utils.precision import at_least_float32, no_autocast
from titans_pytorch.utils.shapes import Float

LARGEST = 1e4
"""Curvature of a row, along its own part of the step, beyond which larger step sizes make no difference."""

NOTHING = 1e-30
"""Weighted loss up to which a row counts as already stored, because its curvature would be a quotient of underflows."""


def proximal_deltas(
    inputs: Float[Tensor, '... m d'],
    deltas: Float[Tensor, '... m e'],
    step_sizes: Float[Tensor, '... m'],
    losses: Float[Tensor, '... m'],
    num_steps: int,
) -> Float[Tensor, '... m e']:
    """Compute Δ of a matrix's proximal step Xᵀ Δ.

    The step moves the product a_i = x_i W of row i by Σ_j (x_i · x_j) Δ_j, so that

        (I + diag(c) X Xᵀ) Δ = −θ ∂ℓ/∂a    with    c_i = θ_i ‖∂ℓ_i/∂a_i‖² / 2ℓ_i

    The eigenvalues of diag(c) X Xᵀ are not negative. So whatever the step sizes, the weighted loss of the chunk does
    not grow where the errors are linear, and a large step stores each row as far as the other rows permit.

    Args:
        inputs: X, the rows that the matrix was applied to.
        deltas: −θ ∂ℓ/∂a, minus the gradients of the weighted losses with respect to the products.
        step_sizes: θ.
        losses: ℓ, mean squared errors, unweighted.
        num_steps: number of steps that add up.
    """
    with no_autocast(deltas):
        rows, own = at_least_float32(inputs), at_least_float32(deltas)
        curvatures = num_steps * _curvatures(own, step_sizes * losses)
        products = rows @ rows.mT
        # step sizes beyond this limit would change the step by only 1e-4, and equal rows would make the system singular
        shares = LARGEST / (curvatures * products.diagonal(dim1=-2, dim2=-1)).clamp(min=LARGEST)
        own, curvatures = shares.unsqueeze(-1) * own, shares * curvatures
        system = curvatures.unsqueeze(-1) * products
        system = system + torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
        return (inverse(system) @ own).to(deltas.dtype)


def proximal_vector(
    gradient: Float[Tensor, '... d'],
    step_sizes: Float[Tensor, '... m'],
    losses: Float[Tensor, '... m'],
    num_steps: int,
) -> Float[Tensor, '... d']:
    """Compute the proximal step of a vector, along its gradient.

    Args:
        gradient: minus the gradient of the weighted losses of a chunk.
        step_sizes, losses, num_steps: as in `proximal_deltas`.
    """
    own = at_least_float32(gradient)
    curvature = _curvatures(own, (step_sizes * losses).sum(dim=-1))
    return (own / (1 + num_steps * curvature.unsqueeze(-1))).to(gradient.dtype)


def _curvatures(gradients: Float[Tensor, '... d'], weighted: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """‖θ g‖² / 2θℓ; 0 for rows that are not stored or are stored already, which have neither gradient nor loss."""
    weighted = 2 * weighted.to(gradients.dtype)
    some = weighted > NOTHING
    return torch.where(some, gradients.square().sum(dim=-1), 0.0) / torch.where(some, weighted, 1.0)
