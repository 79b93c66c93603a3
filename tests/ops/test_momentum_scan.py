"""Momentum and weights over a block of chunks: by the reference and by Triton kernels, against a loop and autograd."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from compare import assert_same, gradients, randomised

from titans_pytorch import NeuralMemory, without_kernels
from titans_pytorch.memory.backends import SpectralBackend, spectral
from titans_pytorch.memory.soft_clamp import soft_clamp_norm
from titans_pytorch.ops import _dispatch
from titans_pytorch.ops.momentum_scan import momentum_scan, reference, vector_scan, weight_scan

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter multiplies no bfloat16
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
# products in float32 of three TF32 ones keep a little less
EXACT = 1e-6 if DEVICE == 'cpu' else 5e-6
# heads, chunks, rows of a chunk, and the sides of a matrix
SHAPES = [
    (2, 5, 4, 16, 32),
    (2, 5, 3, 20, 37),
    (1, 1, 1, 5, 3),
    (1, 2, 16, 130, 20),
    (3, 4, 1, 37, 20),
    (1, 3, 40, 20, 37),
    (1, 35, 2, 8, 6),
]
MOMENTA = [
    ('scales', 'gates', 'start'),
    ('gates', 'start'),
    ('gates',),
    ('scales',),
    (),
    ('scales', 'start'),
]
VECTORS = [
    ('scales', 'gates', 'momentum_start'),
    ('gates', 'momentum_start'),
    ('gates',),
    ('scales',),
    (),
]
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


def leaf(t, dtype=None):
    return t.detach().to(dtype or t.dtype).requires_grad_()


def leaves(tensors, dtype=None):
    return {name: leaf(t, dtype) for name, t in tensors.items()}


def matrices(heads, chunks, rows, dim, width, present=MOMENTA[0]):
    """Of `momenta`, its arguments by name."""
    tensors = {
        'inputs': torch.randn(heads, chunks, rows, dim),
        'deltas': torch.randn(heads, chunks, rows, width),
        'scales': torch.randn(heads, chunks),
        'gates': torch.rand(heads, chunks),
        'start': torch.randn(heads, dim, width),
    }
    return {name: t.to(DEVICE) for name, t in tensors.items() if name in ('inputs', 'deltas', *present)}


def vectors(heads, chunks, features, present=VECTORS[0]):
    """Of `vectors_over_time`."""
    tensors = {
        'updates': torch.randn(heads, chunks, features),
        'scales': torch.randn(heads, chunks),
        'gates': torch.rand(heads, chunks),
        'keep': torch.rand(heads, chunks),
        'momentum_start': torch.randn(heads, features),
        'weight_start': torch.randn(heads, features),
    }
    always = ('updates', 'keep', 'weight_start')
    return {name: t.to(DEVICE) for name, t in tensors.items() if name in (*always, *present)}


# the two recurrences as they stand in the paper


def looped_momenta(inputs, deltas, scales=None, gates=None, start=None):
    state, over_chunks = 0.0 if start is None else start, []
    for chunk in range(inputs.shape[1]):
        update = inputs[:, chunk].mT @ deltas[:, chunk]
        if scales is not None:
            update = scales[:, chunk, None, None] * update
        state = update if gates is None else gates[:, chunk, None, None] * state + update
        over_chunks.append(state)
    return {'every': torch.stack(over_chunks, dim=1), 'end': state}


def looped_vectors(updates, keep, weight_start, scales=None, gates=None, momentum_start=None):
    weight, momentum = weight_start, 0.0 if momentum_start is None else momentum_start
    before = []
    for chunk in range(updates.shape[1]):
        before.append(weight)
        update = updates[:, chunk] if scales is None else scales[:, chunk, None] * updates[:, chunk]
        momentum = update if gates is None else gates[:, chunk, None] * momentum + update
        weight = keep[:, chunk, None] * weight + momentum
    ends = {'weight_end': weight} | ({} if gates is None else {'momentum_end': momentum})
    return {'before': torch.stack(before, dim=1), **ends}


# and ours


def log(gates):
    return None if gates is None else gates.log()


def our_momenta(inputs, deltas, scales=None, gates=None, start=None, out_dtype=None):
    every, end = momentum_scan(inputs, deltas, scales, log(gates), start, out_dtype or inputs.dtype)
    return {'every': every, 'end': end}


def our_vectors(updates, keep, weight_start, scales=None, gates=None, momentum_start=None):
    before, end, momentum_end = vector_scan(updates, scales, log(gates), keep.log(), momentum_start, weight_start)
    ends = {'weight_end': end} | ({} if momentum_end is None else {'momentum_end': momentum_end})
    return {'before': before, **ends}


def learned(function, tensors, used=None):
    """What `function` gives, and the gradient of a linear function of it, or of what is `used`, by every tensor."""
    generator, total = torch.Generator().manual_seed(1), 0.0
    out = function(**tensors)
    for name, t in out.items():
        weights = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        if used is None or name in used:
            total = total + (t.double() * weights).sum()
    came = torch.autograd.grad(total, [*tensors.values()], allow_unused=True)
    zeros = (torch.zeros_like(t) if own is None else own for own, t in zip(came, tensors.values()))
    return out, dict(zip(tensors, zeros))


def exactly(function, tensors, used=None):
    return learned(function, leaves(tensors, torch.float64), used)


@pytest.mark.parametrize('present', MOMENTA)
def test_momentum_scan_equals_a_loop(present):
    tensors = matrices(2, 4, 3, 5, 7, present)
    assert_same(exactly(our_momenta, tensors), exactly(looped_momenta, tensors), 1e-13)


@pytest.mark.parametrize('present', VECTORS)
def test_vector_scan_equals_a_loop(present):
    tensors = vectors(2, 4, 7, present)
    assert_same(exactly(our_vectors, tensors), exactly(looped_vectors, tensors), 1e-13)


def test_saturated_gates_have_finite_gradients():
    log_gates = torch.tensor([[-1e-30, -1e4, -200.0, -1e-3]], dtype=torch.float64, requires_grad=True)
    updates, start = torch.randn(1, 4, 3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    out = vector_scan(updates, None, log_gates, log_gates, start, start)
    expected = looped_vectors(updates, log_gates.exp(), start, gates=log_gates.exp(), momentum_start=start)
    assert_same(dict(zip(expected, (out[0], out[1], out[2]))), expected, 1e-13)
    (gradient,) = torch.autograd.grad(sum(t.sum() for t in out), log_gates)
    assert gradient.isfinite().all()


@pytest.mark.parametrize('present', MOMENTA)
@pytest.mark.parametrize('shape', SHAPES)
def test_kernels_of_momenta(kernels_everywhere, poisoned, shape, present):
    tensors = matrices(*shape, present)
    came = learned(our_momenta, leaves(tensors))
    assert_same(came, exactly(looped_momenta, tensors), EXACT)
    assert all(t.dtype == torch.float32 for own in came for t in own.values())


@pytest.mark.parametrize('present', VECTORS)
@pytest.mark.parametrize('shape', [(2, 5, 37), (1, 1, 3), (3, 4, 600), (1, 70, 5)])
def test_kernels_of_vectors(kernels_everywhere, poisoned, shape, present):
    tensors = vectors(*shape, present)
    came = learned(our_vectors, leaves(tensors))
    assert_same(came, exactly(looped_vectors, tensors), EXACT)
    assert all(t.dtype == torch.float32 for own in came for t in own.values())


@pytest.mark.parametrize('shape', [(2, 5, 20, 37), (3, 1, 7)])
def test_weights_take_updates_of_any_shape(kernels_everywhere, poisoned, shape):
    updates, start = torch.randn(shape, device=DEVICE), torch.randn(shape[0], *shape[2:], device=DEVICE)
    tensors = {'updates': updates, 'keep': torch.rand(shape[:2], device=DEVICE), 'weight_start': start}

    def ours(updates, keep, weight_start):
        before, end = weight_scan(updates, keep.log(), weight_start, updates.dtype)
        assert before.shape == updates.shape and end.shape == weight_start.shape
        return {'before': before.flatten(2), 'weight_end': end.flatten(1)}

    def looped(updates, keep, weight_start):
        return looped_vectors(updates.flatten(2), keep, weight_start.flatten(1))

    assert_same(learned(ours, leaves(tensors)), exactly(looped, tensors), EXACT)


@pytest.mark.parametrize('name', ['every', 'end'])
@pytest.mark.parametrize('present', [MOMENTA[0], ()])
def test_only_some_momenta_are_used(kernels_everywhere, poisoned, present, name):
    tensors = matrices(2, 3, 2, 16, 20, present)
    assert_same(learned(our_momenta, leaves(tensors), [name]), exactly(looped_momenta, tensors, [name]), EXACT)


@pytest.mark.parametrize('name', ['before', 'weight_end', 'momentum_end'])
def test_only_some_vectors_are_used(kernels_everywhere, poisoned, name):
    tensors = vectors(2, 3, 20)
    assert_same(learned(our_vectors, leaves(tensors), [name]), exactly(looped_vectors, tensors, [name]), EXACT)


@pytest.mark.parametrize('sides', [(20, 70), (70, 20)])
def test_programs_of_more_or_less(kernels_everywhere, poisoned, sides, monkeypatch):
    from titans_pytorch.ops.momentum_scan import triton

    tensors = matrices(2, 3, 4, *sides)
    expected = exactly(looped_momenta, tensors)
    for enough in (1, 5, 1000):
        monkeypatch.setattr(triton, 'ENOUGH_PROGRAMS', enough)
        assert_same(learned(our_momenta, leaves(tensors)), expected, EXACT)


def test_kernels_read_views(kernels_everywhere, poisoned):
    # chunks out of a longer sequence, features of every other, states that heads share or that are transposed
    longer, changed = matrices(2, 9, 5, 16, 24), vectors(2, 9, 48)
    cut = {
        'inputs': longer['inputs'][:, 2:7, 1:],
        'deltas': longer['deltas'][:, 2:7, :-1, ::2],
        'scales': longer['scales'][:, 2:7],
        'gates': longer['gates'].mT.contiguous().mT[:, 2:7],
        'start': longer['start'].mT.contiguous().mT[..., :12],
    }
    shared = cut | {'start': longer['start'][:1, :, :12].contiguous().expand(2, -1, -1)}
    for tensors in (cut, shared):
        assert not any(t.is_contiguous() for t in tensors.values())
        came = learned(our_momenta, {name: t.requires_grad_() for name, t in tensors.items()})
        assert_same(came, exactly(looped_momenta, tensors), EXACT)
    changed = {name: t[:, 2:7, ::2] if name == 'updates' else t for name, t in changed.items()}
    changed |= {name: changed[name][:, 2:7] for name in ('scales', 'gates', 'keep')}
    changed |= {'weight_start': changed['weight_start'][:1, :24].expand(2, -1)}
    changed |= {'momentum_start': changed['momentum_start'][:, ::2]}
    came = learned(our_vectors, {name: t.requires_grad_() for name, t in changed.items()})
    assert_same(came, exactly(looped_vectors, changed), EXACT)


@pytest.mark.parametrize('sides', [(20, 37), (37, 20)])
@pytest.mark.parametrize('rows', [torch.float32, LOW])
@pytest.mark.parametrize('out_dtype', [torch.float32, LOW])
def test_momenta_in_low_precision(kernels_everywhere, poisoned, rows, out_dtype, sides):
    tensors = matrices(2, 5, 4, *sides)
    tensors = {name: t.to(rows) if t.ndim == 4 else t for name, t in tensors.items()}
    expected, exact_gradients = exactly(looped_momenta, tensors)
    with torch.autocast(DEVICE, torch.bfloat16):
        out, gradients = learned(lambda **own: our_momenta(**own, out_dtype=out_dtype), leaves(tensors))
    assert out['every'].dtype == out_dtype and out['end'].dtype == torch.float32
    step = torch.finfo(out_dtype).eps
    # the state itself is not rounded
    assert_same(out['every'], expected['every'], max(EXACT, step))
    assert_same(out['end'], expected['end'], EXACT)
    for name, want in exact_gradients.items():
        assert gradients[name].dtype == tensors[name].dtype
        least = max(torch.finfo(rows).eps, step, EXACT)
        assert (gradients[name].double() - want).norm() <= least * want.norm(), name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_weights_in_low_precision(kernels_everywhere, poisoned, dtype):
    tensors = vectors(2, 5, 37, ())
    tensors['updates'] = tensors['updates'].to(dtype)

    def ours(updates, keep, weight_start):
        before, end = weight_scan(updates, keep.log(), weight_start, dtype)
        assert before.dtype == dtype and end.dtype == torch.float32
        return {'before': before, 'weight_end': end}

    out, gradients = learned(ours, leaves(tensors))
    expected, exact_gradients = exactly(looped_vectors, tensors)
    step = torch.finfo(dtype).eps
    assert_same(out['before'], expected['before'], step)
    assert_same(out['weight_end'], expected['weight_end'], EXACT)
    for name, want in exact_gradients.items():
        assert gradients[name].dtype == tensors[name].dtype
        assert (gradients[name].double() - want).norm() <= step * want.norm(), name


def test_reference_and_kernels_agree_in_low_precision(kernels_everywhere):
    tensors = matrices(2, 3, 4, 16, 24)
    tensors = {name: t.to(LOW) if t.ndim == 4 else t for name, t in tensors.items()}
    came = []
    for kernels in (nullcontext(), without_kernels()):
        with kernels:
            came.append(learned(lambda **own: our_momenta(**own, out_dtype=LOW), leaves(tensors)))
    assert_same(*came, 4 * torch.finfo(LOW).eps)


# which of the two is taken


@pytest.fixture
def no_reference(monkeypatch):
    def refused(*args):
        raise AssertionError('the reference')

    for name in ('momentum_scan', 'vector_scan'):
        monkeypatch.setattr(reference, name, refused)


def test_what_the_kernels_do_not_support_takes_the_reference(kernels_everywhere, no_reference):
    our_momenta(**matrices(1, 2, 16, 128, 140))
    our_vectors(**vectors(1, 2, 300))
    many_rows, wide, empty = matrices(1, 2, 65, 4, 4), matrices(1, 1, 1, 132, 132), matrices(0, 2, 2, 4, 4)
    full = [{name: t.double() for name, t in tensors.items()} for tensors in (matrices(1, 2, 2, 4, 4), many_rows)]
    half_states = matrices(1, 2, 2, 4, 4) | {'start': torch.zeros(1, 4, 4, device=DEVICE).half()}
    for tensors in (many_rows, wide, empty, half_states, *full):
        with pytest.raises(AssertionError, match='the reference'):
            our_momenta(**tensors)
    with pytest.raises(AssertionError, match='the reference'):
        our_vectors(**{name: t.double() for name, t in vectors(1, 2, 4).items()})


@pytest.mark.parametrize(('rows', 'sides'), [(65, (4, 4)), (1, (132, 132))])
def test_matrices_that_no_kernel_supports(kernels_everywhere, rows, sides):
    tensors = matrices(1, 2, rows, *sides)
    # sums of 132 × 132 entries in float32, which processors add up in different orders
    assert_same(learned(our_momenta, leaves(tensors)), exactly(looped_momenta, tensors), 4 * EXACT)


# to the compiler


def test_operations_keep_the_rules_of_pytorch():
    pytest.importorskip('triton')
    from titans_pytorch.ops.momentum_scan import triton

    of_matrices, of_vectors = leaves(matrices(2, 3, 2, 16, 20)), leaves(vectors(2, 3, 20))
    gradients = torch.ops.titans_pytorch
    for present in ((), ('scales', 'gates', 'start', 'momentum_start')):
        some = {name: t if name in ('inputs', 'deltas', *present) else None for name, t in of_matrices.items()}
        args = (*some.values(), torch.float16)
        torch.library.opcheck(triton.momentum_scan, args, test_utils=CHECKS)
        outputs = [t.detach() for t in triton.momentum_scan(*args)]
        args = (*(None if t is None else t.detach() for t in some.values()), torch.float16)
        for d_outputs in (outputs, [None, outputs[1]], [outputs[0], None]):
            all_args = (d_outputs, outputs[:1], *args)
            torch.library.opcheck(gradients.momentum_scan_backward, all_args, test_utils=CHECKS[:3])

        there = ('updates', 'keep', 'weight_start', *present)
        some = {name: t if name in there else None for name, t in of_vectors.items()}
        args = (*some.values(), torch.float16)
        torch.library.opcheck(triton.vector_scan, args, test_utils=CHECKS)
        before, end, _, momenta = (t.detach() for t in triton.vector_scan(*args))
        args = (*(None if t is None else t.detach() for t in some.values()), torch.float16)
        all_args = ([before, end, None], [before, momenta], *args)
        torch.library.opcheck(gradients.vector_scan_backward, all_args, test_utils=CHECKS[:3])


def test_scans_compile_to_operations(kernels_everywhere, fresh_compiler):
    tensors, seen = matrices(2, 3, 2, 16, 20), []

    def scans(inputs, deltas, scales, gates, start):
        every, end = momentum_scan(inputs, deltas, scales, gates.log(), start, torch.float32)
        before, weight = weight_scan(every.tanh(), gates.log(), start, torch.float32)
        return {'before': before, 'weight': weight, 'end': end}

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend('aot_eager')(graph, inputs)

    compiled = torch.compile(scans, fullgraph=True, backend=backend)
    assert_same(learned(compiled, leaves(tensors)), learned(scans, leaves(tensors)), 1e-6)
    assert sum('titans_pytorch' in name for name in seen) == 2


# on a GPU, in the sizes of training


@pytest.mark.gpu
@pytest.mark.parametrize('low', [False, True])
@pytest.mark.parametrize(
    'shape', [(16, 32, 4, 64, 128), (256, 8, 4, 128, 64), (16, 32, 16, 64, 64), (3, 5, 1, 100, 250)]
)
def test_kernels_in_sizes_of_training(kernels_everywhere, poisoned, shape, low):
    tensors = matrices(*shape)
    tensors = {name: t.bfloat16() if low and t.ndim == 4 else t for name, t in tensors.items()}
    out_dtype = torch.bfloat16 if low else torch.float32

    def ours(inputs, deltas, scales, gates, start):
        every, end = momentum_scan(inputs, deltas, scales, gates.log(), start, out_dtype)
        before, weight = weight_scan(every, gates.log(), start, out_dtype)
        return {'every': every, 'end': end, 'before': before, 'weight': weight}

    def looped(inputs, deltas, scales, gates, start):
        of_momentum = looped_momenta(inputs, deltas, scales, gates, start)
        own = looped_vectors(of_momentum['every'].flatten(2), gates, start.flatten(1))
        before = own['before'].view_as(of_momentum['every'])
        return {**of_momentum, 'before': before, 'weight': own['weight_end'].view_as(start)}

    exact, came = exactly(looped, tensors), learned(ours, leaves(tensors))
    for ours, wanted in zip(came, exact):
        for name, want in wanted.items():
            error = (ours[name].double() - want).norm() / want.norm()
            assert error <= (2e-2 if low else EXACT), f'{name}: {error:.2e}'


# in a memory


@pytest.fixture
def scanned(monkeypatch):
    """The scans of memories, by name."""
    calls = []
    for name in ('momentum_scan', 'weight_scan', 'vector_scan'):
        operation = getattr(spectral, name)
        noted = lambda *args, name=name, operation=operation: calls.append(name) or operation(*args)  # noqa: E731
        monkeypatch.setattr(spectral, name, noted)
    return calls


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'momentum': False},
        {'max_grad_norm': 0.5, 'per_parameter_lr_modulation': True},
        {'mem_model_norm_add_residual': False, 'gated_transition': True},
        {'default_model_kwargs': {'depth': 1}},
    ],
)
def test_memories_that_scan_equal_the_dense_engine(options, scanned):
    """Two, of which the second builds on the first."""

    def stored(engine):
        torch.manual_seed(0)
        make = {'dim': 16, 'chunk_size': 2, 'batch_size': 6, 'heads': 2, 'dim_head': 8, 'spectral_norm_surprises': True}
        one, two = (
            randomised(NeuralMemory(**make, **options, accept_weight_residual=residual, engine=engine)).double()
            for residual in (False, True)
        )
        seq = torch.randn(2, 17, 16, dtype=torch.float64)
        first, state = one(seq)
        second, after = two(first, prev_weights=state.updates)
        third, after = two(first[:, :3], state=after, prev_weights=one(first[:, :3], state=state)[1].updates)
        total = first.square().sum() + second.square().sum() + third.sum()
        total = total + sum(w.square().sum() for pair in after.states for w in pair.values())
        both = torch.nn.ModuleList((one, two))
        return first, second, third, dict(after.updates.items()), gradients(both, total)

    expected = stored('dense')
    assert not scanned
    assert_same(stored('dual'), expected)
    assert scanned


def test_only_weights_are_scanned_with_momentum_of_several_orders(scanned):
    NeuralMemory(8, 2, spectral_norm_surprises=True, momentum_order=2)(torch.randn(1, 6, 8))
    assert {*scanned} == {'weight_scan'}


def test_kernels_store_what_the_reference_stores(kernels_everywhere, scanned, monkeypatch):
    """Two memories, clamped, of which the second builds on the first, and goes on from a state."""
    # not Newton–Schulz's, which makes much of rounding
    monkeypatch.setattr(_dispatch, 'compute_capability', lambda device: _dispatch.AMPERE)

    def stored():
        torch.manual_seed(0)
        # as many rows in a chunk as a matrix has: with fewer, Newton–Schulz makes much of what is nearly nothing
        make = {'dim': 8, 'chunk_size': 16, 'batch_size': 32, 'spectral_norm_surprises': True, 'max_grad_norm': 0.5}
        one, two = (
            NeuralMemory(**make, default_model_kwargs={'depth': 1}, accept_weight_residual=residual).to(DEVICE)
            for residual in (False, True)
        )
        seq = torch.randn(1, 70, 8, device=DEVICE)
        first, state = one(seq)
        second, after = two(first, prev_weights=state.updates)
        third, after = two(seq[:, :15], state=after, prev_weights=one(seq[:, :15], state=state)[1].updates)
        return first, second, third, dict(after.states[0].items()), dict(after.states[1].items())

    with without_kernels():
        expected = stored()
    scanned.clear()
    assert_same(stored(), expected, 1e-3)
    # in each run a matrix and a vector
    assert len(scanned) > 9 and len(scanned) == 3 * scanned.count('momentum_scan')


@pytest.mark.parametrize('scale', [1.0, 1e-5])
def test_a_clamp_is_that_of_the_matrix_whatever_its_rows_are_in(scale):
    backend = SpectralBackend(None, None, None, None, 0.5, True)
    rows, deltas = torch.randn(2, 3, 4, 8).half(), (torch.randn(2, 3, 4, 6) * scale).half()
    matrices = rows.float().mT @ deltas.float()
    with torch.autocast(DEVICE, LOW):
        scales = backend._update_factor(rows, deltas, None)
    assert_same(scales[..., None, None] * matrices, soft_clamp_norm(matrices, 0.5), 1e-5)


def test_weights_stored_under_autocast_serve_without_it():
    one, two = (NeuralMemory(8, 2, accept_weight_residual=residual) for residual in (False, True))
    seq = torch.randn(1, 9, 8)
    _, state = one(seq)
    low = {name: w.to(torch.bfloat16) for name, w in state.updates.items()}
    rounded = {name: w.float() for name, w in low.items()}
    assert_same(two(seq, prev_weights=low)[0], two(seq, prev_weights=rounded)[0], 1e-6)


@pytest.mark.gpu
def test_sums_of_parts_beyond_32_bits():
    from titans_pytorch.ops.momentum_scan import triton

    count = 2**30
    parts = torch.ones(3, count, dtype=torch.bfloat16, device='cuda')
    parts[2, -1] = 4.0
    sums = triton._summed(parts, torch.bfloat16)
    assert_same((sums.min(), sums.max(), sums[-1]), tuple(torch.tensor(value) for value in (3.0, 6.0, 6.0)), 0.0)
