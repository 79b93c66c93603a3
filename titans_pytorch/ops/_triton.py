"""Products of tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plus(acc, left, right, PRECISION: tl.constexpr, OPERAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + left · right"""
    return tl.dot(left.to(OPERAND), right.to(OPERAND), acc, input_precision=PRECISION)
