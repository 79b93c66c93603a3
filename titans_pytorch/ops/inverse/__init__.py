"""Inverses of small matrices that need no pivoting."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.ops._dispatch import use_kernel
from titans_pytorch.ops.inverse import reference
from titans_pytorch.utils.shapes import Float

# most rows, because a program holds the whole matrix
_MOST_ROWS = 64


def inverse(matrices: Float[Tensor, '... m m']) -> Float[Tensor, '... m m']:
    """The inverse of each matrix. All leading blocks of the matrices must be far from singular.

    That holds for I + D K with D diagonal and not negative, and K symmetric without negative eigenvalues. It is not
    checked, because a check would wait for the device.
    """
    if use_kernel([matrices], dtypes=(torch.float32,)) and _supports(matrices):
        from titans_pytorch.ops.inverse import triton

        return triton.inverse(matrices)
    return reference.inverse(matrices)


def _supports(matrices: Tensor) -> bool:
    return matrices.shape[-1] <= _MOST_ROWS and matrices.numel() > 0
