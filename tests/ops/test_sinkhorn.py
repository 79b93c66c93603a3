"""`sinkhorn`: the hyper-connections' numbers, exact gradients, one operation to the compiler; and its Triton kernel."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same
from hyper_connections.mHCv2 import sinkhorn_knopps

from titans_pytorch import MemoryAsContextTransformer
from titans_pytorch.ops.sinkhorn import EPS, reference, sinkhorn

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def problem(*shape, dtype=torch.float32, device='cpu'):
    """Matrices cut out of a larger tensor, as hyper-connections cut theirs."""
    size = shape[-1]
    return (torch.randn(*shape[:-1], size + 1, dtype=dtype, device=device) * 2)[..., 1:]


def by_loop(log_alpha, iters=20):
    """The definition, in the precision of its input."""
    x = (log_alpha - log_alpha.amax(dim=-2, keepdim=True).detach()).exp()
    for _ in range(iters):
        x = x / x.sum(dim=-2, keepdim=True).clamp(min=EPS)
        x = x / x.sum(dim=-1, keepdim=True).clamp(min=EPS)
    return x


def with_gradient(function, log_alpha, *args):
    log_alpha = log_alpha.detach().requires_grad_()
    out = function(log_alpha, *args)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, torch.autograd.grad((out * weights).sum(), log_alpha)[0]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 6, 7, 8, 17])
def test_equals_hyper_connections(size, dtype):
    log_alpha = problem(2, 3, size, size, dtype=dtype)
    came, expected = with_gradient(sinkhorn, log_alpha), with_gradient(sinkhorn_knopps, log_alpha)
    assert came[0].dtype == came[1].dtype == dtype
    assert came[0].is_contiguous()
    assert_same(came, expected, 2**-8 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize('iters', [1, 2, 20])
@pytest.mark.parametrize('shape', [(4, 4), (7, 3, 3), (2, 1, 5, 8, 8), (0, 4, 4)])
def test_gradient_goes_through_every_iteration(shape, iters):
    log_alpha = problem(*shape)
    exact = with_gradient(by_loop, log_alpha.double(), iters)
    assert_same(with_gradient(sinkhorn, log_alpha, iters), exact, 2e-6)

    # the same without rounding
    for function in (reference.sinkhorn, reference.loop):
        assert_same(with_gradient(function, log_alpha.double(), iters, EPS), exact, 1e-12)


def test_second_gradient():
    log_alpha = problem(3, 4, 4).requires_grad_()
    results = []
    for function in (sinkhorn, sinkhorn_knopps):
        (first,) = torch.autograd.grad(function(log_alpha).pow(2).sum(), log_alpha, create_graph=True)
        results.append((first, *torch.autograd.grad(first.pow(2).sum(), log_alpha)))
    assert_same(*results, 1e-5)


def implementations():
    yield reference.sinkhorn
    pytest.importorskip('triton')
    from titans_pytorch.ops.sinkhorn import triton

    yield triton.sinkhorn


@pytest.mark.parametrize('iters', [1, 5])
def test_rows_of_next_to_nothing(iters):
    # a row is divided by EPS at least, which is a constant; one of zeros stays so, and its gradient is finite
    log_alpha = problem(3, 4, 4, device=DEVICE)
    log_alpha *= 0.1
    log_alpha[0, 1] -= 28.5  # a sum of about EPS / 2
    log_alpha[1, 2] -= 200
    log_alpha[2, 3] -= 40
    _, expected = with_gradient(by_loop, log_alpha.double(), iters)
    expected[1, 2] = 0
    for implementation in implementations():
        out, gradient = with_gradient(implementation, log_alpha, iters, EPS)
        assert_same(out, sinkhorn_knopps(log_alpha, iters), 1e-6)
        assert_same(gradient, expected, 1e-5)
        assert not gradient[1, 2].any()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize(('shape', 'iters'), [((3, 1, 1), 2), ((7, 3, 3), 20), ((3, 13, 4, 4), 3), ((3, 16, 16), 2)])
def test_kernel_equals_a_loop(shape, iters, dtype, poisoned):
    pytest.importorskip('triton')
    from titans_pytorch.ops.sinkhorn import triton

    log_alpha = problem(*shape, dtype=dtype, device=DEVICE)
    expected = with_gradient(by_loop, log_alpha.double(), iters)
    came = with_gradient(triton.sinkhorn, log_alpha, iters, EPS)
    assert came[0].dtype == came[1].dtype == dtype
    assert_same(came, expected, {torch.float64: 1e-12, torch.float32: 5e-6}[dtype])


def test_what_is_not_a_number_shows():
    log_alpha = problem(2, 4, 4, device=DEVICE)
    log_alpha[0, 1, 2] = float('nan')
    for implementation in implementations():
        out = implementation(log_alpha, 2, EPS)
        assert out[0].isnan().all() and out[1].isfinite().all()


def test_one_operation_to_the_compiler():
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == 'call_function'])
        return graph

    log_alpha = problem(2, 3, 4, 4, device=DEVICE)
    twice = lambda x: sinkhorn(x * 2)  # noqa: E731
    torch.compile(twice, fullgraph=True, backend=backend)(log_alpha)
    assert len(graphs) == 1 and len(graphs[0]) <= 4  # the product, two conversions, and this
    compiled = torch.compile(twice, fullgraph=True, backend='aot_eager')
    assert_same(with_gradient(compiled, log_alpha), with_gradient(twice, log_alpha), 1e-7)


@pytest.mark.parametrize('iters', [3, 20])
def test_choosing_the_kernel(iters, kernels_everywhere):
    for size in (4, 17):
        log_alpha = problem(3, size, size, device=DEVICE)
        assert_same(with_gradient(sinkhorn, log_alpha, iters), with_gradient(by_loop, log_alpha.double(), iters), 5e-6)


def test_operations_keep_the_rules_of_pytorch():
    log_alpha, d_out = (problem(2, 3, 4, 4, device=DEVICE).detach().requires_grad_() for _ in range(2))
    checks = 'test_schema', 'test_autograd_registration', 'test_faketensor'
    operations = torch.ops.titans_pytorch
    torch.library.opcheck(operations.sinkhorn_loop.default, (log_alpha, 3, EPS), test_utils=checks)
    torch.library.opcheck(operations.sinkhorn_loop_backward.default, (d_out, log_alpha, 3, EPS), test_utils=checks)
    if len([*implementations()]) > 1:
        torch.library.opcheck(operations.sinkhorn.default, (log_alpha, 3, EPS), test_utils=checks)
        torch.library.opcheck(operations.sinkhorn_backward.default, ([d_out.detach()], [], log_alpha.detach(), 3, EPS))


def test_errors_say_what_came():
    with pytest.raises(ValueError, match=r'square matrices \(…, s, s\), got \(2, 3\)'):
        sinkhorn(torch.zeros(2, 3))
    with pytest.raises(TypeError, match='floating-point'):
        sinkhorn(torch.zeros(2, 2, dtype=torch.long))


def test_every_hyper_connection_of_a_transformer_uses_it():
    model = MemoryAsContextTransformer(num_tokens=8, dim=8, depth=2, segment_len=4, heads=1, dim_head=8)
    used = [part.residual_mix_constraint_fn for part in model.modules() if hasattr(part, 'residual_mix_constraint_fn')]
    assert len(used) == 6 and all(function is sinkhorn for function in used)


@pytest.mark.parametrize('size', [1, 2, 4])
def test_the_loop_in_log_space_gives_the_same_matrices(size):
    for scale in (0.1, 1.0, 5.0):
        log_alpha = torch.randn(7, size, size).double() * scale
        assert_same(reference.loop_in_log_space(log_alpha, 20, EPS), reference.loop(log_alpha, 20, EPS), 1e-12)
