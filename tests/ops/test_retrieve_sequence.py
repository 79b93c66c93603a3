"""Retrieval over a sequence: the reference against weights formed for every step, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_no_worse, assert_same

from titans_pytorch.ops import retrieve_sequence as operation
from titans_pytorch.ops.norms import layer_norm
from titans_pytorch.ops.retrieve_sequence import FactoredMatrix, reference, retrieve_sequence

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter multiplies no bfloat16
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
# products in float32 of three TF32 ones keep a little less
EXACT = 2e-6 if DEVICE == 'cpu' else 1e-5
EPS = 1e-5
# heads, blocks of chunks, steps, queries and stored rows of a step, features, hidden features, initial states, norm
SMALL = (2, 2, 3, 4, 4, 16, 32, 2, True)
CASES = [
    SMALL,
    (1, 2, 5, 3, 6, 20, 37, 3, True),
    (1, 2, 1, 4, 4, 16, 24, 1, False),
    (2, 1, 5, 3, 2, 20, None, 2, True),
    (1, 2, 4, 1, 3, 100, None, 1, False),
    (1, 1, 33, 4, 1, 16, 40, 2, True),
    (1, 1, 3, 40, 70, 16, 20, 4, False),
    (1, 1, 2, 1, 1, 128, 48, 2, True),
]
MATRIX = ('initial', 'inputs', 'deltas')
STORED = ('inputs', 'deltas')
ARGUMENTS = ('queries', 'coefficients', 'initial_coefficients')
ARGUMENTS = (*ARGUMENTS, *(f'{name}_{part}' for name in ('first', 'last') for part in MATRIX), 'gamma')
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


@pytest.fixture
def launches(launches_of):
    return launches_of(operation)


def leaf(t, dtype=None):
    return t.detach().to(dtype or t.dtype).requires_grad_()


def leaves(tensors, dtype=None):
    return {name: leaf(t, dtype) for name, t in tensors.items()}


def problem(heads, blocks, steps, rows, stored, dim, width, states, norm, depth=2):
    """The arguments of the operation by name, without absent ones."""

    def matrix(name, dim_in, dim_out):
        return {
            f'{name}_initial': torch.randn(heads, blocks, states, dim_in, dim_out) * dim_in**-0.5,
            f'{name}_inputs': torch.randn(heads, blocks, steps * stored, dim_in) * dim_in**-0.5,
            f'{name}_deltas': torch.randn(heads, blocks, steps * stored, dim_out) * 0.5,
        }

    tensors = {
        'queries': torch.randn(heads, blocks, steps, rows, dim),
        'coefficients': torch.rand(heads, blocks, steps, steps).tril(-1),
        'initial_coefficients': torch.randn(heads, blocks, steps, states),
        **({} if width is None else matrix('first', dim, width)),
        **(matrix('middle', width, width) if depth > 2 else {}),
        **matrix('last', width or dim, dim),
        **({'gamma': torch.randn(heads, blocks, steps, dim) * 0.3} if norm else {}),
    }
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def ours(tensors):
    matrices = [
        FactoredMatrix(*(tensors[f'{name}_{part}'] for part in MATRIX))
        for name in ('first', 'middle', 'last')
        if f'{name}_inputs' in tensors
    ]
    rows = (tensors[name] for name in ('queries', 'coefficients', 'initial_coefficients'))
    return retrieve_sequence(*rows, matrices, tensors.get('gamma'), EPS)


def with_weights_of_every_step(tensors):
    """Each step's matrices are formed."""
    queries, coefficients = tensors['queries'], tensors['coefficients'].tril(-1)
    steps = queries.shape[2]

    def linear(x, name):
        initial, inputs, deltas = (tensors[f'{name}_{part}'] for part in MATRIX)
        inputs, deltas = (t.unflatten(2, (steps, -1)) for t in (inputs, deltas))
        changes = torch.einsum('brjmd, brjme -> brjde', inputs, deltas)
        weights = torch.einsum('brij, brjde -> bride', coefficients, changes)
        return x @ (weights + torch.einsum('brik, brkde -> bride', tensors['initial_coefficients'], initial))

    hidden = queries
    for name in ('first', 'middle'):
        hidden = F.gelu(linear(hidden, name)) if f'{name}_inputs' in tensors else hidden
    y = linear(hidden, 'last')
    return y if 'gamma' not in tensors else layer_norm(y, EPS) * (tensors['gamma'].unsqueeze(3) + 1) + queries


def learned(function, tensors):
    """What `function` gives, and the gradient of a linear function of it by every tensor that has one."""
    out = function(tensors)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.device)
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    # with a single step nothing that is stored is read
    total = (out.double() * weights).sum()
    came = torch.autograd.grad(total, [*wanted.values()], materialize_grads=True)
    return out, dict(zip(wanted, came))


def exactly(tensors):
    return learned(with_weights_of_every_step, leaves(tensors, torch.float64))


# the reference


@pytest.mark.parametrize('rows_in_cache', [reference.ROWS_IN_CACHE, 1, 30])
@pytest.mark.parametrize('case', [*CASES, (*SMALL, 3), (1, 2, 5, 3, 6, 20, 37, 3, False, 3)])
def test_the_reference_applies_the_weights_of_every_step(case, rows_in_cache, monkeypatch):
    monkeypatch.setattr(reference, 'ROWS_IN_CACHE', rows_in_cache)
    tensors = problem(*case)
    assert_same(learned(ours, leaves(tensors, torch.float64)), exactly(tensors), 1e-12)


def test_the_reference_can_be_differentiated_twice():
    names, values = zip(*leaves(problem(1, 2, 2, 1, 1, 3, 4, 2, True), torch.float64).items())
    torch.autograd.gradgradcheck(lambda *own: ours(dict(zip(names, own))), values)


@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('width', [24, None])
@pytest.mark.parametrize('rows', [torch.float32, torch.bfloat16])
def test_precision_under_autocast(norm, width, rows):
    tensors = problem(1, 2, 3, 2, 2, 16, width, 2, norm)
    low = {name: t.bfloat16() if name.endswith(('inputs', 'deltas')) else t for name, t in tensors.items()}
    low['queries'] = low['queries'].to(rows)
    with torch.autocast(DEVICE, torch.bfloat16):
        came = ours(low)
    assert came.dtype == (torch.float32 if norm else torch.bfloat16)
    assert_same(came.float(), ours(tensors), 0.05)


# kernels


@pytest.mark.parametrize('case', CASES)
def test_kernels_equal_the_reference(launches, poisoned, case):
    tensors = problem(*case)
    came = learned(ours, leaves(tensors))
    assert_same(came, exactly(tensors), EXACT)
    assert len(launches) == 1
    assert all(t.dtype == torch.float32 for t in (came[0], *came[1].values()))


@pytest.mark.parametrize('tiles', [(64, 64, 16, 32), (16, 32, 64, 16), (32, 16, 32, 64)])
def test_tiles_of_any_size(launches, poisoned, tiles, monkeypatch):
    """And kernels whose tiles differ from each other's."""
    from titans_pytorch.ops.retrieve_sequence import triton as kernel

    for index, name in enumerate(('FORWARD', 'QUERIES', 'STORED', 'INITIAL')):
        rows, stored = tiles[index], tiles[index - 1]
        monkeypatch.setattr(kernel, name, (kernel.Tiles(rows, stored, tiles[index - 2], 4),) * 2)
    monkeypatch.setattr(kernel, 'ENOUGH_PROGRAMS', 0)
    for case in ((1, 1, 12, 6, 8, 16, 40, 2, True), (1, 1, 5, 24, 12, 16, None, 2, True)):
        tensors = problem(*case)
        assert_same(learned(ours, leaves(tensors)), exactly(tensors), EXACT)


@pytest.mark.parametrize('use_kernels', [True, False])
def test_only_coefficients_below_the_diagonal_are_read(launches, poisoned, use_kernels):
    dtype = torch.float32 if use_kernels else torch.float64
    tensors = problem(*SMALL)
    expected = learned(ours, leaves(tensors, dtype))
    tensors['coefficients'] += torch.randn_like(tensors['coefficients']).triu()
    came = learned(ours, leaves(tensors, dtype))
    assert_same(came, expected, 0.0)
    assert not came[1]['coefficients'].triu().any() and len(launches) == 2 * use_kernels


def test_kernels_read_views(launches, poisoned):
    heads, blocks, steps, rows, stored, dim, width, states, _ = case = (2, 2, 3, 2, 2, 16, 20, 2, True)
    tensors = problem(*case)
    # queries and keys out of a longer sequence of all heads, whose features lie beside each other
    sequence = torch.randn(blocks * steps * rows + 3, 2, heads * dim, device=DEVICE)
    queries = sequence[3:, 0].unflatten(-1, (heads, dim)).transpose(0, 1).unflatten(1, (blocks, steps, rows))
    keys = sequence[:-3, 1].unflatten(-1, (heads, dim)).transpose(0, 1).unflatten(1, (blocks, steps * stored))
    cut = tensors | {
        'queries': queries,
        'first_inputs': keys,
        'coefficients': tensors['coefficients'].repeat_interleave(stored, dim=3)[..., ::stored],
        'initial_coefficients': torch.randn(heads, blocks, steps + 1, states + 1, device=DEVICE)[:, :, 1:, 1:],
        # of every other feature, transposed, or the same for all heads
        'first_initial': tensors['first_initial'].mT.contiguous().mT,
        'last_initial': tensors['last_initial'][:1].expand(heads, -1, -1, -1, -1),
        'first_deltas': torch.randn(heads, blocks, steps * stored, 2 * width, device=DEVICE)[..., ::2],
        'last_deltas': torch.randn(heads, blocks, steps * stored + 1, dim, device=DEVICE)[:, :, 1:],
        'gamma': torch.randn(heads, blocks * steps + 1, dim, device=DEVICE)[:, :-1].unflatten(1, (blocks, steps)),
    }
    changed = {name: t for name, t in cut.items() if t is not tensors[name]}
    assert len(changed) == 9 and not any(t.is_contiguous() for t in changed.values())
    came = learned(ours, {name: t.detach().requires_grad_() for name, t in cut.items()})
    assert_same(came, exactly(cut), EXACT)
    assert len(launches) == 1


@pytest.mark.parametrize('case', [SMALL, (1, 2, 5, 3, 6, 20, None, 2, False)])
@pytest.mark.parametrize('rows', [torch.float32, LOW])
@pytest.mark.parametrize('parts', [STORED, MATRIX])
def test_kernels_are_as_exact_under_autocast_as_the_reference(launches, poisoned, case, rows, parts):
    tensors = lowered(problem(*case), parts)
    tensors['queries'] = tensors['queries'].to(rows)
    assert_no_worse(lambda: learned_in(LOW, tensors), exactly(tensors), floor=1e-4)
    assert len(launches) == 1


def lowered(tensors, parts):
    """Matrices with these parts in low precision."""
    names = tuple(f'_{part}' for part in parts)
    return {name: t.to(LOW) if name.endswith(names) else t for name, t in tensors.items()}


def learned_in(low, tensors):
    with torch.autocast(DEVICE, low, enabled=low is not None):
        return learned(ours, leaves(tensors))


@pytest.mark.parametrize(
    'learns', [('queries',), ('last_initial', 'initial_coefficients'), ('coefficients', 'gamma', 'first_deltas')]
)
def test_only_some_learn(launches, poisoned, learns):
    tensors = problem(*SMALL)
    some = {name: t.clone().requires_grad_(name in learns) for name, t in tensors.items()}
    out, came = learned(ours, some)
    expected_out, expected = exactly(tensors)
    assert_same((out, came), (expected_out, {name: expected[name] for name in came}), EXACT)
    assert came.keys() == {*learns}


def test_without_gradients(launches, poisoned):
    tensors = problem(*SMALL)
    with torch.no_grad():
        expected = with_weights_of_every_step({name: t.double() for name, t in tensors.items()})
        assert_same(ours(tensors), expected, EXACT)
    assert len(launches) == 1


def test_inputs_that_the_kernels_do_not_support(launches):
    for case in ((1, 1, 2, 1, 1, 132, 4, 1, True), (1, 1, 2, 1, 1, 4, 4, 5, True)):
        tensors = problem(*case)
        assert_same(learned(ours, leaves(tensors)), exactly(tensors), EXACT)
    learned(ours, leaves(problem(*SMALL), torch.float64))
    learned(ours, leaves(problem(*SMALL, depth=3)))
    assert not launches


# to the compiler


@pytest.mark.parametrize('case', [SMALL, (1, 2, 3, 2, 2, 16, None, 2, False)])
def test_the_operation_is_registered_correctly(kernels_everywhere, case):
    from titans_pytorch.ops.retrieve_sequence import triton as kernels

    tensors = leaves(problem(*case))
    args = (*(tensors.get(name) for name in ARGUMENTS), EPS, torch.float32)
    torch.library.opcheck(kernels.retrieve_sequence, args, test_utils=CHECKS)


def test_it_compiles_to_one_operation(kernels_everywhere, fresh_compiler):
    tensors, seen = problem(*SMALL), []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend('aot_eager')(graph, inputs)

    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    assert_same(learned(compiled, leaves(tensors)), learned(ours, leaves(tensors)), 1e-6)
    assert sum('titans_pytorch' in name for name in seen) == 1


# on a GPU, in the sizes of training


@pytest.mark.gpu
@pytest.mark.parametrize('parts', [(), STORED, MATRIX])
@pytest.mark.parametrize(
    'case',
    [
        (16, 4, 32, 4, 4, 64, 256, 2, True),
        (64, 2, 32, 4, 8, 64, 256, 2, True),
        (8, 3, 5, 3, 6, 100, 250, 3, True),
        (4, 2, 8, 64, 64, 128, 512, 2, True),
        (4, 2, 8, 64, 64, 64, 256, 1, False),
        (3, 2, 32, 1, 1, 16, 32, 2, True),
        (16, 4, 32, 4, 4, 64, None, 2, True),
        (4, 2, 7, 5, 5, 128, None, 1, False),
    ],
)
def test_kernels_in_sizes_of_training(launches, poisoned, case, parts):
    tensors = lowered(problem(*case), parts)
    assert_no_worse(lambda: learned_in(LOW if parts else None, tensors), exactly(tensors), floor=1e-5)
    assert len(launches) == 1
