"""`token_hyper_connection`: its reference and its Triton kernel."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same

from titans_pytorch.ops.hyper_connection import ITERATIONS, MOST_STREAMS
from titans_pytorch.ops.sinkhorn import EPS
from titans_pytorch.ops.token_hyper_connection import reference, token_hyper_connection

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
SETTINGS = (ITERATIONS, EPS)


@pytest.fixture
def kernel():
    pytest.importorskip('triton')
    from titans_pytorch.ops.token_hyper_connection import triton

    return triton


def random_weights(streams, dim, adds=True):
    logits = streams + 1 + adds
    return torch.randn(logits, dim, device=DEVICE) * dim**-0.5, torch.randn(streams, logits, device=DEVICE)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ('streams', 'dim', 'pending', 'adds'),
    [
        (4, 384, True, True),
        (4, 70, False, True),
        (4, 20, True, False),
        (3, 7, True, True),
        (3, 40, False, False),
        (2, 33, True, False),
        (8, 1, True, True),
        (8, 18, False, True),
        (1, 20, True, True),
    ],
)
def test_kernel_equals_the_reference(streams, dim, pending, adds, dtype, kernel, poisoned, monkeypatch):
    weights = random_weights(streams, dim, adds)
    # none is dense: of the streams only the features are, of the branch's output not even they
    x = torch.randn(streams, 3, dim + 1, device=DEVICE).to(dtype).transpose(0, 1)[..., :dim]
    write = torch.rand(3, streams, 2, device=DEVICE).to(dtype)[..., 1:]
    branch_out = torch.randn(dim, 1, 3, device=DEVICE).permute(2, 1, 0)
    outputs = (write, branch_out) if pending else None

    for block in (512, 32):
        monkeypatch.setattr(kernel, 'BLOCK', block)
        came = kernel.token_hyper_connection(x, outputs, *weights, *SETTINGS)
        assert {t.dtype for t in came} == {dtype} and all(t.is_contiguous() for t in came)
        expected = reference.token_hyper_connection(x, outputs, *weights, *SETTINGS)
        assert_same(came, expected, 1e-5 if dtype == torch.float32 else 4e-3)


def test_streams_of_zeros_and_what_is_not_a_number(kernel):
    weights = random_weights(4, 20)
    x = torch.randn(3, 4, 20, device=DEVICE)
    x[0, 1] = 0
    x[1] = 0
    came, expected = (own.token_hyper_connection(x, None, *weights, *SETTINGS) for own in (kernel, reference))
    assert_same(came, expected, 1e-5)
    x[1, 2, 3] = float('nan')
    for own in (kernel, reference):
        branch_in, residual, write = own.token_hyper_connection(x, None, *weights, *SETTINGS)
        assert branch_in[1].isnan().any() and residual[1].isnan().any() and write[1, 2].isnan().all()
        assert all(t[::2].isfinite().all() for t in (branch_in, residual, write))


def test_the_kernel_is_for_no_gradient_and_float32_at_most(kernel, kernels_everywhere, monkeypatch):
    monkeypatch.setattr(kernel, 'token_hyper_connection', None)
    weights, x = random_weights(4, 8), torch.randn(1, 4, 8, device=DEVICE)
    token_hyper_connection(x, None, *weights)
    with torch.no_grad():
        token_hyper_connection(x.double(), None, *(t.double() for t in weights))
        many = MOST_STREAMS + 1
        token_hyper_connection(torch.randn(1, many, 8, device=DEVICE), None, *random_weights(many, 8))
        with pytest.raises(TypeError, match='not callable'):
            token_hyper_connection(x, None, *weights)
