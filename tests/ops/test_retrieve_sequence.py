"""What queries retrieve over a sequence as one operation: plain and by Triton kernels, against layers one by one."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same
from titans_pytorch.memory.engines import DualEngine

from titans_pytorch.memory.fast_weights import FastWeights, Runs
from titans_pytorch.memory_models import MemoryMLP, ResidualNorm
from titans_pytorch.ops import _dispatch, retrieve_sequence
from titans_pytorch.ops.retrieve_sequence import Matrix, Parts, plain_retrieve, retrieve

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter multiplies no bfloat16
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
# products in float32 of three TF32 ones keep a little less
EXACT = 2e-6 if DEVICE == 'cpu' else 1e-5
EPS = 1e-5
# heads, runs, steps, queries and stored rows of a step, features, hidden features, starts, norm
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
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


@pytest.fixture
def calls(monkeypatch):
    """Kernels run on this device too; and how often they were asked for."""
    pytest.importorskip('triton')
    seen, kernels = [], retrieve_sequence._kernels

    def noted(*args):
        came = kernels(*args)
        if came is not None:
            seen.append('kernels')
        return came

    monkeypatch.setattr(_dispatch, 'kernels_run_on', lambda device: True)
    monkeypatch.setattr(retrieve_sequence, '_kernels', noted)
    return seen


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def leaf(t, dtype=None):
    return t.detach().to(dtype or t.dtype).requires_grad_()


def leaves(tensors, dtype=None):
    return {name: leaf(t, dtype) for name, t in tensors.items()}


def problem(heads, runs, steps, rows, stored, dim, width, starts, norm):
    """The arguments that there are, by the names of `Parts`."""

    def matrix(name, dim_in, dim_out):
        return {
            f'{name}_starts': torch.randn(heads, runs, starts, dim_in, dim_out) * dim_in**-0.5,
            f'{name}_inputs': torch.randn(heads, runs, steps * stored, dim_in) * dim_in**-0.5,
            f'{name}_errors': torch.randn(heads, runs, steps * stored, dim_out) * 0.5,
        }

    tensors = {
        'queries': torch.randn(heads, runs, steps, rows, dim),
        'mix': torch.rand(heads, runs, steps, steps).tril(-1),
        'shares': torch.randn(heads, runs, steps, starts),
        **({} if width is None else matrix('first', dim, width)),
        **matrix('last', width or dim, dim),
        **({'gamma': torch.randn(heads, runs, steps, dim) * 0.3} if norm else {}),
    }
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def parts_of(tensors):
    return Parts(*(tensors.get(name) for name in Parts._fields))


def ours(tensors):
    parts = parts_of(tensors)
    first = None if parts.first_starts is None else Matrix(*parts[3:6])
    return retrieve(*parts[:3], first, Matrix(*parts[6:9]), parts.gamma, EPS)


def plainly(tensors):
    """By operations of PyTorch, through which autograd finds its own way back."""
    return plain_retrieve(parts_of(tensors), EPS, torch.float64)[0]


def layer_by_layer(tensors):
    """As the engine sends rows through weights over time."""
    parts = parts_of(tensors)
    heads, runs, steps, _, dim = parts.queries.shape
    model = MemoryMLP(dim, 1 if parts.first_starts is None else 2, parts.last_inputs.shape[-1] / dim)
    model = model if parts.gamma is None else ResidualNorm(dim, model)
    *first, last = [name for name, p in model.named_parameters() if p.ndim > 1]
    matrices = {last: tuple(parts[6:9])} | {name: tuple(parts[3:6]) for name in first}
    # in force after the last chunk, and read by no row here
    end = {name: starts[:, 0, 0] for name, (starts, _, _) in matrices.items()}
    dense = {}
    if parts.gamma is not None:
        end['norm.gamma'] = parts.gamma[:, 0, 0]
        dense['norm.gamma'] = torch.cat((parts.gamma.flatten(1, 2), end['norm.gamma'].unsqueeze(1)), dim=1)
    weights = FastWeights(dense, [Runs(parts.mix, parts.shares, matrices)], end)
    out = DualEngine.retrieve_with(model.to('meta'), weights, parts.queries.flatten(1, 2), 0)
    return out.unflatten(1, (runs, steps))


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
    return learned(plainly, leaves(tensors, torch.float64))


# the plain twin


@pytest.mark.parametrize('case', CASES)
def test_plain_is_layer_by_layer(case):
    tensors = problem(*case)
    expected_out, expected = learned(layer_by_layer, leaves(tensors, torch.float64))
    out, came = learned(ours, leaves(tensors, torch.float64))
    # what no chunk has of another cannot be learned here
    expected['mix'] = expected['mix'].tril(-1)
    assert_same((out, came), (expected_out, expected), 1e-12)


def test_plain_gradients_are_those_of_small_differences():
    names, values = zip(*leaves(problem(1, 1, 3, 2, 1, 3, 4, 2, True), torch.float64).items())
    torch.autograd.gradcheck(lambda *own: ours(dict(zip(names, own))), values)


@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('width', [24, None])
@pytest.mark.parametrize('rows', [torch.float32, torch.bfloat16])
def test_precision_is_that_of_the_layers(norm, width, rows):
    tensors = problem(1, 2, 3, 2, 2, 16, width, 2, norm)
    low = {name: t.bfloat16() if name.endswith(('inputs', 'errors')) else t for name, t in tensors.items()}
    low['queries'] = low['queries'].to(rows)
    with torch.autocast(DEVICE, torch.bfloat16):
        came, expected = ours(low), layer_by_layer(low)
    assert came.dtype == expected.dtype
    assert_same(came, expected, 0.05)
    assert ours(tensors).dtype == layer_by_layer(tensors).dtype == torch.float32


# kernels


@pytest.mark.parametrize('case', CASES)
def test_kernels(calls, poisoned, case):
    tensors = problem(*case)
    came = learned(ours, leaves(tensors))
    assert_same(came, exactly(tensors), EXACT)
    assert calls == ['kernels'] * 2
    assert all(t.dtype == torch.float32 for t in (came[0], *came[1].values()))


@pytest.mark.parametrize('tiles', [(64, 64, 16, 32), (16, 32, 64, 16), (32, 16, 32, 64)])
def test_tiles_of_any_size(calls, poisoned, tiles, monkeypatch):
    """And kernels whose tiles differ from each other's."""
    from titans_pytorch.ops.retrieve_sequence import triton as kernel

    for index, name in enumerate(('FORWARD', 'QUERIES', 'STORED', 'STARTS')):
        rows, stored = tiles[index], tiles[index - 1]
        monkeypatch.setattr(kernel, name, (kernel.Tiles(rows, stored, tiles[index - 2], 4),) * 2)
    monkeypatch.setattr(kernel, 'ENOUGH_PROGRAMS', 0)
    for case in ((1, 1, 12, 6, 8, 16, 40, 2, True), (1, 1, 5, 24, 12, 16, None, 2, True)):
        tensors = problem(*case)
        assert_same(learned(ours, leaves(tensors)), exactly(tensors), EXACT)


def test_what_is_not_below_the_diagonal_is_not_read(calls, poisoned):
    for where in (ours, lambda own: plain_retrieve(parts_of(own), EPS, torch.float32)[0]):
        tensors = problem(*SMALL)
        expected = learned(where, leaves(tensors))
        tensors['mix'] += torch.randn_like(tensors['mix']).triu()
        came = learned(where, leaves(tensors))
        assert_same(came, expected, 0.0)
        assert not came[1]['mix'].triu().any()


def test_kernels_read_views(calls, poisoned):
    heads, runs, steps, rows, stored, dim, width, starts, _ = case = (2, 2, 3, 2, 2, 16, 20, 2, True)
    tensors = problem(*case)
    # queries and keys out of a longer sequence of all heads, whose features lie beside each other
    sequence = torch.randn(runs * steps * rows + 3, 2, heads * dim, device=DEVICE)
    queries = sequence[3:, 0].unflatten(-1, (heads, dim)).transpose(0, 1).unflatten(1, (runs, steps, rows))
    keys = sequence[:-3, 1].unflatten(-1, (heads, dim)).transpose(0, 1).unflatten(1, (runs, steps * stored))
    cut = tensors | {
        'queries': queries,
        'first_inputs': keys,
        'mix': tensors['mix'].repeat_interleave(stored, dim=3)[..., ::stored],
        'shares': torch.randn(heads, runs, steps + 1, starts + 1, device=DEVICE)[:, :, 1:, 1:],
        # of every other feature, turned, or the same for all heads
        'first_starts': tensors['first_starts'].mT.contiguous().mT,
        'last_starts': tensors['last_starts'][:1].expand(heads, -1, -1, -1, -1),
        'first_errors': torch.randn(heads, runs, steps * stored, 2 * width, device=DEVICE)[..., ::2],
        'last_errors': torch.randn(heads, runs, steps * stored + 1, dim, device=DEVICE)[:, :, 1:],
        'gamma': torch.randn(heads, runs * steps + 1, dim, device=DEVICE)[:, :-1].unflatten(1, (runs, steps)),
    }
    changed = {name: t for name, t in cut.items() if t is not tensors[name]}
    assert len(changed) == 9 and not any(t.is_contiguous() for t in changed.values())
    came = learned(ours, {name: t.detach().requires_grad_() for name, t in cut.items()})
    assert_same(came, exactly(cut), EXACT)
    assert calls == ['kernels'] * 2


@pytest.mark.parametrize('case', [SMALL, (1, 2, 5, 3, 6, 20, None, 2, False)])
@pytest.mark.parametrize('rows', [torch.float32, LOW])
def test_kernels_are_as_exact_under_autocast_as_plain_operations(calls, poisoned, case, rows, monkeypatch):
    tensors = problem(*case)
    tensors = {name: t.to(LOW) if name.endswith(('inputs', 'errors')) else t for name, t in tensors.items()}
    tensors['queries'] = tensors['queries'].to(rows)
    came = []
    for fused in (True, False):
        monkeypatch.setattr(_dispatch, 'kernels_run_on', lambda device, fused=fused: fused)
        with torch.autocast(DEVICE, LOW):
            came.append(learned(ours, leaves(tensors)))
    assert calls == ['kernels'] * 2
    assert_no_worse(*came, exactly(tensors), floor=1e-4)


def assert_no_worse(ours, theirs, exact, floor):
    (out, gradients), (their_out, their_gradients), (exact_out, exact_gradients) = ours, theirs, exact
    pairs = {'out': (out, their_out, exact_out)}
    pairs |= {name: (gradients[name], their_gradients[name], want) for name, want in exact_gradients.items()}
    for name, (own, their, want) in pairs.items():
        assert own.dtype == their.dtype and own.shape == want.shape
        error, budget = ((t.double() - want).norm() for t in (own, their))
        assert error <= max(2 * budget, floor * want.norm()), f'{name}: {error:.2e}, plain {budget:.2e}'


@pytest.mark.parametrize('learns', [('queries',), ('last_starts', 'shares'), ('mix', 'gamma', 'first_errors')])
def test_only_some_learn(calls, poisoned, learns):
    tensors = problem(*SMALL)
    some = {name: t.clone().requires_grad_(name in learns) for name, t in tensors.items()}
    out, came = learned(ours, some)
    expected_out, expected = exactly(tensors)
    assert_same((out, came), (expected_out, {name: expected[name] for name in came}), EXACT)
    assert came.keys() == {*learns}


def test_without_gradients(calls, poisoned):
    tensors = problem(*SMALL)
    with torch.no_grad():
        assert_same(ours(tensors), plainly({name: t.double() for name, t in tensors.items()}), EXACT)
    assert calls == ['kernels']


# which of the two is taken


def test_what_no_kernel_serves_is_plain(calls):
    for case in ((1, 1, 2, 1, 1, 132, 4, 1, True), (1, 1, 2, 1, 1, 4, 4, 5, True)):
        tensors = problem(*case)
        assert_same(learned(ours, leaves(tensors)), exactly(tensors), EXACT)
    learned(ours, leaves(problem(*SMALL), torch.float64))
    assert not calls


def test_what_kernels_serve(monkeypatch):
    monkeypatch.setattr(_dispatch, 'kernels_run_on', lambda device: True)

    def served(case, change=lambda name, t: t):
        parts = parts_of({name: change(name, t) for name, t in problem(*case).items()})
        first = None if parts.first_starts is None else Matrix(*parts[3:6])
        return retrieve_sequence.kernels_serve(*parts[:3], first, Matrix(*parts[6:9]), parts.gamma)

    def low_rows(name, t):
        return t.to(LOW) if name.endswith(('queries', 'inputs', 'errors')) else t

    assert all(served(case) for case in CASES)
    assert not served((1, 1, 2, 1, 1, 132, 4, 1, True))
    assert not served((1, 1, 2, 1, 1, 4, 4, 5, True))
    assert not served(SMALL, lambda name, t: t.double())
    assert not served(SMALL, lambda name, t: t.to(LOW) if name == 'first_starts' else t)
    # in one precision below, products are in it only under autocast
    assert not served(SMALL, low_rows)
    with torch.autocast(DEVICE, LOW):
        assert served(SMALL, low_rows) and served(SMALL)
    monkeypatch.undo()
    if DEVICE == 'cpu':
        assert not served(SMALL)


# to the compiler


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('case', [SMALL, (1, 2, 3, 2, 2, 16, None, 2, False)])
def test_operations_are_what_they_say(calls, case, fused, monkeypatch):
    monkeypatch.setattr(_dispatch, 'kernels_run_on', lambda device: fused)
    args = (*parts_of(leaves(problem(*case))), EPS, torch.float32)
    torch.library.opcheck(retrieve_sequence._retrieve, args, test_utils=CHECKS)
    out, *saved = (t.detach() for t in retrieve_sequence._retrieve(*args))
    given = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    torch.library.opcheck(
        retrieve_sequence._retrieve_backward, (out, *given[:-2], *saved, *given[-2:]), test_utils=CHECKS[:3]
    )
    assert bool(calls) == fused


def test_it_compiles_to_one_operation(calls, fresh_compiler):
    tensors, seen = problem(*SMALL), []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend('aot_eager')(graph, inputs)

    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    assert_same(learned(compiled, leaves(tensors)), learned(ours, leaves(tensors)), 1e-6)
    assert sum('titans_pytorch' in name for name in seen) == 1


# on a GPU, in the sizes of training


@pytest.mark.gpu
@pytest.mark.parametrize('low', [False, True])
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
def test_kernels_in_sizes_of_training(calls, poisoned, case, low, monkeypatch):
    tensors = problem(*case)
    if low:
        tensors = {name: t.to(LOW) if name.endswith(('inputs', 'errors')) else t for name, t in tensors.items()}
    came = []
    for fused in (True, False):
        monkeypatch.setattr(_dispatch, 'kernels_run_on', lambda device, fused=fused: fused)
        with torch.autocast('cuda', LOW, enabled=low):
            came.append(learned(ours, leaves(tensors)))
    assert calls == ['kernels'] * 2
    assert_no_worse(*came, exactly(tensors), floor=1e-5)
