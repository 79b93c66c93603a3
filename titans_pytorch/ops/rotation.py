"""Rotation of pairs of features by given angles, for a single position (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.utils.shapes import Float, Int


def turns(frequencies: Float[Tensor, '... half'], position: Int[Tensor, ' 1']) -> Float[Tensor, '... half 2']:
    """Cosines and sines by which `turned` rotates each pair of features at one position."""
    angles = position * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def turned(t: Float[Tensor, '... d'], by: Float[Tensor, 'half 2']) -> Float[Tensor, '... d']:
    """Features rotated in neighbouring pairs, as complex numbers: `rotate` of a single position."""
    width = 2 * by.shape[-2]
    if width < t.shape[-1]:  # an odd width leaves one feature unrotated
        return torch.cat((turned(t[..., :width].contiguous(), by), t[..., width:]), dim=-1)
    pairs = t.unflatten(-1, (-1, 2)).to(by.dtype)
    if torch.compiler.is_compiling():  # the compiler generates no code for complex numbers
        (real, imaginary), (cos, sin) = pairs.unbind(-1), by.unbind(-1)
        pairs = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    else:
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(by))
    return pairs.flatten(-2).to(t.dtype)
