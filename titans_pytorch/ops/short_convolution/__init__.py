"""Short convolution of queries, keys and values, as in section 4.4 of Titans, with activation, heads and norm."""

from __future__ import annotations

from torch import Tensor

from titans_pytorch.ops._dispatch import VOLTA, use_kernel
from titans_pytorch.ops.short_convolution import reference
from titans_pytorch.utils.shapes import Float

# most features in a head, and greatest width of the convolution
_WIDEST, _LONGEST = 256, 8


def short_convolution(
    x: Float[Tensor, 'b t hud'], weight: Float[Tensor, 'hud 1 k'], heads: int, per_token: int, normalize: bool
) -> Float[Tensor, 'b h nu d']:
    """SiLU of a causal depthwise convolution, y_t = SiLU(Σ_j w_j x_{t+j}), split into the rows of each head.

    Args:
        x: tokens; the first k − 1 are context, which leaves n = t − (k − 1).
        per_token: number u of rows for each head and token, next to each other in the features of a head.
        normalize: scale rows to length 1; rows of zeros stay zero and have no gradient.
    """
    if use_kernel([x, weight], capability=VOLTA) and _supports(x, weight, heads * per_token):
        from titans_pytorch.ops.short_convolution import triton

        return triton.short_convolution(x, weight, heads, per_token, normalize)
    return reference.short_convolution(x, weight, heads, per_token, normalize)


def _supports(x: Tensor, weight: Tensor, groups: int) -> bool:
    width = weight.shape[-1]
    return x.shape[-1] // groups <= _WIDEST and width <= _LONGEST and x.shape[1] >= width and len(x) > 0
