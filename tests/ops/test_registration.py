"""`register_kernel`: what tracing expects of an operation."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pytorch.ops._registration import register_kernel


def _doubled(x: Tensor, y: Tensor) -> Tensor:
    return 2.0 * x + y


def test_gradients_have_the_strides_that_tracing_expects(fresh_compiler):
    def strided(d_out, x, y):
        return (2.0 * d_out).T.contiguous().T, torch.cat((d_out, d_out), dim=1)[:, : d_out.shape[1]]

    operation = register_kernel('test_strides', _doubled, strided, outputs=lambda x, y: x.new_empty(x.shape))
    x, y, weights = (torch.randn(3, 5, requires_grad=True) for _ in range(3))

    def loss(x, y):
        return (operation(x, y) * weights).sum()

    came = torch.autograd.grad(torch.compile(loss)(x, y), (x, y))
    expected = torch.autograd.grad(loss(x, y), (x, y))
    for have, want, exact in zip(came, expected, (2.0 * weights, weights)):
        assert have.is_contiguous() and want.is_contiguous()
        assert torch.equal(have, want) and torch.equal(have, exact)
    torch.library.opcheck(operation, (x, y), test_utils=('test_schema', 'test_faketensor', 'test_aot_dispatch_dynamic'))
