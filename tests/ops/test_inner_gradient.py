"""Inner gradient: the reference against autograd of a forward pass, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_no_worse, assert_same

from titans_pytorch.ops import inner_gradient as operation
from titans_pytorch.ops.inner_gradient import InnerGradient, PreviousWeights, inner_gradient
from titans_pytorch.ops.norms import standardise

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter multiplies no bfloat16
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
# products in float32 of three TF32 ones keep a little less
EXACT = 5e-6 if DEVICE == 'cpu' else 2e-5
EPS = 1e-5
# heads, chunks, rows of a chunk, width, hidden width
SHAPES = [(2, 4, 4, 16, 32), (2, 5, 1, 16, 64), (1, 3, 3, 20, 50), (1, 2, 20, 40, 80), (1, 5, 2, 128, 140)]
# a chunk of one row and of several, odd widths, chunks in parts, matrices that are not kept on chip
RESIDUAL_SHAPES = [(2, 3, 4, 16, 32), (2, 3, 1, 20, 37), (1, 1, 17, 20, 37), (1, 3, 40, 16, 24), (1, 2, 4, 100, 140)]
NETWORKS = [(depth, norm) for depth in (1, 2) for norm in (True, False)]
MATRICES = ('first', 'middle', 'last')
WEIGHTS = (*MATRICES, 'gamma')
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


@pytest.fixture
def launches(launches_of):
    return launches_of(operation)


def problem(heads, chunks, rows, dim, width, depth=2, norm=True, residual=False):
    """The arguments of `inner_gradient` by name, without absent ones."""
    shapes = {'first': (dim, width), 'middle': (width, width), 'last': (width, dim)}
    if depth < 3:
        del shapes['middle']
    if depth < 2:
        shapes = {'last': (dim, dim)}
    shapes |= {'gamma': (dim,)} if norm else {}
    scales = {name: shape[0] ** -0.5 if len(shape) > 1 else 0.3 for name, shape in shapes.items()}
    tensors = {
        'keys': torch.randn(heads, chunks, rows, dim),
        'values': torch.randn(heads, chunks, rows, dim),
        'step_sizes': torch.rand(heads, chunks, rows),
    }
    tensors |= {name: torch.randn(heads, *shape) * scales[name] for name, shape in shapes.items()}
    if residual:
        tensors['shares'] = torch.rand(heads, chunks)
        for name, shape in shapes.items():
            tensors[f'residual {name}'] = torch.randn(heads, chunks, *shape) * scales[name]
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def leaves(tensors, dtype=None):
    return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}


def matrices_of(tensors, prefix=''):
    return [tensors[prefix + name] for name in MATRICES if prefix + name in tensors]


def ours(tensors):
    rows = (tensors[name] for name in ('keys', 'values', 'step_sizes'))
    residual = None
    if 'shares' in tensors:
        others = matrices_of(tensors, 'residual '), tensors.get('residual gamma')
        residual = PreviousWeights(tensors['shares'], *others)
    return by_name(inner_gradient(*rows, matrices_of(tensors), tensors.get('gamma'), EPS, residual))


def by_name(out):
    """The tensors by name, without the keys, which are the inputs of the first matrix."""
    named = {name: t for name, t in out._asdict().items() if isinstance(t, torch.Tensor)}
    named |= {f'inputs {index}': t for index, t in enumerate(out.inputs) if index > 0}
    return named | {f'deltas {index}': t for index, t in enumerate(out.deltas)}


def by_autograd(tensors):
    """The same by autograd, which then differentiates its own gradient."""
    keys, chunks = tensors['keys'], tensors['keys'].shape[1]
    weights = {name: tensors[name] for name in WEIGHTS if name in tensors}
    weights = {name: w.unsqueeze(1).expand(-1, chunks, *w.shape[1:]) for name, w in weights.items()}
    if 'shares' in tensors:
        for name, w in weights.items():
            other = tensors[f'residual {name}']
            weights[name] = w + tensors['shares'].reshape(*w.shape[:2], *(1,) * (w.ndim - 2)) * other
    inputs, products = [], []
    for matrix in matrices_of(weights):
        inputs.append(F.gelu(products[-1]) if products else keys)
        products.append(inputs[-1] @ matrix)
    prediction = products[-1]
    if 'gamma' in weights:
        prediction = standardise(prediction, EPS)[0] * (weights['gamma'].unsqueeze(2) + 1) + keys
        products.append(weights['gamma'])
    losses = (prediction - tensors['values']).square().mean(dim=-1)
    total = -(losses * tensors['step_sizes']).sum()
    deltas = [*torch.autograd.grad(total, products, create_graph=True)]
    negative_gamma_gradient = deltas.pop() if 'gamma' in weights else None
    return by_name(InnerGradient(inputs, deltas, negative_gamma_gradient, losses))


def learned(function, tensors, used=''):
    """The fields of `function`, and the gradient of a linear function of those whose names begin with `used`."""
    generator = torch.Generator().manual_seed(1)
    out = function(tensors)
    weights = {name: torch.randn(t.shape, generator=generator, dtype=torch.float64) for name, t in out.items()}
    total = sum((t.double() * weights[name].to(t.device)).sum() for name, t in out.items() if name.startswith(used))
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    came = torch.autograd.grad(total, [*wanted.values()], materialize_grads=True)
    return {name: t.detach() for name, t in out.items()}, dict(zip(wanted, came))


def exactly(tensors, *args):
    return learned(ours, leaves(tensors, torch.float64), *args)


# the reference


@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize(('depth', 'norm'), [*NETWORKS, (3, True), (3, False)])
def test_the_reference_is_the_gradient_of_the_forward(depth, norm, residual):
    tensors = leaves(problem(3, 4, 5, 6, 15, depth, norm, residual), torch.float64)
    assert_same(learned(ours, tensors), learned(by_autograd, tensors), 1e-13)


@pytest.mark.parametrize('residual', [False, True])
def test_the_reference_can_be_differentiated_twice(residual):
    names, values = zip(*leaves(problem(1, 2, 2, 3, 4, residual=residual), torch.float64).items())

    def outputs(*own):
        return tuple(ours(dict(zip(names, own))).values())

    torch.autograd.gradcheck(outputs, values)
    torch.autograd.gradgradcheck(outputs, values, check_fwd_over_rev=True)


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
def test_the_reference_under_transforms(depth, norm):
    tensors = problem(3, 2, 2, 4, 6, depth, norm)
    tensors = {name: t.double() for name, t in tensors.items()}

    def total(tensors):
        return sum(t.sin().sum() for t in ours(tensors).values())

    expected = torch.autograd.grad(total(leafed := leaves(tensors)), [*leafed.values()])
    assert_same([*torch.func.grad(total)(tensors).values()], expected, 1e-12)

    def of_head(own):
        return [t.squeeze(0) for t in ours({name: t.unsqueeze(0) for name, t in own.items()}).values()]

    assert_same(torch.func.vmap(of_head)(tensors), [*ours(tensors).values()], 1e-12)
    _, tangent = torch.func.jvp(total, (tensors,), (tensors,))
    assert_same(tangent, sum((g * t).sum() for g, t in zip(expected, tensors.values())), 1e-12)


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
def test_precision_under_autocast(depth, norm):
    tensors = problem(2, 3, 4, 16, 32, depth, norm)
    with torch.autocast(DEVICE, torch.bfloat16):
        came = ours(tensors)
    low = {name for name, t in came.items() if t.dtype == torch.bfloat16}
    assert low == {name for name in came if name.startswith(('inputs', 'deltas'))}
    assert_same(came, ours(tensors), 0.05)


# kernels


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
def test_kernels_equal_the_reference(launches, poisoned, depth, norm, shape):
    tensors = problem(*shape, depth, norm)
    came = learned(ours, leaves(tensors))
    assert len(launches) == 1
    assert_same(came, exactly(tensors), EXACT)
    assert len(launches) == 1
    assert all(t.dtype == torch.float32 for own in came for t in own.values())


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
def test_programs_of_more_rows(launches, poisoned, depth, norm, monkeypatch):
    from titans_pytorch.ops import _triton

    monkeypatch.setattr(_triton, 'ENOUGH_PROGRAMS', 1)
    for chunks, rows in ((9, 3), (2, 40)):
        tensors = problem(1, chunks, rows, 16, 32, depth, norm)
        assert_same(learned(ours, leaves(tensors)), exactly(tensors), EXACT)


def test_kernels_read_views(launches, poisoned):
    # chunks out of a longer sequence, keys without the last row and values without the first, weights of all heads
    longer = problem(2, 9, 4, 16, 32)
    cut = {
        'keys': longer['keys'][:, 2:7, :-1],
        'values': longer['values'][:, 2:7, 1:],
        'step_sizes': longer['step_sizes'][:, 2:7, :-1],
        **{name: longer[name][:1].expand(longer[name].shape) for name in ('first', 'last', 'gamma')},
    }
    came = learned(ours, {name: t.requires_grad_() for name, t in cut.items()})
    assert not any(t.is_contiguous() for t in cut.values()) and len(launches) == 1
    assert_same(came, exactly(cut), EXACT)


@pytest.mark.parametrize('used', ['inputs', 'deltas 0', 'deltas 1', 'negative_gamma_gradient', 'losses'])
def test_only_one_output_is_used(launches, poisoned, used):
    tensors = problem(1, 3, 2, 16, 20)
    assert_same(learned(ours, leaves(tensors), used), exactly(tensors, used), EXACT)


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
@pytest.mark.parametrize('dtype', [torch.float32, LOW])
def test_kernels_are_as_exact_under_autocast_as_the_reference(launches, poisoned, depth, norm, dtype):
    tensors = lowered(problem(4, 8, 4, 16, 64, depth, norm), dtype)
    assert_no_worse(lambda: learned_in(LOW, tensors), exactly(tensors))
    assert len(launches) == 1


def lowered(tensors, dtype):
    """As a memory under autocast gives them: rows, shares and residual weights in its precision."""
    low = ('keys', 'values', 'shares')
    return {name: t.to(dtype) if name in low or 'residual' in name else t for name, t in tensors.items()}


def learned_in(low, tensors):
    with torch.autocast(DEVICE, low, enabled=low is not None):
        return learned(ours, leaves(tensors))


# and at weights of its own for each chunk


@pytest.mark.parametrize('shape', RESIDUAL_SHAPES)
@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
def test_kernels_with_residual_weights(launches, poisoned, depth, norm, shape):
    tensors = problem(*shape, depth, norm, residual=True)
    came = learned(ours, leaves(tensors))
    assert len(launches) == 1
    assert_same(came, exactly(tensors), EXACT)
    assert all(t.dtype == torch.float32 for own in came for t in own.values())


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
def test_chunks_shared_out_among_programs(launches, poisoned, depth, norm, monkeypatch):
    from titans_pytorch.ops.inner_gradient import triton as kernels

    tensors = problem(2, 5, 3, 16, 64, depth, norm, residual=True)
    exact = exactly(tensors)
    # all of them to one program, or two to each; and matrices read anew instead of kept
    for programs, kept in ((1, 4096), (24, 512)):
        monkeypatch.setattr(kernels, 'ENOUGH_SUMS', programs)
        monkeypatch.setattr(kernels, 'KEPT_IN_FULL', kept)
        assert_same(learned(ours, leaves(tensors)), exact, EXACT)


def test_kernels_read_views_of_residual_weights(launches, poisoned):
    # a block out of the other memory's chunks, one matrix held transposed
    tensors = problem(2, 7, 4, 16, 32, residual=True)
    cut = {name: t if name in WEIGHTS else t[:, 2:5] for name, t in tensors.items()}
    cut['residual first'] = cut['residual first'].mT.contiguous().mT
    came = learned(ours, {name: t.requires_grad_() for name, t in cut.items()})
    assert len(launches) == 1
    assert_same(came, exactly(cut), EXACT)


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
@pytest.mark.parametrize('dtype', [torch.float32, LOW])
def test_residual_weights_are_as_exact_under_autocast(launches, poisoned, depth, norm, dtype):
    tensors = lowered(problem(2, 4, 4, 16, 64, depth, norm, residual=True), dtype)
    assert_no_worse(lambda: learned_in(LOW, tensors), exactly(tensors))
    assert len(launches) == 1


def test_inputs_that_the_kernels_do_not_support(launches):
    learned(ours, leaves(problem(1, 1, 1, 136, 16)))
    learned(ours, leaves(problem(1, 1, 1, 16, 16, depth=3)))
    exactly(problem(1, 2, 2, 8, 16))
    empty = problem(1, 2, 0, 8, 16)
    assert learned(ours, leaves(empty))[0]['deltas 1'].shape == (1, 2, 0, 8)
    assert not launches


# to the compiler


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
@pytest.mark.parametrize('residual', [False, True])
def test_the_operation_is_registered_correctly(kernels_everywhere, depth, norm, residual):
    from titans_pytorch.ops.inner_gradient import triton as kernels

    tensors = leaves(problem(2, 3, 2, 16, 32, depth, norm, residual))
    weights = ('first', 'last', 'gamma')
    names = ('keys', 'values', 'step_sizes', *weights, 'shares', *(f'residual {name}' for name in weights))
    args = (*(tensors.get(name) for name in names), EPS, torch.float32)
    torch.library.opcheck(kernels.inner_gradient, args, test_utils=CHECKS)


# on a GPU, in the sizes of training


@pytest.mark.gpu
@pytest.mark.parametrize('precision', ['highest', 'high', 'bfloat16'])
@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
@pytest.mark.parametrize(
    'shape',
    [(64, 32, 4, 64, 256), (16, 32, 4, 64, 256), (8, 5, 3, 100, 250), (16, 8, 64, 128, 512), (3, 32, 1, 16, 32)],
)
def test_kernels_in_sizes_of_training(launches, poisoned, shape, depth, norm, precision):
    tensors = problem(*shape, depth, norm)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest' if precision == 'bfloat16' else precision)
    try:
        low = torch.bfloat16 if precision == 'bfloat16' else None
        assert_no_worse(lambda: learned_in(low, tensors), exactly(tensors), floor=1e-5)
        assert len(launches) == 1
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize('low', [None, torch.bfloat16])
@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
@pytest.mark.parametrize(
    'shape',
    [(16, 32, 4, 64, 128), (64, 8, 4, 64, 256), (8, 5, 3, 100, 250), (4, 8, 64, 128, 256), (3, 32, 1, 16, 32)],
)
def test_residual_weights_in_sizes_of_training(launches, poisoned, shape, depth, norm, low):
    tensors = problem(*shape, depth, norm, residual=True)
    tensors = tensors if low is None else lowered(tensors, low)
    assert_no_worse(lambda: learned_in(low, tensors), exactly(tensors), floor=1e-5)
    assert len(launches) == 1
