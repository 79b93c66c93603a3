"""Proximal steps and normalised momentum: what they promise, beside the comparisons that all switches go through."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same, gradients
from memories import DIM, HEAD, inputs, memory
from torch import nn

from titans_pytorch import MemoryAttention, MemoryMLP, NeuralMemory, NeuralMemState
from titans_pytorch.ops.proximal_steps import proximal_deltas
from titans_pytorch.presets import memory_settings

DEPTHS = (1, 2, 3)
AHEAD = {'normalized_momentum': True, 'lookahead_gradients': True}


class Rowwise(nn.Linear):
    rowwise = True


def proximal(depth: int, chunk_size: int, **kwargs) -> NeuralMemory:
    changes = {'init_decay_bias': -30.0, 'momentum': False, 'mem_model_norm_add_residual': False, **kwargs}
    batch_size = changes.pop('batch_size', chunk_size)
    return memory('proximal steps', chunk_size, batch_size, model=MemoryMLP(HEAD, depth=depth), **changes)


def test_a_step_of_a_linear_memory_minimises_loss_and_distance():
    """W minimises Σ θ ‖k W − v‖² / d + ‖W − W₀‖² / 2."""
    mem = proximal(1, 4, default_step_transform_max_lr=50.0)
    nn.init.constant_(mem.to_decay_factor[0].bias, -40.0)
    nn.init.zeros_(mem.to_decay_factor[0].weight)
    seq = inputs(mem, 4)
    chunks, _ = mem._project_chunks(seq, None)
    keys, values = chunks.keys[:, 0], chunks.values[:, 0]
    weighted = 2 * chunks.step_sizes[:, 0, :, None] / HEAD * keys
    (start,) = mem.init_weights(2).values()
    system = torch.eye(HEAD, dtype=torch.float64) + keys.mT @ weighted
    expected = torch.linalg.solve(system, start + weighted.mT @ values)
    (came,) = mem(seq)[1].weights.values()
    assert_same(came, expected, 1e-10)


def test_a_step_of_one_row_follows_its_error_to_where_it_ends():
    """One matrix of a network: Δ = −θ ∂ℓ/∂a, with ℓ linearised, at the product that the step leads to."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    theta = torch.tensor([3.0], dtype=torch.float64)

    def error(product):
        return (product.tanh() - 0.3).norm() / 3**0.5  # ℓ is its square

    product = x @ weight
    gradient, value = torch.func.grad_and_value(error)(product)
    delta = proximal_deltas(x, -theta * 2 * value * gradient, theta, value.square().reshape(1), 1)
    moved = (x @ x.mT) @ delta
    linearised = value + (gradient * moved).sum()
    assert_same(delta, -theta * 2 * linearised * gradient, 1e-12)


@pytest.mark.parametrize('theta', [0.1, 10.0, 1e4])
@pytest.mark.parametrize('chunk_size', [1, 4, 16])
def test_no_step_of_a_linear_memory_raises_the_loss_of_its_chunk(chunk_size, theta):
    mem = proximal(1, chunk_size, default_step_transform_max_lr=theta)
    seq = inputs(mem, chunk_size)
    with torch.no_grad():
        _, state, before = mem(seq, return_surprises=True)
        # the same chunk again, from the weights that it left
        _, _, after = mem(seq, state=state._replace(seq_index=0), return_surprises=True)
    weighted = [(losses * step_sizes).sum(dim=-1) for losses, step_sizes in (before, after)]
    assert (weighted[1] < weighted[0]).all()
    if theta == 1e4 and chunk_size < HEAD:
        assert (weighted[1] < 1e-3 * weighted[0]).all()


@pytest.mark.parametrize('batch_size', [16, 64])
@pytest.mark.parametrize('residual_norm', [False, True])
@pytest.mark.parametrize('depth', DEPTHS)
def test_a_memory_stays_finite_where_plain_steps_diverge(depth, residual_norm, batch_size):
    """Keys of positive features, which all point much the same way; a step that moves a row all the way by itself."""

    def largest(**kwargs) -> float:
        torch.manual_seed(depth)
        mem = NeuralMemory(
            32,
            chunk_size=16,
            batch_size=batch_size,
            mem_model_norm_add_residual=residual_norm,
            qk_l2norm=True,
            activation=nn.ReLU(),
            init_decay_bias=-5.0,
            init_momentum_bias=2.0,
            default_step_transform_max_lr=16.0,
            default_model_kwargs={'depth': depth},
            **kwargs,
        )
        with torch.no_grad():
            return mem(torch.randn(1, 2048, 32))[0].abs().max().item()

    assert not largest() < 1e3
    assert largest(proximal_steps=True, normalized_momentum=True) < 10


def test_equal_rows_share_a_step_however_large():
    rows, deltas = torch.ones(3, 4), 1e6 * torch.ones(3, 2)
    step = proximal_deltas(rows, deltas, torch.full((3,), 1e8), torch.ones(3), 5)
    # five such steps move the product by 2ℓ / ‖g‖, with g = 0.01 in each of two directions
    assert_same(5 * rows @ rows.mT @ step, torch.full((3, 2), 2 / 0.02), 1e-3)


def test_rows_that_are_not_stored_have_finite_gradients():
    mem = proximal(2, 4).float()
    seq = torch.zeros(2, 8, DIM)
    seq[:, 4:] = 1.0  # equal rows
    mask = torch.tensor([[True, False] * 4, [False] * 8])
    out, state = mem(seq, store_mask=mask)
    (out.sum() + sum(w.square().sum() for w in state.weights.values())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mem.parameters())


@pytest.mark.parametrize('order', [1, 2])
def test_normalized_momentum_adds_up_to_one_step(order):
    """What a single chunk adds to the weights in the end, if nothing is forgotten, whatever the gates."""
    mem = memory('no residual norm', 2, None, normalized_momentum=True, momentum_order=order)
    plain = memory('no residual norm', 2, None, momentum=False)
    plain.load_state_dict(mem.state_dict(), strict=False)
    for own in (mem, plain):
        nn.init.zeros_(own.to_decay_factor[0].weight)
        nn.init.constant_(own.to_decay_factor[0].bias, -40.0)
    mem.to_momentum[0].weight.data.mul_(10)
    seq = inputs(mem, 400)
    mask = torch.zeros(2, 400, dtype=torch.bool)
    mask[:, :2] = True
    (start, _), (end, _), (expected, _) = (
        [*weights.values()]
        for weights in (mem.init_weights(2), *(own(seq, store_mask=mask)[1].states[0] for own in (mem, plain)))
    )
    gates = (mem._project_chunks(seq, None)[0].momentum_logits).sigmoid()
    assert gates.min() < 0.1 and gates.max() > 0.9
    assert_same(end - start, expected - start, 1e-9)


def errors_with_gates(gates, monkeypatch, **options):
    """Distance of the value retrieved for one key, which every chunk of one token stores, by the largest proximal step
    of `memory_settings`; these gates of momentum are repeated."""
    torch.manual_seed(0)
    identities = {'conv_kernel': None, 'activation': None, 'post_rmsnorm': False, 'channel_gate': False}
    biases = {'init_adaptive_step_bias': 40.0, 'init_decay_bias': -40.0}
    linear = {'default_model_kwargs': {'depth': 1}}
    mem = NeuralMemory(HEAD, 1, 1, **memory_settings(1, HEAD, 1, **identities, **biases, **linear, **options)).double()
    for gate in (mem.to_adaptive_step[0], mem.to_decay_factor[0]):
        nn.init.zeros_(gate.weight)
    logits = torch.tensor(gates, dtype=torch.float64).logit().repeat(300 // len(gates)).view(1, -1, 1)
    seq = torch.randn(1, 1, HEAD, dtype=torch.float64).expand(1, logits.shape[1], HEAD)
    chunks, pooled = mem._project_chunks(seq, None)
    orders = logits.expand(1, -1, mem.momentum_order)
    chunks = chunks._replace(momentum_logits=orders, momentum_shares=(-orders).sigmoid())
    monkeypatch.setattr(mem, '_project_chunks', lambda *_: (chunks, pooled))
    with torch.no_grad():
        (over_time,) = mem(seq)[1].updates.to_dict().values()
    return (chunks.keys[:, 0] @ over_time[0] - chunks.values[:, 0]).norm(dim=-1).squeeze(1)


@pytest.mark.parametrize('order', [1, 2])
@pytest.mark.parametrize('gates', [[0.9], [0.95] * 4 + [0.0], [0.99] * 9 + [0.1]], ids=str)
def test_look_ahead_gradients_do_not_ask_twice(gates, order, monkeypatch):
    errors = errors_with_gates(gates, monkeypatch, momentum_order=order, **AHEAD)
    assert (errors[1:] < errors[:-1] + 1e-12).all()
    assert errors[-1] < 1e-8 * errors[0]


def test_gradients_at_the_newest_weights_ask_again_for_what_momentum_holds(monkeypatch):
    """Gates 0.95 for four tokens, then 0: the error grows 2.4-fold in five tokens."""
    errors = errors_with_gates([0.95] * 4 + [0.0], monkeypatch, normalized_momentum=True, lookahead_gradients=False)
    growth = errors[10::5] / errors[5:-5:5]
    assert_same(growth[-1], torch.tensor(2.4091, dtype=torch.float64), 1e-4)
    assert (growth > 2).all()


def test_look_ahead_weights_take_every_step_at_once():
    """V = W + Σ P changes by u whatever the gates, so that without decay the base weights are those of a memory without
    momentum."""
    options = {'batch_size': 4, 'default_step_transform_max_lr': 50.0}
    mem = proximal(1, 2, momentum=True, momentum_order=2, **AHEAD, **options)
    plain = proximal(1, 2, **options)
    plain.load_state_dict(mem.state_dict(), strict=False)
    for own in (mem, plain):
        nn.init.zeros_(own.to_decay_factor[0].weight)
        nn.init.constant_(own.to_decay_factor[0].bias, -40.0)
    seq = inputs(mem, 32)
    (_, state), (_, expected) = mem(seq), plain(seq)
    assert_same(dict(state.weights.items()), dict(expected.weights.items()), 1e-9)
    (newest,), (end,) = (own.states[0].values() for own in (state, expected))
    assert (newest - end).abs().max() > 1e-2


def test_storing_without_retrieval_counts_the_chunks_of_the_call():
    mem = proximal(1, 4, batch_size=24, default_step_transform_max_lr=100.0)
    seq = inputs(mem, 24)
    stored = mem.store_memories(seq, return_surprises=False)
    assert_same((stored[-1] if isinstance(stored, tuple) else stored).states, mem(seq)[1].states, 1e-12)


def test_storing_a_memory_batch_in_pieces_without_retrieval_equals_one_call():
    mem = proximal(1, 4, batch_size=24, momentum=False, default_step_transform_max_lr=100.0)
    seq = inputs(mem, 24)
    expected = mem(seq)[1].states
    for length in (4, 8, 12):
        weights, state, position = None, None, 0
        for piece in seq.split(length, dim=-2):
            # all gradients at the initial weights
            _, after = mem.store_memories(piece, weights, state, position, return_surprises=False)
            weights, state, position = after.weights, after.states, after.seq_index
        assert_same(state, expected, 1e-9)


def test_look_ahead_from_a_state_with_momentum_at_the_start():
    """Gradients of the first memory batch are taken at the state's base weights."""
    results = []
    for engine in ('dual', 'dense'):
        mem = memory(chunk_size=2, batch_size=4, engine=engine, **AHEAD)
        seq = inputs(mem, 12)
        weights, momentum = mem(seq)[1].states
        out, state = mem(seq, state=NeuralMemState(0, weights, None, (weights, momentum), None))
        results.append((out, state.states))
    assert_same(*results, 1e-10)


def test_a_batch_size_for_one_call_counts():
    mem, longer = (proximal(1, 4, batch_size=batch_size, default_step_transform_max_lr=64.0) for batch_size in (4, 64))
    longer.load_state_dict(mem.state_dict())
    seq = inputs(mem, 256)
    assert_same(mem(seq, ttt_batch_size=64)[0], longer(seq)[0], 1e-9)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    mem = proximal(2, 4).float()
    seq = inputs(mem, 23).float()
    expected = mem(seq)[0]
    with torch.autocast('cpu', dtype):
        assert_same(mem(seq)[0].float(), expected, 0.05)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'batch_size': None}, 'needs batch_size'),
        ({'max_grad_norm': 1.0}, 'needs max_grad_norm=None'),
        ({'max_mem_layer_modulation': 2.0}, 'needs max_mem_layer_modulation of at most 1, got 2.0'),
        ({'model': MemoryAttention(DIM)}, 'needs a model that treats rows separately'),
        ({'model': Rowwise(DIM, DIM)}, 'needs a model that the dual engine can serve: .*takes no `linear`'),
        ({'store_memory_loss_fn': lambda x, y: (x - y).abs().mean(dim=-1)}, 'the default store_memory_loss_fn'),
        ({'spectral_norm_surprises': True}, 'needs spectral_norm_surprises=False'),
        ({'momentum': False, 'normalized_momentum': True}, 'normalized_momentum needs momentum=True'),
        ({'proximal_steps': 1}, 'proximal_steps must be True or False'),
        ({'lookahead_gradients': True}, 'lookahead_gradients needs normalized_momentum=True'),
        ({**AHEAD, 'proximal_steps': False, 'batch_size': None}, 'lookahead_gradients needs batch_size'),
        (
            {**AHEAD, 'momentum_order': 2, 'learned_momentum_combine': True},
            'lookahead_gradients needs learned_momentum_combine=False',
        ),
        ({**AHEAD, 'gated_transition': True}, 'lookahead_gradients needs gated_transition=False'),
        ({**AHEAD, 'lookahead_gradients': None}, 'lookahead_gradients must be True or False'),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        NeuralMemory(DIM, **{'batch_size': 4, 'proximal_steps': True, **changes})


def test_surprises_on_request_change_nothing():
    mem = memory('linear memory', 1, 1, proximal_steps=True, mem_model_norm_add_residual=False)
    seq, results = inputs(mem, 9), []
    for requested in (True, False):
        out, state, *surprises = mem(seq, return_surprises=requested)
        assert len(surprises) == requested
        results.append((out, state.states, gradients(mem, out.sin().sum())))
    assert_same(*results, 1e-12)
