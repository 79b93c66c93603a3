"""`hyper_connection`: its reference and its Triton kernels, forward and backward."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same

from titans_pytorch.ops.hyper_connection import ITERATIONS, MOST_STREAMS, hyper_connection, reference
from titans_pytorch.ops.sinkhorn import EPS
from titans_pytorch.ops.sinkhorn import reference as sinkhorn_reference

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
SETTINGS = (ITERATIONS, EPS)
CHECKS = ('test_schema', 'test_faketensor', 'test_autograd_registration')


@pytest.fixture
def kernel():
    pytest.importorskip('triton')
    from titans_pytorch.ops.hyper_connection import triton

    return triton


@pytest.fixture
def exact(monkeypatch):
    """The reference, all of it in the precision of its arguments: Sinkhorn's iteration too."""
    by_loop = lambda log_alpha, iters: sinkhorn_reference.loop(log_alpha, iters, EPS)  # noqa: E731
    monkeypatch.setattr(reference, 'sinkhorn', by_loop)
    return lambda x, weights: reference.hyper_connection(x, weights, *SETTINGS)


def random_weights(streams, dim, adds=True):
    shapes = [(dim,), (streams, streams + 1), (1, dim, streams + 1), (1,), (1,)]
    shapes += [(streams,), (dim,), (1,)] * adds
    return [torch.randn(shape, device=DEVICE) * (0.1 if dim in shape else 0.5) for shape in shapes]


def with_gradients(function, x, weights, d_results):
    leaves = [t.detach().requires_grad_() for t in (*x, *weights)]
    results = function(leaves[: len(x)], leaves[len(x) :])
    used = [(t, d.to(t.dtype)) for t, d in zip(results, d_results) if t.numel()]
    gradients = torch.autograd.grad([t for t, _ in used], leaves, [d for _, d in used], allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients)]
    return results, zeros[: len(x)], zeros[len(x) :]


@pytest.mark.parametrize('pending', [False, True])
@pytest.mark.parametrize('adds', [False, True])
def test_gradients_of_the_reference_are_those_of_small_differences(adds, pending, exact):
    weights = [t.double() for t in random_weights(2, 3, adds)]
    x = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in ((4, 2, 3), (4, 2, 1), (2, 2, 3))]
    x = x if pending else x[:1]

    def results(*tensors):
        return tuple(t for t in exact([*tensors[: len(x)]], [*tensors[len(x) :]]) if t.numel())

    torch.autograd.gradcheck(results, tuple(t.requires_grad_() for t in (*x, *weights)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ('batch', 'tokens', 'streams', 'dim', 'pending', 'adds'),
    [(3, 3, 4, 36, True, True), (2, 4, 3, 7, True, True), (2, 3, 4, 130, False, True), (1, 3, 8, 5, True, True),
     (2, 3, 2, 33, True, True), (2, 3, 5, 130, True, False), (1, 7, 2, 33, False, False)],
)  # fmt: skip
def test_kernels_equal_the_reference(
    batch, tokens, streams, dim, pending, adds, dtype, kernel, exact, poisoned, monkeypatch
):
    weights = random_weights(streams, dim, adds)
    # of none are the positions dense; of the gates and the branch's output not even the features are
    x = [torch.randn(tokens, batch * streams, dim + 1, device=DEVICE).to(dtype).transpose(0, 1)[..., :dim]]
    if pending:
        x += [torch.rand(batch * streams, 2, tokens, device=DEVICE).mT[..., 1:]]
        x += [torch.randn(dim, tokens, batch, device=DEVICE).permute(2, 1, 0)]
    full_x, full_weights = [t.double() for t in x], [t.double() for t in weights]
    d_results = [torch.randn(t.shape, device=DEVICE).to(dtype) for t in exact(full_x, full_weights)]
    expected = with_gradients(exact, full_x, full_weights, d_results)

    # one position for each warp, and several; one group for each program, and several
    for positions, warps, programs in [(2, 2, 99), (4, 2, 2)]:
        for name in ('FORWARD', 'BACKWARD_PRODUCTS'):
            monkeypatch.setattr(kernel, name, kernel.Programs(positions, warps))
        for name in ('BACKWARD_GATES', 'BACKWARD_ROWS'):
            monkeypatch.setattr(kernel, name, kernel.Programs(positions, warps, programs))
        came = with_gradients(
            lambda x, weights: kernel.hyper_connection(x, weights, *SETTINGS)[:3], x, weights, d_results
        )
        assert [t.dtype for t in came[0]] == [dtype, dtype, torch.float32]
        assert [t.dtype for t in came[1]] == [t.dtype for t in x] and all(t.is_contiguous() for t in came[0])
        assert_same(came, expected, 1e-5 if dtype == torch.float32 else 8e-3)


def test_positions_of_zeros_and_what_is_not_a_number(kernel):
    weights = random_weights(4, 20)
    x = torch.randn(4, 3, 20, device=DEVICE)
    x[1, 0] = 0
    x[:, 1] = 0
    d_results = [torch.randn(t, device=DEVICE) for t in ((1, 3, 20), (4, 3, 20), (4, 3, 1))]

    def by(function):
        return with_gradients(lambda x, weights: function(x, weights, *SETTINGS)[:3], [x], weights, d_results)

    came, (d_x,), d_weights = by(kernel.hyper_connection)
    expected, (d_expected,), d_weights_expected = by(reference.hyper_connection)
    # along streams of zeros a gradient is that of a division by 1e-12
    assert ((d_x - d_expected).abs() <= 1e-4 * d_expected.abs().amax(dim=-1, keepdim=True).clamp(min=1)).all()
    assert_same([came, d_weights], [expected, d_weights_expected], 1e-4)

    x[2, 1, 3] = float('nan')
    (branch_in, mixed, write), (d_x,), _ = by(kernel.hyper_connection)
    assert branch_in[:, 1].isnan().any() and mixed[:, 1].isnan().any() and write[2, 1].isnan().all()
    assert all(t[:, ::2].isfinite().all() for t in (branch_in, mixed, write, d_x))


def test_choosing_the_kernel(kernel, kernels_everywhere, monkeypatch):
    monkeypatch.setattr(reference, 'hyper_connection', None)
    weights, x = random_weights(4, 8), torch.randn(2 * 4, 3, 8, device=DEVICE)
    hyper_connection([x], weights)
    many = MOST_STREAMS + 1
    for refused in (
        ([x.double()], [t.double() for t in weights]),
        ([torch.randn(many, 3, 8, device=DEVICE)], random_weights(many, 8)),
    ):
        with pytest.raises(TypeError, match='not callable'):
            hyper_connection(*refused)


@pytest.mark.parametrize('adds', [True, False])
def test_the_operation_keeps_the_rules_of_pytorch(adds, kernel):
    weights = [t.requires_grad_() for t in random_weights(4, 6, adds)]
    x, write, branch_out = torch.randn(8, 3, 6), torch.rand(8, 3, 1), torch.randn(2, 3, 6)
    pending = [t.to(DEVICE).requires_grad_() for t in (x, write, branch_out)]
    for inputs in (pending[:1], pending):
        torch.library.opcheck(kernel.hyper_connection, (inputs, weights, *SETTINGS), test_utils=CHECKS)
