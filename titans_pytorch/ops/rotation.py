"""Rotation of pairs of features by position-dependent angles (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titans_pytorch.utils.shapes import Float, Int


def rotation_at(frequencies: Float[Tensor, '... half'], positions: Int[Tensor, ...]) -> Float[Tensor, '... half 2']:
    """Cosines and sines of the angles of positions, which broadcast with the frequencies, in the frequencies'
    precision.

    Angles are computed modulo 2π in float64 if the device has it: near a million, float32 numbers are a sixteenth
    apart.
    """
    wide = torch.float32 if positions.device.type == 'mps' else torch.float64
    angles = (positions.to(wide) * frequencies.to(wide)).remainder(2 * math.pi).to(frequencies.dtype)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate_pairs(
    pairs: Float[Tensor, '... half 2'], rotation: Float[Tensor, '... half 2']
) -> Float[Tensor, '... half 2']:
    """Multiply pairs of features, as complex numbers, by those of `rotation`."""
    (real, imaginary), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)


def rotate_features(t: Float[Tensor, '... d'], rotation: Float[Tensor, '... half 2']) -> Float[Tensor, '... d']:
    """Rotate features in neighbouring pairs; features beyond the pairs of `rotation` stay as they are."""
    width = 2 * rotation.shape[-2]
    if width < t.shape[-1]:
        return torch.cat((rotate_features(t[..., :width], rotation), t[..., width:]), dim=-1)
    pairs = t.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        rotated = rotate_pairs(pairs, rotation)
    else:
        # a single product of complex numbers is faster, but the compiler generates no code for it. Pairs are copied,
        # because not all strides and offsets are allowed and autograd would keep a copy anyway
        dtype = torch.promote_types(t.dtype, rotation.dtype)
        pairs = pairs.to(dtype, copy=True, memory_format=torch.contiguous_format)
        product = torch.view_as_complex(pairs) * torch.view_as_complex(rotation.to(dtype))
        rotated = torch.view_as_real(product)
    return rotated.flatten(-2).to(t.dtype)
