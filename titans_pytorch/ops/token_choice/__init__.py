"""Choosing a token from its logits: a filter of unlikely tokens, then the Gumbel-max trick, for sampling.

With temperature T, uniform noise u in (0, 1) and the largest logit l_max:

    token = argmax over i of (l_i − l_max) / T − log(−log u_i)    where softmax(l)_i ≥ min_p · max softmax(l)
"""

from __future__ import annotations

from torch import Tensor

from titans_pytorch.ops._dispatch import VOLTA, use_kernel
from titans_pytorch.ops.token_choice import reference
from titans_pytorch.ops.token_choice.reference import gumbel, without_unlikely
from titans_pytorch.utils.shapes import Float, Int

__all__ = ['gumbel', 'token_choice', 'without_unlikely']


def token_choice(
    logits: Float[Tensor, '... l'],
    uniform: Float[Tensor, '... l'] | None,
    temperature: float,
    min_p: float | None,
) -> tuple[Int[Tensor, ' ...'], Float[Tensor, ' ...']]:
    """A token for each row, and its logit plus noise, which is NaN or −inf if no token was valid.

    Args:
        uniform: noise, in at least float32; `None` to choose the likeliest token, whatever the temperature.
        min_p: leave out tokens less likely than `min_p` times the likeliest; `None` for no filter.

    The kernel has no gradient, so it runs only if gradients are off. It compares likelihoods in float32; the plain path
    rounds those of half precision to that precision.
    """
    noise = () if uniform is None else (uniform,)
    if use_kernel((logits,), noise, capability=VOLTA, has_backward=False):
        from titans_pytorch.ops.token_choice import triton

        return triton.token_choice(logits, uniform, temperature, min_p, reference.TINY)
    return reference.token_choice(logits, uniform, temperature, min_p)
