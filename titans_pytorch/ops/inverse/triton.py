"""Kernel of inverses. A program owns a matrix, which it holds in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel
from titans_pytorch.ops._triton import invert

# entries of a matrix that a warp holds
ENTRIES = 1024


@triton.jit
def _kernel(matrices, inverses, m, M: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.arange(0, M)[:, None], tl.arange(0, M)[None, :]
    offset = tl.program_id(0).to(tl.int64) * m * m + row * m + column
    inside = (row < m) & (column < m)
    matrix = tl.load(matrices + offset, mask=inside, other=0.0)
    tl.store(inverses + offset, invert(matrix, m, M), mask=inside)


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
