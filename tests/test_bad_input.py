"""Bad input: an error that names the argument, what was expected and what came; and nothing lost by it."""

from __future__ import annotations

import copy

import pytest
import torch
from compare import assert_same
from memories import DIM, inputs, memory
from torch import nn

from titans_pytorch import (
    MemoryAsContextTransformer,
    MemoryAttention,
    MemoryMLP,
    NeuralMemory,
    NeuralMemState,
    mem_state_detach,
)
from titans_pytorch.mac_transformer import SegmentedAttention


class Widens(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, DIM * 2))

    def forward(self, x):
        return x @ self.weight


BAD_MEMORIES = [
    (dict(dim=0), ValueError, 'dim must be a positive integer, got 0'),
    (dict(chunk_size=0), ValueError, 'chunk_size must be a positive integer, got 0'),
    (dict(chunk_size=(4, 0)), ValueError, 'chunk_size must be a positive integer, got 0'),
    (dict(chunk_size=2.0), TypeError, 'chunk_size must be a positive integer, got 2.0'),
    (dict(heads=0), ValueError, 'heads must be a positive integer, got 0'),
    (dict(num_kv_per_token=0), ValueError, 'num_kv_per_token must be a positive integer, got 0'),
    (dict(momentum_order=0), ValueError, 'momentum_order must be a positive integer, got 0'),
    (dict(chunk_size=4, batch_size=6), ValueError, 'batch_size must be a multiple of chunk_size=4, got 6'),
    (dict(batch_size=0), ValueError, 'batch_size must be a positive integer, got 0'),
    (dict(dim_head=4), ValueError, 'dim_head must equal dim=8 when heads is 1, got 4'),
    (dict(attn_pool_chunks=True), ValueError, 'attn_pool_chunks needs a chunk_size above 1'),
    (dict(learned_momentum_combine=True), ValueError, 'learned_momentum_combine needs .* momentum_order=1'),
    (dict(momentum=False, init_momentum_bias=1.0), ValueError, 'init_momentum_bias needs momentum=True'),
    (dict(model=Widens()), ValueError, r'model must keep the shape of its input, .* gave \(3, 2, 16\)'),
    (dict(model=MemoryMLP(5, depth=1)), ValueError, r'model must accept a tensor of shape \(3, 2, 8\)'),
    (dict(model=nn.BatchNorm1d(2)), ValueError, "model must have no buffers, got .'running_mean'"),
    (dict(model=nn.Identity()), ValueError, 'model must have parameters'),
    (dict(engine='dense', checkpoint_every=8), ValueError, "checkpoint_every needs engine='dual', and this memory is"),
    (dict(accept_weight_residual=True, checkpoint_every=8), ValueError, 'checkpoint_every keeps no weights over time'),
    (dict(model=torch.tanh), TypeError, 'model must be a torch.nn.Module'),
]


@pytest.mark.parametrize(('kwargs', 'error', 'message'), BAD_MEMORIES)
def test_memory_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        NeuralMemory(**{'dim': DIM, **kwargs})


def test_lookahead_that_stores_nothing_says_so():
    with pytest.warns(UserWarning, match='chunks of a single row stores nothing'):
        NeuralMemory(DIM, store_with_lookahead_value=True)


def test_the_error_of_a_memory_model_is_kept_as_the_cause():
    with pytest.raises(ValueError, match='it raised: ') as caught:
        NeuralMemory(DIM, model=MemoryMLP(5, depth=1))
    assert isinstance(caught.value.__cause__, RuntimeError)


SEQ = torch.randn(2, 10, DIM, dtype=torch.float64)
MASK = torch.ones(2, 10, dtype=torch.bool)

BAD_CALLS = [
    ('plain', dict(seq=SEQ[..., :5]), ValueError, r'seq must be \(batch, length, dim=8\), got \(2, 10, 5\)'),
    ('plain', dict(seq=SEQ[None]), ValueError, r'seq must be \(batch, length, dim=8\)'),
    ('plain', dict(seq=SEQ[:, :0]), ValueError, r'none of them empty, got \(2, 0, 8\)'),
    ('plain', dict(seq=SEQ.long()), TypeError, 'seq must be a floating-point tensor, got torch.int64'),
    ('plain', dict(seq=[1.0]), TypeError, 'seq must be a tensor, got list'),
    ('different views', dict(seq=SEQ.expand(2, 2, 10, DIM)), ValueError, r'seq must be \(views=3, batch'),
    ('plain', dict(seq=SEQ, store_seq=SEQ[:1]), ValueError, r'store_seq must be \(batch=2, length, dim=8\)'),
    ('different views', dict(seq=SEQ.expand(3, 2, 10, DIM), store_seq=SEQ[None]), ValueError, r'store_seq must be'),
    ('plain', dict(seq=SEQ, store_mask=MASK[:, :9]), ValueError, r'store_mask must be .* got \(2, 9\)'),
    ('plain', dict(seq=SEQ, store_mask=MASK.double()), TypeError, 'store_mask must be a boolean tensor'),
    ('plain', dict(seq=SEQ, ttt_batch_size=6), ValueError, 'ttt_batch_size must be a multiple of chunk_size=4, got 6'),
    ('plain', dict(seq=SEQ, prev_weights={}), ValueError, 'prev_weights must be given exactly where'),
    ('plain', dict(seq=SEQ, state='state'), TypeError, 'state must be a NeuralMemState, got str'),
]  # fmt: skip


@pytest.mark.parametrize(('switch', 'kwargs', 'error', 'message'), BAD_CALLS)
def test_memory_calls(switch, kwargs, error, message):
    with pytest.raises(error, match=message):
        memory(switch)(**kwargs)


def test_states_of_another_kind():
    mem = memory()
    _, state = mem(SEQ)
    cases = [
        (mem, SEQ[:1], r'state.weights must hold the weights of this memory'),
        (memory('deep memory'), SEQ, r'state.weights must hold the weights of this memory'),
        (memory('momentum of order 2'), SEQ, r'state.states\[1\] must hold the weights of this memory'),
        (memory(chunk_size=3, batch_size=6), SEQ, r'chunk_size=3: its seq_index must be a multiple of it, got 8'),
        (memory(chunk_size=2), SEQ, r'state.cache_store_segment must be \(batch=2, fewer than chunk_size=2'),
        (memory('different views'), SEQ.expand(3, 2, 10, DIM), r'state.cache_store_segment must be \(views=2'),
    ]
    for other, seq, message in cases:
        with pytest.raises(ValueError, match=message):
            other(seq, state=state)
    with pytest.raises(TypeError, match='state must be a NeuralMemState'):
        mem_state_detach(tuple(state))


def test_weights_of_another_kind():
    mem, accepts = memory(), memory(accept_weight_residual=True)
    _, state = mem(SEQ)
    with pytest.raises(ValueError, match='prev_weights must be given exactly where .* got none'):
        accepts(SEQ)
    with pytest.raises(ValueError, match='prev_weights must hold weights for each of the 2 chunks .* got 1'):
        accepts(SEQ, prev_weights=state.weights)
    with pytest.raises(ValueError, match='prev_weights must hold the parameters'):
        accepts(SEQ, prev_weights={'other': SEQ})
    with pytest.raises(ValueError, match=r"weights\['norm.gamma'\] must be \(batch·heads=4, chunks, 8\)"):
        mem.retrieve_memories(SEQ, {name: w[:1] for name, w in state.updates.items()})


def test_a_refused_call_loses_nothing():
    mem = memory('everything')
    seq = inputs(mem, 18)
    before = copy.deepcopy(mem.state_dict())
    _, state = mem(seq[..., :7, :])
    kept = copy.deepcopy(state.detach())
    for kwargs in (dict(ttt_batch_size=3), dict(store_mask=torch.ones(1, 1, dtype=torch.bool)), dict(prev_weights={})):
        with pytest.raises(ValueError):
            mem(seq[..., 7:, :], state=state, **kwargs)
    assert_same(state.detach(), kept, 0.0)
    assert_same(mem.state_dict(), before, 0.0)
    assert_same(mem(seq[..., 7:, :], state=state)[0], mem(seq)[0][:, 7:])


def test_a_partial_state_is_filled_in():
    mem = memory()
    assert_same(mem(SEQ, state=NeuralMemState(0, None, None, None, None)), mem(SEQ), 0.0)
    assert_same(mem(SEQ, state=NeuralMemState(0, mem.init_weights(2), None, None, None)), mem(SEQ), 0.0)


TRANSFORMER = dict(num_tokens=16, dim=16, depth=2, segment_len=4, dim_head=8, heads=2)

BAD_TRANSFORMERS = [
    (dict(num_tokens=0), 'num_tokens must be a positive integer, got 0'),
    (dict(depth=0), 'depth must be a positive integer, got 0'),
    (dict(segment_len=0), 'segment_len must be a positive integer, got 0'),
    (dict(num_residual_streams=0), 'num_residual_streams must be a positive integer, got 0'),
    (dict(num_persist_mem_tokens=-1), 'num_persist_mem_tokens must be an integer of at least 0, got -1'),
    (dict(neural_memory_layers=(1, 3)), r'neural_memory_layers must be layers from 1 to depth=2, got \[3\]'),
    (dict(neural_memory_layers=(0,)), r'neural_memory_layers must be layers from 1 to depth=2, got \[0\]'),
    (dict(neural_memory_batch_size=6), 'batch_size must be a multiple of chunk_size=4, got 6'),
]


@pytest.mark.parametrize(('kwargs', 'message'), BAD_TRANSFORMERS)
def test_transformer_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MemoryAsContextTransformer(**{**TRANSFORMER, **kwargs})


def test_transformer_calls():
    model = MemoryAsContextTransformer(**TRANSFORMER)
    ids = torch.randint(0, 16, (2, 10))
    for bad, error, message in [
        (ids.float(), TypeError, 'x must hold integer token ids, got torch.float32'),
        (ids + 16, ValueError, r'x must hold token ids in \[0, num_tokens=16\), got ids in'),
        (ids - 16, ValueError, r'x must hold token ids in'),
        (ids[0], ValueError, r'x must be \(batch, length\), got \(10,\)'),
        (ids[:, :0], ValueError, r'x must be \(batch, length\), none of them empty'),
    ]:
        with pytest.raises(error, match=message):
            model(bad)
    with pytest.raises(ValueError, match='x must hold at least 2 tokens'):
        model(ids[:, :1], return_loss=True)
    with pytest.raises(ValueError, match=r'prompt must be \(batch, length\), none of them empty'):
        model.sample(ids[:, :0], 5, show_progress=False)
    _, cache = model(ids, return_cache=True)
    with pytest.raises(ValueError, match='x must go beyond the 10 tokens in the cache'):
        model(ids, cache=cache)


def test_attention_and_memory_models():
    with pytest.raises(ValueError, match=r'seq must be \(batch, length, dim=16\), got \(1, 3, 8\)'):
        SegmentedAttention(16, 4)(torch.randn(1, 3, 8))
    with pytest.raises(ValueError, match='value_residual must be given exactly where'):
        SegmentedAttention(16, 4, accept_value_residual=True)(torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match='segment_len must be a positive integer'):
        SegmentedAttention(16, 0)
    with pytest.raises(ValueError, match='depth must be a positive integer, got 0'):
        MemoryMLP(8, depth=0)
    with pytest.raises(ValueError, match='dim must be a positive integer, got 0'):
        MemoryAttention(0)
