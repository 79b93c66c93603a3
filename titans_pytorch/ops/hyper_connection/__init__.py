"""Hyper-connections of a sequence (arXiv 2409.19606; manifold-constrained, mHC: 2512.24880) as one operation."""

from __future__ import annotations

from torch import Tensor

from titans_pytorch.ops._dispatch import VOLTA, use_kernel
from titans_pytorch.ops.hyper_connection import reference
from titans_pytorch.ops.sinkhorn import EPS
from titans_pytorch.utils.shapes import Float

ITERATIONS = 20
"""Number of Sinkhorn iterations, as in `hyper_connections`."""

MOST_STREAMS = 8
"""Most streams; a thread must hold some features of each."""


def hyper_connection(
    x: list[Tensor], weights: list[Tensor]
) -> tuple[
    Float[Tensor, 'b n d'],
    Float[Tensor, 'bs n d'] | Float[Tensor, ' 0'],
    Float[Tensor, 'bs n 1'] | Float[Tensor, ' 0'],
]:
    """Compute a branch's input, the mixed residual streams, and the gates for writing the branch's output to them.

    For the streams x_s of a position, with r_s = √d / ‖x_s‖, gain 1 + γ, weights A and B, scales α and β, and biases:

        logits_s = α · r_s x_s ∘ (1 + γ) A + bias_s    read_s = σ(logits_s0)    mix = sinkhorn(logits_s,1…S)
        write_s = σ(β · r_s x_s ∘ (1 + γ) B + bias_s)
        branch's input = Σ_s read_s x_s    new x_t = Σ_s mix_st x_s + 2 write_t · branch's output

    The second result is the last sum without its second term. Adding the branch's output is left to the next
    connection, which reads the streams anyway.

    Args:
        x: the streams (b · s, n, d); or, with a pending branch output, the streams without it (b · s, n, d), the gates
            for writing it (b · s, n, 1), and the output (b, n, d).
        weights: γ (d), read and mix biases (s, s + 1), A (1, d, s + 1), and the scales α of reading and of mixing, (1)
            each; then write biases (s), B (d) and β (1). Without the last three, only the first result is computed, and
            the others are empty.
    """
    if use_kernel([*x, *weights], capability=VOLTA) and len(weights[1]) <= MOST_STREAMS:
        from titans_pytorch.ops.hyper_connection import triton

        branch_in, mixed, write, *_ = triton.hyper_connection(x, weights, iters=ITERATIONS, eps=EPS)
        return branch_in, mixed, write
    return reference.hyper_connection(x, weights, ITERATIONS, EPS)
