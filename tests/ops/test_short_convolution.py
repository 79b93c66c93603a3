"""Short convolution: the modules of PyTorch, and the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from compare import assert_no_worse, assert_same
from torch import nn
from torch.autograd import gradcheck

from titans_pytorch.ops.norms import l2_norm
from titans_pytorch.ops.short_convolution import reference, short_convolution

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
# batch, tokens, heads, rows of a head and token, features of a head, width of the convolution
SHAPES = [(2, 9, 3, 1, 8, 4), (1, 70, 2, 2, 20, 3), (2, 5, 1, 3, 1, 1), (1, 4, 2, 1, 256, 4), (1, 140, 1, 1, 64, 8)]
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


def problem(batch, tokens, heads, per_token, dim, width, dtype=torch.float32):
    features = heads * per_token * dim
    x = torch.randn(batch, tokens, features, dtype=dtype, device=DEVICE)
    return x, torch.randn(features, 1, width, device=DEVICE) * 0.5, heads, per_token


def learned(function, x, weight, heads, per_token, normalize, transposed=False):
    """The rows, and gradients, of which the one that comes in is contiguous or transposed."""
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    out = function(x, weight, heads, per_token, normalize)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    weights = weights.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weights
    return out.detach(), torch.autograd.grad(out, (x, weight), weights)


def in_float64(x, weight, *sizes):
    return x.double(), weight.double(), *sizes


@pytest.fixture
def kernels(kernels_everywhere):
    from titans_pytorch.ops.short_convolution import triton as kernels

    return kernels


def test_it_is_a_convolution_an_activation_and_a_norm():
    x, weight, heads, _ = in_float64(*problem(2, 9, 3, 1, 8, 4))
    conv = nn.Conv1d(24, 24, 4, groups=24, bias=False, dtype=torch.float64, device=DEVICE)
    conv.weight.data.copy_(weight)
    rows = nn.SiLU()(conv(x.mT)).mT.unflatten(-1, (3, 8)).transpose(1, 2)
    assert_same(short_convolution(x, weight, heads, 1, False), rows, 0.0)
    assert_same(short_convolution(x, weight, heads, 1, True), l2_norm(rows), 0.0)


@pytest.mark.parametrize('normalize', [False, True])
def test_gradients(normalize):
    x, weight, *sizes = in_float64(*problem(1, 5, 1, 2, 3, 3))
    assert gradcheck(lambda *t: short_convolution(*t, *sizes, normalize), (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_kernels_equal_the_reference(kernels, poisoned, shape, normalize):
    given = problem(*shape)
    exact = learned(reference.short_convolution, *in_float64(*given), normalize)
    assert_same(learned(short_convolution, *given, normalize), exact, 1e-5)
    assert_same(learned(short_convolution, *given, normalize, transposed=True), exact, 1e-5)


def test_rows_may_be_apart(kernels, poisoned):
    x, *given = problem(2, 9, 3, 1, 8, 4)
    spaced = torch.randn(2, 9, 48, device=DEVICE)[..., :24]
    spaced.copy_(x)
    assert_same(learned(short_convolution, spaced, *given, True), learned(short_convolution, x, *given, True), 0.0)


@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('dtypes', [(LOW, torch.float32), (LOW, LOW)])
def test_precision_is_that_of_the_reference(kernels, poisoned, dtypes, normalize):
    x, weight, *sizes = problem(2, 40, 3, 1, 32, 4)
    x, weight = x.to(dtypes[0]), weight.to(dtypes[1])
    exact = learned(reference.short_convolution, *in_float64(x, weight), *sizes, normalize)
    assert_no_worse(lambda: learned(short_convolution, x, weight, *sizes, normalize), exact, floor=1e-6)


def test_rows_of_zeros_stay_zero_and_have_no_gradient(kernels, poisoned):
    x, *given = problem(1, 6, 2, 1, 8, 3)
    x = torch.zeros_like(x)
    assert_same(learned(short_convolution, x, *given, True), learned(reference.short_convolution, x, *given, True), 0.0)


def test_other_inputs_take_the_reference(kernels, monkeypatch):
    monkeypatch.setattr(kernels, 'short_convolution', None)
    for shape in ((1, 3, 1, 1, 257, 2), (1, 9, 1, 1, 4, 9), (0, 5, 1, 1, 4, 2)):
        given = problem(*shape)
        assert_same(short_convolution(*given, True), reference.short_convolution(*given, True), 0.0)


def test_the_operation_is_registered_correctly(kernels):
    x, weight, *sizes = problem(2, 7, 2, 2, 8, 4)
    arguments = (x.requires_grad_(), weight.requires_grad_(), *sizes, True)
    torch.library.opcheck(kernels.short_convolution, arguments, test_utils=CHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_kernels_in_sizes_of_training(kernels, poisoned, dtype):
    x, weight, *sizes = problem(12, 4099, 5, 1, 64, 4, dtype=dtype)
    exact = learned(reference.short_convolution, *in_float64(x, weight), *sizes, True)
    assert_same(learned(short_convolution, x, weight, *sizes, True), exact, 2e-5 if dtype == torch.float32 else 2e-2)
