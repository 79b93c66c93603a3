"""Reference implementation of the inputs of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.ops.rotation import rotate_features, rotation_at
from titans_pytorch.utils.shapes import Float, Int


def attention_inputs(
    projected: Float[Tensor, 'b n qkv'],
    heads: int,
    frequencies: Float[Tensor, ' half'],
    positions: int | Int[Tensor, 'b n'],
    mix: tuple[Float[Tensor, 'b h n d'], Float[Tensor, 'b h n 1']] | None,
    persistent: Float[Tensor, '2 h p d'] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, values = heads_of(projected, heads)
    if mix is not None:
        values = mixed_values(values, *mix)
    if isinstance(positions, Tensor):
        positions = positions.unsqueeze(1)
    else:
        positions = torch.arange(positions, positions + queries.shape[-2], device=queries.device)
    rotation = rotation_at(frequencies, positions.unsqueeze(-1))
    queries, keys = rotate_features(queries, rotation), rotate_features(keys, rotation)
    return queries, *with_persistent(keys, values, persistent)


def heads_of(projected: Float[Tensor, 'b n qkv'], heads: int) -> Float[Tensor, '3 b h n d']:
    """Queries, keys and values of each head."""
    return projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def mixed_values(
    values: Float[Tensor, 'b h n d'], residual: Float[Tensor, 'b h n d'], share: Float[Tensor, 'b h n 1']
) -> Float[Tensor, 'b h n d']:
    return values.lerp(residual.to(values.dtype), share.to(values.dtype))


def with_persistent(
    keys: Float[Tensor, 'b h n d'], values: Float[Tensor, 'b h n d'], persistent: Float[Tensor, '2 h p d'] | None
) -> tuple[Float[Tensor, 'b h j d'], Float[Tensor, 'b h j d']]:
    """Put persistent keys and values, which all sequences share, in front; without any, return the others."""
    if persistent is None:
        return keys, values
    of_keys, of_values = persistent.to(keys.dtype).unsqueeze(1).expand(-1, keys.shape[0], -1, -1, -1)
    return torch.cat((of_keys, keys), dim=-2), torch.cat((of_values, values), dim=-2)
