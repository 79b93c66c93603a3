"""Mixtures of several vectors of a single token in decoding, with weights computed from one of the vectors.

With gain g, input x of width d, matrix W and bias b, for each mixture v of the choices c_j:

    l = W (x / √(mean x² + ε) ∘ g) + b    out_v = Σ_j softmax(l_v)_j · c_j
"""

from __future__ import annotations

from torch import Tensor

from titans_pytorch.ops._dispatch import VOLTA, use_kernel
from titans_pytorch.ops.token_linear import Norm, have_one_precision
from titans_pytorch.ops.token_mixture import reference
from titans_pytorch.utils.shapes import Float

MOST_CHOICES = 64


def token_mixture(
    x: Float[Tensor, 'b 1 d'],
    choices: Float[Tensor, 'b 1 c d'],
    norm: Norm,
    weight: Float[Tensor, 'vc d'],
    bias: Float[Tensor, ' vc'],
) -> Float[Tensor, 'v b 1 d']:
    """The mixtures for each batch entry; `weight` and `bias` hold the logits of the choices, one mixture after another.

    The kernel has no gradient, so it runs only if gradients are off.
    """
    tensors = (x, choices, norm[0], weight, bias)
    few = choices.shape[2] <= MOST_CHOICES
    if few and use_kernel(tensors, capability=VOLTA, has_backward=False) and have_one_precision(*tensors):
        from titans_pytorch.ops.token_mixture import triton

        return triton.token_mixture(x, choices, norm, weight, bias)
    return reference.token_mixture(x, choices, norm, weight, bias)
