"""Scan over memory batches: the reference and the kernels against a loop over the operations on a single one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compare import assert_no_worse, assert_same

import titans_pytorch.ops.memory_batch_scan as operation
from titans_pytorch.ops.final_state import final_state
from titans_pytorch.ops.inner_gradient import inner_gradient
from titans_pytorch.ops.memory_batch_scan import MemoryBatches, memory_batch_scan

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter multiplies no bfloat16
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
# products in float32 of three TF32 ones keep a little less, and each memory batch builds on the one before
EXACT = 1e-5 if DEVICE == 'cpu' else 5e-5
PARAMETERS = ('first', 'last', 'gamma')
NETWORKS = [(depth, norm) for depth in (1, 2) for norm in (True, False)]
# heads, memory batches, chunks, rows of a chunk, width, hidden width, states
SHAPES = [
    (2, 3, 4, 4, 16, 32, 2),
    (1, 2, 5, 1, 20, 37, 1),
    (2, 2, 3, 3, 20, 24, 3),
    (1, 2, 2, 20, 24, 40, 2),
    (1, 1, 5, 2, 100, 130, 2),
]
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


@pytest.fixture
def kernels(kernels_everywhere, monkeypatch):
    """The kernels with states in memory run on this device too; their module."""
    from titans_pytorch.ops.memory_batch_scan import triton as kernels

    monkeypatch.setattr(operation, 'fits_on_chip', lambda *_: False)
    return kernels


@pytest.fixture
def on_chip(kernels_everywhere, monkeypatch):
    """The kernels with states on chip run on this device too, and no others; their module."""
    from titans_pytorch.ops.memory_batch_scan import triton, triton_on_chip

    monkeypatch.setattr(triton, 'memory_batch_scan', None)
    return triton_on_chip


def problem(heads, batches, chunks, rows, dim, width, states, depth=2, norm=True):
    """The arguments of the operation by name. Steps are small, as each memory batch builds on the one before."""

    def draw(*shape, scale=1.0):
        return (torch.randn(heads, *shape) * scale).to(DEVICE)

    shapes = {'first': (dim, width), 'last': (width, dim), 'gamma': (dim,)}
    if depth == 1:
        shapes = {'last': (dim, dim), 'gamma': (dim,)}
    if not norm:
        del shapes['gamma']
    tensors = {
        'keys': draw(batches * chunks, rows, dim),
        'values': draw(batches * chunks, rows, dim),
        'step_sizes': draw(batches * chunks, rows).abs() * 0.3,
        'coefficients': draw(batches, states, chunks) / chunks**0.5,
        'initial_coefficients': draw(batches, states, states) / states,
    }
    for name, shape in shapes.items():
        scale = shape[0] ** -0.5 if len(shape) > 1 else 0.3
        tensors |= {f'{name} {index}': draw(*shape, scale=scale) for index in range(states)}
    return tensors


def by_parameter(tensors):
    """States of W₁, W₂ and γ; an empty list for an absent one."""
    return [[t for name, t in tensors.items() if name.startswith(parameter)] for parameter in PARAMETERS]


def states_of(tensors):
    """Of each matrix, and of γ."""
    *matrices, gamma = by_parameter(tensors)
    return [own for own in matrices if own], gamma


def structured(initial_coefficients):
    """Without the weights in any momentum, and without a momentum in one of an earlier order."""
    states = initial_coefficients.shape[-1]
    read = torch.ones(states, states, device=DEVICE).tril()
    read[0], read[1:, 0] = 1, 0
    return initial_coefficients * read.to(initial_coefficients.dtype)


def scanned(tensors, batches_per_block=1):
    matrices, gamma = states_of(tensors)
    rows = (tensors[name] for name in ('keys', 'values', 'step_sizes'))
    coefficients = tensors['coefficients'], structured(tensors['initial_coefficients'])
    return by_name(memory_batch_scan(*rows, matrices, gamma or None, *coefficients, 1e-5, batches_per_block))


def by_name(out):
    """The tensors by name, without the keys, which are the inputs of the first matrix."""
    fields, lists = out._asdict(), ('initial', 'final', 'inputs', 'deltas')
    named = {f'{name} {index}': t for name in lists for index, t in enumerate(fields[name])}
    named |= {name: t for name, t in fields.items() if name not in lists and t is not None}
    return {name: t for name, t in named.items() if name != 'inputs 0'}


def looped(tensors, batches_per_block=1):
    """A memory batch after the other, by the operations on one."""
    (matrices, gamma), initial, initial_gamma, of_rows = states_of(tensors), [], [], []
    rows = [
        tensors[name].unflatten(1, tensors['coefficients'].shape[1::2]) for name in ('keys', 'values', 'step_sizes')
    ]
    coefficients = tensors['coefficients'], structured(tensors['initial_coefficients'])
    for keys, values, step_sizes, own, own_initial in zip(*(t.unbind(1) for t in (*rows, *coefficients))):
        initial.append([torch.stack(states, dim=1) for states in matrices])
        weights, own_gamma = [states[0] for states in matrices], gamma[0] if gamma else None
        gradient = inner_gradient(keys, values, step_sizes, weights, own_gamma, 1e-5)
        of_rows.append(gradient)
        updates = zip(matrices, gradient.inputs, gradient.deltas)
        matrices = [final_state(own, own_initial, *update) for update in updates]
        if gamma:
            initial_gamma.append(torch.stack(gamma, dim=1))
            gamma = [*(own @ gradient.negative_gamma_gradient + own_initial @ initial_gamma[-1]).unbind(1)]

    def of_blocks(parts):
        return torch.cat([*parts], dim=1).unflatten(1, (len(initial) // batches_per_block, -1))

    def by_matrix(name):
        return [of_blocks(t.flatten(1, 2) for t in own) for own in zip(*(getattr(one, name) for one in of_rows))]

    return by_name(
        MemoryBatches(
            [torch.stack(own[::batches_per_block], dim=1) for own in zip(*initial)],
            torch.stack(initial_gamma[::batches_per_block], dim=1) if gamma else None,
            [torch.stack(states, dim=1) for states in matrices],
            torch.stack(gamma, dim=1) if gamma else None,
            by_matrix('inputs'),
            by_matrix('deltas'),
            of_blocks(one.negative_gamma_gradient for one in of_rows) if gamma else None,
            of_blocks(one.losses for one in of_rows),
        )
    )


def leaves(tensors, dtype=None):
    return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}


def frozen(tensors, dtype=None):
    """Coefficients of updates that learn nothing."""
    every = leaves(tensors, dtype)
    return every | {'coefficients': every['coefficients'].detach()}


def learned(function, tensors, used=None, transposed=False):
    """Results of `function`, and gradients of a linear function of them, or of those in `used`, for every tensor."""
    generator, total = torch.Generator().manual_seed(1), 0.0
    out = function(tensors)
    for name, t in out.items():
        weights = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        if transposed and t.ndim > 2:
            t, weights = t.transpose(-2, -1) * 1.0, weights.transpose(-2, -1)
        if used is None or name in used:
            total = total + (t.double() * weights).sum()
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    came = torch.autograd.grad(total, [*wanted.values()], allow_unused=True)
    zeros = (torch.zeros_like(t) if own is None else own for own, t in zip(came, wanted.values()))
    return {name: t.detach() for name, t in out.items()}, dict(zip(wanted, zeros))


def exactly(tensors, *args, **settings):
    return learned(partial(looped, **settings), leaves(tensors, torch.float64), *args)


@pytest.mark.parametrize('states', [1, 3])
@pytest.mark.parametrize('rows', [1, 3])
@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
def test_the_reference_is_a_loop(depth, norm, rows, states):
    tensors = leaves(problem(2, 3, 4, rows, 5, 7, states, depth, norm), torch.float64)
    assert_same(learned(scanned, tensors), learned(looped, tensors), 1e-12)


@pytest.mark.parametrize(
    ('depth', 'norm', 'shape'),
    [*((2, True, shape) for shape in SHAPES), *((1, False, shape) for shape in SHAPES[:3])]
    + [(1, True, SHAPES[1]), (2, False, SHAPES[2])],
)
def test_kernels_equal_a_loop(kernels, poisoned, depth, norm, shape):
    tensors = problem(*shape, depth, norm)
    came = learned(scanned, leaves(tensors))
    assert_same(came, exactly(tensors), EXACT)
    assert all(t.dtype == torch.float32 for own in came for t in own.values())


@pytest.mark.parametrize('of', [leaves, frozen])
@pytest.mark.parametrize(('depth', 'norm', 'states'), [(2, True, 2), (1, False, 3), (2, False, 1)])
def test_memory_batches_of_one_chunk(kernels, poisoned, depth, norm, states, of):
    tensors = problem(2, 3, 1, 35, 20, 40, states, depth, norm)
    # of 35 rows, which some processors add up with twice the error of others
    assert_same(learned(scanned, of(tensors)), learned(looped, of(tensors, torch.float64)), 4 * EXACT)


@pytest.mark.parametrize(('programs', 'depth', 'norm'), [(2, 1, True), (2, 2, False), (3, 2, True)])
def test_phases_can_be_launched_one_by_one(kernels, poisoned, programs, depth, norm, monkeypatch):
    # several blocks of rows, which cut chunks, and of hidden features, so that each program has some
    monkeypatch.setattr(kernels, 'PROGRAMS_WAIT', False)
    monkeypatch.setattr(kernels, '_programs', lambda *_: programs)
    tensors = problem(1, 2, 2, 19, 20, 70, 2, depth, norm)
    assert_same(learned(scanned, leaves(tensors)), exactly(tensors), EXACT)


@pytest.mark.parametrize('programs', [2, 3])
def test_how_the_work_is_shared_changes_nothing(kernels, programs, monkeypatch):
    # where tiles and blocks are the same, sums are too
    tensors = problem(1, 2, 4, 3, 16, 40, 2)
    came = []
    monkeypatch.setattr(kernels, 'PROGRAMS_WAIT', False)
    for own in (1, programs):
        monkeypatch.setattr(kernels, '_programs', lambda *_, own=own: own)
        came.append(learned(scanned, leaves(tensors)))
    assert_same(*came, 0.0)


@pytest.mark.parametrize('rows', [(16, 16), (64, 64)])
def test_blocks_of_other_sizes(kernels, poisoned, rows, monkeypatch):
    monkeypatch.setattr(kernels, 'MOST_ROWS_IN_FULL', rows)
    monkeypatch.setattr(kernels, 'MOST_COLUMNS', 16)
    monkeypatch.setattr(kernels, 'STATE_BLOCK_IN_FULL', (32, 16))
    monkeypatch.setattr(kernels, 'UNITS', 16)
    tensors = problem(1, 2, 2, 20, 20, 40, 2)
    assert_same(learned(scanned, leaves(tensors)), exactly(tensors), EXACT)


@pytest.mark.parametrize(('depth', 'norm'), [(2, True), (1, False)])
def test_only_one_output_is_used(kernels, poisoned, depth, norm):
    tensors = problem(1, 2, 2, 2, 16, 16, 1, depth, norm)
    for name in looped(tensors):
        came, expected = learned(scanned, leaves(tensors), [name]), exactly(tensors, [name])
        assert_same(came, expected, EXACT, f'of {name} ')


def test_kernels_read_views(kernels, poisoned):
    # memory batches out of a longer sequence, keys without the last row and values without the first, heads side by
    # side; states of all heads, and one held transposed; gradients that come transposed
    longer = problem(2, 4, 3, 4, 16, 20, 2)
    cut = {name: t[:, 1:3] for name, t in longer.items() if name.endswith('coefficients')}
    cut |= {'keys': longer['keys'][:, 3:9, :-1], 'values': longer['values'][:, 3:9, 1:]}
    cut |= {'step_sizes': longer['step_sizes'][:, 3:9, :-1]}
    cut |= {name: t[:1].expand(t.shape) for name, t in longer.items() if ' ' in name}
    cut['keys'] = cut['keys'].transpose(0, 1).contiguous().transpose(0, 1)
    cut['last 1'] = longer['last 1'].mT.contiguous().mT
    cut = {name: t.requires_grad_() for name, t in cut.items()}
    assert not any(t.is_contiguous() for t in cut.values())
    assert_same(learned(scanned, cut, None, True), exactly(cut, None, True), EXACT)


def test_not_all_inputs_learn(kernels, poisoned):
    tensors = problem(1, 2, 3, 2, 16, 20, 2)
    _, all_of_them = learned(scanned, leaves(tensors))
    for frozen in (
        ('keys', 'coefficients', 'first 0'),
        ('values', 'step_sizes', 'initial_coefficients', 'last 0', 'last 1', 'gamma 1'),
    ):
        some = {name: t if name in frozen else t.clone().requires_grad_() for name, t in tensors.items()}
        _, came = learned(scanned, some)
        assert_same(came, {name: t for name, t in all_of_them.items() if name not in frozen}, 0.0)


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
@pytest.mark.parametrize('dtype', [torch.float32, LOW])
def test_kernels_are_as_exact_under_autocast_as_the_reference(kernels, poisoned, depth, norm, dtype):
    tensors = lowered(problem(2, 2, 4, 4, 16, 32, 2, depth, norm), dtype)
    # the backward reads states in the precision of products
    assert_no_worse(lambda: learned_in(LOW, tensors), exactly(tensors), floor=torch.finfo(LOW).eps)


def lowered(tensors, dtype):
    """As a memory under autocast gives them: rows in its precision."""
    return {name: t.to(dtype) if name in ('keys', 'values') else t for name, t in tensors.items()}


def learned_in(low, tensors, leaves=leaves):
    def rounded(tensors):
        # some kernels return states before a block in the precision of products
        out = scanned(tensors)
        low_states = {name: t.to(low).float() for name, t in out.items() if low and 'initial ' in name}
        return out | low_states

    with torch.autocast(DEVICE, low, enabled=low is not None):
        return learned(rounded, leaves(tensors))


def test_inputs_that_the_kernels_do_not_support(kernels, monkeypatch):
    monkeypatch.setattr(kernels, 'memory_batch_scan', None)
    for shape in ((1, 1, 1, 1, 136, 4, 1), (1, 1, 2, 1, 4, 4, 5)):
        tensors = problem(*shape)
        assert_same(learned(scanned, leaves(tensors)), exactly(tensors), EXACT)


# with states on chip

# heads, memory batches, chunks, rows of a chunk, width, hidden width, states
ON_CHIP = [(2, 3, 4, 4, 16, 32, 2), (1, 2, 5, 1, 20, 37, 1), (1, 3, 2, 5, 24, 80, 2), (1, 2, 3, 10, 60, 130, 2)]


@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('shape', ON_CHIP)
def test_states_on_chip(on_chip, poisoned, shape, norm):
    tensors = problem(*shape, 2, norm)
    assert_same(learned(scanned, leaves(tensors)), exactly(tensors), EXACT)


@pytest.mark.parametrize('of', [leaves, frozen])
@pytest.mark.parametrize('states', [1, 2])
def test_memory_batches_of_one_chunk_on_chip(on_chip, poisoned, states, of):
    tensors = problem(2, 3, 1, 7, 24, 80, states)
    assert_same(learned(scanned, of(tensors)), learned(looped, of(tensors, torch.float64)), EXACT)


@pytest.mark.parametrize('depth', [1, 2])
@pytest.mark.parametrize('batches_per_block', [2, 4])
def test_states_of_blocks(kernels_everywhere, poisoned, batches_per_block, depth):
    tensors = problem(1, 4, 2, 3, 16, 70, 2, depth)

    def blocks(function):
        return lambda own: function(own, batches_per_block)

    came = learned(blocks(scanned), leaves(tensors))
    assert_same(came, learned(blocks(looped), leaves(tensors, torch.float64)), EXACT)


def test_only_one_output_on_chip_is_used(on_chip, poisoned):
    tensors = problem(1, 2, 2, 2, 16, 70, 2)
    for name in looped(tensors):
        assert_same(learned(scanned, leaves(tensors), [name]), exactly(tensors, [name]), EXACT, f'of {name} ')


def test_states_on_chip_without_gradients(on_chip, poisoned):
    tensors = problem(1, 2, 2, 2, 16, 70, 2)
    with torch.no_grad():
        came = scanned(tensors)
    assert_same(came, {name: t.detach() for name, t in scanned(leaves(tensors)).items()}, 0.0)


def test_views_on_chip(on_chip, poisoned):
    tensors = problem(2, 4, 3, 4, 16, 20, 2)
    cut = {name: t[:, 1:3] for name, t in tensors.items() if name.endswith('coefficients')}
    cut |= {name: tensors[name][:, 3:9] for name in ('keys', 'values', 'step_sizes')}
    cut |= {name: t[:1].expand(t.shape) for name, t in tensors.items() if ' ' in name}
    cut = {name: t.requires_grad_() for name, t in cut.items()}
    assert_same(learned(scanned, cut, None, True), exactly(cut, None, True), EXACT)


@pytest.mark.parametrize('dtype', [torch.float32, LOW])
def test_states_on_chip_under_autocast(on_chip, poisoned, dtype):
    tensors = lowered(problem(2, 2, 4, 4, 16, 80, 2), dtype)
    assert_no_worse(lambda: learned_in(LOW, tensors), exactly(tensors))


def test_states_that_do_not_fit(kernels_everywhere, monkeypatch):
    from titans_pytorch.ops.memory_batch_scan import triton_on_chip

    monkeypatch.setattr(triton_on_chip, 'memory_batch_scan_on_chip', None)
    shapes = ((1, 1, 1, 1, 65, 8, 1), (1, 1, 1, 1, 8, 513, 1), (1, 1, 1, 1, 8, 8, 3), (1, 1, 3, 11, 8, 8, 1))
    for shape in (*shapes, (1, 2, 1, 1, 8, 8, 2, 1)):
        tensors = problem(*shape)
        assert_same(learned(scanned, leaves(tensors)), exactly(tensors), EXACT)


def test_the_operation_on_chip_is_registered_correctly(on_chip):
    tensors = leaves(problem(1, 2, 2, 2, 16, 70, 2))
    rows = (tensors[name] for name in ('keys', 'values', 'step_sizes'))
    stacked = (torch.stack(own, dim=1).detach().requires_grad_() for own in by_parameter(tensors))
    coefficients = (tensors[name] for name in ('coefficients', 'initial_coefficients'))
    args = (*rows, *stacked, *coefficients, 2, True, True, 1e-5, torch.float32)
    torch.library.opcheck(on_chip.memory_batch_scan_on_chip, args, test_utils=CHECKS)


# to the compiler


@pytest.mark.parametrize(('depth', 'norm'), [(2, True), (1, False)])
def test_the_operation_is_registered_correctly(kernels, depth, norm):
    tensors = leaves(problem(1, 2, 2, 2, 16, 16, 1 + norm, depth, norm))
    rows = (tensors[name] for name in ('keys', 'values', 'step_sizes'))
    coefficients = (tensors[name] for name in ('coefficients', 'initial_coefficients'))
    args = (*rows, *by_parameter(tensors), *coefficients, True, 1e-5, torch.float32)
    torch.library.opcheck(kernels.memory_batch_scan, args, test_utils=CHECKS)


def test_it_compiles_to_one_operation(kernels, fresh_compiler):
    tensors, seen = leaves(problem(1, 2, 3, 2, 16, 20, 2)), []

    def loss(tensors):
        return sum(t.square().sum() for t in scanned(tensors).values())

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend('aot_eager')(graph, inputs)

    compiled = torch.compile(loss, fullgraph=True, backend=backend)(tensors)
    assert sum('titans_pytorch' in name for name in seen) == 1
    came = torch.autograd.grad(compiled, [*tensors.values()])
    assert_same(came, torch.autograd.grad(loss(tensors), [*tensors.values()]), 1e-6)


# on a GPU, where the programs of a head wait for each other, in the sizes of training


@pytest.mark.gpu
@pytest.mark.parametrize('low', [None, torch.bfloat16])
@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
@pytest.mark.parametrize(
    'shape',
    [
        (16, 4, 32, 4, 64, 256, 2),
        (64, 3, 32, 4, 64, 256, 2),
        (64, 3, 1, 64, 64, 256, 2),
        (200, 2, 8, 4, 64, 128, 2),
        (3, 3, 5, 3, 100, 250, 3),
        (8, 2, 8, 64, 128, 512, 2),
        (2, 3, 32, 1, 16, 32, 4),
    ],
)
def test_kernels_in_sizes_of_training(kernels, poisoned, shape, depth, norm, low):
    tensors = problem(*shape, depth, norm)
    tensors['step_sizes'] = tensors['step_sizes'] * 0.03
    tensors = tensors if low is None else lowered(tensors, low)
    assert_no_worse(lambda: learned_in(low, tensors), exactly(tensors), floor=1e-5)
    if shape[2] == 1:
        expected = learned(looped, frozen(tensors, torch.float64))
        assert_no_worse(lambda: learned_in(low, tensors, frozen), expected, floor=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('low', [None, torch.bfloat16])
@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize(
    'shape',
    [(64, 4, 1, 16, 64, 256, 2), (8, 3, 1, 32, 64, 256, 2), (300, 2, 4, 4, 64, 128, 1), (3, 5, 5, 3, 50, 500, 2)],
)
def test_states_on_chip_in_sizes_of_training(on_chip, poisoned, shape, norm, low):
    tensors = problem(*shape, 2, norm)
    tensors['step_sizes'] = tensors['step_sizes'] * 0.03
    tensors = tensors if low is None else lowered(tensors, low)
    assert_no_worse(lambda: learned_in(low, tensors), exactly(tensors), floor=1e-5)
    # coefficients of one chunk are constants in the plainest memory
    if shape[2] == 1:
        expected = learned(looped, frozen(tensors, torch.float64))
        assert_no_worse(lambda: learned_in(low, tensors, frozen), expected, floor=1e-5)


@pytest.mark.gpu
def test_programs_that_wait_do_what_one_does(kernels, monkeypatch):
    tensors = problem(4, 6, 16, 4, 64, 128, 2)
    tensors['step_sizes'] = tensors['step_sizes'] * 0.03
    expected = None
    for own, waits in ((1, True), (4, False), (4, True), (16, True), (16, True)):
        monkeypatch.setattr(kernels, '_programs', lambda *_, own=own: own)
        monkeypatch.setattr(kernels, 'PROGRAMS_WAIT', waits)
        came = learned(scanned, leaves(tensors))
        expected = expected or came
        assert_same(came, expected, 1e-5)


@pytest.mark.gpu
def test_a_step_is_captured(kernels):
    tensors = leaves(problem(8, 3, 8, 4, 64, 128, 2))

    def step():
        total = sum(t.square().sum() for t in scanned(tensors).values())
        return torch.autograd.grad(total, [*tensors.values()])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for _ in range(2):
        with torch.no_grad():
            tensors['keys'].copy_(torch.randn_like(tensors['keys']))
        graph.replay()
        assert_same([t.clone() for t in replayed], step(), 1e-5)
