"""A run of chunks in a memory MLP by fused operations: plain, by Triton kernels, and inside a whole memory."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same, gradients
from memories import inputs, memory
from titans_pytorch.memory.engines import Chunks, DualEngine, Mixing, default_loss_fn

from titans_pytorch.memory import engines
from titans_pytorch.memory_models import MemoryMLP, ResidualNorm
from titans_pytorch.ops import _dispatch, inner_gradient, memory_batch_scan

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter multiplies no bfloat16
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
# products in float32 of three TF32 ones keep a little less
EXACT = 5e-6 if DEVICE == 'cpu' else 2e-5
# heads, chunks, rows of a chunk, width, factor to the hidden width
SHAPES = [(2, 4, 4, 16, 2.0), (2, 5, 1, 16, 4.0), (1, 3, 3, 20, 2.5), (1, 2, 20, 40, 2.0), (1, 5, 2, 128, 1.1)]
NETWORKS = [(depth, norm) for depth in (1, 2) for norm in (True, False)]


@pytest.fixture
def calls(monkeypatch):
    """Kernels run on this device too; the operations that are called."""
    pytest.importorskip('triton')
    calls = []

    def noted(name):
        operation = getattr(fused_mlp, name)
        return lambda *args: calls.append(name) or operation(*args)

    for name in ('record', 'ends'):
        monkeypatch.setattr(fused_mlp, name, noted(name))
    monkeypatch.setattr(_dispatch, 'kernels_run_on', lambda device: True)
    return calls


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# what a run costs: `record`


def network(depth, norm, dim, factor):
    model = MemoryMLP(dim, depth, factor)
    return ResidualNorm(dim, model) if norm else model


def problem(model, heads, chunks, rows, dim):
    """Keys, values, step sizes and weights, by name."""
    tensors = {
        'keys': torch.randn(heads, chunks, rows, dim),
        'values': torch.randn(heads, chunks, rows, dim),
        'step_sizes': torch.rand(heads, chunks, rows),
    }
    for name, p in model.named_parameters():
        tensors[name] = torch.randn(heads, *p.shape) * (p.shape[0] ** -0.5 if p.ndim > 1 else 0.3)
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def leaf(t, dtype=None):
    return t.detach().to(dtype or t.dtype).requires_grad_()


def recorded(model, tensors, loss_fn=default_loss_fn):
    """What the engine notes of a run, and the gradient of a linear function of it all by every tensor."""
    keys, values, step_sizes, *_ = tensors.values()
    base, added = ({name: tensors.get(of + name) for name, _ in model.named_parameters()} for of in ('', 'added '))
    residual = engines.Residual(None, added, tensors['shares'], 0) if 'shares' in tensors else None
    engine = DualEngine(model, loss_fn, None, None, False)
    *named, losses = engine._factors(Chunks(keys, values, step_sizes, None, None, None, None), base, residual)
    out = {f'{kind} {name}': t for kind, own in zip('XΔv', named) for name, t in own.items()} | {'losses': losses}
    return out, dict(zip(tensors, torch.autograd.grad(functional(out), [*tensors.values()])))


def functional(tensors):
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(t.shape, generator=generator) for name, t in sorted(tensors.items())}
    return sum((t.double() * weights[name].to(t.device)).sum() for name, t in tensors.items())


def exactly(model, tensors):
    return recorded(model, {name: leaf(t, torch.float64) for name, t in tensors.items()})


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
def test_record_is_written_out_rightly(depth, norm, monkeypatch):
    # the plain twin in place of the kernels, in float64, against autograd
    model = network(depth, norm, 6, 2.5)
    tensors = {name: leaf(t, torch.float64) for name, t in problem(model, 3, 4, 5, 6).items()}
    expected = recorded(model, tensors)
    monkeypatch.setattr(engines, 'fused_record_serves', lambda *_: True)
    assert_same(recorded(model, tensors), expected, 1e-13)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
def test_record_equals_the_plain_engine(calls, poisoned, depth, norm, shape):
    *sizes, factor = shape
    model = network(depth, norm, sizes[-1], factor)
    tensors = problem(model, *sizes)
    came = recorded(model, {name: leaf(t) for name, t in tensors.items()})
    assert calls == ['record']
    expected = exactly(model, tensors)
    assert calls == ['record']
    assert_same(came, expected, EXACT)
    assert all(t.dtype == torch.float32 for own in came for t in own.values())


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
def test_programs_of_more_rows(calls, poisoned, depth, norm, monkeypatch):
    from titans_pytorch.ops.inner_gradient import triton as record

    monkeypatch.setattr(record, 'ENOUGH_PROGRAMS', 1)
    model = network(depth, norm, 16, 2.0)
    for chunks, rows in ((9, 3), (2, 40)):
        tensors = problem(model, 1, chunks, rows, 16)
        assert_same(recorded(model, {name: leaf(t) for name, t in tensors.items()}), exactly(model, tensors), EXACT)


def test_record_reads_views(calls, poisoned):
    # chunks out of a longer sequence, keys without the last row and values without the first, weights of all heads
    model = network(2, True, 16, 2.0)
    longer = problem(model, 2, 9, 4, 16)
    shared = {name: t[:1].expand(t.shape) for name, t in longer.items()}
    cut = {
        'keys': longer['keys'][:, 2:7, :-1],
        'values': longer['values'][:, 2:7, 1:],
        'step_sizes': longer['step_sizes'][:, 2:7, :-1],
        **{name: t for name, t in shared.items() if '.' in name},
    }
    came = recorded(model, {name: t.requires_grad_() for name, t in cut.items()})
    assert not any(t.is_contiguous() for t in cut.values()) and calls == ['record']
    assert_same(came, exactly(model, cut), EXACT)


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
@pytest.mark.parametrize('dtype', [torch.float32, LOW])
def test_record_is_as_exact_under_autocast_as_the_plain_engine(calls, poisoned, depth, norm, dtype, monkeypatch):
    model = network(depth, norm, 16, 4.0)
    tensors = {
        name: t if '.' in name or t.ndim == 3 else t.to(dtype) for name, t in problem(model, 4, 8, 4, 16).items()
    }
    assert_no_worse(model, tensors, calls, monkeypatch, LOW)


def assert_no_worse(model, tensors, calls, monkeypatch, low=None, floor=0.0, same_dtypes=True):
    """Than the plain engine in the same precision; `floor`: what full float32 may differ by for order alone."""
    exact, came = exactly(model, tensors), []
    for fused in (True, False):
        monkeypatch.setattr(_dispatch, 'kernels_run_on', lambda device, fused=fused: fused)
        with torch.autocast(DEVICE, low, enabled=low is not None):
            came.append(recorded(model, {name: leaf(t) for name, t in tensors.items()}))
    assert calls == ['record']
    for ours, theirs, want in zip(*came, exact):
        assert ours.keys() == theirs.keys() == want.keys()
        for name, t in want.items():
            # on a CPU, autocast leaves the square of the default loss in low precision
            like = ours[name].dtype == theirs[name].dtype or (name, DEVICE) == ('losses', 'cpu')
            assert like or not same_dtypes, name
            error, budget = ((own[name].double() - t).norm() for own in (ours, theirs))
            assert error <= max(2 * budget, floor * t.norm()), f'{name}: {error:.2e}, plain {budget:.2e}'


# and at weights of its own for each chunk


# a chunk of one row and of several, odd widths, chunks in parts, matrices that are not kept on chip
OTHER_SHAPES = [(2, 3, 4, 16, 2.0), (2, 3, 1, 20, 1.85), (1, 1, 17, 20, 1.85), (1, 3, 40, 16, 1.5), (1, 2, 4, 100, 1.4)]


def with_another(model, heads, chunks, *sizes):
    """The same with another memory's weights before each chunk, and shares of them."""
    tensors = problem(model, heads, chunks, *sizes)
    own = {name: w for name, w in tensors.items() if '.' in name}
    shares = {'shares': torch.rand(heads, chunks, device=DEVICE)}
    others = {f'added {name}': torch.randn_like(w[:, None].expand(-1, chunks, *w.shape[1:])) for name, w in own.items()}
    return tensors | shares | {name: t * t.shape[-2] ** -0.5 for name, t in others.items()}


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
def test_a_residual_is_written_out_rightly(depth, norm, monkeypatch):
    model = network(depth, norm, 6, 2.5)
    tensors = {name: leaf(t, torch.float64) for name, t in with_another(model, 3, 4, 5, 6).items()}
    expected = recorded(model, tensors)
    monkeypatch.setattr(engines, 'fused_record_serves', lambda *_: True)
    assert_same(recorded(model, tensors), expected, 1e-13)


@pytest.mark.parametrize('shape', OTHER_SHAPES)
@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
def test_a_residual_equals_the_plain_engine(calls, poisoned, depth, norm, shape):
    *sizes, factor = shape
    model = network(depth, norm, sizes[-1], factor)
    tensors = with_another(model, *sizes)
    came = recorded(model, {name: leaf(t) for name, t in tensors.items()})
    assert calls == ['record']
    assert_same(came, exactly(model, tensors), EXACT)
    assert all(t.dtype == torch.float32 for own in came for t in own.values())


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
def test_chunks_shared_out_among_programs(calls, poisoned, depth, norm, monkeypatch):
    from titans_pytorch.ops.inner_gradient import triton as record

    model = network(depth, norm, 16, 4.0)
    tensors = with_another(model, 2, 5, 3, 16)
    exact = exactly(model, tensors)
    # all of them to one program, or two to each; and matrices read anew instead of kept
    for programs, kept in ((1, 4096), (24, 512)):
        monkeypatch.setattr(record, 'ENOUGH_SUMS', programs)
        monkeypatch.setattr(record, 'KEPT_IN_FULL', kept)
        assert_same(recorded(model, {name: leaf(t) for name, t in tensors.items()}), exact, EXACT)


def test_record_reads_views_of_a_residual(calls, poisoned):
    # a run out of the other memory's chunks, one matrix held transposed
    model = network(2, True, 16, 2.0)
    tensors = with_another(model, 2, 7, 4, 16)
    cut = {name: t if name in dict(model.named_parameters()) else t[:, 2:5] for name, t in tensors.items()}
    turned = 'added model.weights.0'
    cut[turned] = cut[turned].mT.contiguous().mT
    came = recorded(model, {name: t.requires_grad_() for name, t in cut.items()})
    assert calls == ['record']
    assert_same(came, exactly(model, cut), EXACT)


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
@pytest.mark.parametrize('dtype', [torch.float32, LOW])
def test_a_residual_is_as_exact_under_autocast(calls, poisoned, depth, norm, dtype, monkeypatch):
    model = network(depth, norm, 16, 4.0)
    tensors = lowered(with_another(model, 2, 4, 4, 16), dtype)
    # shares in float32 raise what the plain engine computes in, but not the operation
    floor = torch.finfo(LOW).eps if dtype == torch.float32 else 0.0
    assert_no_worse(model, tensors, calls, monkeypatch, LOW, floor, dtype == LOW)


def lowered(tensors, dtype):
    """As a memory under autocast gives them: rows, shares and what is added in its precision."""
    low = ('keys', 'values', 'shares')
    return {name: t.to(dtype) if name in low or 'added' in name else t for name, t in tensors.items()}


# what it leaves: `ends`


def run(heads, chunks, rows, dim, width, orders):
    sizes = {'decay': (chunks,), 'inputs': (chunks, rows, dim), 'errors': (chunks, rows, width)}
    sizes |= {'momentum': (chunks, orders)} if orders else {}
    sizes |= {f'start {index}': (dim, width) for index in range(1 + orders)}
    return {name: torch.randn(heads, *size, device=DEVICE) for name, size in sizes.items()}


def ended(tensors):
    mixing = Mixing.of(tensors['decay'], tensors.get('momentum'), None)
    starts = [t for name, t in tensors.items() if name.startswith('start')]
    states = engines._ends(mixing, starts, tensors['inputs'], tensors['errors'])
    out = {str(index): state for index, state in enumerate(states)}
    return out, dict(zip(tensors, torch.autograd.grad(functional(out), [*tensors.values()])))


ENDS = [
    (2, 4, 4, 16, 32, 0),
    (2, 3, 3, 40, 16, 1),
    (1, 5, 1, 20, 100, 1),
    (1, 13, 3, 130, 20, 2),
    (2, 2, 40, 20, 20, 3),
]


@pytest.mark.parametrize('orders', [0, 1, 3])
def test_ends_is_written_out_rightly(orders, monkeypatch):
    tensors = {name: leaf(t, torch.float64) for name, t in run(3, 4, 2, 5, 7, orders).items()}
    expected = ended(tensors)
    monkeypatch.setattr(inner_gradient, 'kernels_serve_ends', lambda *_: True)
    assert_same(ended(tensors), expected, 1e-13)


@pytest.mark.parametrize('sizes', ENDS)
def test_ends_equals_the_plain_engine(calls, poisoned, sizes):
    tensors = run(*sizes)
    came = ended({name: leaf(t) for name, t in tensors.items()})
    assert_same(came, ended({name: leaf(t, torch.float64) for name, t in tensors.items()}), EXACT)
    assert calls == ['ends']


def test_ends_reads_views(calls, poisoned):
    tensors = run(2, 9, 4, 16, 24, 1)
    cut = {name: t[:, 2:7] if name in ('decay', 'momentum') else t for name, t in tensors.items()}
    cut |= {name: tensors[name][:, 2:7, :-1] for name in ('inputs', 'errors')}
    cut |= {'start 0': tensors['start 0'][:1].expand(2, -1, -1), 'start 1': tensors['start 1'].mT.contiguous().mT}
    cut = {name: t.requires_grad_() for name, t in cut.items()}
    assert_same(ended(cut), ended({name: leaf(t, torch.float64) for name, t in cut.items()}), EXACT)
    assert calls == ['ends']


def test_ends_is_as_exact_under_autocast_as_the_plain_engine(calls, poisoned, monkeypatch):
    tensors = {name: t.to(LOW) if t.ndim == 4 else t for name, t in run(4, 8, 4, 16, 64, 1).items()}
    came, exact = [], ended({name: leaf(t, torch.float64) for name, t in tensors.items()})
    for fused in (True, False):
        monkeypatch.setattr(_dispatch, 'kernels_run_on', lambda device, fused=fused: fused)
        with torch.autocast(DEVICE, LOW):
            came.append(ended({name: leaf(t) for name, t in tensors.items()}))
    assert calls == ['ends']
    for ours, theirs, want in zip(*came, exact):
        for name, t in want.items():
            assert ours[name].dtype == theirs[name].dtype
            assert (ours[name] - t).norm() <= 2 * (theirs[name] - t).norm() + 1e-6 * t.norm()


# which of the two is taken


def test_what_no_kernel_serves_is_plain(calls):
    class Other(MemoryMLP):
        pass

    def other_loss(pred, target):
        return (pred - target).abs().sum(dim=-1)

    for model in (MemoryMLP(8, 3), Other(8, 2), ResidualNorm(8, Other(8, 1))):
        recorded(model, {name: leaf(t) for name, t in problem(model, 1, 2, 2, 8).items()})
    model = MemoryMLP(8, 2)
    tensors = {name: leaf(t) for name, t in problem(model, 1, 2, 2, 8).items()}
    recorded(model, tensors, other_loss)
    exactly(model, tensors)
    wide = MemoryMLP(136, 1)
    recorded(wide, {name: leaf(t) for name, t in problem(wide, 1, 1, 1, 136).items()})
    assert not calls
    ended({name: leaf(t) for name, t in run(1, 2, 2, 4, 4, 4).items()})
    ended({name: leaf(t) for name, t in run(1, 1, 1, 136, 136, 0).items()})
    assert not calls


def test_without_gpu_nothing_is_fused():
    assert _dispatch.kernels_run_on(torch.device('cpu')) is False


# a whole memory


MATERIALISED = ['spectral norm', 'two keys per token', 'linear memory']
FACTORED = ['no momentum', 'momentum of order 3, combined', 'soft clamp', 'no residual norm', 'lookahead values']


@pytest.fixture
def one_by_one(monkeypatch):
    """Memory batches, not several at once."""
    monkeypatch.setattr(memory_batch_scan, 'kernels_serve', lambda *_: False)


@pytest.mark.parametrize('switch', [*MATERIALISED, *FACTORED])
def test_a_memory_equals_the_dense_engine(calls, switch, one_by_one):
    agrees_with_the_dense_engine(switch)
    # matrices that are no larger than a chunk's rows are formed
    assert 'record' in calls and ('ends' in calls) == (switch not in MATERIALISED)


@pytest.mark.parametrize('switch', ['plain', 'no residual norm'])
def test_a_memory_that_stores_batches_at_once_equals_the_dense_engine(calls, switch):
    agrees_with_the_dense_engine(switch)
    assert not calls


def agrees_with_the_dense_engine(switch):
    fused = memory(switch, engine='dual').float().to(DEVICE)
    dense = memory(switch, engine='dense').to(DEVICE)
    dense.load_state_dict(fused.state_dict())
    seq = inputs(dense, 17).to(DEVICE)
    results = []
    for mem in (fused, dense):
        out, state = mem(seq.to(next(mem.parameters()).dtype))
        loss = out.double().sin().sum() + sum(w.double().sum() for w in state.states[0].values())
        results.append((out, state.states, gradients(mem, loss)))
    assert_same(*results, 3e-4)


@pytest.mark.parametrize('at_once', [True, False])
def test_a_memory_compiles_to_few_operations(calls, fresh_compiler, monkeypatch, at_once):
    mem, seen = memory().float().to(DEVICE), []
    seq = inputs(mem, 9).float().to(DEVICE)
    serve = memory_batch_scan.kernels_serve
    monkeypatch.setattr(memory_batch_scan, 'kernels_serve', lambda *args: at_once and serve(*args))

    def loss(seq):
        out, state = mem(seq)
        return out.pow(2).sum() + sum(w.sum() for w in state.states[0].values())

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend('aot_eager')(graph, inputs)

    compiled = torch.compile(loss, fullgraph=True, backend=backend)(seq)
    # one memory batch, of two matrices
    counts = [sum(what in name for name in seen) for what in ('walk', 'record', 'ends', 'titans_pytorch.retrieve')]
    assert counts == ([1, 0, 0, 1] if at_once else [0, 1, 2, 1]), seen
    expected = loss(seq)
    assert_same((compiled, gradients(mem, compiled)), (expected, gradients(mem, expected)), 1e-5)


@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
@pytest.mark.parametrize('residual', [False, True])
def test_operations_are_what_they_say(calls, depth, norm, residual):
    model = network(depth, norm, 16, 2.0)
    tensors = {name: leaf(t) for name, t in with_another(model, 2, 3, 2, 16).items()}
    first, last = ([None] + [name for name in tensors if name.startswith(('model.weights', 'weights'))])[-2:]
    names = (first, last, 'norm.gamma')
    weights = [tensors.get(name) for name in names]
    others = (
        [tensors.get(name) for name in ('shares', *(f'added {name}' for name in names))] if residual else [None] * 4
    )
    rows = tuple(tensors[name] for name in ('keys', 'values', 'step_sizes'))
    args = (*rows, *weights, *others, 1e-5, torch.float32)
    checks = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')
    torch.library.opcheck(inner_gradient._record, args, test_utils=checks)
    outputs = [t.detach() for t in inner_gradient._record(*args)]
    saved = [None if t is None else t.detach() for t in args[:10]]
    torch.library.opcheck(
        inner_gradient._record_backward,
        (*outputs, *saved, outputs[0], outputs[2], 1e-5, torch.float32),
        test_utils=checks[:3],
    )


def test_operations_of_the_ends_are_what_they_say(calls):
    tensors = {name: leaf(t) for name, t in run(2, 3, 2, 16, 20, 1).items()}
    mixing = Mixing.of(tensors['decay'].detach(), tensors['momentum'].detach(), None)
    starts = [tensors['start 0'], tensors['start 1']]
    args = (leaf(mixing.end), leaf(mixing.end_starts), starts, tensors['inputs'], tensors['errors'], torch.float32)
    checks = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')
    torch.library.opcheck(inner_gradient._ends, args, test_utils=checks)
    saved = [[t.detach() for t in own] if isinstance(own, list) else own.detach() for own in args[:-1]]
    d_states = [start.detach().clone() for start in starts]
    torch.library.opcheck(inner_gradient._ends_backward, (d_states, *saved, torch.float32), test_utils=checks[:3])


# on a GPU, in the sizes of training


@pytest.mark.gpu
@pytest.mark.parametrize('precision', ['highest', 'high', 'bfloat16'])
@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
@pytest.mark.parametrize(
    'shape',
    [(64, 32, 4, 64, 4.0), (16, 32, 4, 64, 4.0), (8, 5, 3, 100, 2.5), (16, 8, 64, 128, 4.0), (3, 32, 1, 16, 2.0)],
)
def test_record_in_sizes_of_training(calls, poisoned, shape, depth, norm, precision, monkeypatch):
    *sizes, factor = shape
    model = network(depth, norm, sizes[-1], factor)
    tensors = problem(model, *sizes)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest' if precision == 'bfloat16' else precision)
    try:
        low = torch.bfloat16 if precision == 'bfloat16' else None
        assert_no_worse(model, tensors, calls, monkeypatch, low, floor=1e-5)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize('low', [None, torch.bfloat16])
@pytest.mark.parametrize(('depth', 'norm'), NETWORKS)
@pytest.mark.parametrize(
    'shape',
    [(16, 32, 4, 64, 2.0), (64, 8, 4, 64, 4.0), (8, 5, 3, 100, 2.5), (4, 8, 64, 128, 2.0), (3, 32, 1, 16, 2.0)],
)
def test_a_residual_in_sizes_of_training(calls, poisoned, shape, depth, norm, low, monkeypatch):
    *sizes, factor = shape
    model = network(depth, norm, sizes[-1], factor)
    tensors = with_another(model, *sizes)
    if low is not None:
        tensors = lowered(tensors, low)
    assert_no_worse(model, tensors, calls, monkeypatch, low, floor=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('precision', ['highest', 'high', 'bfloat16'])
@pytest.mark.parametrize(
    'sizes', [(64, 32, 4, 64, 256, 1), (16, 32, 4, 256, 64, 1), (8, 5, 3, 100, 250, 2), (4, 8, 64, 512, 128, 0)]
)
def test_ends_in_sizes_of_training(calls, poisoned, sizes, precision, monkeypatch):
    tensors = run(*sizes)
    exact, came = ended({name: leaf(t, torch.float64) for name, t in tensors.items()}), []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest' if precision == 'bfloat16' else precision)
    try:
        for fused in (True, False):
            monkeypatch.setattr(_dispatch, 'kernels_run_on', lambda device, fused=fused: fused)
            with torch.autocast('cuda', torch.bfloat16, enabled=precision == 'bfloat16'):
                came.append(ended({name: leaf(t) for name, t in tensors.items()}))
    finally:
        torch.set_float32_matmul_precision(before)
    for ours, theirs, want in zip(*came, exact):
        for name, t in want.items():
            error, budget = ((own[name].double() - t).norm() for own in (ours, theirs))
            assert error <= max(2 * budget, 1e-5 * t.norm()), f'{name}: {error:.2e}, plain {budget:.2e}'


@pytest.mark.gpu
@pytest.mark.parametrize('low', [None, torch.bfloat16])
def test_a_step_of_a_memory_is_captured(low):
    mem = memory().float().cuda()
    seq = torch.empty_like(inputs(mem, 29)).float().cuda()

    def step():
        with torch.autocast('cuda', torch.bfloat16, enabled=low is not None, cache_enabled=False):
            out, state = mem(seq)
            loss = out.pow(2).sum() + sum(w.sum() for w in state.states[0].values())
        loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    mem.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for _ in range(2):
        seq.copy_(torch.randn_like(seq))
        mem.zero_grad(set_to_none=False)
        graph.replay()
        came = replayed.clone(), [p.grad.clone() for p in mem.parameters()]
        mem.zero_grad(set_to_none=False)
        assert_same(came, (step(), [p.grad.clone() for p in mem.parameters()]), 1e-5)
