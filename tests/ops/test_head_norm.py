"""RMS norm of heads: PyTorch's module, and the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from compare import assert_no_worse, assert_same
from torch import nn

from titans_pytorch.ops.head_norm import head_norm, reference

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
# batch, heads, rows, features
SHAPES = [(2, 3, 5, 8), (1, 4, 70, 64), (2, 2, 9, 20), (1, 1, 1, 1), (1, 2, 3, 256)]
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


def problem(batch, heads, rows, dim, dtype=torch.float32):
    """Rows as a projection leaves them, with heads side by side."""
    x = torch.randn(batch, rows, heads, dim, dtype=dtype, device=DEVICE).transpose(1, 2)
    return x, torch.randn(heads, 1, dim, device=DEVICE)


def learned(function, x, gamma, transposed=False):
    """The norm, and gradients, of which the one that comes in is contiguous or transposed."""
    x, gamma = (t.detach().requires_grad_() for t in (x, gamma))
    out = function(x, gamma)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    weights = weights.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weights
    return out.detach(), torch.autograd.grad(out, (x, gamma), weights)


@pytest.fixture
def kernels(kernels_everywhere):
    from titans_pytorch.ops.head_norm import triton as kernels

    return kernels


def test_it_is_the_norm_of_pytorch():
    x, gamma = problem(2, 3, 5, 8, dtype=torch.float64)
    norm = nn.RMSNorm(8, elementwise_affine=False)
    assert_same(head_norm(x, gamma.double()), norm(x) * (1 + gamma.double()), 0.0)


@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_kernels_equal_the_reference(kernels, poisoned, shape, transposed):
    tensors = problem(*shape)
    exact = learned(reference.head_norm, *(t.double() for t in tensors), transposed)
    assert_same(learned(head_norm, *tensors, transposed), exact, 1e-5)
    contiguous = tensors[0].contiguous(), tensors[1]
    assert_same(learned(head_norm, *contiguous, transposed), exact, 1e-5)


@pytest.mark.parametrize('dtypes', [(LOW, torch.float32), (LOW, LOW)])
def test_precision_is_that_of_the_reference(kernels, poisoned, dtypes):
    x, gamma = (t.to(dtype) for t, dtype in zip(problem(2, 3, 40, 32), dtypes))
    exact = learned(reference.head_norm, x.double(), gamma.double())
    assert_no_worse(lambda: learned(head_norm, x, gamma), exact, floor=1e-6)


def test_rows_of_zeros(kernels, poisoned):
    x, gamma = torch.zeros(1, 2, 3, 8, device=DEVICE), torch.randn(2, 1, 8, device=DEVICE)
    assert_same(learned(head_norm, x, gamma), learned(reference.head_norm, x, gamma), 1e-5)


def test_other_inputs_take_the_reference(kernels, monkeypatch):
    monkeypatch.setattr(kernels, 'head_norm', None)
    for x, gamma in (problem(1, 1, 2, 257), problem(1, 2, 0, 8)):
        assert_same(head_norm(x, gamma), reference.head_norm(x, gamma), 0.0)


def test_the_operation_is_registered_correctly(kernels):
    x, gamma = problem(2, 3, 5, 8)
    arguments = x.transpose(1, 2).detach().requires_grad_(), gamma.requires_grad_(), torch.float32
    torch.library.opcheck(kernels.head_norm, arguments, test_utils=CHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_kernels_in_sizes_of_training(kernels, poisoned, dtype):
    x, gamma = problem(16, 4, 2048, 64, dtype=dtype)
    exact = learned(reference.head_norm, x.double(), gamma.double())
    assert_same(learned(head_norm, x, gamma), exact, 1e-5 if dtype == torch.float32 else 1e-2)
