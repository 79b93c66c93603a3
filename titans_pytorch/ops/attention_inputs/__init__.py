"""Queries, keys and values for attention, from the projection of a sequence."""

from __future__ import annotations

from torch import Tensor

from titans_pytorch.ops._dispatch import VOLTA, use_kernel
from titans_pytorch.ops.attention_inputs import reference
from titans_pytorch.ops.attention_inputs.reference import heads_of, mixed_values, with_persistent
from titans_pytorch.utils.shapes import Float, Int

__all__ = ['attention_inputs', 'heads_of', 'mixed_values', 'with_persistent']

# most features in a head
_WIDEST = 256


def attention_inputs(
    projected: Float[Tensor, 'b n qkv'],
    heads: int,
    frequencies: Float[Tensor, ' half'],
    positions: int | Int[Tensor, 'b n'] = 0,
    *,
    mix: tuple[Float[Tensor, 'b h n d'], Float[Tensor, 'b h n 1']] | None = None,
    persistent: Float[Tensor, '2 h p d'] | None = None,
) -> tuple[Float[Tensor, 'b h n d'], Float[Tensor, 'b h j d'], Float[Tensor, 'b h j d']]:
    """Queries R q, keys [k_persistent ‖ R k] and values [v_persistent ‖ (1 − a) v + a r], with j = p + n.

    R rotates neighbouring pairs of features by position · frequency; features beyond the frequencies stay as they are.

    Args:
        projected: queries, keys and values, each with heads side by side.
        frequencies: angle per position, in at least float32.
        positions: positions of the tokens, or of the first token only.
        mix: r, values to mix with the sequence's own, and a, their share.
        persistent: keys and values that come before those of the sequence; they are not rotated.
    """
    residual, share = (None, None) if mix is None else mix
    tensors = [projected, residual, share, persistent]
    if use_kernel(tensors, [frequencies], capability=VOLTA) and _supports(projected, heads, frequencies):
        from titans_pytorch.ops.attention_inputs import triton

        given, first = (positions, 0) if isinstance(positions, Tensor) else (None, positions)
        return triton.attention_inputs(projected, frequencies, given, residual, share, persistent, heads, first)
    return reference.attention_inputs(projected, heads, frequencies, positions, mix, persistent)


def _supports(projected: Tensor, heads: int, frequencies: Tensor) -> bool:
    dim = projected.shape[-1] // (3 * heads)
    # the kernel computes no gradient of frequencies, which are not learned unless a caller makes them learnable
    all_rotate = 2 * len(frequencies) == dim and not frequencies.requires_grad
    return all_rotate and dim <= _WIDEST and projected.numel() > 0
