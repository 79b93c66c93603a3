"""Rows in many groups, multiplied by the matrix of their group: y_g = x_g W_g, for groups of few rows.

With so few rows, nearly all the work is moving the matrices: they are read once, and in the gradient read and written
once.
"""

from __future__ import annotations

from torch import Tensor

from titans_pytorch.ops._dispatch import use_kernel
from titans_pytorch.utils.precision import autocast_dtype, operand_dtype
from titans_pytorch.utils.shapes import Float

# beyond these sizes, cuBLAS has enough to do
_MOST_ROWS, _MOST_FEATURES = 16, 256


def grouped_linear(x: Float[Tensor, 'b n c d'], weights: Float[Tensor, 'b n d e']) -> Float[Tensor, 'b n c e']:
    """`x @ weights`, in the precision of autocast, or otherwise of `x`. The kernel serves half precision."""
    operands = operand_dtype(x)
    if use_kernel([x, weights]) and operands.itemsize == 2 and _supports(x, weights):
        from titans_pytorch.ops.grouped_linear import triton

        return triton.grouped_linear(x.to(operands), weights.to(operands))
    # autocast would make the dtypes equal; without it, the weights may have been stored under autocast
    return x @ (weights.to(x.dtype) if autocast_dtype(x.device) is None else weights)


def _supports(x: Tensor, weights: Tensor) -> bool:
    fits = x.shape[2] <= _MOST_ROWS and x.shape[3] <= _MOST_FEATURES
    return fits and x.numel() > 0 and weights.numel() > 0 and x.shape[:2] == weights.shape[:2]
