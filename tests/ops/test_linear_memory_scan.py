"""A linear memory by triangular systems: against a loop over memory batches, the delta rule, and the dense backend; and
the kernels against the loop."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from memories import scalar

from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.memory.backends.fused_mlp import FusedMLP
from titans_pytorch.memory.chunks import Chunks
from titans_pytorch.memory.coefficients import Coefficients
from titans_pytorch.ops import linear_memory_scan as operation
from titans_pytorch.ops.linear_memory_scan import linear_memory_scan
from titans_pytorch.ops.proximal_steps import proximal_deltas
from titans_pytorch.presets import delta_rule_settings

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
SMALL = dict(deadline=None, derandomize=True)
# products in float32 of three TF32 ones keep a little less, and blocks build on each other
EXACT = 1e-5 if DEVICE == 'cpu' else 5e-5
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


def problem(blocks, batches, chunks, rows, dim=5, orders=1):
    """Chunks of a call, and initial states, in float64: `batches` memory batches of `chunks` chunks in each block."""
    torch.manual_seed(0)
    n = blocks * batches * chunks
    leading = (2, n)
    double = dict(dtype=torch.float64)
    keys = torch.nn.functional.normalize(torch.randn(*leading, rows, dim, **double), dim=-1)
    inputs = Chunks(
        keys=keys,
        values=torch.randn(*leading, rows, dim, **double),
        step_sizes=torch.rand(*leading, rows, **double) * dim / 2,
        decay_logits=torch.randn(*leading, **double),
        momentum_logits=torch.randn(*leading, orders, **double) if orders else None,
        momentum_mix=None,
        modulation=None,
    )
    return inputs, [torch.randn(2, dim, dim, **double) for _ in range(1 + orders)]


def by_loop(inputs, states, chunks_per_batch, num_proximal_steps=None):
    """Titans eq. 10–13, chunk after chunk: the states before each chunk, the updates' rows and the losses."""
    weights, *momentum = states
    gates = inputs.update_gates()
    base, before, deltas, losses = weights, [], [], []
    for chunk, (k, v, theta) in enumerate(zip(*(t.unbind(1) for t in inputs[:3]))):
        if chunk % chunks_per_batch == 0:
            base = weights
        before.append(torch.stack([weights, *momentum], dim=1))
        error = v - k @ base
        loss, delta = error.square().mean(dim=-1), 2 / v.shape[-1] * theta.unsqueeze(-1) * error
        if num_proximal_steps is not None:
            delta = proximal_deltas(k, delta, theta, loss, num_proximal_steps)
        update = k.mT @ delta
        for order, share in enumerate(gates.momentum):
            momentum[order] = share[:, chunk, None, None] * momentum[order] + update
            update = momentum[order]
        weights = gates.retention[:, chunk, None, None] * weights + update
        deltas.append(delta)
        losses.append(loss)
    return [torch.stack(t, dim=1) for t in (before, deltas, losses)], torch.stack([weights, *momentum], dim=1)


LOOP_SIZES = [(1, 1, 1, 1), (2, 4, 1, 1), (3, 2, 3, 2), (2, 3, 2, 3), (2, 1, 3, 1)]


@pytest.mark.parametrize('num_proximal_steps', [None, 3])
@pytest.mark.parametrize('orders', [0, 1, 2])
@pytest.mark.parametrize('sizes', LOOP_SIZES)
def test_it_equals_a_loop_over_chunks(sizes, orders, num_proximal_steps):
    assert_equals_a_loop(*problem(*sizes, orders=orders), sizes, num_proximal_steps)


@pytest.mark.parametrize('sizes', LOOP_SIZES)
def test_the_limit_of_proximal_steps_is_that_of_a_loop(sizes):
    inputs, states = problem(*sizes)
    inputs.step_sizes[:, ::2] *= 1e6
    assert_equals_a_loop(inputs, states, sizes, 3)


def assert_equals_a_loop(inputs, states, sizes, num_proximal_steps):
    blocks, batches, chunks, rows = sizes
    leaves = [t.requires_grad_() for t in (*inputs, *states) if t is not None]
    coefficients = Coefficients.of_blocks(inputs, blocks)
    came = linear_memory_scan(*inputs[:3], states, *coefficients, chunks, num_proximal_steps)

    (before, deltas, losses), final = by_loop(inputs, states, chunks, num_proximal_steps)
    first_of_block = before[:, :: batches * chunks]
    expected = (first_of_block, final, deltas.flatten(1, 2).view_as(came.deltas), losses.view_as(came.losses))
    for name, own, right in zip(came._fields, came, expected):
        assert_same(own, right, 1e-12, f'{name} ')

    weights = [torch.randn_like(t) for t in came]
    results = []
    for outputs in (came, expected):
        total = sum((t * w).sum() for t, w in zip(outputs, weights))
        results.append(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
    assert_same(*results, 1e-11, 'gradient ')


@pytest.mark.parametrize('sizes', [(1, 2, 1, 16), (1, 4, 4, 4)])
def test_losses_in_float32_do_not_depend_on_the_steps_after_them(sizes):
    """Keys that are far from dependent, so that nothing but the computation of the losses limits precision."""
    inputs, states = problem(*sizes, dim=64)
    coefficients, found = Coefficients.of_blocks(inputs, 1), []
    for dtype in (torch.float32, torch.float64):
        keys, values = inputs.keys.to(dtype), inputs.values.to(dtype)
        theta = (30 * inputs.step_sizes).to(dtype).requires_grad_()
        rows = keys, values, theta, [state.to(dtype) for state in states]
        losses = linear_memory_scan(*rows, *coefficients.to(dtype), sizes[2], 3).losses
        found.append(torch.autograd.grad(losses.sum(), theta)[0])
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()


def test_second_derivatives():
    inputs, states = problem(2, 2, 1, 1, dim=2)
    coefficients = Coefficients.of_blocks(inputs, 2)

    def scan(values, theta, weights):
        return linear_memory_scan(inputs.keys, values, theta, [weights, states[1]], *coefficients, 1)

    of = (inputs.values, inputs.step_sizes, states[0])
    assert torch.autograd.gradgradcheck(scan, [t.requires_grad_() for t in of])


def memory(chunk_size, batch_size, engine='auto', **kwargs):
    kwargs = {'qk_rmsnorm': True, 'init_decay_bias': -2.0, 'default_step_transform_max_lr': 1.5, **kwargs}
    mem = NeuralMemory(
        8,
        chunk_size,
        batch_size,
        dim_head=4,
        heads=2,
        model=MemoryMLP(4, depth=1),
        mem_model_norm_add_residual=False,
        engine=engine,
        **kwargs,
    ).double()
    for p in mem.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return mem


@pytest.fixture
def solved(monkeypatch):
    """Counts the blocks stored by the operation."""
    calls, store = [], FusedMLP.store_linear
    monkeypatch.setattr(FusedMLP, 'store_linear', lambda *args: (calls.append(args), store(*args))[1])
    return calls


@settings(max_examples=60, **SMALL)
@given(
    rows=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    length=st.integers(1, 75),
    cut=st.integers(0, 75),
    switches=st.fixed_dictionaries(
        {
            'momentum_order': st.integers(1, 3),
            'num_kv_per_token': st.integers(1, 2),
            'per_parameter_lr_modulation': st.booleans(),
            'store_with_lookahead_value': st.booleans(),
            'gated_transition': st.booleans(),
            'proximal_steps': st.booleans(),
        }
    ),
    momentum=st.sampled_from([None, 'plain', 'normalized', 'look-ahead']),
)
@pytest.mark.filterwarnings('ignore:store_with_lookahead_value:UserWarning')
def test_it_equals_the_dense_backend(rows, length, cut, switches, momentum):
    chunk, batches = rows
    if momentum is None:
        switches = {**switches, 'momentum': False, 'momentum_order': 1}
    switches['learned_momentum_combine'] = switches['momentum_order'] > 1
    switches['normalized_momentum'] = momentum in ('normalized', 'look-ahead')
    if momentum == 'look-ahead':
        excluded = {'learned_momentum_combine': False, 'gated_transition': False}
        switches = {**switches, 'lookahead_gradients': True, **excluded}
    ours, dense = (memory(chunk, chunk * batches, engine, **switches) for engine in ('dual', 'dense'))
    dense.load_state_dict(ours.state_dict())
    seq, mask = torch.randn(2, length, 8, dtype=torch.float64), torch.rand(2, length) > 0.2
    results = []
    for mem in (ours, dense):
        state, out = None, []
        for piece in torch.arange(length).tensor_split([min(cut, length)]):
            if len(piece):
                one, state, surprises = mem(
                    seq[:, piece], state=state, store_mask=mask[:, piece], return_surprises=True
                )
                out.append(one)
        out = torch.cat(out, dim=1)
        results.append((out, surprises, state.updates['weights.0'], gradients(mem, scalar(out, state))))
    for came, expected, name in zip(*results, ('output', 'surprise', 'update', 'gradient')):
        assert_same(came, expected, 1e-9, f'{name} ')


def test_a_weight_residual_is_added_to_the_base_weights(solved):
    first = memory(1, 2)
    ours, dense = (memory(1, 2, engine, accept_weight_residual=True) for engine in ('dual', 'dense'))
    dense.load_state_dict(ours.state_dict())
    seq = torch.randn(2, 21, 8, dtype=torch.float64)
    _, before = first(seq)
    outs = [mem(seq, prev_weights=before.updates)[0] for mem in (ours, dense)]
    assert len(solved) == 2  # the first memory and ours
    assert_same(*outs, 1e-12)


def by_delta_rule(mem, seq):
    """Weights after W ← (1 − α) W + β kᵀ (v − k W) for each token of one sequence, in memories of width 4; and β."""
    normed = mem.store_norm(seq)
    keys = mem.k_norm(mem.split_kv_heads(mem.to_keys(normed)))[0]
    values = mem.split_kv_heads(mem.to_values(normed))[0]
    rates = mem.adaptive_step_transform(mem.to_adaptive_step(normed)) * 2 / 4
    retained = 1 - mem.to_decay_factor(normed).sigmoid()
    weights = mem.init_weights(1)['weights.0']
    for k, v, rate, kept in zip(keys.unbind(1), values.unbind(1), rates.unbind(1), retained.unbind(1)):
        error = v - torch.einsum('hd, hde -> he', k, weights)
        weights = kept.view(-1, 1, 1) * weights + rate[:, None, None] * torch.einsum('hd, he -> hde', k, error)
    return weights, rates


def test_chunks_of_one_token_are_the_delta_rule(solved):
    """Schlag et al. (arXiv 2102.11174), and with decay the gated delta rule."""
    plain = memory(1, 1, momentum=False, init_decay_bias=None)
    torch.nn.init.zeros_(plain.to_decay_factor[0].weight)
    torch.nn.init.constant_(plain.to_decay_factor[0].bias, -1e4)  # nothing is forgotten
    gated = NeuralMemory(8, 1, 1, **delta_rule_settings(2, 4, activation=None, conv_kernel=None)).double()
    seq = torch.randn(1, 40, 8, dtype=torch.float64)
    for mem in (plain, gated):
        solved.clear()
        _, state = mem(seq)
        assert len(solved) > 0
        weights, rates = by_delta_rule(mem, seq)
        assert_same(state.updates['weights.0'][:, -1], weights, 1e-12)
    assert rates.max() < 1


@pytest.mark.parametrize(
    ('chunk_size', 'batch_size', 'used'), [(1, 1, True), (4, 16, True), (1, None, False), (4, 32, False)]
)
def test_it_serves_short_memory_batches(chunk_size, batch_size, used, solved):
    memory(chunk_size, batch_size)(torch.randn(1, 64, 8, dtype=torch.float64))
    assert bool(solved) == used


def test_other_memories_take_other_ways(solved):
    seq = torch.randn(1, 16, 8, dtype=torch.float64)
    for kwargs in ({'max_grad_norm': 1.0}, {'gated_transition': True}, {'spectral_norm_surprises': True}):
        memory(1, 1, **kwargs)(seq)
    NeuralMemory(8, 1, 1, dim_head=4, heads=2, model=MemoryMLP(4, depth=1)).double()(seq)  # a residual norm
    assert not solved


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_low_precision_errs_no_more_than_twice_as_much_as_the_dense_backend(dtype):
    ours, dense = (memory(1, 1, engine) for engine in ('dual', 'dense'))
    dense.load_state_dict(ours.state_dict())
    seq = torch.randn(2, 96, 8, dtype=torch.float64)
    exact = ours(seq)[0]
    errors = []
    for mem in (ours, dense):
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            errors.append((mem.float()(seq.float())[0] - exact).norm())
    assert errors[0] < 2 * errors[1]


# kernels


@pytest.fixture
def kernels(kernels_everywhere):
    from titans_pytorch.ops.linear_memory_scan import triton as kernels

    return kernels


def tensors_of(sizes, dtype=torch.float32, **kwargs):
    """`problem` with coefficients, as arguments of the operation by name."""
    inputs, states = problem(*sizes, **kwargs)
    coefficients = Coefficients.of_blocks(inputs, sizes[0])
    rows = {name: getattr(inputs, name).to(dtype) for name in ('keys', 'values')}
    tensors = {**rows, 'step_sizes': inputs.step_sizes, **coefficients._asdict()}
    tensors |= {f'state {index}': state for index, state in enumerate(states)}
    return {name: (t if t.dtype == dtype else t.float()).to(DEVICE) for name, t in tensors.items()}


def learned(tensors, chunks_per_batch, used=None, num_proximal_steps=None):
    """Results of the operation, and gradients of a linear function of those in `used`, by default of all."""
    tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    states = [t for name, t in tensors.items() if name.startswith('state')]
    rows = [tensors[name] for name in ('keys', 'values', 'step_sizes')]
    settings = chunks_per_batch, num_proximal_steps
    out = linear_memory_scan(*rows, states, *(tensors[name] for name in Coefficients._fields), *settings)
    generator, total = torch.Generator().manual_seed(1), 0.0
    for name, t in out._asdict().items():
        weights = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        if used is None or name in used:
            total = total + (t.double() * weights).sum()
    came = torch.autograd.grad(total, [*tensors.values()], allow_unused=True, materialize_grads=True)
    # what lies above the diagonal is never read by the kernels
    gradients = {name: t.tril(-1) if name == 'steps' else t for name, t in zip(tensors, came)}
    return {name: t.detach() for name, t in out._asdict().items()}, gradients


def exactly(tensors, *args, **kwargs):
    return learned({name: t.double() for name, t in tensors.items()}, *args, **kwargs)


# blocks, memory batches, chunks and rows; features, orders of momentum
KERNEL_SIZES = [
    ((3, 4, 1, 1), 16, 1),
    ((1, 40, 1, 1), 24, 0),
    ((2, 3, 2, 3), 20, 2),
    ((2, 1, 3, 11), 40, 1),
    ((1, 2, 1, 32), 100, 1),
    ((2, 2, 1, 2), 8, 3),
]


@pytest.mark.parametrize('steps', [None, 4])
@pytest.mark.parametrize(('sizes', 'dim', 'orders'), KERNEL_SIZES)
def test_kernels_equal_the_reference(kernels, poisoned, sizes, dim, orders, steps):
    tensors = tensors_of(sizes, dim=dim, orders=orders)
    came, expected = (compute(tensors, sizes[2], num_proximal_steps=steps) for compute in (learned, exactly))
    assert_same(came, expected, EXACT)


@pytest.mark.parametrize('sizes', [(2, 3, 2, 3), (2, 1, 1, 32), (2, 16, 1, 4), (2, 4, 1, 16), (2, 16, 4, 1)])
def test_large_proximal_steps(kernels, poisoned, note_launches, sizes):
    launches, tensors = note_launches(operation), tensors_of(sizes, dim=48)
    # beyond the limit for half the rows
    tensors['step_sizes'].view(2, -1)[:, ::2] *= 1e6
    came, expected = (compute(tensors, sizes[2], num_proximal_steps=2) for compute in (learned, exactly))
    assert_same(came, expected, EXACT)
    assert len(launches) == 1


@pytest.mark.parametrize('steps', [None, 2])
def test_losses_are_computed_on_request(steps):
    tensors = tensors_of((2, 3, 1, 2), dim=16)
    rows = [tensors[name] for name in ('keys', 'values', 'step_sizes')]
    states = [t for name, t in tensors.items() if name.startswith('state')]
    given = (*rows, states, *(tensors[name] for name in Coefficients._fields), 1, steps)
    expected, came = linear_memory_scan(*given), linear_memory_scan(*given, with_losses=False)
    assert came.losses is None
    assert_same(came[:3], expected[:3], 0.0)


@pytest.mark.parametrize('sizes', [(1, 1), (4, 4), (2, 8)])
@pytest.mark.parametrize('order', [1, 2])
def test_look_ahead_gradients(kernels, poisoned, solved, sizes, order):
    options = {'normalized_momentum': True, 'lookahead_gradients': True, 'momentum_order': order}
    ours, exact = (memory(*sizes, proximal_steps=True, **options).to(DEVICE) for _ in range(2))
    exact.load_state_dict(ours.float().state_dict())
    seq, results = torch.randn(2, 75, 8, device=DEVICE), []
    for mem in (ours, exact):
        out, state = mem(seq.to(next(mem.parameters()).dtype))
        results.append((out, state.states, gradients(mem, out.double().sin().sum())))
    assert_same(*results, 3e-4)
    assert solved


def test_rows_that_are_not_stored(kernels, poisoned):
    tensors = tensors_of((2, 3, 2, 2), dim=16)
    tensors['step_sizes'] *= torch.rand(tensors['step_sizes'].shape, device=DEVICE) > 0.4
    assert_same(learned(tensors, 2), exactly(tensors, 2), EXACT)


def test_keys_that_are_all_the_same(kernels, poisoned):
    # the products of rows, of which the inverse is made, are then as large as they can be
    tensors = tensors_of((1, 64, 1, 1), dim=16)
    tensors['keys'] = tensors['keys'][:1, :1].expand(tensors['keys'].shape)
    tensors['step_sizes'] = tensors['step_sizes'] * 0 + 8.0
    assert_same(learned(tensors, 1), exactly(tensors, 1), EXACT)


def test_only_one_output_is_used(kernels, poisoned):
    tensors = tensors_of((2, 2, 1, 2), dim=16)
    for name in ('initial', 'final', 'deltas', 'losses'):
        assert_same(learned(tensors, 1, [name]), exactly(tensors, 1, [name]), EXACT, f'of {name} ')


def test_kernels_read_views(kernels, poisoned):
    tensors = tensors_of((2, 2, 1, 3), dim=16)
    for name in ('keys', 'values', 'step_sizes'):
        tensors[name] = tensors[name].transpose(0, 1).contiguous().transpose(0, 1)
    tensors['state 0'] = tensors['state 0'].mT.contiguous().mT
    assert_same(learned(tensors, 1), exactly(tensors, 1), EXACT)


def test_under_autocast(kernels, poisoned):
    low = torch.bfloat16 if DEVICE == 'cuda' else torch.float16  # Triton's interpreter multiplies no bfloat16
    tensors = tensors_of((2, 8, 1, 2), dtype=low, dim=16)
    with torch.autocast(DEVICE, low):
        came = learned(tensors, 1)
    assert came[0]['deltas'].dtype == low
    for own, exact in zip(came, exactly(tensors, 1)):
        for name, want in exact.items():
            assert (own[name].double() - want).norm() < 5e-3 * want.norm(), name


def test_larger_problems_take_the_reference(kernels, monkeypatch):
    monkeypatch.setattr(kernels, 'linear_memory_scan', None)
    for sizes, dim, orders in (((1, 65, 1, 1), 4, 1), ((1, 2, 1, 1), 129, 0), ((1, 2, 1, 1), 96, 2)):
        tensors = tensors_of(sizes, dim=dim, orders=orders)
        assert_same(learned(tensors, 1), exactly(tensors, 1), 1e-4)


@pytest.mark.parametrize('own_coefficient', [0, 2])
def test_the_operation_is_registered_correctly(kernels, own_coefficient):
    tensors = [t.requires_grad_() for t in tensors_of((2, 2, 1, 2), dim=16).values()]
    rows, coefficients, states = tensors[:3], tensors[3:7], tensors[7:]
    stacked = torch.stack(states, dim=1).detach().requires_grad_()
    arguments = (*rows, stacked, *coefficients, 1, own_coefficient, torch.float32)
    torch.library.opcheck(kernels.linear_memory_scan, arguments, test_utils=CHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize('steps', [None, 2])
@pytest.mark.parametrize(
    ('sizes', 'orders'), [((32, 64, 1, 1), 1), ((8, 4, 1, 16), 1), ((8, 1, 1, 64), 0), ((8, 4, 4, 4), 3)]
)
def test_kernels_in_sizes_of_training(kernels, poisoned, sizes, orders, steps):
    tensors = tensors_of(sizes, dim=64, orders=orders)
    tensors['step_sizes'] = tensors['step_sizes'] / (sizes[3] if steps is None else 1)
    came, expected = (compute(tensors, sizes[2], num_proximal_steps=steps) for compute in (learned, exactly))
    assert_same(came, expected, EXACT)
