"""A linear layer for a single token in decoding, with the RMS norm before it and the gate after it.

With gain g and input x of width d:

    n = x / √(mean x² + ε) ∘ g    y = W n + b    out = y,  or  y₁ ∘ silu(y₂)  of its halves
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Module

from titans_pytorch.ops._dispatch import AMPERE, VOLTA, use_kernel
from titans_pytorch.ops.token_linear import reference
from titans_pytorch.utils.plain import is_plain, is_plain_linear
from titans_pytorch.utils.precision import autocast_dtype
from titans_pytorch.utils.shapes import Float

FEW_ENTRIES, MOST_ENTRIES = 4, 256
"""Most entries in a batch for which a kernel reads the matrix once per entry, and for which another kernel uses tensor
cores. A library's products are made for more rows."""

Norm = tuple[Float[Tensor, ' d'], float | None]
"""The gain and ε; for `None`, that of `nn.RMSNorm`, the machine epsilon of the precision it computes in."""


def token_linear(
    x: Float[Tensor, 'b 1 d'],
    weight: Float[Tensor, 'e d'],
    bias: Float[Tensor, ' e'] | None = None,
    norm: Norm | None = None,
    gated: bool = False,
) -> tuple[Float[Tensor, 'b 1 _'], Float[Tensor, 'b 1 d']]:
    """The layer's output, of width e, or e / 2 if gated; and its input after the norm.

    The kernel has no gradient, so it runs only if gradients are off.
    """
    tensors = (x, weight, bias, None if norm is None else norm[0])
    in_tiles = len(x) > FEW_ENTRIES
    capability = AMPERE if in_tiles else VOLTA
    if use_kernel(tensors, capability=capability, has_backward=False) and _supports(*tensors):
        from titans_pytorch.ops.token_linear import triton

        return triton.token_linear(x, weight, bias, norm, gated, in_tiles)
    return reference.token_linear(x, weight, bias, norm, gated)


def linear_of_token(
    linear: Module, x: Float[Tensor, 'b 1 d'], norm: Module | None = None
) -> tuple[Float[Tensor, 'b 1 e'], Float[Tensor, 'b 1 d']]:
    """Outputs of a linear layer and of the norm before it; modules of other kinds, or with hooks, are called."""
    norm = None if is_plain(norm, nn.Identity) else norm
    if is_plain_linear(linear, norm):
        own = None if norm is None else (norm.weight, norm.eps)
        return token_linear(x, linear.weight, linear.bias, own)  # type: ignore[arg-type]
    normed = x if norm is None else norm(x)
    return linear(normed), normed


def linear_of_rows(linear: Module, x: Float[Tensor, '... d']) -> Float[Tensor, '... e']:
    """`linear(x)`, by the kernel of `token_linear` if that serves so few rows."""
    if torch.is_grad_enabled():  # in training; the compiler would otherwise trace the rest
        return linear(x)
    has_kernel = use_kernel((x,), capability=VOLTA, has_backward=False)
    if not has_kernel or x.shape[:-1].numel() > MOST_ENTRIES or not is_plain_linear(linear):
        return linear(x)
    out, _ = token_linear(x.reshape(-1, 1, x.shape[-1]), linear.weight, linear.bias)  # type: ignore[arg-type]
    return out.view(*x.shape[:-1], out.shape[-1])


def _supports(x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> bool:
    # tiles are normalised after their products, and these may overflow float16
    overflows = len(x) > FEW_ENTRIES and gain is not None and x.dtype == torch.float16
    return len(x) <= MOST_ENTRIES and not overflows and have_one_precision(x, weight, bias, gain)


def have_one_precision(*tensors: Tensor | None) -> bool:
    """True if all tensors have the same precision, and autocast does not lower it."""
    present = [t for t in tensors if t is not None]
    return len({t.dtype for t in present}) == 1 and autocast_dtype(present[0].device) is None
