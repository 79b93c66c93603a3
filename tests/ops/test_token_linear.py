"""`token_linear`: its reference and its Triton kernel."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from titans_pytorch.models.feedforward import FeedForward, feedforward_of_token
from titans_pytorch.models.views import selected_views, selected_views_of_token, view_selector
from titans_pytorch.ops import token_linear as operation
from titans_pytorch.ops.token_choice import token_choice
from titans_pytorch.ops.token_linear import (
    FEW_ENTRIES,
    MOST_ENTRIES,
    linear_of_rows,
    linear_of_token,
    reference,
    token_linear,
)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture
def kernel():
    pytest.importorskip('triton')
    from titans_pytorch.ops.token_linear import triton

    return triton


@pytest.fixture
def launches(launches_of):
    """The last argument of a launch: whether it computes tiles."""
    return launches_of(operation)


def problem(batch, dim, outputs, norm=True, bias=True, dtype=torch.float32, eps=None):
    """Arguments of the operation. The rows are not dense."""
    x = torch.randn(batch, 1, dim + 3, device=DEVICE).to(dtype)[..., :dim]
    weight = (torch.randn(outputs, dim, device=DEVICE) * dim**-0.5).to(dtype)
    gain = torch.rand(dim, device=DEVICE).to(dtype)
    return x, weight, torch.randn(outputs, device=DEVICE).to(dtype) if bias else None, (gain, eps) if norm else None


@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize(('batch', 'dim', 'outputs'), [(1, 20, 6), (3, 7, 2)])
def test_rows_equal_the_reference(batch, dim, outputs, norm, bias, gated, kernel, poisoned, monkeypatch):
    given = problem(batch, dim, outputs, norm, bias)
    for block in (1024, 8):
        monkeypatch.setattr(kernel, 'BLOCK', block)
        assert_same(kernel.token_linear(*given, gated, False), reference.token_linear(*given, gated), 1e-5)


@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize(('batch', 'dim', 'outputs'), [(5, 20, 6), (40, 150, 36)])
@pytest.mark.parametrize('of_norm', [128, 16])
def test_tiles_equal_the_reference(of_norm, batch, dim, outputs, norm, bias, gated, kernel, poisoned, monkeypatch):
    monkeypatch.setattr(kernel, 'FEATURES_OF_NORM', of_norm)
    given = problem(batch, dim, outputs, norm, bias)
    assert_same(kernel.token_linear(*given, gated, True), reference.token_linear(*given, gated), 1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('eps', [None, 0.5])
@pytest.mark.parametrize('in_tiles', [False, True])
def test_kernel_takes_half_precision_and_any_eps(in_tiles, dtype, eps, kernel, poisoned):
    x, *others = problem(2, 24, 10, dtype=dtype, eps=eps)
    given = (0.02 * x, *others)  # so small that ε counts
    came = kernel.token_linear(*given, True, in_tiles)
    assert {t.dtype for t in came} == {dtype}
    assert_same(came, reference.token_linear(*given, True), 1e-5 if dtype == torch.float32 else 4e-3)
    empty = kernel.token_linear(*problem(0, 24, 10), True, in_tiles)
    assert [t.shape for t in empty] == [(0, 1, 5), (0, 1, 24)]


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(('dim', 'outputs', 'gated'), [(384, 768, False), (384, 2048, True), (1024, 384, False)])
@pytest.mark.parametrize('batch', [2, 64, 100])
def test_kernel_in_sizes_of_models(batch, dim, outputs, gated, dtype, kernel, poisoned):
    x, weight, bias, norm = problem(batch, dim, outputs, dtype=dtype)
    exact = reference.token_linear(x.double(), weight.double(), bias.double(), (norm[0].double(), 1e-7), gated)
    came = kernel.token_linear(x, weight, bias, (norm[0], 1e-7), gated, batch > FEW_ENTRIES)
    assert_same(came, exact, 1e-5 if dtype == torch.float32 else 1e-2)


def test_reference_equals_the_modules():
    feedforward = FeedForward(12).double()
    norm, to_hidden, gate, to_out = feedforward
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 1, 12, dtype=torch.float64)
    hidden, normed = token_linear(x, to_hidden.weight, to_hidden.bias, (norm.weight, norm.eps), gated=True)
    assert_same(hidden, gate(to_hidden(norm(x))))
    assert_same(normed, norm(x))
    assert_same(token_linear(hidden, to_out.weight, to_out.bias)[0], feedforward(x))


def test_the_kernel_is_for_few_entries_of_one_precision_without_gradient(launches):
    few, tiles, many = (problem(entries, 8, 6) for entries in (FEW_ENTRIES, MOST_ENTRIES, MOST_ENTRIES + 1))
    token_linear(*few)
    with torch.no_grad():
        token_linear(*many)
        token_linear(*(t.double() for t in few[:3]))
        with torch.autocast(DEVICE, torch.bfloat16):
            token_linear(*few)
        assert not launches
        token_linear(*few)
        token_linear(*tiles)
    assert [in_tiles for *_, in_tiles in launches] == [False, True]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@torch.no_grad()
def test_rows_of_plain_layers_alone_take_the_kernel(launches):
    def check(linear, x, takes):
        launches.clear()
        assert_same(linear_of_rows(linear, x), linear(x), 1e-5)
        assert len(launches) == takes

    linear, x = nn.Linear(8, 6).to(DEVICE), torch.randn(2, 3, 8, device=DEVICE)
    check(linear, x, takes=1)
    check(linear, torch.randn(MOST_ENTRIES + 1, 8, device=DEVICE), takes=0)
    check(nn.Sequential(linear), x, takes=0)
    with torch.enable_grad():
        check(linear, x, takes=0)
    hook = linear.register_forward_hook(lambda module, args, out: 2 * out)
    check(linear, x, takes=0)
    hook.remove()
    parametrize.register_parametrization(linear, 'weight', Doubled())
    check(linear, x, takes=0)


@torch.no_grad()
def test_half_precision_is_normalised_before_it_overflows(launches):
    for batch in (2, FEW_ENTRIES + 1):
        x, weight, bias, _ = problem(batch, 24, 10, dtype=torch.float16)
        gain = torch.full((24,), 3.0, dtype=torch.float16, device=DEVICE)
        for scale in (1e4, 1e-5):
            given = scale * x, weight, bias, (gain, None)
            norm = gain.double(), torch.finfo(torch.float32).eps
            exact = reference.token_linear(*(t.double() for t in given[:3]), norm, False)
            assert_same(token_linear(*given)[0].double(), exact[0], 1e-2)
    assert [in_tiles for *_, in_tiles in launches] == [False] * 2  # tiles with a norm are for other precisions


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as quantised ones are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(t):
            return t.inner if isinstance(t, Wrapped) else t

        out = func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
        return cls(out) if func is torch.ops.aten.detach.default else out


@torch.no_grad()
def test_layers_that_are_not_plain_are_called(launches):
    x = torch.randn(2, 1, 8, device=DEVICE)

    def wrapped(module):
        for part in module.modules():
            if isinstance(part, nn.Linear):
                part.weight = nn.Parameter(Wrapped(part.weight.detach()), requires_grad=False)
        return module

    def without_gain(module):
        module[0] = nn.RMSNorm(8, elementwise_affine=False)
        return module

    def without_bias(module):
        module[1] = nn.Linear(8, len(module[1].weight), bias=False)
        return module

    choices = torch.randn(2, 1, 5, 8, device=DEVICE)
    for change in (wrapped, without_gain, without_bias):
        feedforward = change(FeedForward(8)).to(DEVICE)
        launches.clear()
        assert_same(feedforward_of_token(feedforward, x), feedforward(x), 1e-5)
        assert len(launches) == (2 if change is without_bias else 0)
        selector = change(view_selector(8, 2)).to(DEVICE)
        assert_same(selected_views_of_token(selector, x, choices), selected_views(selector, x, choices), 1e-5)
        norm, linear, *_ = feedforward
        assert_same(linear_of_token(linear, x, norm)[0], linear(norm(x)), 1e-5)


@torch.no_grad()
def test_what_is_compiled_without_gradients_is_one_graph(kernels_everywhere, fresh_compiler):
    linear, x = nn.Linear(8, 6), torch.randn(2, 3, 8)
    compiled = torch.compile(lambda x: linear_of_rows(linear, x), fullgraph=True, backend='eager')
    assert_same(compiled(x), linear(x), 1e-6)
    chosen = torch.compile(lambda x: token_choice(x, None, 0.0, 0.1)[0], fullgraph=True, backend='eager')
    assert torch.equal(chosen(x), x.argmax(dim=-1))
