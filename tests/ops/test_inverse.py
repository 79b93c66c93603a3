"""Inverses of small matrices: the definition, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same, learned

from titans_pytorch.ops.inverse import inverse, reference

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


def problem(*shape, largest=10.0, dtype=torch.float32):
    """I + diag(c) X Xᵀ with rows of length 1, of which the first two are equal, and c from 0 to `largest`."""
    *_, m = shape
    generator = torch.Generator().manual_seed(m)
    rows = torch.nn.functional.normalize(torch.randn(*shape, 8, generator=generator, dtype=torch.float64), dim=-1)
    rows[..., 1:2, :] = rows[..., :1, :]
    curvatures = largest * torch.rand(*shape, 1, generator=generator, dtype=torch.float64)
    curvatures[..., -1:, :] = 0
    return (torch.eye(m, dtype=torch.float64) + curvatures * (rows @ rows.mT)).to(DEVICE, dtype)


@pytest.fixture
def kernels(kernels_everywhere):
    from titans_pytorch.ops.inverse import triton as kernels

    return kernels


@pytest.mark.parametrize('m', [1, 2, 7, 64])
def test_definition(m):
    matrices = problem(3, m, dtype=torch.float64)
    identity = torch.eye(m, dtype=torch.float64, device=DEVICE).expand_as(matrices)
    assert_same(inverse(matrices) @ matrices, identity, 1e-12)


@pytest.mark.parametrize('shape', [(3, 1), (2, 3, 2), (2, 7), (3, 16), (1, 33), (2, 64)])
def test_the_kernel_equals_the_reference(kernels, poisoned, shape):
    matrices = problem(*shape)
    assert_same(learned(inverse, matrices), learned(reference.inverse, matrices.double()), 2e-5)


def test_large_curvature(kernels, poisoned):
    matrices = problem(2, 16, largest=1e4)
    # applied to diag(c) X Xᵀ, as in a proximal step; the inverse alone is less exact, as two rows are equal
    step = matrices.double() - torch.eye(16, device=DEVICE)
    assert_same(inverse(matrices).double() @ step, reference.inverse(matrices.double()) @ step, 5e-3)


@pytest.mark.parametrize('m', [32, 64])
def test_repeated_rows(kernels, poisoned, m):
    """Rows that occur four times each, as of text, with large curvature."""
    generator = torch.Generator().manual_seed(m)
    rows = torch.nn.functional.normalize(torch.randn(2, m // 4, 64, generator=generator, dtype=torch.float64), dim=-1)
    rows = rows.repeat(1, 4, 1)
    step = 1e4 * torch.rand(2, m, 1, generator=generator, dtype=torch.float64) * (rows @ rows.mT)
    matrices = (torch.eye(m, dtype=torch.float64) + step).to(DEVICE)
    values = torch.randn(2, m, 32, generator=generator, dtype=torch.float64).to(DEVICE)

    def error(inverses):
        expected = torch.linalg.solve(matrices, values)
        return (inverses.double() @ values - expected).norm() / expected.norm()

    assert error(inverse(matrices.float())) < 2 * error(reference.inverse(matrices.float()))


def test_the_kernel_reads_views(kernels, poisoned):
    matrices = problem(3, 6).mT
    assert not matrices.is_contiguous()
    assert_same(learned(inverse, matrices), learned(reference.inverse, matrices.double()), 2e-5)


def test_other_inputs_take_the_reference(kernels, monkeypatch):
    monkeypatch.setattr(kernels, 'inverse', None)
    for matrices in (problem(2, 65), problem(2, 5, dtype=torch.float64), problem(0, 5)):
        assert_same(inverse(matrices), reference.inverse(matrices), 0.0)


def test_the_operation_is_registered_correctly(kernels):
    torch.library.opcheck(kernels.inverse, (problem(2, 5).requires_grad_(),), test_utils=CHECKS)


@pytest.mark.gpu
def test_the_kernel_in_sizes_of_training(kernels, poisoned):
    for m in (2, 7, 16, 33, 64):
        matrices = problem(2048, m)
        assert_same(learned(inverse, matrices), learned(reference.inverse, matrices.double()), 1e-4)
