"""Helpers that the kernels of several operations share, inside a kernel and around its launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def multiply_add(acc, left, right, PRECISION: tl.constexpr, OPERAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + left · right"""
    return tl.dot(left.to(OPERAND), right.to(OPERAND), acc, input_precision=PRECISION)


@triton.jit
def select(which: tl.constexpr, a, b, c, d):  # type: ignore[no-untyped-def]
    """The one of four arguments with this index, which is known when the kernel is compiled."""
    chosen = a
    if which == 1:
        chosen = b
    if which == 2:
        chosen = c
    if which == 3:
        chosen = d
    return chosen


def tile_size(size: int) -> int:
    """The power of two that holds `size` entries, and at least 16, the shortest side of a product in Triton."""
    return max(16, triton.next_power_of_2(size))


def contiguous_inside(t: Tensor, axes: int) -> Tensor:
    """`t` with its last one or two axes contiguous; those before may have any strides, zero among them."""
    strides = (t.shape[-1], 1)[-axes:]
    return t if t.stride()[-axes:] == strides else t.contiguous()


def strides_of(t: Tensor | None, axes: int) -> tuple[int, ...]:
    """The first strides of a tensor, and zeros for an absent one, whose pointer a kernel does not read."""
    return (0,) * axes if t is None else t.stride()[:axes]


def named_strides(name: str, t: Tensor | None, axes: str) -> dict[str, int]:
    """A tensor's first strides as keyword arguments, `<name>_<axis>`; 0 for an absent one, which no kernel reads."""
    names = [f'{name}_{axis}' for axis in axes.split()]
    return dict.fromkeys(names, 0) if t is None else dict(zip(names, t.stride()))
