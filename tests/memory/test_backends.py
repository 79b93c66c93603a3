"""Backends against each other: outputs, states, surprises and every gradient; and the choice between them."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from compare import assert_same, gradients, leaves
from hypothesis import given, settings
from hypothesis import strategies as st
from memories import HEAD, SWITCHES, carried, inputs, memory, scalar
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titans_pytorch import MemoryMLP, NeuralMemory
from titans_pytorch.memory.backends import DenseBackend, DualBackend, SpectralBackend, dual, fused_mlp
from titans_pytorch.memory.chunks import Chunks
from titans_pytorch.memory.coefficients import Coefficients
from titans_pytorch.memory.fast_weights import FastWeights
from titans_pytorch.memory.soft_clamp import soft_clamp_norm
from titans_pytorch.ops.gate_products import gate_products

DUAL = [switch for switch in SWITCHES if 'module' not in switch]


def pair(switch, *sizes, **kwargs):
    """The same memory with the dual and with the dense backend."""
    ours, dense = (memory(switch, *sizes, engine=engine, **kwargs) for engine in ('dual', 'dense'))
    dense.load_state_dict(ours.state_dict())
    return ours, dense


def assert_backends_agree(ours, dense, seq, sizes, mask=None):
    results = []
    for mem in (ours, dense):
        state, outs, surprises, updates = None, [], [], []
        for piece in torch.arange(sum(sizes)).split(sizes):
            some = None if mask is None else mask[:, piece]
            out, state, surprise = mem(seq[..., piece, :], state=state, store_mask=some, return_surprises=True)
            outs.append(out)
            surprises.append(surprise)
            updates.append(dict(state.updates.items()))
        out = torch.cat(outs, dim=1)
        results.append((out, carried(state), surprises, updates, gradients(mem, scalar(out, state))))
    for came, expected, name in zip(*results, ('output', 'state', 'surprise', 'update', 'gradient')):
        assert_same(came, expected, 1e-9, f'{name} ')


@pytest.fixture
def factored(monkeypatch):
    """All matrices factored, however small."""
    monkeypatch.setattr(dual, '_forms_matrix', lambda *_: False)


@pytest.fixture
def formed(monkeypatch):
    """All matrices formed, however large."""
    monkeypatch.setattr(dual, '_forms_matrix', lambda *_: True)


@pytest.mark.parametrize('matrices', ['factored', 'formed'])
@pytest.mark.parametrize('switch', [switch for switch in DUAL if 'spectral_norm_surprises' not in SWITCHES[switch]])
def test_backends_agree(switch, matrices, request):
    request.getfixturevalue(matrices)
    pair_of_backends = pair(switch)
    assert_backends_agree(*pair_of_backends, inputs(pair_of_backends[0], 29), [29])


STORED_TOGETHER = [
    *('plain', 'no momentum', 'momentum of order 3, combined', 'shared heads', 'two keys per token'),
    *('lookahead values', 'no residual norm', 'linear memory', 'look-ahead gradients'),
]


@pytest.mark.parametrize('sizes', [[39], [5, 20, 14]])
@pytest.mark.parametrize('switch', STORED_TOGETHER)
def test_memory_batches_are_stored_and_retrieved_from_together(switch, sizes, factored, monkeypatch):
    stored, retrieved = [], []
    scan, retrieve = fused_mlp.memory_batch_scan, fused_mlp.retrieve_sequence
    monkeypatch.setattr(fused_mlp, 'memory_batch_scan', lambda *args: (stored.append(args[5].shape[1]), scan(*args))[1])
    monkeypatch.setattr(
        fused_mlp, 'retrieve_sequence', lambda *args: (retrieved.append(args[0].shape[1]), retrieve(*args))[1]
    )
    ours, dense = pair(switch)
    assert_backends_agree(ours, dense, inputs(ours, sum(sizes)), sizes)
    assert max(stored) > 1 and max(retrieved) > 1


@pytest.mark.parametrize(('before', 'after'), [(32, 8), (None, 8), (8, 16)])
@pytest.mark.parametrize('switch', ['plain', 'look-ahead gradients'])
def test_memory_batches_together_begin_at_the_base_weights(switch, before, after, factored):
    """The base weights are not the newest ones if the last call ended within a memory batch."""
    results = []
    for mem in pair(switch):
        mem.batch_size = before
        seq = inputs(mem, 48)
        torch.manual_seed(0)
        seq = torch.randn_like(seq)
        _, state = mem(seq[:, :16])
        out, state = mem(seq[:, 16:], state=state, ttt_batch_size=after)
        results.append((out, carried(state), gradients(mem, scalar(out, state))))
    assert_same(*results, 1e-9)


def test_look_ahead_gradients_go_on_from_a_state_without_them(factored):
    """Base weights are then the newest ones, although there is momentum."""
    results = []
    for mem in pair('look-ahead gradients'):
        before = memory('normalized momentum', engine='dense')
        before.load_state_dict(mem.state_dict())
        seq = torch.linspace(-2, 2, 2 * 40 * 8, dtype=torch.float64).sin().view(2, 40, 8)
        state = before(seq[:, :16])[1].detach()
        state = state._replace(weights=state.states[0])
        out, state = mem(seq[:, 16:], state=state)
        results.append((out, carried(state), gradients(mem, scalar(out, state))))
    assert_same(*results, 1e-9)


@pytest.mark.parametrize('switch', ['plain', *(switch for switch in DUAL if 'look-ahead gradients' in switch)])
def test_memory_batches_together_are_recomputed_in_the_backward(switch, factored):
    kept, recomputed = memory(switch), memory(switch, checkpoint_every=16)
    seq = inputs(kept, 45)
    results = [(out, gradients(mem, out.sin().sum())) for mem in (kept, recomputed) for out, _ in [mem(seq)]]
    assert_same(*results, 1e-9)


@pytest.mark.parametrize('switch', [switch for switch in DUAL if 'spectral_norm_surprises' in SWITCHES[switch]])
def test_backends_agree_on_orthogonal_momentum(switch):
    dual, dense = pair(switch)
    assert_backends_agree(dual, dense, inputs(dual, 29), [29])


def test_the_smaller_of_matrices_and_rows_is_kept():
    for chunk_size, factored in ((3, True), (8, False)):
        mem = memory(
            'linear memory', chunk_size, chunk_size
        )  # 8 × 8: as large as four rows of inputs and four of errors
        updates = mem(inputs(mem, 16))[1].updates
        assert isinstance(updates, FastWeights) is factored


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_backends_agree_on_any_configuration(data):
    # with larger steps some of them amplify rounding errors from chunk to chunk
    switches = {'default_step_transform_max_lr': 0.2}
    for extra in data.draw(st.lists(st.sampled_from(DUAL), max_size=3)):
        switches |= {key: value for key, value in SWITCHES[extra].items() if key != 'model'}
    switch = data.draw(st.sampled_from(DUAL))
    chunk_size = data.draw(st.sampled_from([1, 2, 3, 5, 9, (2, 4), (4, 2)]))
    store = chunk_size[1] if isinstance(chunk_size, tuple) else chunk_size
    per_batch = data.draw(st.sampled_from([None, 1, 2, 4]))
    sizes = data.draw(st.lists(st.integers(1, 11), min_size=1, max_size=4))
    masked = data.draw(st.booleans())

    if store == 1:
        switches |= {'attn_pool_chunks': False, 'store_with_lookahead_value': False}
    if switches.get('momentum') is False:
        switches |= {'momentum_order': 1, 'learned_momentum_combine': False, 'init_momentum_bias': None}
    if switches.get('momentum_order', 2) == 1:
        switches |= {'learned_momentum_combine': False}
    try:
        dual, dense = pair(switch, chunk_size, per_batch and per_batch * store, **switches)
    except ValueError as error:  # a combination that the constructor refuses
        assert 'needs' in str(error)
        return
    mask = torch.rand(2, sum(sizes)) > 0.4 if masked else None
    assert_backends_agree(dual, dense, inputs(dual, sum(sizes)), sizes, mask)


@pytest.mark.parametrize('switch', ['plain', 'everything', 'attention memory', 'deep memory', 'soft clamp'])
def test_weight_residual_agrees(switch):
    results = []
    for engine in ('dual', 'dense'):
        first = memory(switch, engine=engine)
        second = memory(switch, accept_weight_residual=True, engine=engine)
        seq, states, outs = torch.randn(0), [None, None], []
        torch.manual_seed(1)
        seq = inputs(first, 29)
        for piece in torch.arange(29).split([11, 18]):
            _, states[0] = first(seq[..., piece, :], state=states[0])
            out, states[1] = second(seq[..., piece, :], state=states[1], prev_weights=states[0].updates)
            outs.append(out)
        out = torch.cat(outs, dim=1)
        parameters = [*first.parameters(), *second.parameters()]
        came = torch.autograd.grad(scalar(out, states[1]), parameters, allow_unused=True)
        results.append((out, carried(states[1]), [g for g in came if g is not None]))
    assert_same(*results, 1e-9)


@pytest.mark.parametrize('batch_size', [None, 400])
def test_long_memory_batches_are_stored_in_blocks(batch_size):
    dual, dense = pair('plain', 4, batch_size)
    assert dual._backend.preferred_chunks(Chunks(torch.zeros(1, 1, 4, 8), *[None] * 6)) < 100
    assert_backends_agree(dual, dense, inputs(dual, 800, batch=1), [333, 467])


class NumbersMade(TorchDispatchMode):
    """How many numbers all operations give, those of the backward included."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.count += sum(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


@pytest.mark.parametrize('batch_size', [None, 16])
def test_work_grows_with_the_length_and_no_faster(batch_size):
    mem = memory('plain', 1, batch_size)
    counts = []
    for length in (1024, 2048, 4096):
        with NumbersMade() as made:
            mem(inputs(mem, length, batch=1))[0].sum().backward()
        counts.append(made.count)
    assert counts[2] - counts[1] < 1.01 * 2 * (counts[1] - counts[0])


def test_masks_of_whole_chunks_and_steps_of_zero():
    dual, dense = pair('soft clamp', adaptive_step_transform=torch.zeros_like, default_step_transform_max_lr=1.0)
    assert_backends_agree(dual, dense, inputs(dual, 17), [17])
    dual, dense = pair('soft clamp')
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[:, 4:12] = False
    assert_backends_agree(dual, dense, inputs(dual, 17), [17], mask)


@pytest.mark.parametrize('logit', [-60.0, 60.0])
def test_saturated_gates(logit):
    biases = {'init_decay_bias': logit, 'init_momentum_bias': logit, 'init_adaptive_step_bias': -logit}
    dual, dense = pair('plain', **biases)
    with torch.no_grad():
        for mem in (dual, dense):
            for gate in (mem.to_decay_factor, mem.to_momentum, mem.to_adaptive_step):
                gate[0].weight.zero_()
    assert_backends_agree(dual, dense, inputs(dual, 29), [29])


# with these step sizes neither diverges, whatever the seed; the second fades to zero
@pytest.mark.parametrize(('depth', 'max_lr'), [(1, 0.05), (2, 0.01)])
def test_a_hundred_thousand_chunks_stay_finite(depth, max_lr):
    kwargs = {'default_model_kwargs': {'depth': depth}, 'default_step_transform_max_lr': max_lr}
    mem = NeuralMemory(8, chunk_size=1, batch_size=128, engine='dual', **kwargs)
    with torch.no_grad():
        seq = torch.randn(1, 100_000, 8)
        out, state = mem(seq)
    assert all(torch.isfinite(t).all() for t in (out, *leaves(carried(state)).values()))
    assert depth == 2 or all(w.abs().max() > 1e-3 for w in state.states[0].values())


@pytest.mark.parametrize('switch', ['plain', 'deep memory', 'attention memory', 'everything'])
def test_low_precision_errs_no_more_than_twice_as_much_as_dense(switch):
    dual, dense = pair(switch, default_step_transform_max_lr=0.05)
    seqs = [inputs(dual, 32) for _ in range(8)]
    exact = [dense(seq)[0].detach() for seq in seqs]

    def error(mem, autocast):
        """Root mean square over several inputs: one input's error is a matter of luck."""
        single, squares = copy.deepcopy(mem).float(), []
        for seq, right in zip(seqs, exact):
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                out = single(seq.float())[0]
            squares.append(((out.double() - right).norm() / right.norm()).item() ** 2)
        return (sum(squares) / len(squares)) ** 0.5

    for autocast in (False, True):
        assert error(dual, autocast) <= 2 * error(dense, autocast)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_without_a_gradient_it_is_as_exact(dtype):
    mem, dense = pair('plain')
    seq = inputs(mem, 29)
    exact = mem(seq)[0]
    mem, dense, seq = mem.to(dtype), dense.to(dtype), seq.to(dtype)
    with_gradient, by_dense = mem(seq)[0], dense(seq)[0]
    with torch.no_grad():
        without = mem(seq)[0]
    error, other, of_dense = ((out.double() - exact).norm() for out in (without, with_gradient, by_dense))
    assert error <= 1.5 * other
    assert other <= 4 * of_dense  # rounding errors of one input differ between processors


def test_a_module_in_bfloat16_runs():
    dual, dense = (mem.bfloat16() for mem in pair('everything', default_step_transform_max_lr=0.05))
    seq = inputs(dual, 29).bfloat16()
    out, state = dual(seq)
    assert out.dtype == state.cache_store_segment.tokens.dtype == torch.bfloat16
    assert all(w.dtype == torch.float32 for w in leaves((state.weights, state.states)).values())  # the recurrence
    assert ((out - dense(seq)[0]).norm() / out.norm()) < 0.1
    assert all(torch.isfinite(g).all() for g in gradients(dual, out.float().pow(2).sum()).values())


# compiling, streaming


@pytest.mark.parametrize(('switch', 'engine'), [('plain', 'auto'), ('linear memory', 'auto'), ('plain', 'dense')])
def test_a_compiled_memory_takes_lengths_that_vary(switch, engine, fresh_compiler):
    mem = memory(switch, engine=engine)

    def backend(graph, given):
        assert not any(isinstance(t, torch.SymInt) for t in given)  # a symbolic length compiles slowly
        return graph.forward

    compiled = torch.compile(mem, fullgraph=True, backend=backend)
    for length in (16, 24, 37):
        seq = inputs(mem, length)
        assert_same(compiled(seq)[0], mem(seq)[0], 1e-12)


@pytest.mark.parametrize('switch', ['plain', 'everything'])
def test_a_memory_compiles_whole_and_once(switch, fresh_compiler):
    mem = memory(switch)

    def loss(seq, state=None):
        out, state = mem(seq, state=state)
        return out.pow(2).sum() + sum(w.sum() for w in state.states[0].values())

    compiled = torch.compile(loss, fullgraph=True, backend='aot_eager')
    for attempt in range(2):
        seq = inputs(mem, 9)  # a whole memory batch, and an open chunk
        with torch.compiler.set_stance('fail_on_recompile' if attempt else 'default'):
            came = compiled(seq)
            of_compiled = gradients(mem, came)
        expected = loss(seq)
        assert_same((came, of_compiled), (expected, gradients(mem, expected)), 1e-9)


@pytest.mark.compiler
def test_a_training_step_compiles_on_a_cpu(fresh_compiler):
    mem = NeuralMemory(32, heads=4, chunk_size=8).double()  # fewer heads than a vector has elements

    def loss(seq):
        return mem(seq)[0].sin().sum()

    compiled, seq = torch.compile(loss, fullgraph=True), torch.randn(1, 65, 32, dtype=torch.float64)
    expected = loss(seq)
    of_expected = gradients(mem, expected)
    for _ in range(3):  # a write beyond the end of a tensor shows later
        came = compiled(seq)
        assert_same((came, gradients(mem, came)), (expected, of_expected), 1e-9)


def test_a_stream_holds_constant_memory():
    mem = NeuralMemory(8, chunk_size=4, batch_size=64)
    state, held = None, []
    with torch.no_grad():
        for _ in range(8):
            _, state = mem(torch.randn(1, 1024, 8), state=state)
            held.append(sum(t.untyped_storage().nbytes() for t in leaves(state).values()))
    assert state.seq_index == 8 * 1024
    assert len({*held}) == 1


@pytest.mark.parametrize('kwargs', [{}, {'engine': 'dense'}, {'spectral_norm_surprises': True}, {'momentum_order': 2}])
def test_weights_that_go_on_hold_nothing_of_the_call_before(kwargs):
    mem = NeuralMemory(8, chunk_size=4, **kwargs)
    held = []
    with torch.no_grad():
        for length in (64, 512):
            _, state = mem(torch.randn(1, length, 8))
            carried_on = leaves([state.weights, state.states])
            held.append(sum(t.untyped_storage().nbytes() for t in carried_on.values()))
    assert held[0] == held[1]


# nothing of size chunks × weights


def test_no_weights_per_chunk_are_held():
    mem = NeuralMemory(64, chunk_size=1, batch_size=64)
    seq = torch.randn(1, 512, 64)
    with torch.no_grad():
        _, state = mem(seq)
    weights = sum(p.numel() for p in mem.memory_model_parameters)
    held = sum(t.numel() for t in leaves([state.updates.blocks, state.updates.dense, state.updates.final]).values())
    assert held < 0.1 * 513 * weights
    assert sum(t.numel() for t in leaves(dict(state.updates.items())).values()) == 513 * weights


def test_updates_are_read_like_the_tensors_they_stand_for():
    dual, dense = pair('plain')
    seq = inputs(dual, 21)
    ours, expected = dual(seq)[1].updates, dense(seq)[1].updates
    with patch.object(FastWeights, 'to_dict', side_effect=AssertionError('weights were formed')):
        assert not hasattr(ours, 'seq_index')
        with pytest.raises(AttributeError, match="'FastWeights' object has no attribute 'detached'"):
            _ = ours.detached
    for changed in (ours * 2, 2 * ours, ours + ours, ours / 0.5, ours - -ours):
        assert_same(dict(changed.items()), {name: 2 * w for name, w in ours.items()})
    assert isinstance(ours, FastWeights) and {*ours} == {*expected.keys()} and len(ours) == len(expected.keys())
    assert_same(dict(ours.items()), dict(expected.items()))
    assert_same(ours.apply(lambda t: t * 2).to_dict(), expected.apply(lambda t: t * 2).to_dict())
    assert_same(dual.retrieve_memories(seq, ours), dual.retrieve_memories(seq, expected))
    detached = dual(seq)[1].detach().updates
    assert isinstance(detached, FastWeights) and not any(t.requires_grad for t in dict(detached.items()).values())


# choosing


class TwiceTheSame(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HEAD, HEAD))

    def forward(self, x, linear=torch.matmul):
        return linear(linear(x, self.weight).tanh(), self.weight)


class BareBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(HEAD, HEAD)), nn.Parameter(torch.randn(HEAD))

    def forward(self, x, linear=torch.matmul):
        return linear(x, self.weight) + self.bias


class OwnProtocol(nn.Module):
    rowwise = True

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(HEAD, HEAD)), nn.Parameter(torch.randn(HEAD))

    def forward(self, x, linear=torch.matmul):
        return linear(x, self.weight).tanh() + self.bias.unsqueeze(-2)


@pytest.mark.parametrize(
    ('model', 'why'),
    [
        (nn.Sequential(nn.Linear(HEAD, HEAD)), 'its forward takes no `linear`'),
        (TwiceTheSame(), r"it must use each of its matrices \['model.weight'\] once"),
        (BareBias(), 'its vectors must broadcast over rows'),
    ],
)
def test_an_explicit_choice_never_falls_back(model, why):
    kwargs = {'dim': 8, 'heads': 2, 'dim_head': HEAD, 'model': model}
    with pytest.raises(ValueError, match=f"engine='dual' cannot serve this model: {why}.*use engine='dense'"):
        NeuralMemory(**kwargs, engine='dual')
    assert NeuralMemory(**kwargs)._backend_class is DenseBackend


def test_choices():
    assert NeuralMemory(8)._backend_class is DualBackend
    assert NeuralMemory(8, spectral_norm_surprises=True)._backend_class is SpectralBackend
    assert NeuralMemory(8, engine='dense')._backend_class is DenseBackend
    with pytest.raises(ValueError, match="engine must be 'auto', 'dual' or 'dense', got 'fast'"):
        NeuralMemory(8, engine='fast')


def test_a_users_model_that_speaks_the_protocol():
    torch.manual_seed(3)
    model = OwnProtocol()
    dual, dense = pair('plain', model=model)
    assert_backends_agree(dual, dense, inputs(dual, 29), [10, 19])


# the pieces


def test_gate_products_equal_their_definition():
    gates = torch.rand(2, 6, dtype=torch.float64)
    products = gate_products(gates.log())
    for c in range(6):
        for j in range(6):
            expected = gates[:, j + 1 : c + 1].prod(dim=1) if j <= c else torch.zeros(2, dtype=torch.float64)
            assert_same(products[:, c, j], expected, 1e-12)


def test_coefficients_solve_the_recurrences():
    torch.manual_seed(0)
    n, orders = 7, 3
    gates = {
        'decay_logits': torch.randn(2, n),
        'momentum_logits': torch.randn(2, n, orders),
        'momentum_mix': torch.rand(2, n, orders + 1),
    }
    empty = torch.zeros(2, n, 1, 1)
    chunks = Chunks(empty, empty, empty[..., 0], **{k: v.double() for k, v in gates.items()}, modulation=None)
    coefficients = Coefficients.of(chunks.decay_logits, chunks.momentum_logits, chunks.momentum_mix)
    _, *parts = chunks.split([1, 3, 3])
    (_, both) = chunks.split([1, 6])
    for block, own in zip(Coefficients.of_blocks(both, 2).unbind(), parts):
        assert_same(block, Coefficients.of(own.decay_logits, own.momentum_logits, own.momentum_mix), 1e-12)

    u, w0, s0 = torch.randn(2, n).double(), torch.randn(2).double(), torch.randn(2, orders).double()
    initial = torch.cat((w0[:, None], s0), dim=1)
    weight, states = w0, [*s0.unbind(1)]
    for c in range(n):
        before = (coefficients.steps[:, c] * u).sum(1) + (coefficients.initial_steps[:, c] * initial).sum(1)
        assert_same(before, weight, 1e-12)
        surprise = u[:, c]
        for o in range(orders):
            states[o] = chunks.momentum_logits[:, c, o].sigmoid() * states[o] + surprise
            surprise = states[o]
        terms = torch.stack([u[:, c], *states], dim=1)
        combined = (chunks.momentum_mix[:, c] * terms).sum(dim=1)
        weight = (1 - chunks.decay_logits[:, c].sigmoid()) * weight + combined
    final = (coefficients.final * u[:, None]).sum(2) + (coefficients.initial_final * initial[:, None]).sum(2)
    assert_same(final, torch.stack([weight, *states], dim=1), 1e-12)


def test_soft_clamp_bounds_the_norm_and_keeps_the_direction():
    gradients_ = torch.randn(2, 3, 4, 5, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e3]).view(1, 3, 1, 1)
    gradients_[0, 0] = 0.0
    clamped = soft_clamp_norm(gradients_, 2.0)
    norms, before = clamped.flatten(2).norm(dim=-1), gradients_.flatten(2).norm(dim=-1)
    assert norms[0, 0] == 0.0
    assert_same(norms[before > 0], ((before.tanh() + 1) * 1.0)[before > 0], 1e-12)
    cosine = torch.nn.functional.cosine_similarity(clamped.flatten(2), gradients_.flatten(2), dim=-1)
    assert_same(cosine[before > 0], torch.ones(5, dtype=torch.float64), 1e-9)


def test_a_linear_memory_without_gates_is_linear_attention():
    """One matrix, no momentum, no forgetting, gradients at zero: W = Σ θ · 2/d · k vᵀ, so M(q) = Σ θ (q·k) v · 2/d."""
    mem = NeuralMemory(
        HEAD, chunk_size=1, batch_size=None, model=MemoryMLP(HEAD, depth=1), momentum=False,
        mem_model_norm_add_residual=False, init_decay_bias=-60.0, init_adaptive_step_bias=0.0,
    ).double()  # fmt: skip
    with torch.no_grad():
        mem.memory_model_parameters[0].zero_()
    seq = torch.randn(1, 9, HEAD, dtype=torch.float64)
    normed = mem.store_norm(seq)
    q, k, v = (proj(normed) for proj in (mem.to_queries, mem.to_keys, mem.to_values))
    expected = (q @ k.mT).tril() @ v * 0.5 * 2 / HEAD
    assert_same(mem(seq)[0], expected, 1e-9)


@pytest.mark.gpu
def test_memory_batches_of_long_chunks_are_stored_together_on_a_gpu(monkeypatch):
    calls, store = [], fused_mlp.memory_batch_scan
    monkeypatch.setattr(fused_mlp, 'memory_batch_scan', lambda *args: (calls.append(args), store(*args))[1])
    mem = NeuralMemory(32, 64, 64, heads=2, dim_head=16, qk_rmsnorm=True, init_decay_bias=-3.0)
    seq = torch.randn(2, 300, 32)
    results = []
    for device, dtype in (('cuda', torch.float32), ('cpu', torch.float64)):
        own = copy.deepcopy(mem).to(device, dtype)
        out, _ = own(seq.to(device, dtype))
        grads = torch.autograd.grad(out.square().sum(), [*own.parameters()])
        results.append([t.double().cpu() for t in (out, *grads)])
    assert len(calls) == 1  # on the CPU the matrices are formed
    assert_same(*results, 1e-4)


@pytest.mark.parametrize('switch', ['plain', 'linear memory'])
def test_weights_stored_under_autocast_are_read_outside_it_and_the_other_way_round(switch):
    mem = memory(switch, 4, 8).float()
    seq = inputs(mem, 24).float()
    with torch.autocast('cpu', torch.bfloat16):
        stored, _ = mem.store_memories(seq, return_surprises=False)
        within = dict(stored.items())
    outside = dict(stored.items())
    assert_same(within, outside, 0)
    for name, w in mem.init_weights(len(seq)).items():
        torch.testing.assert_close(outside[name][:, 0], w, atol=1e-6, rtol=0)
    retrieved = mem.retrieve_memories(seq, stored)
    torch.testing.assert_close(retrieved, mem.retrieve_memories(seq, outside), atol=0.02, rtol=0.02)
