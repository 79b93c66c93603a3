"""Products of gates: the definition, and the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, learned

from titans_pytorch.ops.gate_products import gate_products, reference

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


def problem(*shape, dtype=torch.float32):
    return F.logsigmoid(torch.randn(*shape, dtype=dtype) * 3).to(DEVICE)


@pytest.fixture
def kernels(kernels_everywhere):
    from titans_pytorch.ops.gate_products import triton as kernels

    return kernels


def test_definition():
    log_gates = problem(2, 6, dtype=torch.float64)
    out = gate_products(log_gates)
    for c in range(6):
        for j in range(6):
            product = log_gates[:, j + 1 : c + 1].exp().prod(dim=-1) if j <= c else torch.zeros(2, device=DEVICE)
            assert_same(out[:, c, j], product.double(), 1e-14)


def test_one_step_has_no_gates_between():
    out = gate_products(problem(3, 1).requires_grad_())
    assert_same(out, torch.ones(3, 1, 1, device=DEVICE), 0.0)
    assert not out.requires_grad


@pytest.mark.parametrize('shape', [(3, 2), (2, 3, 7), (1, 32), (5, 33), (2, 128)])
def test_kernels_equal_the_reference(kernels, poisoned, shape):
    log_gates = problem(*shape)
    expected = learned(reference.gate_products, log_gates.double())
    assert_same(learned(gate_products, log_gates), expected, 2e-6)


def test_kernels_read_views(kernels, poisoned):
    log_gates = problem(7, 5, 3).transpose(0, 1)[..., 1]
    assert not log_gates.is_contiguous()
    assert_same(learned(gate_products, log_gates), learned(reference.gate_products, log_gates.double()), 2e-6)


def test_closed_gates(kernels, poisoned):
    log_gates = problem(2, 9)
    log_gates[:, 4] = -1e4
    out, (gradient,) = learned(gate_products, log_gates)
    assert_same((out, (gradient,)), learned(reference.gate_products, log_gates.double()), 2e-6)
    assert out[:, 4:, :4].abs().max() == 0


def test_other_inputs_take_the_reference(kernels, monkeypatch):
    monkeypatch.setattr(kernels, 'gate_products', None)
    for log_gates in (problem(2, 129), problem(2, 5, dtype=torch.float64), problem(0, 5), problem(3, 0)):
        assert_same(gate_products(log_gates), reference.gate_products(log_gates), 0.0)


def test_the_operation_is_registered_correctly(kernels):
    torch.library.opcheck(kernels.gate_products, (problem(2, 5).requires_grad_(),), test_utils=CHECKS)


@pytest.mark.gpu
def test_kernels_in_sizes_of_training(kernels, poisoned):
    log_gates = problem(2048, 64)
    assert_same(learned(gate_products, log_gates), learned(reference.gate_products, log_gates.double()), 1e-5)
