"""Hyper-connections of a single token, for decoding."""

from __future__ import annotations

from torch import Tensor

from titans_pytorch.ops._dispatch import VOLTA, use_kernel
from titans_pytorch.ops.hyper_connection import ITERATIONS, MOST_STREAMS
from titans_pytorch.ops.sinkhorn import EPS
from titans_pytorch.ops.token_hyper_connection import reference
from titans_pytorch.utils.shapes import Float


def token_hyper_connection(
    x: Float[Tensor, 'b s d'],
    pending: tuple[Float[Tensor, 'b s 1'], Float[Tensor, 'b 1 d']] | None,
    to_logits: Float[Tensor, 'l d'],
    bias: Float[Tensor, 's l'],
) -> tuple[Float[Tensor, 'b 1 d'], Float[Tensor, 'b s d'], Float[Tensor, 'b s l-s-1']]:
    """`hyper_connection` for a single position, with gain and scales multiplied into one matrix beforehand.

    That leaves a norm, a product with the matrix, Sinkhorn's iteration and a mixture, which take one launch on a GPU.
    The kernel has no gradient.

    Args:
        pending: gates and output of the previous branch, which are not yet part of `x`.
        to_logits: (1 + γ) times A and B, each with its scale; l = s + 2, or, without gates for writing, l = s + 1 and
            the last result is empty.
    """
    inputs, states = (x, *(pending or ())), (to_logits, bias)
    if use_kernel(inputs, states, capability=VOLTA, has_backward=False) and x.shape[1] <= MOST_STREAMS:
        from titans_pytorch.ops.token_hyper_connection import triton

        return triton.token_hyper_connection(x, pending, to_logits, bias, iters=ITERATIONS, eps=EPS)
    return reference.token_hyper_connection(x, pending, to_logits, bias, ITERATIONS, EPS)
