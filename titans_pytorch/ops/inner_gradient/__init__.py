"""Inner gradient: the forward of a memory MLP over a block of chunks, and the gradient of the default loss by its
products, Titans eq. 12.

For one row with key k, value v and step size θ, two matrices W₁ and W₂ and the gain 1 + γ of a layer norm:

    h = k W₁    a = gelu(h)    y = a W₂    x̂ = (y − mean y) · r, r = (var y + eps)^−½    p = x̂ ∘ (1 + γ) + k
    loss = mean (p − v)²
    s = −θ ∂loss/∂p = −(2θ/d) (p − v)    u = s ∘ (1 + γ)
    Δ₂ = r · P(u) with P(u) = u − mean u − x̂ · mean(u ∘ x̂)    Δ₁ = (Δ₂ W₂ᵀ) ∘ gelu′(h)

and −θ ∂loss/∂γ = s ∘ x̂. Without the norm p = y and Δ₂ = s; with one matrix y = k W₂, and there is no Δ₁. The gradient
of a matrix over some rows is −Xᵀ Δ, with X the keys for W₁ and a for W₂.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from titans_pytorch.ops._dispatch import use_kernel
from titans_pytorch.ops.inner_gradient import reference
from titans_pytorch.utils.precision import operand_dtype
from titans_pytorch.utils.shapes import Float

WIDEST = 128
"""Features of a row, at most, that fit on chip whole."""


class InnerGradient(NamedTuple):
    """What one gradient step needs of each row. Inputs and deltas are in the precision of products."""

    hidden: Float[Tensor, 'bh n m e'] | None
    """gelu(k W₁), the inputs of the last matrix; `None` without `first`."""
    hidden_deltas: Float[Tensor, 'bh n m e'] | None
    """Δ₁, the negative gradients of the first matrix's outputs (δ of backpropagation); `None` without `first`."""
    deltas: Float[Tensor, 'bh n m d']
    """Δ₂, those of the last matrix's outputs."""
    negative_gamma_gradient: Float[Tensor, 'bh n d'] | None
    """Σ s ∘ x̂ over the rows of each chunk; `None` without `gamma`."""
    losses: Float[Tensor, 'bh n m']
    """Unweighted."""


class PreviousWeights(NamedTuple):
    """Another memory's weights P_c before each chunk c, for gradients at W + share_c · P_c instead of W."""

    shares: Float[Tensor, 'bh n']
    first: Float[Tensor, 'bh n d e'] | None
    last: Float[Tensor, 'bh n e d']
    gamma: Float[Tensor, 'bh n d'] | None


def inner_gradient(
    keys: Float[Tensor, 'bh n m d'],
    values: Float[Tensor, 'bh n m d'],
    step_sizes: Float[Tensor, 'bh n m'],
    first: Float[Tensor, 'bh d e'] | None,
    last: Float[Tensor, 'bh e d'],
    gamma: Float[Tensor, 'bh d'] | None,
    eps: float,
    residual: PreviousWeights | None = None,
) -> InnerGradient:
    """The inner gradient of every row, all at the same weights, or with `residual` at those of its chunk.

    Args:
        step_sizes: θ, the weight of each row's loss.
        first: W₁; `None` if the memory is one matrix.
        last: W₂, or the one matrix (bh, d, d).
        gamma: γ of the norm around the network; `None` without.
        eps: of that norm.

    Sums and norms are in the precision of the weights, products in that of autocast or of the keys.
    """
    added = PreviousWeights(None, None, None, None) if residual is None else residual  # type: ignore[arg-type]
    tensors = (keys, values, step_sizes, first, last, gamma, *added)
    operands = operand_dtype(keys)
    rows = (keys, values, step_sizes, *added)
    if use_kernel(rows, [first, last, gamma]) and _supports(keys):
        from titans_pytorch.ops.inner_gradient import triton

        hidden, hidden_deltas, deltas, negative_gamma_gradient, losses = triton.inner_gradient(*tensors, eps, operands)
        if first is None:
            hidden = hidden_deltas = None
        if gamma is None:
            negative_gamma_gradient = None
        return InnerGradient(hidden, hidden_deltas, deltas, negative_gamma_gradient, losses)
    return InnerGradient(*reference.inner_gradient(*tensors, eps, operands))


def _supports(keys: Tensor) -> bool:
    return keys.shape[-1] <= WIDEST and keys.numel() > 0
