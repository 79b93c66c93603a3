"""Final state: the reference against the equation, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from compare import assert_no_worse, assert_same

from titans_pytorch.ops import final_state as operation
from titans_pytorch.ops.final_state import final_state

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter multiplies no bfloat16
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
# products in float32 of three TF32 ones keep a little less
EXACT = 5e-6 if DEVICE == 'cpu' else 2e-5
# heads, chunks, rows of a chunk, features of inputs and of deltas, states
SHAPES = [
    (2, 4, 4, 16, 32, 1),
    (2, 3, 3, 40, 16, 2),
    (1, 5, 1, 20, 100, 2),
    (1, 13, 3, 130, 20, 3),
    (2, 2, 40, 20, 20, 4),
]
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


@pytest.fixture
def launches(launches_of):
    return launches_of(operation)


def problem(heads, chunks, rows, dim, width, states):
    """The arguments of `final_state` by name, with each initial state by itself."""
    tensors = {
        'coefficients': torch.randn(heads, states, chunks),
        'initial_coefficients': torch.randn(heads, states, states),
        'inputs': torch.randn(heads, chunks, rows, dim),
        'deltas': torch.randn(heads, chunks, rows, width),
    }
    tensors |= {f'initial {index}': torch.randn(heads, dim, width) for index in range(states)}
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def structured(initial_coefficients):
    """Without the weights in any momentum, and without a momentum in one of an earlier order."""
    states = initial_coefficients.shape[-1]
    read = torch.ones(states, states, device=DEVICE).tril()
    read[0], read[1:, 0] = 1, 0
    return initial_coefficients * read.to(initial_coefficients.dtype)


def arguments(tensors):
    initial_states = [t for name, t in tensors.items() if name.startswith('initial ')]
    coefficients = tensors['coefficients'], structured(tensors['initial_coefficients'])
    return *coefficients, initial_states, tensors['inputs'], tensors['deltas']


def ours(tensors):
    return final_state(*arguments(tensors))


def by_equation(tensors):
    coefficients, initial_coefficients, initial_states, inputs, deltas = arguments(tensors)
    states = torch.einsum('bkc, bcmd, bcme -> bkde', coefficients, inputs, deltas)
    states = states + torch.einsum('bkj, bjde -> bkde', initial_coefficients, torch.stack(initial_states, dim=1))
    return [*states.unbind(1)]


def leaves(tensors, dtype=None):
    return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}


def learned(function, tensors):
    """The states, and the gradient of a linear function of them by every tensor."""
    states, generator = function(tensors), torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device) for t in states]
    total = sum((t.double() * weight).sum() for t, weight in zip(states, weights))
    gradients = dict(zip(tensors, torch.autograd.grad(total, [*tensors.values()])))
    return {str(index): t.detach() for index, t in enumerate(states)}, gradients


def exactly(tensors):
    return learned(by_equation, leaves(tensors, torch.float64))


@pytest.mark.parametrize('states', [1, 2, 4])
@pytest.mark.parametrize(('dim', 'width'), [(5, 7), (7, 5)])
def test_the_reference_is_the_equation(states, dim, width):
    tensors = problem(3, 4, 2, dim, width, states)
    assert_same(learned(ours, leaves(tensors, torch.float64)), exactly(tensors), 1e-13)


@pytest.mark.parametrize('shape', SHAPES)
def test_kernels_equal_the_equation(launches, poisoned, shape):
    tensors = problem(*shape)
    assert_same(learned(ours, leaves(tensors)), exactly(tensors), EXACT)
    assert len(launches) == 1


def test_kernels_read_views(launches, poisoned):
    tensors = problem(2, 9, 4, 16, 24, 2)
    cut = {name: tensors[name][:, 2:7, :-1] for name in ('inputs', 'deltas')}
    cut |= {'coefficients': tensors['coefficients'][:, :, 2:7], 'initial_coefficients': tensors['initial_coefficients']}
    cut |= {'initial 0': tensors['initial 0'][:1].expand(2, -1, -1)}
    cut |= {'initial 1': tensors['initial 1'].mT.contiguous().mT}
    came = learned(ours, {name: t.requires_grad_() for name, t in cut.items()})
    assert_same(came, exactly(cut), EXACT)
    assert len(launches) == 1


def learned_in(low, tensors):
    with torch.autocast(DEVICE, low, enabled=low is not None):
        return learned(ours, leaves(tensors))


def test_kernels_are_as_exact_under_autocast_as_the_reference(launches, poisoned):
    tensors = problem(4, 8, 4, 16, 64, 2)
    tensors = {name: t.to(LOW) if name in ('inputs', 'deltas') else t for name, t in tensors.items()}
    assert_no_worse(lambda: learned_in(LOW, tensors), exactly(tensors), floor=1e-6)
    assert len(launches) == 1


def test_inputs_that_the_kernels_do_not_support(launches):
    learned(ours, leaves(problem(1, 2, 2, 4, 4, 5)))
    learned(ours, leaves(problem(1, 1, 1, 136, 136, 1)))
    learned(ours, leaves(problem(1, 2, 2, 4, 4, 2), torch.float64))
    assert not launches


def test_the_operation_is_registered_correctly(kernels_everywhere):
    from titans_pytorch.ops.final_state import triton as kernels

    args = (*arguments(leaves(problem(2, 3, 2, 16, 20, 2))), torch.float32)
    torch.library.opcheck(kernels.final_state, args, test_utils=CHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize('precision', ['highest', 'high', 'bfloat16'])
@pytest.mark.parametrize(
    'shape', [(64, 32, 4, 64, 256, 2), (16, 32, 4, 256, 64, 2), (8, 5, 3, 100, 250, 3), (4, 8, 64, 512, 128, 1)]
)
def test_kernels_in_sizes_of_training(launches, poisoned, shape, precision):
    tensors = problem(*shape)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest' if precision == 'bfloat16' else precision)
    try:
        low = torch.bfloat16 if precision == 'bfloat16' else None
        assert_no_worse(lambda: learned_in(low, tensors), exactly(tensors), floor=1e-5)
        assert len(launches) == 1
    finally:
        torch.set_float32_matmul_precision(before)
