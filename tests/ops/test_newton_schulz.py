"""`newton_schulz`, and its Triton kernel: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same

from titans_pytorch.ops import newton_schulz as operation
from titans_pytorch.ops.newton_schulz import QUINTIC, newton_schulz, reference

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter multiplies no bfloat16
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
# wide, tall, square; odd sizes; one matrix and several
SHAPES = [(3, 16, 32), (3, 32, 16), (1, 16, 16), (2, 24, 40), (2, 37, 5), (1, 1, 3), (5, 3, 2)]


@pytest.fixture
def kernel():
    pytest.importorskip('triton')
    from titans_pytorch.ops.newton_schulz import triton

    return triton.newton_schulz


def by_kernel(kernel, matrices, steps=5, eps=1e-7, operands=torch.float32):
    return kernel(matrices, steps, eps, *QUINTIC, operands)


def by_reference(matrices, steps=5, eps=1e-7):
    return reference.newton_schulz(matrices, steps, eps, QUINTIC)


def with_gradient(orthogonalised, matrices):
    out = orthogonalised(matrices)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).cos().view_as(out)
    return out, *torch.autograd.grad((out * weights).sum(), matrices)


def leaf(matrices, dtype=None):
    return matrices.detach().to(dtype or matrices.dtype).requires_grad_()


def test_singular_values_come_near_one():
    # of the quintic, not of this code: five steps take [0.05, 1] to about [0.7, 1.2]
    left, _ = torch.linalg.qr(torch.randn(2, 6, 6, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(2, 9, 6, dtype=torch.float64))
    matrices = left * torch.linspace(0.2, 1, 6) @ right.mT
    for out in (newton_schulz(matrices), newton_schulz(matrices.mT).mT):
        assert_same(torch.linalg.svdvals(out), torch.ones(2, 6), 0.35)
        assert_same(out @ right @ torch.linalg.inv(left.mT @ out @ right) @ left.mT @ out, out)


def test_any_number_of_axes_may_be_in_front():
    matrices = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    together = newton_schulz(matrices)
    assert_same(together, torch.stack([torch.stack([newton_schulz(m) for m in row]) for row in matrices]))


@pytest.mark.parametrize('shape', SHAPES)
def test_kernel_equals_the_reference(kernel, poisoned, shape):
    matrices = leaf(torch.randn(shape, device=DEVICE))
    came = with_gradient(lambda m: by_kernel(kernel, m), matrices)
    assert all(t.dtype == torch.float32 for t in came)
    assert_same(came, with_gradient(by_reference, leaf(matrices, torch.float64)), 1e-4)


@pytest.mark.parametrize('steps', [0, 1, 2])
def test_kernel_takes_few_steps(kernel, poisoned, steps):
    matrices = leaf(torch.randn(2, 5, 7, device=DEVICE))
    came = with_gradient(lambda m: by_kernel(kernel, m, steps), matrices)
    assert_same(came, with_gradient(lambda m: by_reference(m, steps), leaf(matrices, torch.float64)), 1e-5)


def test_kernel_on_zero_and_tiny_matrices(kernel, poisoned):
    # below `eps` the norm does not divide: nothing of the gradient is projected away
    scales = torch.tensor([1.0, 0.0, 1e-3, 1.0, 1e3], device=DEVICE)
    matrices = leaf(torch.randn(5, 4, 6, device=DEVICE) * scales[:, None, None])
    out, gradient = with_gradient(lambda m: by_kernel(kernel, m, eps=0.1), matrices)
    exact = with_gradient(lambda m: by_reference(m, eps=0.1), leaf(matrices, torch.float64))
    assert not out[1].any()
    for index, scale in enumerate(exact[1].abs().amax(dim=(1, 2))):
        assert_same(out[index], exact[0][index], 1e-4)
        assert_same(gradient[index] / scale, exact[1][index] / scale, 1e-4)


@pytest.mark.parametrize('view', [lambda m: m.mT, lambda m: m[:, ::2, 1:], lambda m: m[1].expand(3, 6, 8)])
def test_kernel_reads_views(kernel, poisoned, view):
    matrices = leaf(torch.randn(3, 6, 8, device=DEVICE))
    came = with_gradient(lambda m: by_kernel(kernel, view(m)), matrices)
    assert_same(came, with_gradient(lambda m: by_reference(view(m)), leaf(matrices, torch.float64)), 1e-4)


@pytest.mark.parametrize('dtype', [torch.float32, LOW])
@pytest.mark.parametrize('shape', [(2, 16, 24), (1, 20, 12)])
def test_kernel_is_as_exact_in_low_precision_as_the_reference(kernel, poisoned, shape, dtype):
    matrices = leaf(torch.randn(shape, device=DEVICE), dtype)
    exact = with_gradient(by_reference, leaf(matrices, torch.float64))
    came = with_gradient(lambda m: by_kernel(kernel, m, operands=LOW), matrices)
    with torch.autocast(DEVICE, LOW, enabled=dtype == torch.float32):
        plain = with_gradient(by_reference, matrices)
    for ours, theirs, want in zip(came, plain, exact):
        assert ours.dtype == dtype
        assert (ours - want).norm() <= 2 * (theirs - want).norm()


@pytest.mark.gpu
@pytest.mark.parametrize('operands', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(1500, 64, 128), (1500, 128, 64), (700, 40, 100), (3000, 16, 32), (64, 33, 33)])
def test_kernel_is_as_exact_as_the_reference_in_sizes_of_training(kernel, poisoned, shape, operands):
    matrices = leaf(torch.randn(shape, device='cuda'))
    exact = with_gradient(by_reference, leaf(matrices, torch.float64))
    came = with_gradient(lambda m: by_kernel(kernel, m, operands=operands), matrices)
    with torch.autocast('cuda', torch.bfloat16, enabled=operands == torch.bfloat16):
        plain = with_gradient(by_reference, matrices)
    for ours, theirs, want in zip(came, plain, exact):
        # of each matrix; products in full float32 may round in another order
        error, budget, size = [(t - want).flatten(1).norm(dim=1).max() for t in (ours, theirs, torch.zeros_like(want))]
        assert error <= max(2 * budget, 2e-5 * size)


@pytest.mark.gpu
@pytest.mark.parametrize('shape', [(300, 64, 256), (300, 128, 128), (300, 256, 64)])
def test_kernel_takes_larger_matrices_in_bfloat16(kernel, poisoned, shape):
    matrices = leaf(torch.randn(shape, device='cuda'))
    assert operation.supports(matrices, torch.bfloat16) and not operation.supports(matrices, torch.float32)
    exact = with_gradient(by_reference, leaf(matrices, torch.float64))
    came = with_gradient(lambda m: by_kernel(kernel, m, operands=torch.bfloat16), matrices)
    with torch.autocast('cuda', torch.bfloat16):
        plain = with_gradient(by_reference, matrices)
    for ours, theirs, want in zip(came, plain, exact):
        assert (ours - want).norm() <= 2 * (theirs - want).norm()


# which of the two is taken, eagerly and compiled


@pytest.fixture
def taken(kernels_everywhere, monkeypatch):
    """Kernels run on this device too; the sizes that the limits were checked for, and `None` for those beyond."""
    sizes, supports = [], operation.supports

    def supports_and_tells(matrices, operands):
        supported = supports(matrices, operands)
        sizes.append((*matrices.shape[-2:], operands) if supported else None)
        return supported

    monkeypatch.setattr(operation, 'supports', supports_and_tells)
    return sizes


def test_matrices_that_fit_take_the_kernel(taken):
    matrices = torch.randn(2, 1, 3, 6, 4, device=DEVICE)
    expected = by_reference(matrices.double())
    assert_same(newton_schulz(matrices), expected, 1e-4)
    for dtype in (torch.float32, LOW):
        with torch.autocast(DEVICE, LOW):
            out = newton_schulz(matrices.to(dtype))
        assert out.dtype == dtype
        assert_same(out, expected, 0.1)
    assert newton_schulz(matrices.to(LOW)).dtype == LOW
    assert taken == [(6, 4, torch.float32), *[(6, 4, LOW)] * 3]


def test_others_take_the_reference(taken):
    for shape in ((1, 4, 5000), (1, 130, 130), (0, 4, 4), (2, 0, 4)):
        assert newton_schulz(torch.randn(shape, device=DEVICE)).shape == shape
    assert taken == [None] * 4
    with torch.autocast(DEVICE, LOW):
        assert newton_schulz(torch.randn(2, 3, 4, device=DEVICE, dtype=torch.float64)).dtype == torch.float64
    assert len(taken) == 4


def test_the_kernel_is_one_node_of_a_compiled_graph(taken, fresh_compiler):
    def loss(matrices):
        return newton_schulz(matrices * 2).pow(3).sum()

    matrices = leaf(torch.randn(2, 3, 5, device=DEVICE))
    compiled = torch.compile(loss, fullgraph=True, backend='aot_eager')(matrices)
    expected = loss(leaf(matrices, torch.float64))
    (gradient,) = torch.autograd.grad(compiled, matrices)
    assert_same(compiled, expected, 1e-5)
    assert_same(gradient, torch.autograd.grad(loss(matrices), matrices)[0], 1e-5)
    assert taken


def test_the_operators_keep_the_rules_of_pytorch(kernel):
    matrices = leaf(torch.randn(2, 3, 5, device=DEVICE))
    settings = (2, 1e-7, *QUINTIC, torch.float32)
    rules = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')
    torch.library.opcheck(kernel, (matrices, *settings), test_utils=rules)
    gradient = torch.ops.titans_pytorch.newton_schulz_backward
    torch.library.opcheck(gradient, ([matrices.detach()], [], matrices.detach(), *settings))


def test_choosing_between_them_compiles_too(fresh_compiler):
    matrices = torch.randn(2, 1, 3, 5, dtype=torch.float64, device=DEVICE)
    compiled = torch.compile(newton_schulz, fullgraph=True, backend='aot_eager')
    for dtype in (torch.float64, torch.float32):
        assert_same(compiled(matrices.to(dtype)), by_reference(matrices), 1e-5)
