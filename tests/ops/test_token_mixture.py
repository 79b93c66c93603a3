"""`token_mixture`: its reference and its Triton kernel."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same

from titans_pytorch.models.views import selected_views, selected_views_of_token, view_selector
from titans_pytorch.ops import token_mixture as operation
from titans_pytorch.ops.token_mixture import MOST_CHOICES, reference, token_mixture

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture
def kernel():
    pytest.importorskip('triton')
    from titans_pytorch.ops.token_mixture import triton

    return triton


@pytest.fixture
def launches(launches_of):
    return launches_of(operation)


def problem(batch, count, dim, dtype=torch.float32, eps=None):
    """Arguments of the operation, for three mixtures. Neither the rows nor the choices are dense."""
    x = torch.randn(batch, 1, dim + 3, device=DEVICE).to(dtype)[..., :dim]
    choices = torch.randn(batch, 1, dim, count, device=DEVICE).to(dtype).mT
    weight = torch.randn(3 * count, dim, device=DEVICE).to(dtype) * dim**-0.5
    return x, choices, (torch.rand(dim, device=DEVICE).to(dtype), eps), weight, torch.randn(3 * count).to(weight)


@pytest.mark.parametrize(('batch', 'count', 'dim'), [(1, 1, 20), (2, 5, 20), (3, 13, 7)])
@pytest.mark.parametrize('block', [512, 8])
def test_kernel_equals_the_reference(block, batch, count, dim, kernel, poisoned, monkeypatch):
    monkeypatch.setattr(kernel, 'BLOCK', block)
    given = problem(batch, count, dim)
    assert_same(kernel.token_mixture(*given), reference.token_mixture(*given), 1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('eps', [None, 0.5])
def test_kernel_takes_half_precision_and_any_eps(dtype, eps, kernel, poisoned):
    x, *others = problem(2, 5, 24, dtype, eps)
    given = (0.02 * x, *others)  # so small that ε counts
    came = kernel.token_mixture(*given)
    assert came.dtype == dtype
    assert_same(came, reference.token_mixture(*given), 1e-5 if dtype == torch.float32 else 4e-3)
    assert kernel.token_mixture(*problem(0, 5, 24)).shape == (3, 0, 1, 24)


@pytest.mark.gpu
@pytest.mark.parametrize('batch', [1, 64])
@pytest.mark.parametrize('count', [5, 21, 64])
def test_kernel_in_sizes_of_models(count, batch, kernel, poisoned):
    x, choices, (gain, _), weight, bias = problem(batch, count, 384)
    exact = reference.token_mixture(
        *(t.double() for t in (x, choices)), (gain.double(), 1e-7), *(weight.double(), bias.double())
    )
    assert_same(kernel.token_mixture(x, choices, (gain, 1e-7), weight, bias), exact, 1e-5)


def test_reference_equals_the_module():
    selector = view_selector(12, 2).double()
    own, choices = torch.randn(2, 1, 12, dtype=torch.float64), torch.randn(2, 1, 5, 12, dtype=torch.float64)
    assert_same(selected_views_of_token(selector, own, choices), selected_views(selector, own, choices))


def test_the_kernel_is_for_few_choices_of_one_precision_without_gradient(launches):
    few, many = problem(2, 5, 8), problem(2, MOST_CHOICES + 1, 8)
    token_mixture(*few)
    with torch.no_grad():
        token_mixture(*many)
        with torch.autocast(DEVICE, torch.bfloat16):
            token_mixture(*few)
        assert not launches
        token_mixture(*few)
    assert len(launches) == 1
