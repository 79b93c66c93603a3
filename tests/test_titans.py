"""The drop-in contract: what code written for the reference package does, and the numbers that it gets.

Every number is compared with another way to compute it: the paper's equations written out, the same sequence in pieces,
no cache. Figures of the reference itself are compared in `test_golden.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import all_in_float64, assert_same, gradients, randomised
from torch import Tensor, nn
from torch.func import functional_call

import titans_pytorch
from titans_pytorch import (
    FactorizedMemoryMLP,
    GatedResidualMemoryMLP,
    MemoryAsContextTransformer,
    MemoryAttention,
    MemoryMLP,
    MemorySwiGluMLP,
    NeuralMemory,
    NeuralMemState,
    mem_state_detach,
)
from titans_pytorch.implicit_mlp_attention import ImplicitMLPAttention
from titans_pytorch.mac_transformer import SegmentedAttention, flex_attention
from titans_pytorch.memory_models import ResidualNorm
from titans_pytorch.nested_attention import NestedAttention
from titans_pytorch.neural_memory import AssocScan

DIM = 8
MODELS = {
    'mlp': lambda: MemoryMLP(DIM, depth=2),
    'linear': lambda: MemoryMLP(DIM, depth=1),
    'gated residual': lambda: GatedResidualMemoryMLP(DIM, depth=2, expansion_factor=2.0),
    'factorized': lambda: FactorizedMemoryMLP(DIM, depth=2, k=3),
    'swiglu': lambda: MemorySwiGluMLP(DIM, depth=2),
    'attention': lambda: MemoryAttention(DIM),
}


@pytest.fixture(autouse=True)
def in_float64(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker('gpu'):
        yield
        return
    torch.set_default_dtype(torch.float64)
    with all_in_float64():
        yield
    torch.set_default_dtype(torch.float32)


def memory(chunk_size: int = 4, **options: Any) -> NeuralMemory:
    return randomised(NeuralMemory(DIM, chunk_size, default_step_transform_max_lr=0.3, **options), 0.2)


def trained(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad and p.numel() > 0}


def in_pieces(mem: NeuralMemory, seq: Tensor, sizes: int | list[int]) -> tuple[Tensor, NeuralMemState]:
    """What calls one after the other retrieve, and the last state."""
    outs, state = [], None
    for piece in seq.split(sizes, dim=-2):
        out, state = mem(piece, state=state)
        outs.append(out)
    return torch.cat(outs, dim=1), state


def assert_pieces_equal_one_pass(mem: NeuralMemory, seq: Tensor, sizes: int | list[int]) -> None:
    (out, state), (expected, expected_state) = in_pieces(mem, seq, sizes), mem(seq)
    assert_same(out, expected)
    assert_same((state.weights, state.states), (expected_state.weights, expected_state.states))
    assert_same(gradients(mem, out.square().sum()), gradients(mem, expected.square().sum()), 1e-8)


# names


def test_public_names():
    names = 'NeuralMemory NeuralMemState mem_state_detach MemoryAsContextTransformer MemoryMLP MemoryAttention'
    for name in [*names.split(), 'FactorizedMemoryMLP', 'MemorySwiGluMLP', 'GatedResidualMemoryMLP']:
        assert name in titans_pytorch.__all__ and hasattr(titans_pytorch, name)
    assert NeuralMemState._fields == ('seq_index', 'weights', 'cache_store_segment', 'states', 'updates')
    first = [*inspect.signature(NeuralMemory.forward).parameters][1:8]
    assert first == ['seq', 'store_seq', 'state', 'detach_mem_state', 'prev_weights', 'store_mask', 'return_surprises']
    assert callable(flex_attention)


# one memory


@pytest.mark.parametrize('batch_size', [None, 4])
def test_memory_follows_the_paper(batch_size):
    """Titans eq. 10, 12 and 13 for a linear memory, token by token and chunk by chunk."""
    chunk_size, length = 2, 11
    mem = memory(chunk_size, batch_size=batch_size, model=MemoryMLP(DIM, 1), mem_model_norm_add_residual=False)
    seq = torch.randn(1, length, DIM)

    rows = mem.store_norm(seq)[0]
    keys, values = mem.to_keys(rows), mem.to_values(rows)
    step_sizes = mem.to_adaptive_step[0](rows).sigmoid() * 0.3
    base = weight = mem.memory_model_parameters[0][0]
    surprise, over_time = torch.zeros_like(weight), [weight]
    for start in range(0, length - 1, chunk_size):
        if batch_size and start % batch_size == 0:
            base = weight
        chunk = slice(start, start + chunk_size)
        errors = keys[chunk] @ base - values[chunk]
        gradient = keys[chunk].mT @ (step_sizes[chunk] * errors) * 2 / DIM
        pooled = rows[chunk].mean(dim=0)
        surprise = mem.to_momentum[0](pooled).sigmoid() * surprise - gradient
        weight = (1 - mem.to_decay_factor[0](pooled).sigmoid()) * weight + surprise
        over_time.append(weight)

    queries = mem.to_queries(mem.retrieve_norm(seq))[0]
    expected = torch.stack([q @ over_time[(t + 1) // chunk_size] for t, q in enumerate(queries)])

    retrieved, state = mem(seq)
    assert_same(retrieved[0], expected)
    assert_same(state.updates['weights.0'][0], torch.stack(over_time))
    assert_same((state.states[0]['weights.0'][0], state.states[1]['weights.0'][0, 0]), (weight, surprise))
    assert state.seq_index == 10 and torch.equal(state.cache_store_segment, seq[:, 10:])


OPTIONS: dict[str, dict[str, Any]] = {
    'default': {},
    'heads': dict(heads=2, dim_head=8),
    'shared heads': dict(heads=2, dim_head=8, per_head_learned_parameters=False),
    'no momentum': dict(momentum=False),
    'momentum of order 2': dict(momentum_order=2),
    'combined': dict(momentum_order=2, learned_momentum_combine=True, learned_combine_include_zeroth=True),
    'activation': dict(activation=nn.SiLU()),
    'norms': dict(qk_rmsnorm=True, post_rmsnorm=True, pre_rmsnorm=False),
    'pooled by attention': dict(attn_pool_chunks=True),
    'clamped': dict(max_grad_norm=2.0),
    'modulated': dict(per_parameter_lr_modulation=True, max_mem_layer_modulation=2.0),
    'two keys per token': dict(num_kv_per_token=2),
    'next values': dict(store_with_lookahead_value=True),
    'spectral': dict(spectral_norm_surprises=True),
    'gated transition': dict(gated_transition=True),
    'biases': dict(init_decay_bias=-3.0, init_momentum_bias=1.0, init_adaptive_step_bias=-1.0),
    'views': dict(qkv_receives_diff_views=True),
}


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_titans(options):
    """Whatever is switched on, calls of any lengths equal one pass: outputs, states, gradients."""
    mem = memory(batch_size=8, **options)
    views = (3,) if mem.qkv_receives_diff_views else ()
    assert_pieces_equal_one_pass(mem, torch.randn(*views, 2, 22, DIM), [8, 3, 6, 1, 4])


@pytest.mark.parametrize('model', MODELS.values(), ids=MODELS)
def test_memory_models(model):
    """Each retrieves what it gives when called with the weights over time, and learns them all."""
    mem = memory(model=model())
    seq = torch.randn(2, 12, DIM)
    retrieved, state = mem(seq)

    # tokens 3 to 6 read the weights after the first chunk; a causal network sees no others of them
    after_first = {name: w[0, 1] for name, w in state.updates.items()}
    queries = mem.to_queries(mem.retrieve_norm(seq[0, 3:7]))
    network = ResidualNorm(DIM, model())
    assert_same(functional_call(network, after_first, (queries,)), retrieved[0, 3:7])

    assert_pieces_equal_one_pass(mem, seq, 5)
    assert gradients(mem, retrieved.sum()).keys() == trained(mem)


def test_memory_models_alone():
    x = torch.randn(2, 5, DIM)
    mlp = MemoryMLP(DIM, 2)
    assert_same(mlp(x), F.gelu(x @ mlp.weights[0]) @ mlp.weights[1])
    for model in MODELS.values():
        made = model()
        changed = x.clone()
        changed[:, 4] += 1.0
        assert torch.equal(made(changed)[:, :4], made(x)[:, :4])  # causal


def test_return_surprises():
    mem = memory(heads=2, dim_head=8, batch_size=None)
    seq = torch.randn(2, 10, DIM)
    _, _, (losses, step_sizes) = mem(seq, return_surprises=True)

    # of the complete chunks, at the initial weights
    rows = mem.store_norm(seq[:, :8])
    keys, values = (to(rows).unflatten(-1, (2, 8)).movedim(2, 1) for to in (mem.to_keys, mem.to_values))
    network = ResidualNorm(8, MemoryMLP(8, 2, 4.0))
    for head in range(2):
        weights = {name: w[head] for name, w in mem.memory_model_parameter_dict.items()}
        predicted = functional_call(network, weights, (keys[:, head],))
        assert_same(losses[:, head], (predicted - values[:, head]).square().mean(dim=-1))
    assert_same(step_sizes, mem.to_adaptive_step[0](rows).sigmoid().mT * 0.3)


def test_memorises_what_it_is_told():
    """Surprise falls when a sequence comes again: the memory holds it, and nothing was trained."""
    torch.manual_seed(0)
    mem = NeuralMemory(
        16, chunk_size=8, batch_size=8, default_step_transform_max_lr=1.0, init_decay_bias=-8.0, init_momentum_bias=-8.0
    )
    seq = torch.randn(1, 8, 16)
    _, _, (losses, _) = mem(seq.repeat(1, 30, 1), return_surprises=True)
    first, last = losses[..., :8].mean(), losses[..., -8:].mean()
    assert last < first / 2


def test_masked_tokens_are_not_stored():
    # gates that are the same for every token, so that only keys and values speak
    mem = NeuralMemory(DIM, 4, init_decay_bias=-1.0, init_momentum_bias=0.0, init_adaptive_step_bias=0.0)
    seq, store_mask = torch.randn(2, 12, DIM), torch.rand(2, 12) > 0.4
    changed = torch.where(store_mask.unsqueeze(-1), seq, torch.randn_like(seq))

    _, state = mem(seq, store_mask=store_mask)
    assert_same(mem(changed, store_mask=store_mask)[1].updates, state.updates)
    assert_same(mem(seq, store_mask=torch.ones_like(store_mask))[0], mem(seq)[0])
    assert (mem(seq)[1].states[0]['model.weights.0'] - state.states[0]['model.weights.0']).abs().max() > 1e-4


def test_what_is_stored_may_differ_from_what_is_asked():
    mem = memory()
    asked, stored = torch.randn(2, 2, 12, DIM)
    retrieved, state = mem(asked, store_seq=stored)
    assert_same(state.updates, mem(stored)[1].updates)
    assert_same(retrieved, mem.retrieve_memories(asked, state.updates))


def test_store_and_retrieve_are_the_two_halves_of_a_call():
    mem = memory()
    seq = torch.randn(2, 14, DIM)
    retrieved, state, surprises = mem(seq, return_surprises=True)
    updates, after, stored_surprises = mem.store_memories(seq)
    assert_same((updates, after.states, stored_surprises), (state.updates, state.states, surprises))
    assert_same(mem.retrieve_memories(seq, updates), retrieved)


def test_custom_loss_and_step_size():
    """The defaults, written out by the caller."""
    seq = torch.randn(2, 12, DIM)
    expected = memory()
    given = NeuralMemory(
        DIM,
        4,
        model=MemoryMLP(DIM, depth=2, expansion_factor=4.0),
        store_memory_loss_fn=lambda pred, target: (pred - target).pow(2).mean(dim=-1),
        adaptive_step_transform=lambda logits: logits.sigmoid() * 0.3,
    )
    given.load_state_dict(expected.state_dict())
    assert_same(given(seq)[0], expected(seq)[0])


# state over calls


@pytest.mark.parametrize('gated_transition', [True, False])
def test_neural_mem_chaining_chunks(gated_transition):
    mem = memory(16, heads=2, dim_head=8, gated_transition=gated_transition)
    assert_pieces_equal_one_pass(mem, torch.randn(2, 48, DIM), 16)


def test_neural_mem_chaining_with_batch_size():
    mem = memory(8, heads=2, dim_head=8, batch_size=32)
    assert_pieces_equal_one_pass(mem, torch.randn(2, 56, DIM), [8, 24, 24])


@pytest.mark.parametrize('over_the_whole_sequence', [True, False])
def test_neural_mem_chaining_with_weight_residual(over_the_whole_sequence):
    mem, mem2 = memory(8), memory(8, accept_weight_residual=True)
    seq = torch.randn(2, 32, DIM)
    _, whole = mem(seq)
    expected, _ = mem2(seq, prev_weights=whole.updates)

    outs, state, state2 = [], None, None
    for piece in seq.split([16, 8, 8], dim=1):
        _, state = mem(piece, state=state)
        updates = whole.updates if over_the_whole_sequence else state.updates
        out, state2 = mem2(piece, state=state2, prev_weights=updates)
        outs.append(out)
    assert_same(torch.cat(outs, dim=1), expected)


@pytest.mark.parametrize('prompt_len', [0, 13])
@pytest.mark.parametrize('chunk_size', [1, 2, 16])
def test_neural_mem_inference(prompt_len, chunk_size):
    """Single tokens, without the axis of length, after a prompt or from the first."""
    mem = memory(chunk_size, batch_size=16)
    seq = torch.randn(2, 36, DIM)
    expected, _ = mem(seq)

    out, state = mem(seq[:, :prompt_len]) if prompt_len else (seq[:, :0], None)
    for token in seq[:, prompt_len:].unbind(dim=1):
        retrieved, state = mem(token, state=state)
        out = torch.cat((out, retrieved), dim=1)
    assert_same(out, expected)


def test_mem_state_detach():
    mem, seq = memory(2), torch.randn(2, 8, DIM, requires_grad=True)
    _, state = mem(seq)
    for detached in (mem_state_detach(state), mem(seq, detach_mem_state=True)[1]):
        assert isinstance(detached, NeuralMemState)
        assert_same(detached, state)
        out, _ = mem(torch.randn(2, 8, DIM), state=detached)
        assert torch.autograd.grad(out.sum(), seq, allow_unused=True) == (None,)
    out, _ = mem(torch.randn(2, 8, DIM), state=state)
    assert torch.autograd.grad(out.sum(), seq)[0].abs().max() > 0


def test_per_head_parameters_train_and_load():
    mem, other = memory(heads=4, dim_head=4), memory(heads=4, dim_head=4)
    seq = torch.randn(2, 16, DIM)
    before = [p.clone() for p in mem.parameters()]
    optimizer = torch.optim.AdamW(mem.parameters(), lr=1e-2)
    mem(seq)[0].square().sum().backward()
    optimizer.step()
    assert all((p != was).any() for p, was in zip(mem.parameters(), before))

    other.load_state_dict(mem.state_dict())
    assert_same(other(seq), mem(seq), 0.0)


# scan


@pytest.mark.parametrize('use_accelerated', [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_assoc_scan(use_accelerated):
    device = 'cuda' if use_accelerated else 'cpu'
    scan = AssocScan(use_accelerated=use_accelerated)
    gates, inputs = torch.rand(2, 32, 3, device=device), torch.randn(2, 32, 3, device=device)

    expected, state = [], torch.zeros(2, 3, device=device)
    for gate, x in zip(gates.unbind(1), inputs.unbind(1)):
        state = gate * state + x
        expected.append(state)
    expected, tolerance = torch.stack(expected, dim=1), 1e-5 if use_accelerated else 1e-12

    assert_same(scan(gates, inputs), expected, tolerance)
    first = scan(gates[:, :11], inputs[:, :11])
    rest = gates[:, 11:], inputs[:, 11:]
    assert_same(scan(*rest, prev=first[:, -1]), expected[:, 11:], tolerance)
    assert_same(scan(*rest, prev=first[:, -1], remove_prev=False), expected[:, 10:], tolerance)


# attention


@pytest.mark.parametrize('sliding', [True, False])
def test_segmented_attention_sees_its_window(sliding):
    attention = SegmentedAttention(DIM, 4, 2, num_longterm_mem_tokens=1, dim_head=4, heads=2, sliding=sliding)
    randomised(attention)
    seq = torch.randn(1, 12, DIM)
    out, (values, (keys, cached_values)) = attention(seq)
    assert_same(cached_values, values)

    # windows of 5: in the blocks 0–4, 5–9, …, or up to 5 positions back
    for changed in (0, 3, 7):
        seen_by = (out - attention(seq + F.one_hot(torch.tensor(changed), 12)[:, None])[0]).abs().amax(
            dim=(0, 2)
        ) > 1e-9
        last = changed + 5 if sliding else changed // 5 * 5 + 4
        assert seen_by.nonzero().flatten().tolist() == list(range(changed, min(last, 11) + 1))

    pieces, cache = [], None
    for piece in seq.split([7, 1, 1, 3], dim=1):
        piece_out, (_, cache) = attention(piece, cache=cache)
        pieces.append(piece_out)
    assert_same(torch.cat(pieces, dim=1), out)


@pytest.mark.gpu
@pytest.mark.parametrize('sliding', [True, False])
@pytest.mark.parametrize('length', [1023, 17])
def test_flex(length, sliding):
    attention = SegmentedAttention(16, 32, 1, 1, use_flex_attn=True, sliding=sliding).cuda()
    seq = torch.randn(1, length, 16, device='cuda')
    assert_same(attention(seq)[0], attention(seq, disable_flex_attn=True)[0], 2e-3)


@pytest.mark.parametrize(
    'attention',
    [
        lambda: ImplicitMLPAttention(DIM, (4, 6, 6, 4), heads=2, activation=nn.ReLU()),
        lambda: NestedAttention(DIM, dim_head=4, heads=2),
    ],
    ids=['implicit', 'nested'],
)
def test_experiments_with_a_cache(attention):
    attend, tokens = randomised(attention()), torch.randn(2, 9, DIM)
    expected = attend(tokens)
    first, cache = attend(tokens[:, :5], return_kv_cache=True)
    rest, cache = attend(tokens[:, 5:8], cache=cache, return_kv_cache=True)
    assert_same(torch.cat((first, rest, attend(tokens[:, 8:], cache=cache)), dim=1), expected)


# transformer

MAC_OPTIONS: dict[str, dict[str, Any]] = {
    'default': {},
    'no memory': dict(neural_memory_layers=()),
    'memory in one layer': dict(neural_memory_layers=(2,)),
    'tokens': dict(num_persist_mem_tokens=2, num_longterm_mem_tokens=2),
    'gates attention': dict(neural_mem_gate_attn_output=True),
    'views': dict(neural_memory_qkv_receives_diff_views=True),
    'weight residual': dict(neural_mem_weight_residual=True, num_longterm_mem_tokens=1),
    'memory segments': dict(neural_memory_segment_len=2, neural_memory_batch_size=4),
    'sliding': dict(sliding_window_attn=True, num_persist_mem_tokens=2, num_longterm_mem_tokens=2),
    'one stream': dict(num_residual_streams=1),
    'memory model': dict(neural_memory_model=MODELS['factorized'], neural_memory_kwargs=dict(momentum=False)),
    'everything': dict(
        num_persist_mem_tokens=1,
        num_longterm_mem_tokens=1,
        neural_memory_segment_len=5,
        neural_memory_batch_size=10,
        neural_memory_qkv_receives_diff_views=True,
        neural_mem_weight_residual=True,
        neural_memory_kwargs=dict(heads=2, dim_head=4, attn_pool_chunks=True, qk_rmsnorm=True, momentum_order=2),
    ),
}
every_mac = pytest.mark.parametrize('options', MAC_OPTIONS.values(), ids=MAC_OPTIONS)


def transformer(**options: Any) -> MemoryAsContextTransformer:
    sizes = dict(num_tokens=32, dim=DIM, depth=2, segment_len=4, dim_head=4, heads=2)
    model = options.pop('neural_memory_model', lambda: None)()
    return randomised(MemoryAsContextTransformer(neural_memory_model=model, **{**sizes, **options}), 0.1)


@every_mac
def test_mac(options):
    """Logits do not depend on what comes later; the loss is their cross-entropy, and every parameter learns by it."""
    model, ids = transformer(**options), torch.randint(0, 32, (2, 15))
    logits = model(ids)
    assert logits.shape == (2, 15, 32)
    for seen in (1, 5, 14):
        assert_same(model(ids[:, :seen]), logits[:, :seen])

    loss = model(ids, return_loss=True)
    assert_same(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    assert gradients(model, loss).keys() >= trained(model)


@every_mac
@pytest.mark.parametrize('prompt_len', [2, 9])
def test_mac_sampling(options, prompt_len):
    """The likeliest tokens, with the cache and without it."""
    model, prompt = transformer(**options), torch.randint(0, 32, (2, prompt_len))
    arguments = dict(temperature=0.0, show_progress=False)
    sampled = model.sample(prompt, 17, use_cache=False, **arguments)
    assert torch.equal(model.sample(prompt, 17, use_cache=True, **arguments), sampled)

    ids = torch.cat((prompt, sampled), dim=1)
    assert torch.equal(model(ids)[:, prompt_len - 1 : -1].argmax(dim=-1), sampled)


def test_mac_sampling_by_chance():
    """A seed repeats a sample, and the filter has its say."""
    model, prompt = transformer(), torch.randint(0, 32, (1, 3))

    def sample(seed: int, **arguments: Any) -> Tensor:
        torch.manual_seed(seed)
        return model.sample(prompt, 30, show_progress=False, **arguments)

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))
    assert torch.equal(sample(0, filter_kwargs=dict(min_p=1.0)), sample(1, temperature=0.0))
    only_seven = lambda logits, token: torch.full_like(logits, -1e9).index_fill(1, torch.tensor([token]), 0.0)  # noqa: E731
    assert (sample(0, filter_fn=only_seven, filter_kwargs=dict(token=7)) == 7).all()
    assert model.training


@pytest.mark.parametrize(
    'options', [MAC_OPTIONS['weight residual'], MAC_OPTIONS['everything']], ids=['some', 'everything']
)
def test_mac_neural_mem_state_equivalence(options):
    """The cache after a token at a time is that of one pass."""
    model, ids = transformer(**options).eval(), torch.randint(0, 32, (1, 12))
    logits, (seq_index, _, memories) = model(ids, return_cache=True)

    cache, step_logits = None, []
    for known in range(1, 13):
        last, cache = model(ids[:, :known], cache=cache, return_cache=True)
        step_logits.append(last[:, -1])
    assert_same(torch.stack(step_logits, dim=1), logits)
    assert cache[0] == seq_index
    for came, expected in zip(cache[2], memories, strict=True):
        assert_same((came.weights, came.states), (expected.weights, expected.states))


def test_mac_learns():
    """A few steps of the usual loop, on a pattern."""
    torch.manual_seed(0)
    model = MemoryAsContextTransformer(num_tokens=8, dim=16, depth=2, segment_len=4, dim_head=8, heads=2)
    ids = torch.arange(24).remainder(8).expand(2, 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(ids, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_mac_state_dict():
    options = dict(num_longterm_mem_tokens=1, neural_memory_qkv_receives_diff_views=True)
    model, other = transformer(**options), transformer(**options)
    other.load_state_dict(model.state_dict())
    ids = torch.randint(0, 32, (1, 11))
    assert_same(other(ids), model(ids), 0.0)


def test_own_token_embedding():
    embedding = nn.Sequential(nn.Embedding(32, 4), nn.Linear(4, DIM))
    model, ids = transformer(token_emb=embedding), torch.randint(0, 32, (1, 9))
    loss = model(ids, return_loss=True)
    assert gradients(embedding, loss).keys() == trained(embedding)
