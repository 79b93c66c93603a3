"""Rotary embeddings of explicit positions, and causal attention with cached keys.

Rotary embedding: RoFormer, https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor
from torch.utils._pytree import tree_leaves

from titans_pytorch.ops.rotation import rotate_features, rotation_at
from titans_pytorch.utils.checks import checked_carried
from titans_pytorch.utils.parameters import fill
from titans_pytorch.utils.plain import is_plain
from titans_pytorch.utils.shapes import Float, Int

KeyValues = tuple[Float[Tensor, 'b h _j e'], Float[Tensor, 'b h _j e']]


def _initial_frequencies(dim: int, device: Any = None) -> Float[Tensor, ' half']:
    """The initial frequencies, in PyTorch's default dtype but at least float32."""
    indices = torch.arange(0, dim // 2 * 2, 2, device=device)
    indices = indices.double() if torch.get_default_dtype() == torch.float64 else indices.float()
    return 1.0 / 10000.0 ** (indices / dim)


class Rotary(RotaryEmbedding):
    """The frequencies of a rotary embedding of `dim` features.

    The base class caches angles in buffers. They are removed here, because `rotate` computes angles anew, so the state
    dict holds every tensor of the module.
    """

    def __init__(self, dim: int):
        super().__init__(dim, custom_freqs=_initial_frequencies(dim), cache_if_possible=False, cache_max_seq_len=0)
        self.dim = dim
        del self.cached_freqs, self.dummy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Apply moves and casts of the module. Frequencies are not cast to half precision, where the angle between
        positions 2,048 apart would be wrong by up to a radian."""
        freqs = self.freqs.detach()
        super()._apply(fn, recurse)
        if self.freqs.dtype.itemsize == 2 < freqs.dtype.itemsize:
            self.freqs.data = freqs.to(self.freqs.device, torch.float32)
        return self

    def reset_parameters(self) -> None:
        fill(self.freqs, _initial_frequencies(self.dim, self.device))

    @property
    def device(self) -> torch.device:
        return self.freqs.device

    def forward(
        self, t: Float[Tensor, '... n'], seq_len: int | None = None, offset: int = 0
    ) -> Float[Tensor, '... n d']:
        """Angles at positions `t`, in the precision of `freqs` but at least float32; other arguments have no effect."""
        dtype = torch.promote_types(self.freqs.dtype, torch.float32)
        # adjacent features share an angle
        return (t.to(dtype).unsqueeze(-1) * self.freqs.to(dtype)).repeat_interleave(2, dim=-1)

    def get_seq_pos(
        self, seq_len: int, device: Any = None, dtype: torch.dtype | None = None, offset: int = 0
    ) -> Float[Tensor, ' n']:
        positions = torch.arange(
            offset, offset + seq_len, device=device or self.device, dtype=dtype or self.freqs.dtype
        )
        return positions / self.interpolate_factor


def check_rotary_width(dim_head: int) -> None:
    if dim_head < 3:
        raise ValueError(f'dim_head must be at least 3, the smallest rotary dimension, got {dim_head}')


def rotate(
    rotary: RotaryEmbedding, t: Float[Tensor, 'b h n d'], positions: Int[Tensor, '... n']
) -> Float[Tensor, 'b h n d']:
    """Rotate `t` by the angles of `positions`.

    If the rotary dimension is smaller than `d`, only the first features rotate. Angles have the precision of
    `rotary.freqs`, at least float32, whatever the dtype of `t`: bfloat16 cannot tell position 256 from 257. The
    library's own angles are not used, because they lose precision in float32 and are cached in the precision of their
    first use. Nor is its rotation: it uses einops, and PyTorch 2.13 takes as long to trace through that as through the
    rest of a model.
    """
    return rotate_features(t, rotation_at(frequencies(rotary, positions.device), positions.unsqueeze(-1)))


def frequencies(rotary: RotaryEmbedding, device: torch.device) -> Float[Tensor, ' half']:
    """Angle per position of each pair of features, in the precision of `rotate`."""
    dtype = torch.promote_types(rotary.freqs.dtype, torch.float32)
    if is_plain(rotary, Rotary) and rotary.interpolate_factor == 1:
        return rotary.freqs.to(dtype)
    # the angles of position 1, obtained by a call, because hooks give an offloaded module its weights in calls
    one = torch.ones(1, dtype=dtype, device=device) / rotary.interpolate_factor
    return rotary(one)[0, ::2].to(dtype)


def rotary_causal_attention(
    rotary: RotaryEmbedding,
    q: Float[Tensor, 'b h i d'],
    k: Float[Tensor, 'b h j d'],
    v: Float[Tensor, 'b h j e'],
) -> Float[Tensor, 'b h i e']:
    """Softmax attention of the last `i` of `j` positions, each to itself and to all earlier positions.

    Queries and keys are passed unrotated, so cached keys never change, and every call counts positions from the start
    of the sequence.
    """
    q_len, k_len = q.shape[-2], k.shape[-2]
    if q_len > k_len:
        raise ValueError(f'q must not be longer than k, whose last positions it holds, got {q_len} and {k_len}')

    positions = torch.arange(k_len, device=k.device)
    q = rotate(rotary, q, positions[k_len - q_len :])
    k = rotate(rotary, k, positions)

    # is_causal aligns its mask with the first key, which is correct only if there is a query for each key
    mask = None
    if 1 < q_len < k_len:
        mask = torch.ones(q_len, k_len, dtype=torch.bool, device=k.device).tril(k_len - q_len)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=q_len == k_len)


def flatten_cache(
    cache: Any | None,  # tensors b h m d, in lists and tuples
    tokens: Float[Tensor, 'b n d'],
    dtype: torch.dtype,
    heads: int,
    dims: Sequence[int],
) -> list[Tensor] | None:
    """The tensors in a cache of keys and values from earlier calls of a module of `dtype`, which must have the widths
    `dims` and equal lengths."""
    if cache is None:
        return None
    tensors = tree_leaves(cache)
    if len(tensors) != len(dims):
        raise ValueError(f'cache must hold {len(dims)} tensors of keys and values, got {len(tensors)}')
    batch, length = len(tokens), None
    for tensor, dim in zip(tensors, dims):
        if not isinstance(tensor, Tensor):
            raise TypeError(f'cache must hold tensors of keys and values, got {type(tensor).__name__}')
        if length is None and tensor.ndim == 4:
            length = tensor.shape[-2]
        if tensor.shape != (batch, heads, length, dim):
            expected = f'(batch={batch}, heads={heads}, length={length}, dim={dim})'
            raise ValueError(f'cache must hold keys and values {expected}, got {tuple(tensor.shape)}')
    return [checked_carried('cache', tensor, dtype, tokens.device) for tensor in tensors]


def extend_cache(
    cached: Sequence[Float[Tensor, 'b h m _d']] | None, new: Sequence[Float[Tensor, 'b h n _d']]
) -> list[Float[Tensor, 'b h _j _d']]:
    """Append the new keys and values to the cached ones, tensor by tensor; without a cache, return the new ones."""
    if cached is None:
        return list(new)
    return [torch.cat(pair, dim=-2) for pair in zip(cached, new, strict=True)]
