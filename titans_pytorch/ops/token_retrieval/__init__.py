"""Retrieval from a memory MLP for a single token in decoding, between the projections around the heads.

With query q, matrices W₁ (d, e) and W₂ (e, d), gains 1 + g and 1 + γ of the norms, the gate's input x and weights w:

    k = q / rms(q) ∘ (1 + g)    y = gelu(k W₁) W₂    p = LN(y) ∘ (1 + γ) + k    out = p · sigmoid(⟨w, x⟩)

With one matrix, y = k W₂; norms and gates that are absent are left out.
"""

from __future__ import annotations

from torch import Tensor

from titans_pytorch.ops._dispatch import VOLTA, use_kernel
from titans_pytorch.ops.token_retrieval import reference
from titans_pytorch.utils.shapes import Float

LARGEST = 65536
"""Most entries in a matrix: one multiprocessor reads all of it, and for larger ones several would be faster."""

Norm = tuple[Tensor, float | None]
"""The gain less 1, and ε; for `None`, the machine epsilon of what is normalised."""


def token_retrieval(
    projected: Float[Tensor, 'b 1 hd'],
    matrices: list[Float[Tensor, 'bh _ _']],
    query_norm: Norm | None,
    norm: Norm | None,
    gate: tuple[Float[Tensor, 'b 1 x'], Float[Tensor, 'h x']] | None,
    heads: int,
) -> Float[Tensor, 'b 1 hd']:
    """The answer of each head's memory, in the precision of `matrices`.

    Args:
        projected: the query of each head, not normalised.
        matrices: W₁ (bh, d, e) and W₂ (bh, e, d), or a single one (bh, d, d).
        query_norm: RMS norm of queries, with g of shape (h, 1, d).
        norm: layer norm around the network, with γ of shape (bh, d).
        gate: its input x and weights w.

    The kernel has no gradient, so it runs only if gradients are off.
    """
    states = [*matrices, None if norm is None else norm[0]]
    inputs = [projected, *(gate or ()), None if query_norm is None else query_norm[0]]
    if use_kernel(inputs, states, capability=VOLTA, has_backward=False) and _supports(matrices):
        from titans_pytorch.ops.token_retrieval import triton

        return triton.token_retrieval(projected, matrices, query_norm, norm, gate, heads)
    return reference.token_retrieval(projected, matrices, query_norm, norm, gate, heads)


def _supports(matrices: list[Tensor]) -> bool:
    return all(w.is_contiguous() and w.shape[1] * w.shape[2] <= LARGEST for w in matrices)
