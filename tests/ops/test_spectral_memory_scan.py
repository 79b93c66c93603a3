"""`spectral_memory_scan`, by kernels: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compare import assert_same
from memories import randomised
from torch.utils._pytree import tree_leaves, tree_map_only

from titans_pytorch import NeuralMemory
from titans_pytorch.memory.backends import SpectralBackend, fused_mlp
from titans_pytorch.ops import newton_schulz, token_linear
from titans_pytorch.ops import spectral_memory_scan as operation
from titans_pytorch.ops.inner_gradient import PreviousWeights, inner_gradient
from titans_pytorch.ops.momentum_scan import momentum_scan, vector_scan, weight_scan
from titans_pytorch.ops.newton_schulz import QUINTIC

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter multiplies no bfloat16
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


def triton():
    pytest.importorskip('triton')
    from titans_pytorch.ops.spectral_memory_scan import triton

    return triton


@pytest.fixture
def scans(monkeypatch):
    """The numbers of chunks of each memory batch in each call of the operation."""
    calls = []

    def noted(*args):
        calls.append(args[8])
        return operation.spectral_memory_scan(*args)

    monkeypatch.setattr(fused_mlp, 'spectral_memory_scan', noted)
    return calls


def memory(accept_weight_residual=False, **options):
    settings = {'dim': 8, 'heads': 2, 'dim_head': 4, 'chunk_size': 4, 'batch_size': 8, 'spectral_norm_surprises': True}
    own = {'accept_weight_residual': accept_weight_residual, **options}
    return randomised(NeuralMemory(**settings | own)).to(DEVICE)


def part_by_part(monkeypatch):
    monkeypatch.setattr(SpectralBackend, '_has_kernel', lambda self, inputs: False)


ONE_HEAD = {'heads': 1, 'dim': 4}  # half the time, where the interpreter runs the kernels
OPTIONS = {
    'two matrices and a norm': {},
    'no momentum': {**ONE_HEAD, 'momentum': False},
    'a step size for each parameter': {**ONE_HEAD, 'per_parameter_lr_modulation': True},
    'one matrix': {'default_model_kwargs': {'depth': 1}},
    'no norm': {**ONE_HEAD, 'mem_model_norm_add_residual': False},
    'two keys per token': {**ONE_HEAD, 'num_kv_per_token': 2},
    'memory batches of a chunk': {**ONE_HEAD, 'batch_size': 4},
    'without memory batches': {**ONE_HEAD, 'batch_size': None},
}


@pytest.mark.parametrize('option', OPTIONS)
def test_all_memory_batches_at_once_are_as_one_by_one(option, kernels_everywhere, scans, monkeypatch):
    """Outputs, states and gradients of two memories, of which the second builds on the first and goes on from a state
    within a memory batch. Both run the same kernels, so that Newton–Schulz magnifies no difference."""

    def stored():
        torch.manual_seed(0)
        one, two = (memory(residual, **OPTIONS[option]) for residual in (False, True))
        seq = torch.randn(1, 22, OPTIONS[option].get('dim', 8), device=DEVICE, requires_grad=True)
        first, before = one(seq)
        second, after = two(first, prev_weights=before.updates)
        longer, state = one(seq[:, :11], state=before)
        third, after = two(seq[:, :11], state=after, prev_weights=state.updates)
        states = [w for pair in after.states for w in pair.values()]
        total = sum(t.square().mean() for t in (first, second, third, longer, *states))
        inputs = [seq, *one.parameters(), *two.parameters()]
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        return first, second, third, dict(after.updates.items()), dict(after.weights.items()), gradients

    found = stored()
    assert len(scans) == 4
    part_by_part(monkeypatch)
    expected = stored()
    assert len(scans) == 4
    assert_same(found, expected, 1e-4)


def outputs_and_gradients(one, two, seq):
    """Of two memories, of which the second builds on the first, in unequal memory batches."""
    first, before = one(seq)
    second, after = two(first, prev_weights=before.updates)
    total = sum(t.square().mean() for t in (first, second, *before.states[1].values(), *after.states[0].values()))
    parameters = [*one.parameters(), *two.parameters()]
    return first, second, torch.autograd.grad(total, parameters, materialize_grads=True, allow_unused=True)


@pytest.mark.gpu
def test_a_captured_step_whose_kernels_run_side_by_side_equals_an_ordinary_one():
    torch.manual_seed(0)
    one, two = (memory(residual, dim=64, dim_head=32, heads=4, batch_size=24) for residual in (False, True))
    seq, steps = torch.randn(2, 70, 64, device=DEVICE), partial(outputs_and_gradients, one, two)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        steps(seq)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        came = steps(seq)
    for _ in range(5):
        seq.copy_(torch.randn_like(seq))
        graph.replay()
        assert_same(came, steps(seq), 1e-5)


def test_a_call_may_end_within_a_memory_batch_or_not_reach_its_end(kernels_everywhere, scans):
    one = memory()
    _, state = one(torch.randn(1, 28, 8, device=DEVICE))
    one(torch.randn(1, 8, 8, device=DEVICE), state=state)
    assert scans == [[2, 2, 2, 1], [1, 1]]


def test_without_a_gradient_only_one_memory_batch_is_kept(kernels_everywhere, switch_kernel, monkeypatch):
    switch_kernel(token_linear, False)  # it projects rows without a gradient, and rounds otherwise
    kernels, kept = triton(), []
    outputs = kernels._outputs

    def noted(*args):
        found = outputs(*args)
        kept.append(found[kernels.MOMENTA].numel())
        return found

    monkeypatch.setattr(kernels, '_outputs', noted)
    one, seq = memory(), torch.randn(1, 16, 8, device=DEVICE)
    learned, _ = one(seq)
    with torch.no_grad():
        out, _ = one(seq)
    assert_same(out, learned, 1e-6)
    assert kept[0] == 2 * kept[1] > 0


def test_a_state_holds_the_weights_of_no_other_memory_batch(kernels_everywhere, scans):
    _, state = memory()(torch.randn(1, 29, 8, device=DEVICE))
    assert scans == [[2, 2, 2, 1]]
    for w in (*state.weights.values(), *(w for pair in state.states for w in pair.values())):
        assert w.untyped_storage().nbytes() == w.nbytes


def test_outputs_are_written_whole(kernels_everywhere, poisoned, scans):
    one, two = (memory(residual, per_parameter_lr_modulation=True) for residual in (False, True))
    seq = torch.randn(1, 14, 8, device=DEVICE)
    first, state = one(seq)
    out, after = two(seq, prev_weights=state.updates)
    states = [w for pair in after.states for w in pair.values()]
    total = first.sum() + out.sum() + sum(w.sum() for w in (*after.updates.values(), *states))
    of_parameters = torch.autograd.grad(total, [*one.parameters(), *two.parameters()], allow_unused=True)
    assert len(scans) == 2
    assert all(t.isfinite().all() for t in (out, *states, *of_parameters) if t is not None)


def problem(num_matrices, norm, momentum, residual, dtype):
    """Arguments of the operation for two memory batches of three chunks and one of two."""
    heads, lengths, rows, dim, width = 2, [3, 3, 2], 4, 4, 8
    chunks = sum(lengths)
    shapes = [(dim, width), (width, dim)] if num_matrices == 2 else [(dim, dim)]
    torch.manual_seed(0)
    made = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731

    def weights(*axes):
        return [made(heads, *axes, *shape) for shape in (*shapes, *([(dim,)] if norm else []))]

    learned = [made(heads, chunks, rows, dim).to(dtype), made(heads, chunks, rows, dim).to(dtype)]
    learned += [torch.rand(heads, chunks, rows, device=DEVICE).to(dtype), weights(), weights()]
    learned += [weights() if momentum else [], -torch.rand(heads, chunks, device=DEVICE)]
    learned += [-torch.rand(heads, chunks, device=DEVICE) if momentum else None]
    learned += [[made(heads, chunks) for _ in shapes + [()] * norm], made(heads, chunks) if residual else None]
    learned += [[w.to(dtype) for w in weights(chunks)] if residual else []]
    tree_map_only(torch.Tensor, lambda t: t.requires_grad_(), learned)
    return *learned, lengths, num_matrices, 1e-5, newton_schulz.STEPS, newton_schulz.EPS, [*QUINTIC], True, dtype


def looped(*arguments):
    """`ScannedWeights` but for the losses, by the operations on a single memory batch."""
    keys, values, thetas, at, newest, momentum, retention, gates, scales, shares, previous = arguments[:11]
    lengths, number, eps, *_, operands = arguments[11:]
    before, ends, momentum_ends = [[] for _ in newest], [[] for _ in newest], [[] for _ in momentum]
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        start += length
        residual = None
        if shares is not None:
            of_chunks = [w[:, own] for w in previous]
            residual = PreviousWeights(shares[:, own], of_chunks[:number], (of_chunks[number:] or [None])[0])
        rows = keys[:, own], values[:, own], thetas[:, own]
        found = inner_gradient(*rows, at[:number], (at[number:] or [None])[0], eps, residual)
        own_gates = None if gates is None else gates[:, own]
        at = []
        for index, w in enumerate(newest):
            earlier = momentum[index] if momentum else None
            if index < number:
                update = found.inputs[index], found.deltas[index], scales[index][:, own]
                every, last = momentum_scan(*update, own_gates, earlier, operands)
                over_time, end = weight_scan(newton_schulz.newton_schulz(every), retention[:, own], w, operands)
            else:
                gated = scales[index][:, own], own_gates, retention[:, own]
                over_time, end, last = vector_scan(found.negative_gamma_gradient, *gated, earlier, w)
            before[index].append(over_time)
            ends[index].append(end)
            if momentum:
                momentum_ends[index].append(last)
            at.append(end)
        newest, momentum = at, [own[-1] for own in momentum_ends]
    over_time = [torch.cat([*own, end[-1][:, None].to(own[0].dtype)], dim=1) for own, end in zip(before, ends)]
    return over_time, [torch.stack(own) for own in ends], [torch.stack(own) for own in momentum_ends]


PROBLEMS = [(2, True, True, True), (1, False, True, False), (2, False, False, True), (1, True, False, False)]


@pytest.mark.parametrize('problem_of', PROBLEMS)
def test_the_operation_in_half_precision_equals_its_parts(kernels_everywhere, problem_of):
    arguments = problem(*problem_of, LOW)
    inputs = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)]
    results = []
    for scanned in (triton().spectral_memory_scan, looped):
        outputs = scanned(*arguments)
        if scanned is not looped:
            outputs = [[t for t in outputs[first : first + 3] if t.numel() > 0] for first in triton().LISTS]
        total = sum(t.double().square().mean() for t in tree_leaves(outputs))
        results.append((outputs, torch.autograd.grad(1e-3 * total, inputs, allow_unused=True)))
    assert_same(*results, 1e-5)
    assert all(t.isfinite().all() for t in tree_leaves(results[0][1]) if t is not None)


@pytest.mark.parametrize('problem_of', PROBLEMS)
def test_the_operation_keeps_the_rules_of_pytorch(kernels_everywhere, problem_of):
    torch.library.opcheck(triton().spectral_memory_scan, problem(*problem_of, torch.float32), test_utils=CHECKS)


def test_a_memory_compiles_to_one_operation(kernels_everywhere, fresh_compiler):
    one, seen = memory(), []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    seq = torch.randn(1, 14, 8, device=DEVICE)
    compiled, _ = torch.compile(one, fullgraph=True, backend=backend)(seq)
    assert sum('spectral_memory_scan' in target for target in seen) == 1
    assert_same(compiled, one(seq)[0], 1e-6)


@pytest.mark.parametrize(
    'options',
    [
        {'max_grad_norm': 1.0},
        {'momentum_order': 2},
        {'gated_transition': True},
        {'default_model_kwargs': {'depth': 3}},
        {'store_memory_loss_fn': lambda pred, target: (pred - target).abs().mean(dim=-1)},
    ],
)
def test_other_memories_are_stored_part_by_part(options, kernels_everywhere, scans):
    memory(**options)(torch.randn(1, 16, 8, device=DEVICE))
    assert not scans
