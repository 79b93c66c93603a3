"""`grouped_linear`, by its kernel: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same

from titans_pytorch.ops import grouped_linear as operation
from titans_pytorch.ops.grouped_linear import grouped_linear

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter multiplies no bfloat16
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
# batch, groups, rows, and the sides of a matrix
SHAPES = [(2, 3, 4, 16, 32), (1, 2, 3, 5, 7), (2, 1, 16, 200, 40), (1, 4, 1, 13, 150)]
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


def problem(batch, groups, rows, dim, width, dtype=LOW):
    return [
        torch.randn(batch, groups, *sides, device=DEVICE).to(dtype).requires_grad_()
        for sides in ((rows, dim), (dim, width))
    ]


def with_gradients(fn, x, weights):
    out = fn(x, weights)
    towards = torch.linspace(-1, 1, out.numel(), device=DEVICE).sin().view_as(out).to(out.dtype)
    return out, *torch.autograd.grad(out, (x, weights), towards)


@pytest.mark.parametrize('shape', SHAPES)
def test_the_kernel_multiplies(kernels_everywhere, poisoned, shape):
    x, weights = problem(*shape)
    exact = with_gradients(torch.matmul, *(t.detach().double().requires_grad_() for t in (x, weights)))
    for came, want in zip(with_gradients(grouped_linear, x, weights), exact):
        assert came.dtype == LOW
        assert_same(came.double() / want.abs().max(), want / want.abs().max(), 8e-3)


def test_the_kernel_reads_views(kernels_everywhere):
    x, weights = problem(2, 6, 3, 8, 16)
    views = lambda x, weights: (x.transpose(2, 3).contiguous().transpose(2, 3)[:, 1:5], weights[:, 2:6])  # noqa: E731
    came = with_gradients(lambda *own: grouped_linear(*views(*own)), x, weights)
    copied = with_gradients(lambda *own: grouped_linear(*(t.contiguous() for t in views(*own))), x, weights)
    assert_same(came, copied, 1e-6)


@pytest.mark.parametrize(
    ('shape', 'dtype'),
    [((1, 2, 17, 8, 8), LOW), ((1, 2, 3, 300, 8), LOW), ((1, 2, 3, 8, 8), torch.float32), ((0, 2, 3, 8, 8), LOW)],
)
def test_other_products_take_pytorch(kernels_everywhere, monkeypatch, shape, dtype):
    from titans_pytorch.ops.grouped_linear import triton

    monkeypatch.setattr(triton, 'grouped_linear', None)
    x, weights = problem(*shape, dtype)
    assert_same(grouped_linear(x, weights), x @ weights)


def test_weights_may_be_in_another_precision_than_rows(kernels_everywhere):
    x, weights = problem(1, 2, 3, 8, 8)
    assert operation.grouped_linear(x.float(), weights).dtype == torch.float32
    assert operation.grouped_linear(x, weights.float()).dtype == LOW


def test_the_operation_keeps_the_rules_of_pytorch():
    pytest.importorskip('triton')
    from titans_pytorch.ops.grouped_linear import triton

    torch.library.opcheck(triton.grouped_linear, (*problem(1, 2, 3, 8, 16),), test_utils=CHECKS)
