"""Proximal steps: gradients of a chunk, taken at the weights that its step leads to."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.utils.precision import at_least_float32, no_autocast
from titans_pytorch.utils.shapes import Float


def proximal_deltas(
    inputs: Float[Tensor, '... m d'],
    deltas: Float[Tensor, '... m e'],
    step_sizes: Float[Tensor, '... m'],
    losses: Float[Tensor, '... m'],
    num_steps: int,
) -> Float[Tensor, '... m e']:
    """Δ of a proximal step, from that of a gradient step; the step is Xᵀ Δ.

    A step that minimises loss plus distance has its gradient taken where it ends. The loss of row i is the square of an
    error, and the error is taken to be linear in the products (Gauss–Newton). Moved by δ along its negative gradient,
    the product a_i = x_i W then has the gradient (1 − δ ‖∂ℓ_i/∂a_i‖ / 2ℓ_i) · ∂ℓ_i/∂a_i, and the step moves it by
    Σ_j (x_i · x_j) Δ_j, so that

        (I + diag(c) X Xᵀ) Δ = −θ ∂ℓ/∂a    with    c_i = θ_i ‖∂ℓ_i/∂a_i‖² / 2ℓ_i

    For a linear memory this is exact. The eigenvalues of diag(c) X Xᵀ are not negative: whatever the step size, no
    error grows, and a large step stores each row as far as the others of its chunk permit. For one row and a large step
    this is the step size of Polyak, 2ℓ / ‖∇ℓ‖².

    Args:
        inputs: X, the rows that a matrix was applied to.
        deltas: −θ ∂ℓ/∂a, minus the gradients of the weighted losses with respect to the products.
        losses: ℓ, mean squared errors, unweighted.
        num_steps: number of such steps that are added up, of each matrix and each chunk of a memory batch: c is
            multiplied by it, because they all correct the same errors.
    """
    with no_autocast(deltas):
        rows, own = at_least_float32(inputs), at_least_float32(deltas)
        weighted = 2 * (step_sizes * losses).to(own.dtype)
        # rows that are not stored, or are stored already, have none of either
        some = weighted > torch.finfo(own.dtype).tiny
        curvature = torch.where(some, own.square().sum(dim=-1), 0.0) / torch.where(some, weighted, 1.0)
        system = num_steps * curvature.unsqueeze(-1) * (rows @ rows.mT)
        system = system + torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
        # without the check of `solve`, which waits for the device: the system has no eigenvalue below 1
        return torch.linalg.solve_ex(system, own).result.to(deltas.dtype)
