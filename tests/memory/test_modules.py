"""Modules around a memory network."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same
from torch import nn

from titans_pytorch.memory.modules import AveragePool, MultiheadRMSNorm


def heads(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def norm():
    norm = MultiheadRMSNorm(8, 3).double()
    nn.init.normal_(norm.gamma)
    return norm


def test_the_norm_of_heads_calls_an_inner_norm_with_hooks(norm):
    x = heads(2, 3, 5, 8)
    expected = norm(x)
    seen = []
    norm.rmsnorm.register_forward_hook(lambda module, args, out: seen.append(out))
    assert_same(norm(x), expected, 1e-12)
    assert len(seen) == 1
    norm.rmsnorm.register_forward_hook(lambda module, args, out: 2 * out)
    assert_same(norm(x), 2 * expected, 1e-12)


@pytest.mark.parametrize('inner', [nn.RMSNorm(8, eps=0.5, elementwise_affine=False), nn.Identity()])
def test_the_norm_of_heads_calls_another_inner_norm(norm, inner):
    norm.rmsnorm = inner
    x = heads(2, 3, 5, 8)
    assert_same(norm(x), inner(x) * (1 + norm.gamma), 1e-12)


@pytest.mark.parametrize('chunk', [1, 3])
def test_average_pool(chunk):
    x = heads(2, 6, 4)
    assert_same(AveragePool(chunk)(x), x.view(2, 6 // chunk, chunk, 4).mean(dim=2), 1e-12)
