"""Kernel of inverses: Gauss–Jordan elimination in place, in registers. A program owns a matrix."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel

# entries of a matrix that a warp holds
ENTRIES = 1024


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    matrices, inverses, m, M: tl.constexpr
):  # fmt: skip
    row, column = tl.arange(0, M)[:, None], tl.arange(0, M)[None, :]
    offset = tl.program_id(0).to(tl.int64) * m * m + row * m + column
    inside = (row < m) & (column < m)
    a = tl.load(matrices + offset, mask=inside, other=0.0)
    for pivot in range(m):
        of_row = tl.sum(tl.where(row == pivot, a, 0.0), axis=0)[None, :]
        of_column = tl.sum(tl.where(column == pivot, a, 0.0), axis=1)[:, None]
        reciprocal = 1.0 / tl.sum(tl.where(column == pivot, of_row, 0.0))
        # the eliminated column holds that of the inverse from here on
        scaled = tl.where(column == pivot, reciprocal, of_row * reciprocal)
        rest = tl.where(column == pivot, 0.0, a) - of_column * scaled
        a = tl.where(row == pivot, scaled, rest)
    tl.store(inverses + offset, a, mask=inside)


def _outputs(matrices: Tensor) -> Tensor:
    return matrices.new_empty(matrices.shape)


def _forward(matrices: Tensor) -> Tensor:  # … m m
    inverses, m = _outputs(matrices), matrices.shape[-1]
    size = triton.next_power_of_2(m)
    _kernel[(matrices.numel() // m**2,)](
        matrices=matrices.contiguous(), inverses=inverses, m=m, M=size, num_warps=max(1, size * size // ENTRIES)
    )
    return inverses


def _backward(d_inverses: Tensor, inverses: Tensor, matrices: Tensor) -> list[Tensor]:
    return [-(inverses.mT @ d_inverses @ inverses.mT)]


inverse = register_kernel('inverse', _forward, _backward, outputs=_outputs, saved=(0,))
