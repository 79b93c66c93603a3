"""Modules around a memory network."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same
from einops.layers.torch import Rearrange
from torch import nn

from titans_pytorch import without_kernels
from titans_pytorch.memory.modules import (
    AveragePool,
    L2Norm,
    MultiheadRMSNorm,
    SplitHeads,
    join_heads,
    pointwise,
    projection,
    rows_of_heads,
)


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


# queries, keys and values, and what is retrieved: several modules as one operation


class OfHeads(nn.Module):
    """Keys of two heads, and values of two heads joined."""

    def __init__(self, norm, per_token=1, gates=16):
        super().__init__()
        self.to_keys, self.split = projection(16, 16 * per_token, nn.SiLU(), 4), SplitHeads(2, per_token)
        self.key_norm = norm
        self.value_norm = nn.Identity() if norm is None else MultiheadRMSNorm(8, 2)
        self.gate = nn.Sequential(nn.Linear(16, gates, bias=False), SplitHeads(2), nn.Sigmoid())

    def forward(self, tokens, values):
        joined = join_heads(values, self.value_norm, self.gate, tokens, None)
        return rows_of_heads(tokens, self.to_keys, self.split, self.key_norm), joined


def learned_by(module):
    """Results, and gradients of a function of them."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 10, 16), (2, 2, 10, 8)
    tokens, values = (torch.randn(*shape, generator=generator, requires_grad=True) for shape in shapes)
    results = module(tokens, values)
    weights = [torch.randn(t.shape, generator=generator) for t in results]
    return results, torch.autograd.grad(results, [*module.parameters(), tokens, values], weights)


NORMS = {'none': lambda: None, 'l2': L2Norm, 'rms': lambda: MultiheadRMSNorm(8, 2)}


@pytest.mark.parametrize('per_token', [1, 3])
@pytest.mark.parametrize('norm', NORMS)
def test_operations_of_heads_equal_their_modules(kernels_everywhere, norm, per_token):
    module = OfHeads(NORMS[norm](), per_token, gates=16 if per_token == 1 else 2)
    by_kernels = learned_by(module)
    with without_kernels():
        by_reference = learned_by(module)
    # with a hook every module is called
    module.to_keys.register_forward_hook(lambda *_: None)
    module.gate.register_forward_hook(lambda *_: None)
    assert_same(by_kernels, by_reference, 1e-5)
    assert_same(by_reference, learned_by(module), 1e-5)


@pytest.mark.parametrize(
    'name', ['to_keys.1', 'to_keys.1.conv', 'to_keys.2', 'split', 'key_norm', 'value_norm', 'gate.2']
)
def test_operations_of_heads_call_modules_with_hooks(name):
    module = OfHeads(L2Norm())
    expected, seen = learned_by(module), []
    handle = module.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    assert_same(learned_by(module), expected, 1e-5)
    assert seen == [name]
    handle.remove()
    with torch.nn.modules.module.register_module_full_backward_hook(lambda own, *_: seen.append(own)):
        learned_by(module)
    assert module.get_submodule(name) in seen


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize(
    'name', ['to_keys', 'to_keys.0', 'to_keys.1.conv', 'to_keys.2', 'key_norm', 'value_norm', 'gate']
)
def test_operations_of_heads_call_replaced_modules(name):
    plain, module = (OfHeads(None if 'keys' in name else L2Norm()) for _ in range(2))
    module.load_state_dict(plain.state_dict())
    path, _, own = name.rpartition('.')
    setattr(module.get_submodule(path), own, Doubled(module.get_submodule(name)))
    (keys, values), (of_plain, of_plain_values) = learned_by(module)[0], learned_by(plain)[0]
    if name in ('to_keys.0', 'to_keys.1.conv'):
        assert (keys - of_plain).norm() > 0.1 * of_plain.norm()
    elif name in ('value_norm', 'gate'):
        assert_same((keys, values), (of_plain, 2 * of_plain_values), 1e-5)
    else:
        assert_same((keys, values), (2 * of_plain, of_plain_values), 1e-5)


@pytest.mark.parametrize('options', [dict(kernel_size=2, dilation=3, groups=16), dict(kernel_size=4)])
def test_convolutions_of_other_settings_are_called(options):
    module = OfHeads(None)
    module.to_keys[1].conv = nn.Conv1d(16, 16, bias=False, **options)
    keys = learned_by(module)[0][0]
    # with a hook every module is called
    module.to_keys.register_forward_hook(lambda *_: None)
    assert_same(keys, learned_by(module)[0][0], 1e-6)


def test_a_projection_without_a_convolution_keeps_its_hooks():
    tokens, module = torch.randn(2, 3, 16), projection(16, 16, nn.SiLU())
    expected = -module(tokens)
    module.register_forward_hook(lambda module, args, out: -out)
    assert_same(pointwise(module)(tokens), expected, 0)


def test_other_parts_of_heads_are_used():
    tokens, values = torch.randn(2, 10, 16), torch.randn(2, 2, 10, 8)
    module = OfHeads(None)
    keys, joined = module(tokens, values)
    module.split = Rearrange('b n (h d) -> b h n d', h=2)
    module.to_keys[1].conv.bias = nn.Parameter(torch.zeros(16))
    assert_same(module(tokens, values)[0], keys, 1e-6)
    module.to_keys[1].conv.bias = nn.Parameter(torch.ones(16))
    module.gate.append(nn.Threshold(1.0, 0.0))
    keys_with_bias, nothing = module(tokens, values)
    assert (keys_with_bias - keys).abs().max() > 0.1
    assert not nothing.any() and joined.any()
