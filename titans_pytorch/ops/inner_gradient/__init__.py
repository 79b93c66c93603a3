"""Inner gradient: the forward pass of a memory MLP over a block of chunks, and the gradient of the default loss with
respect to its products, Titans eq. 12.

For one row with key k, value v and step size θ, matrices W_1 to W_L and the gain 1 + γ of a layer norm:

    X_1 = k    h_l = X_l W_l    X_{l+1} = gelu(h_l)    y = h_L
    x̂ = (y − mean y) · r, r = (var y + eps)^−½    p = x̂ ∘ (1 + γ) + k
    loss = mean (p − v)²
    s = −θ ∂loss/∂p = −(2θ/d) (p − v)    u = s ∘ (1 + γ)
    Δ_L = r · P(u) with P(u) = u − mean u − x̂ · mean(u ∘ x̂)    Δ_l = (Δ_{l+1} W_{l+1}ᵀ) ∘ gelu′(h_l)

and −θ ∂loss/∂γ = s ∘ x̂. Without the norm p = y and Δ_L = s. The gradient of W_l over some rows is −X_lᵀ Δ_l.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from titans_pytorch.ops._dispatch import MOST_ENTRIES, has_short_offsets, use_kernel
from titans_pytorch.ops.inner_gradient import reference
from titans_pytorch.utils.precision import operand_dtype
from titans_pytorch.utils.shapes import Float

WIDEST = 128
"""Most features in a row, which must fit on chip whole."""


class InnerGradient(NamedTuple):
    """What a gradient step needs of each row. Inputs and deltas are in the precision of products."""

    inputs: list[Float[Tensor, 'bh n m _d']]
    """For each matrix, X, the rows that it is applied to; for the first, these are the keys."""
    deltas: list[Float[Tensor, 'bh n m _e']]
    """For each matrix, Δ, the negative gradients of its products (δ of backpropagation)."""
    negative_gamma_gradient: Float[Tensor, 'bh n d'] | None
    """Σ s ∘ x̂ over the rows of each chunk; `None` without `gamma`."""
    losses: Float[Tensor, 'bh n m']
    """Losses of the rows, unweighted."""


class PreviousWeights(NamedTuple):
    """Another memory's weights P_c before each chunk c; gradients are then taken at W + share_c · P_c instead of W."""

    shares: Float[Tensor, 'bh n']
    matrices: list[Float[Tensor, 'bh n _d _e']]
    gamma: Float[Tensor, 'bh n d'] | None


def inner_gradient(
    keys: Float[Tensor, 'bh n m d'],
    values: Float[Tensor, 'bh n m d'],
    step_sizes: Float[Tensor, 'bh n m'],
    matrices: list[Float[Tensor, 'bh _d _e']],
    gamma: Float[Tensor, 'bh d'] | None,
    eps: float,
    residual: PreviousWeights | None = None,
) -> InnerGradient:
    """Compute the inner gradient of every row, at the same weights for all, or with `residual` at those of its chunk.

    Args:
        step_sizes: θ, the weight of each row's loss.
        matrices: W_1 to W_L, from d features to d. There are kernels for one matrix (bh, d, d), and for two, (bh, d, e)
            and (bh, e, d).
        gamma: γ of the norm around the network; `None` without a norm.
        eps: ε of that norm.

    Sums and norms are in the precision of the weights, products in the precision of autocast or of the keys.
    """
    shares, previous, previous_gamma = (None, [], None) if residual is None else residual
    operands, rows = operand_dtype(keys), (keys, values, step_sizes)
    factors = (*rows, shares, *previous, previous_gamma)
    if supports(keys, values, matrices, previous) and use_kernel(factors, [*matrices, gamma]):
        from titans_pytorch.ops.inner_gradient import triton

        # absent matrices are `None`
        first, last = [None, *matrices][-2:]
        previous_first, previous_last = [None, None, *previous][-2:]
        weights = first, last, gamma, shares, previous_first, previous_last, previous_gamma
        hidden, hidden_deltas, delta, gamma_update, losses = triton.inner_gradient(*rows, *weights, eps, operands)
        inputs, deltas = [keys.to(operands), hidden], [hidden_deltas, delta]
        number = len(matrices)
        return InnerGradient(inputs[:number], deltas[-number:], None if gamma is None else gamma_update, losses)
    return InnerGradient(
        *reference.inner_gradient(*rows, matrices, gamma, shares, previous, previous_gamma, eps, operands)
    )


def supports(keys: Tensor, values: Tensor, matrices: list[Tensor], previous: list[Tensor]) -> bool:
    _, chunks, rows, dim = keys.shape
    fits = len(matrices) <= 2 and dim <= WIDEST and keys.numel() > 0
    hidden = chunks * rows * max(dim, matrices[0].shape[2])
    return fits and hidden < MOST_ENTRIES and has_short_offsets(keys, values, *previous)
