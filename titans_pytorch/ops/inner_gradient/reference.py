"""Reference implementation of the inner gradient: the gradient is written out; autograd takes its own derivatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pytorch.ops.norms import standardise
from titans_pytorch.utils.shapes import Float


def inner_gradient(
    keys: Float[Tensor, 'bh n m d'],
    values: Float[Tensor, 'bh n m d'],
    step_sizes: Float[Tensor, 'bh n m'],
    matrices: Sequence[Float[Tensor, 'bh _d _e']],
    gamma: Float[Tensor, 'bh d'] | None,
    shares: Float[Tensor, 'bh n'] | None,
    residual_matrices: Sequence[Float[Tensor, 'bh n _d _e']],
    residual_gamma: Float[Tensor, 'bh n d'] | None,
    eps: float,
    operands: torch.dtype,
) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor]:
    """The fields of `InnerGradient`; `residual_matrices` is empty without residual weights."""
    dtype, share = matrices[0].dtype, None if shares is None else shares.to(matrices[0].dtype)[..., None, None]
    weights = [matrix.to(operands) for matrix in matrices]
    residuals: list[Tensor | None] = [matrix.to(operands) for matrix in residual_matrices] or [None for _ in weights]

    def linear(x: Tensor, matrix: Tensor, residual: Tensor | None) -> Tensor:
        # x (W + share_c · P_c), in the precision of products
        out = (x.flatten(1, 2) @ matrix).to(dtype).unflatten(1, x.shape[1:3])
        if share is None or residual is None:
            return out
        return torch.addcmul(out, share, (x @ residual).to(dtype))

    inputs, products = [keys.to(operands)], [linear(keys.to(operands), weights[0], residuals[0])]
    for matrix, residual in zip(weights[1:], residuals[1:]):
        inputs.append(F.gelu(products[-1]).to(operands))
        products.append(linear(inputs[-1], matrix, residual))

    gain = None if gamma is None else (gamma + 1)[:, None, None]
    if gain is not None and share is not None and residual_gamma is not None:
        gain = torch.addcmul(gain, share, residual_gamma.unsqueeze(2))
    last, negative_gamma_gradient, losses = gradient_of_product(products.pop(), keys, values, step_sizes, gain, eps)

    deltas = [last.to(operands)]
    for matrix, residual, product in zip(weights[:0:-1], residuals[:0:-1], reversed(products)):
        # Δ_l = (Δ_{l+1} W_{l+1}ᵀ) ∘ gelu′(h_l)
        back = linear(deltas[0], matrix.mT, None if residual is None else residual.mT)
        deltas.insert(0, torch.ops.aten.gelu_backward(back, product).to(operands))
    return inputs, deltas, negative_gamma_gradient, losses


def gradient_of_product(
    y: Float[Tensor, 'bh n m d'],
    keys: Float[Tensor, 'bh n m d'],
    values: Float[Tensor, 'bh n m d'],
    step_sizes: Float[Tensor, 'bh n m'],
    gain: Float[Tensor, 'bh _n 1 d'] | None,
    eps: float,
) -> tuple[Float[Tensor, 'bh n m d'], Float[Tensor, 'bh n d'] | None, Float[Tensor, 'bh n m']]:
    """From the product y with the last matrix: Δ, minus the gradient of γ, and the losses. `gain` is 1 + γ."""
    dtype = y.dtype
    # s = −(2θ/d) (p − v)
    scale = (step_sizes.to(dtype) * (-2 / y.shape[-1])).unsqueeze(-1)
    negative_gamma_gradient = None
    if gain is None:
        difference = y - values.to(dtype)
        deltas = scale * difference
    else:
        unit, inverse = standardise(y, eps)
        difference = torch.addcmul(keys.to(dtype), unit, gain) - values.to(dtype)
        negative_gradient = scale * difference
        negative_gamma_gradient = (negative_gradient * unit).sum(dim=2)
        # Δ = r · P(s ∘ (1 + γ))
        deltas = inverse * project_out(negative_gradient * gain, unit)
    return deltas, negative_gamma_gradient, difference.square().mean(dim=-1)


def project_out(u: Float[Tensor, '... d'], unit: Float[Tensor, '... d']) -> Float[Tensor, '... d']:
    """P(u) = u − mean u − x̂ · mean(u ∘ x̂), the derivative of a layer norm up to its scale."""
    along = (u * unit).mean(dim=-1, keepdim=True)
    return torch.addcmul(u - u.mean(dim=-1, keepdim=True), unit, along, value=-1)
