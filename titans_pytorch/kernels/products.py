"""Products of tiles, as precise as PyTorch's own in the same precision."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plus(acc, left, right, PRECISION: tl.constexpr, OPERAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + left · right"""
    left, right = _operand(left, PRECISION, OPERAND), _operand(right, PRECISION, OPERAND)
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def _operand(x, PRECISION: tl.constexpr, OPERAND: tl.constexpr):  # type: ignore[no-untyped-def]
    x = x.to(OPERAND)
    if PRECISION == 'tf32' and OPERAND == tl.float32:
        # tensor cores cut off the bits that TF32 has not; rounded, errors do not all point one way
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x
