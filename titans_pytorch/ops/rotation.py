"""Rotation of pairs of features by given angles, for a single position (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titans_pytorch.utils.shapes import Float, Int


def angles_at(positions: Int[Tensor, ' n'], frequencies: Float[Tensor, '... half']) -> Float[Tensor, '... half']:
    """Angles of positions modulo 2π, in the precision of `frequencies`.

    They are computed in float64, where the device has it: at a million positions float32 is wrong by a tenth of a
    radian.
    """
    wide = torch.float32 if positions.device.type == 'mps' else torch.float64
    return (positions.to(wide) * frequencies.to(wide)).remainder(2 * math.pi).to(frequencies.dtype)


def rotation_at(
    frequencies: Float[Tensor, '*layers half'], position: Int[Tensor, ' 1']
) -> Float[Tensor, '*layers half 2']:
    """Cosines and sines of one position's angles, by which `rotate_features` rotates each pair of features."""
    angles = angles_at(position, frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate_features(t: Float[Tensor, '... d'], rotation: Float[Tensor, 'half 2']) -> Float[Tensor, '... d']:
    """Features rotated in neighbouring pairs, as complex numbers; those beyond the pairs of `rotation` stay."""
    width = 2 * rotation.shape[-2]
    if width < t.shape[-1]:
        rotated = rotate_features(t[..., :width].contiguous(), rotation)
        return torch.cat((rotated, t[..., width:]), dim=-1)
    pairs = t.unflatten(-1, (-1, 2)).to(rotation.dtype)
    if torch.compiler.is_compiling():  # the compiler generates no code for complex numbers
        (real, imaginary), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        pairs = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    else:
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return pairs.flatten(-2).to(t.dtype)
