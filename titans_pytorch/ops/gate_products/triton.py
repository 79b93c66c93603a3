"""Kernels of products of gates. A program owns a matrix."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel

# entries of a matrix that a warp holds
ENTRIES = 1024


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    log_gates, products, stride, n, step_stride, N: tl.constexpr
):  # fmt: skip
    own = tl.program_id(0).to(tl.int64)
    after, step = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    gate = tl.load(log_gates + own * stride + after * step_stride, mask=after < n, other=0.0)
    sums = tl.cumsum(tl.where(after > step, gate, 0.0), axis=0)
    product = tl.where(after >= step, tl.exp(sums), 0.0)
    tl.store(products + own * n * n + after * n + step, product, mask=(after < n) & (step < n))


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_products, products, d_log_gates, n, N: tl.constexpr
):  # fmt: skip
    """The gradient of log g_i is the sum of L ∘ d_L over all entries that contain g_i: c ≥ i and j < i."""
    own = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, N)[None, :]
    # starting at the last row
    row = n - 1 - tl.arange(0, N)
    inside = (row >= 0)[:, None] & (step < row[:, None])
    offset = own * n * n + row[:, None] * n + step
    # row c of L contains g_i only left of its diagonal
    weighted = tl.load(products + offset, mask=inside, other=0.0) * tl.load(d_products + offset, mask=inside, other=0.0)
    sums = tl.where(step < row[:, None], tl.cumsum(weighted, axis=0), 0.0)
    tl.store(d_log_gates + own * n + row, tl.sum(sums, axis=1), mask=row >= 0)


def _outputs(log_gates: Tensor) -> Tensor:
    return log_gates.new_empty(*log_gates.shape, log_gates.shape[-1])


def _forward(log_gates: Tensor) -> Tensor:  # … n
    products, flat = _outputs(log_gates), log_gates.reshape(-1, log_gates.shape[-1])
    size, options = _tile(log_gates)
    _forward_kernel[(len(flat),)](
        log_gates=flat, products=products, stride=flat.stride(0), n=flat.shape[1], step_stride=flat.stride(1), N=size,
        **options,
    )  # fmt: skip
    return products


def _backward(d_products: Tensor, products: Tensor, log_gates: Tensor) -> list[Tensor]:
    d_log_gates = log_gates.new_empty(log_gates.shape)
    n = log_gates.shape[-1]
    size, options = _tile(log_gates)
    _backward_kernel[(log_gates.numel() // n,)](
        d_products=d_products.contiguous(), products=products, d_log_gates=d_log_gates, n=n, N=size, **options
    )
    return [d_log_gates]


def _tile(log_gates: Tensor) -> tuple[int, dict[str, int]]:
    size = triton.next_power_of_2(log_gates.shape[-1])
    return size, {'num_warps': max(1, min(8, size * size // ENTRIES))}


gate_products = register_kernel('gate_products', _forward, _backward, outputs=_outputs, saved=(0,))
