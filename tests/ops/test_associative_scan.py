"""`AssocScan`, and its Triton kernel: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same

from titans_pytorch.ops.associative_scan import AssocScan, reference

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
SHAPES = [(1, 1, 1), (2, 7, 5), (3, 33, 256), (2, 16, 300), (1, 130, 3)]


def by_loop(gates, inputs, prev):
    """The definition; the first state is `prev`."""
    states, state = [prev], prev
    for step in range(inputs.shape[1]):
        state = gates[:, step] * state + inputs[:, step]
        states.append(state)
    return torch.stack(states, dim=1)


def problem(batch, steps, features, gate_features, dtype=torch.float64, device='cpu'):
    gates = torch.rand(batch, steps, gate_features, dtype=dtype, device=device, requires_grad=True)
    inputs = torch.randn(batch, steps, features, dtype=dtype, device=device, requires_grad=True)
    prev = torch.randn(batch, features, dtype=dtype, device=device, requires_grad=True)
    return gates, inputs, prev


def with_gradients(scan, *arguments):
    out = scan(*arguments)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return out, torch.autograd.grad((out * weights).sum(), arguments)


@pytest.mark.parametrize('shape', SHAPES)
def test_plain_scan_equals_a_loop(shape):
    gates, inputs, prev = problem(*shape, 1)
    scan = AssocScan()
    came = with_gradients(lambda g, x, p: scan(g, x, prev=p, remove_prev=False), gates, inputs, prev)
    assert_same(came, with_gradients(by_loop, gates, inputs, prev))
    assert_same(scan(gates, inputs, prev=prev), came[0][:, 1:])
    assert_same(scan(gates, inputs), by_loop(gates, inputs, torch.zeros_like(prev))[:, 1:])


def test_accelerated_scan_says_where_there_is_no_gpu():
    gates, inputs, prev = problem(2, 7, 5, 1)
    with pytest.warns(UserWarning, match='needs a CUDA device'):
        out = AssocScan(use_accelerated=True)(gates, inputs, prev=prev)
    assert_same(out, AssocScan()(gates, inputs, prev=prev), 0.0)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('gate_of_each_feature', [False, True])
def test_kernel_equals_a_loop(shape, dtype, gate_of_each_feature, poisoned):
    pytest.importorskip('triton')
    from titans_pytorch.ops.associative_scan.triton import associative_scan

    gate_features = shape[2] if gate_of_each_feature else 1
    arguments = [t.detach().to(dtype).requires_grad_() for t in problem(*shape, gate_features, device=DEVICE)]
    exact = [t.detach().double().requires_grad_() for t in arguments]

    came = with_gradients(associative_scan, *arguments)
    assert all(t.dtype == dtype for t in (came[0], *came[1]))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert_same(came, with_gradients(by_loop, *exact), tolerance)


@pytest.mark.parametrize('gate_features', [1, 5])
def test_kernel_keeps_the_rules_of_pytorch(gate_features):
    pytest.importorskip('triton')
    from titans_pytorch.ops.associative_scan.triton import associative_scan

    arguments = problem(2, 7, 5, gate_features, torch.float32, DEVICE)
    checks = 'test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic'
    torch.library.opcheck(associative_scan, arguments, test_utils=checks)


@pytest.mark.filterwarnings('ignore:use_accelerated_scan=True')
def test_choosing_the_kernel(kernels_everywhere, monkeypatch):
    gates, inputs, prev = problem(2, 7, 5, 1, torch.float32, DEVICE)
    calls = {'none': {}, 'prev': {'prev': prev}, 'prev kept': {'prev': prev, 'remove_prev': False}}
    expected = {name: AssocScan()(gates, inputs, **kwargs) for name, kwargs in calls.items()}
    monkeypatch.setattr(reference.AssocScan, 'forward', None)
    for name, kwargs in calls.items():
        assert_same(AssocScan(use_accelerated=True)(gates, inputs, **kwargs), expected[name], 1e-5)


@pytest.mark.filterwarnings('ignore:use_accelerated_scan=True')
def test_what_the_plain_scan_broadcasts_or_promotes_is_left_to_it(kernels_everywhere):
    inputs, prev = torch.randn(2, 7, 3, 5, device=DEVICE), torch.randn(2, 3, 5, device=DEVICE)
    one = torch.rand(1, 7, 1, device=DEVICE)
    cases = [(one, inputs, prev), (one[..., 0], inputs, prev), (one[:, :, None].double(), inputs, prev)]
    cases += [(torch.rand(2, 7, 1, device=DEVICE), inputs, p) for p in (prev.double(), None)]
    for gates, x, start in cases:
        came, expected = (AssocScan(use_accelerated=use)(gates, x, prev=start) for use in (True, False))
        assert came.dtype == expected.dtype
        assert_same(came, expected, 1e-6)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    steps, features = 17, 2**27
    inputs = torch.zeros(1, steps, features, dtype=torch.bfloat16, device='cuda')
    ends = torch.cat((torch.arange(4), torch.arange(features - 4, features))).cuda()
    inputs[:, :, ends] = torch.randn(1, steps, 8, device='cuda').bfloat16()
    gates = torch.rand(1, steps, 1, device='cuda').bfloat16()
    prev = torch.zeros(1, features, dtype=torch.bfloat16, device='cuda')

    def last_of(scan, gates, inputs, prev, own):
        given = [t.detach().requires_grad_() for t in (gates, inputs, prev)]
        out = scan(*given)
        out[:, -1, own].sum().backward()
        return out.detach()[:, :, own], given[0].grad, given[1].grad[:, :, own]

    came = last_of(AssocScan(use_accelerated=True), gates, inputs, prev, ends)
    exact = last_of(AssocScan(), gates.double(), inputs[:, :, ends].double(), prev[:, ends].double(), torch.arange(8))
    assert_same(came, exact, 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize('inputs_shape', [(2, 7, 5), (2, 7, 4, 6), (2, 1, 3), (70000, 2, 3), (1, 3, 70000)])
@pytest.mark.parametrize('gates_like_inputs', [False, True])
def test_accelerated_takes_every_shape(inputs_shape, gates_like_inputs):
    inputs = torch.randn(inputs_shape, device='cuda')
    gates = torch.rand(inputs_shape if gates_like_inputs else (*inputs_shape[:2], 1), device='cuda')
    prev = torch.randn(inputs_shape[0], *inputs_shape[2:], device='cuda')
    for kwargs in ({}, {'prev': prev}, {'prev': prev, 'remove_prev': False}):
        came = AssocScan(use_accelerated=True)(gates, inputs, **kwargs)
        assert_same(came, AssocScan()(gates, inputs, **kwargs), 1e-4)
