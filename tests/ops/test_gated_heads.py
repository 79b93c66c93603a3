"""Norm and gate of heads: PyTorch's modules, and the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from compare import assert_no_worse, assert_same
from torch import nn

from titans_pytorch.ops.gated_heads import gated_heads, reference

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
# batch, heads, rows, features; whether there is a norm, and a gate for each feature
SHAPES = [(2, 3, 5, 8), (1, 4, 70, 64), (2, 2, 9, 20), (1, 1, 1, 1), (1, 2, 3, 256)]
KINDS = [(False, False), (False, True), (True, False), (True, True)]
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


def problem(batch, heads, rows, dim, norm, per_feature, dtype=torch.float32):
    x = torch.randn(batch, heads, rows, dim, dtype=dtype, device=DEVICE)
    logits = torch.randn(batch, rows, heads * (dim if per_feature else 1), dtype=dtype, device=DEVICE)
    return x, torch.randn(heads, 1, dim, device=DEVICE) if norm else None, logits


def learned(function, *tensors, **options):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    gradients = torch.autograd.grad((out * weights).sum(), [t for t in leaves if t is not None])
    return out.detach(), gradients


def in_float64(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.fixture
def kernels(kernels_everywhere):
    from titans_pytorch.ops.gated_heads import triton as kernels

    return kernels


def test_it_is_a_norm_and_a_gate():
    x, gamma, logits = in_float64(*problem(2, 3, 5, 8, True, True))
    normed = nn.RMSNorm(8, elementwise_affine=False)(x) * (1 + gamma)
    gated = normed.transpose(1, 2).flatten(2) * logits.sigmoid()
    assert_same(gated_heads(x, gamma, logits), gated, 1e-12)
    assert gated_heads(x, gamma, logits, torch.float32).dtype == torch.float32


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('shape', SHAPES)
def test_kernels_equal_the_reference(kernels, poisoned, shape, kind):
    tensors = problem(*shape, *kind)
    exact = learned(reference.gated_heads, *in_float64(*tensors))
    assert_same(learned(gated_heads, *tensors), exact, 1e-5)


def test_rows_may_be_apart(kernels, poisoned):
    x, gamma, logits = problem(2, 3, 5, 8, True, True)
    spaced = x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat((logits, logits), dim=-1)[..., :24]
    assert_same(learned(gated_heads, spaced, gamma, wide), learned(gated_heads, x, gamma, logits), 0.0)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('low_rows', [False, True])
def test_precision_is_that_of_the_reference(kernels, poisoned, kind, low_rows):
    x, gamma, logits = problem(2, 3, 40, 32, *kind)
    x, logits = x.to(LOW) if low_rows else x, logits.to(LOW)
    exact = learned(reference.gated_heads, *in_float64(x, gamma, logits))
    assert_no_worse(lambda: learned(gated_heads, x, gamma, logits), exact, floor=1e-6)
    assert_no_worse(lambda: learned(gated_heads, x, gamma, logits, dtype=LOW), exact, floor=1e-6)


def test_other_inputs_take_the_reference(kernels, monkeypatch):
    monkeypatch.setattr(kernels, 'gated_heads', None)
    for shape in ((1, 1, 2, 257), (1, 2, 0, 8)):
        tensors = problem(*shape, True, True)
        assert_same(gated_heads(*tensors), reference.gated_heads(*tensors), 0.0)
    x, gamma, logits = problem(1, 2, 3, 8, True, True)
    assert_same(gated_heads(x, gamma[:1], logits), reference.gated_heads(x, gamma[:1], logits), 0.0)


@pytest.mark.parametrize('kind', KINDS[::3])
def test_the_operation_is_registered_correctly(kernels, kind):
    tensors = [None if t is None else t.requires_grad_() for t in problem(2, 3, 5, 8, *kind)]
    torch.library.opcheck(kernels.gated_heads, (*tensors, torch.float32), test_utils=CHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_kernels_in_sizes_of_training(kernels, poisoned, dtype):
    tensors = problem(12, 5, 4096, 64, True, True, dtype=dtype)
    exact = learned(reference.gated_heads, *in_float64(*tensors))
    assert_same(learned(gated_heads, *tensors), exact, 2e-5 if dtype == torch.float32 else 2e-2)
