"""Bad input: an error that names the argument, what was expected and what came; and nothing lost by it."""

from __future__ import annotations

import copy

import pytest
import torch
from compare import assert_same
from memories import DIM, inputs, memory
from torch import nn

from titans_pytorch import (
    FactorizedMemoryMLP,
    GatedResidualMemoryMLP,
    LongTermMemoryModel,
    MemoryAsContextTransformer,
    MemoryAsGateTransformer,
    MemoryAsLayerTransformer,
    MemoryAttention,
    MemoryMLP,
    MemorySwiGluMLP,
    NeuralMemory,
    NeuralMemState,
    mem_state_detach,
)
from titans_pytorch.generation.logits import gumbel_sample, min_p_filter
from titans_pytorch.mac_transformer import SegmentedAttention
from titans_pytorch.presets import delta_rule_settings, memory_settings, preset

NAN, INF = float('nan'), float('inf')


class Widens(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, DIM * 2))

    def forward(self, x):
        return x @ self.weight


class Running(nn.Module):
    """Sums over earlier tokens: causal, but another result where a sequence is split."""

    def forward(self, x):
        return x.cumsum(dim=1)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


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
    (dict(model=Pair(DIM, DIM)), TypeError, 'model must return a tensor, got tuple'),
    (dict(model=MemoryMLP(5, depth=1)), ValueError, r'model must accept a tensor of shape \(3, 2, 8\)'),
    (dict(model=nn.BatchNorm1d(2)), ValueError, "model must have no buffers, got .'running_mean'"),
    (dict(model=nn.Identity()), ValueError, 'model must have parameters'),
    (dict(engine='dense', checkpoint_every=8), ValueError, "checkpoint_every needs engine='dual', and this memory is"),
    (dict(accept_weight_residual=True, checkpoint_every=8), ValueError, 'checkpoint_every keeps no weights over time'),
    (dict(model=torch.tanh), TypeError, 'model must be a torch.nn.Module'),
    (
        dict(chunk_size=(4, 4, 4)),
        ValueError,
        r'chunk_size must be an integer or a pair \(retrieve, store\), got \(4, 4',
    ),
    (dict(chunk_size='4'), TypeError, "chunk_size must be a positive integer, got '4'"),
    (dict(heads=True), TypeError, 'heads must be a positive integer, got True'),
    (dict(momentum='no'), TypeError, "momentum must be True or False, got 'no'"),
    (dict(activation=torch.tanh), TypeError, 'activation must be a torch.nn.Module'),
    (dict(activation=nn.GLU()), ValueError, 'activation must keep the shape'),
    (dict(activation=nn.PReLU(3)), ValueError, 'activation must take'),
    (dict(activation=nn.Softmax(dim=1)), ValueError, 'activation must treat tokens separately'),
    (dict(activation=Running()), ValueError, 'activation must treat tokens separately'),
    (
        dict(adaptive_step_transform=nn.Softmax(dim=-1)),
        ValueError,
        'adaptive_step_transform must treat tokens separate',
    ),
    (dict(adaptive_step_transform=lambda t: t.cumsum(-1)), ValueError, 'adaptive_step_transform must treat tokens sep'),
    (dict(store_memory_loss_fn=nn.MSELoss()), ValueError, 'store_memory_loss_fn must return one loss a row'),
    (dict(store_memory_loss_fn=torch.tanh), ValueError, 'store_memory_loss_fn must accept two tensors .* it raised'),
    (
        dict(store_memory_loss_fn=lambda came, wanted: (came - wanted).square().mean(-1) * float(came.sum() >= 0)),
        ValueError,
        'store_memory_loss_fn must work under torch.func.vmap, it raised: ',
    ),
    (dict(default_model_kwargs=4), TypeError, 'default_model_kwargs must be a mapping of keyword arguments, got 4'),
    (dict(default_model_kwargs={'depth': 2, 'expansion_factor': '4'}), TypeError, 'expansion_factor must be a number'),
    (
        dict(default_model_kwargs={'depth': 2, 'width': 3}),
        TypeError,
        "default_model_kwargs must hold arguments of MemoryMLP: .*'width'",
    ),
    (dict(engine=['dual']), ValueError, 'engine must be .*, got'),
]
BOUNDS = ['max_grad_norm', 'default_step_transform_max_lr', 'max_mem_layer_modulation']
BAD_MEMORIES += [
    ({name: value}, ValueError, f'{name} must be a finite number above 0, got {value}')
    for name in ('max_grad_norm', 'max_mem_layer_modulation')
    for value in (0, -1, NAN, INF)
]
BAD_MEMORIES += [
    ({'default_step_transform_max_lr': value}, ValueError, f'max_lr must be a finite number of at least 0, got {value}')
    for value in (-1, NAN, INF)
]
BAD_MEMORIES += [
    ({name: value}, ValueError, f'{name} must be a finite number, got {value}')
    for name in ('init_adaptive_step_bias', 'init_momentum_bias', 'init_decay_bias')
    for value in (NAN, INF, -INF)
    if (name, value) != ('init_decay_bias', -INF)
]
BAD_MEMORIES += [
    ({name: '1'}, TypeError, f"{name} must be a number.*, got '1'") for name in (*BOUNDS, 'init_decay_bias')
]


@pytest.mark.parametrize(('kwargs', 'error', 'message'), BAD_MEMORIES)
def test_memory_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        NeuralMemory(**{'dim': DIM, **kwargs})


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (
            dict(adaptive_step_transform=torch.sigmoid, default_step_transform_max_lr=0.1),
            'default_step_transform_max_lr has no effect with adaptive_step_transform',
        ),
        (dict(momentum=False, momentum_order=2), 'momentum_order has no effect with momentum=False'),
        (dict(learned_combine_include_zeroth=True), 'learned_combine_include_zeroth has no effect'),
    ],
)
def test_arguments_without_effect(kwargs, message):
    with pytest.warns(UserWarning, match=message) as warned:
        NeuralMemory(DIM, **kwargs)
    assert warned[0].filename == __file__


def test_the_backend_is_chosen_once():
    memory = NeuralMemory(DIM, spectral_norm_surprises=True)
    assert memory.spectral_norm_surprises
    with pytest.raises(AttributeError):
        memory.spectral_norm_surprises = False


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
    ('plain', dict(seq=SEQ, store_seq=SEQ[:, 1:]), ValueError, 'store_seq must have a token for each of the 10 tokens'),
    ('plain', dict(seq=SEQ, store_seq=SEQ[:1]), ValueError, r'store_seq must be \(batch=2, length, dim=8\)'),
    ('different views', dict(seq=SEQ.expand(3, 2, 10, DIM), store_seq=SEQ[None]), ValueError, r'store_seq must be'),
    ('different views', dict(seq=SEQ, store_seq=SEQ.expand(2, 2, 10, DIM)), ValueError, r'^seq must be \(views=3'),
    ('different views', dict(seq=SEQ.expand(7, 2, 10, DIM), store_seq=SEQ.expand(2, 2, 10, DIM)), ValueError, r'^seq'),
    ('plain', dict(seq=SEQ, store_mask=MASK[:, :9]), ValueError, r'store_mask must be .* got \(2, 9\)'),
    ('plain', dict(seq=SEQ, store_mask=MASK.double()), TypeError, 'store_mask must be a boolean tensor'),
    ('plain', dict(seq=SEQ.float()), TypeError, 'seq must be of torch.float64, as the parameters are, got '),
    ('plain', dict(seq=SEQ, return_surprises=1), TypeError, 'return_surprises must be True or False, got 1'),
    ('plain', dict(seq=SEQ, detach_mem_state=SEQ), TypeError, 'detach_mem_state must be True or False, got a tensor'),
    ('plain', dict(seq=SEQ, ttt_batch_size=6), ValueError, 'ttt_batch_size must be a multiple of chunk_size=4, got 6'),
    ('plain', dict(seq=SEQ, prev_weights={}), ValueError, 'prev_weights must be given if, and only if'),
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
        (
            mem,
            SEQ[:1],
            r'state.weights must be of a batch of 1, as the sequence is, got one of 2: see NeuralMemState.select',
        ),
        (memory('deep memory'), SEQ, r'state.weights must hold the weights of this memory'),
        (memory(momentum=False), SEQ, r'state.states\[1\] must hold no momentum, or zeros, as this memory has none'),
        (memory('momentum of order 2'), SEQ, r'state.states\[1\] must hold the weights of this memory'),
        (memory(chunk_size=3, batch_size=6), SEQ, r'state.seq_index must be a multiple of chunk_size=3, .* got 8'),
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
    with pytest.raises(ValueError, match='prev_weights must be given if, and only if, .*got none'):
        accepts(SEQ)
    with pytest.raises(ValueError, match='prev_weights must hold weights for each of the 2 chunks .* got 1'):
        accepts(SEQ, prev_weights=state.weights)
    with pytest.raises(ValueError, match='prev_weights must hold the parameters'):
        accepts(SEQ, prev_weights={'other': SEQ})
    with pytest.raises(ValueError, match=r"weights\['norm.gamma'\] must be \(batch·heads=4, chunks, 8\)"):
        mem.retrieve_memories(SEQ, {name: w[:1] for name, w in state.updates.items()})


def test_states_and_weights_of_the_wrong_kind():
    mem, accepts = memory(), memory(accept_weight_residual=True)
    _, state = mem(SEQ)
    for field, value, message in [
        ('seq_index', 'x', "state.seq_index must be an integer of at least 0, got 'x'"),
        ('weights', 3, 'state.weights must map the names of parameters to tensors, got 3'),
        ('weights', {**state.weights, 'norm.gamma': None}, r"state.weights\['norm.gamma'\] must be a tensor, got None"),
        ('states', state.weights, 'state.states must be a pair of weights and momentum'),
        ('states', (state.weights, SEQ), r'state.states\[1\] must map the names of parameters to tensors'),
        ('cache_store_segment', 'x', 'state.cache_store_segment must be a PendingSegment, got str'),
    ]:
        with pytest.raises(TypeError, match=message):
            mem(SEQ, state=state._replace(**{field: value}))
    with pytest.raises(ValueError, match='state.seq_index must be an integer of at least 0, got -4'):
        mem(SEQ, state=state._replace(seq_index=-4))
    with pytest.raises(
        TypeError, match='store_seq must be a tensor, got NeuralMemState; pass a state by keyword, as st'
    ):
        mem(SEQ, state)
    with pytest.raises(TypeError, match='prev_weights must map the names of parameters to tensors'):
        accepts(SEQ, prev_weights=SEQ)
    with pytest.raises(TypeError, match=r'past_state\[0\] must map the names of parameters to tensors, got 1'):
        mem.store_memories(SEQ, past_state=(1, 2))
    with pytest.raises(TypeError, match='weights must map the names of parameters to tensors'):
        mem.retrieve_memories(SEQ, 'weights')
    with pytest.raises(TypeError, match=r'entries\[0\] must be an integer, got 0.5'):
        state.select([0.5])
    with pytest.raises(TypeError, match='entries must be integers, in one dimension, got 1'):
        state.select(1)


def test_a_refused_call_loses_nothing():
    mem = memory('everything')
    seq = inputs(mem, 18)
    before = copy.deepcopy(mem.state_dict())
    _, state = mem(seq[..., :7, :])
    kept = copy.deepcopy(state.detach())
    for kwargs in (dict(ttt_batch_size=3), dict(store_mask=torch.ones(1, 1, dtype=torch.bool)), dict(prev_weights={})):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
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
    (dict(neural_memory_batch_size=6), 'neural_memory_batch_size must be a multiple of neural_memory_segment_len=4'),
    (dict(ff_mult=-1), 'ff_mult must be a finite number above 0, got -1'),
    (dict(ff_mult=0.01), 'ff_mult must give a hidden layer of at least one feature for a width of 16, got 0.01'),
    (dict(dim_head=2), 'dim_head must be at least 3, the smallest rotary dimension, got 2'),
    (
        dict(neural_memory_kwargs={'chunk_size': 2}),
        "must not hold 'chunk_size': models have neural_memory_segment_len for it",
    ),
    (
        dict(neural_memory_kwargs={'accept_weight_residual': True}),
        "must not hold 'accept_weight_residual': models set it",
    ),
    (dict(neural_memory_kwargs={'max_grad_norm': -1}), 'max_grad_norm must be a finite number above 0, got -1'),
]


@pytest.mark.parametrize(('kwargs', 'message'), BAD_TRANSFORMERS)
def test_transformer_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MemoryAsContextTransformer(**{**TRANSFORMER, **kwargs})


def test_a_model_without_a_length_of_chunks():
    with pytest.raises(
        TypeError, match='neural_memory_segment_len, the tokens of a memory chunk, or segment_len must be'
    ):
        LongTermMemoryModel(num_tokens=8, dim=16, depth=1)


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


MODELS = [MemoryAsContextTransformer, MemoryAsGateTransformer, MemoryAsLayerTransformer, LongTermMemoryModel]
models = pytest.mark.parametrize('cls', MODELS)


@models
def test_a_state_in_the_place_of_return_loss(cls):
    model = cls(**TRANSFORMER)
    ids = torch.randint(0, 16, (2, 10))
    _, state = model(ids, return_state=True)
    message = 'return_loss must be True or False, got ModelState; pass a state by keyword, as state='
    with pytest.raises(TypeError, match=message):
        model(ids, state)
    for flag in ('return_loss', 'return_state', 'return_hidden', 'return_cache', 'disable_flex_attn'):
        for value in (1, None, 'yes', ids):
            with pytest.raises(TypeError, match=f'{flag} must be True or False, got '):
                model(ids, **{flag: value})
    if cls is MemoryAsContextTransformer:
        with pytest.raises(TypeError, match='return_loss_breakdown must be True or False, got 1'):
            model(ids, False, 1)
        with pytest.raises(TypeError, match='disable_flex_attn must be True or False, got ModelState; pass a state by'):
            model(ids, False, False, state)


@models
def test_unknown_keywords_of_a_call(cls):
    model, ids = cls(**TRANSFORMER), torch.randint(0, 16, (2, 10))
    message = f'{cls.__name__} got an unexpected keyword argument .attention_mask., .foo.; a call takes x, .*labels'
    with pytest.raises(TypeError, match=message):
        model(ids, attention_mask=None, foo=1)
    if cls is not MemoryAsContextTransformer:
        with pytest.raises(TypeError, match='unexpected keyword argument .factorized_pos_emb.'):
            model(ids, factorized_pos_emb=None)


@models
def test_model_states_of_the_wrong_kind(cls):
    model, ids = cls(**TRANSFORMER).double(), torch.randint(0, 16, (2, 10))
    _, state = model(ids, return_state=True)
    with pytest.raises(TypeError, match='state must be a ModelState, got NeuralMemState'):
        model(ids, state=state.memories[0])
    with pytest.raises(TypeError, match=r'state.memories\[1\] must be a NeuralMemState, got int'):
        model(ids, state=state._replace(memories=[state.memories[0], 1]))
    with pytest.raises(ValueError, match='state must be of a batch of 1, as x is, got one of 2'):
        model(ids[:1], state=state)
    pair = (torch.zeros(2, 3, 1, 8),) * 2
    with pytest.raises(ValueError, match=r'state.key_values\[0\] must be'):
        model(ids, state=state._replace(key_values=[pair, pair]))
    if cls is not LongTermMemoryModel:
        with pytest.raises(ValueError, match=r'state.key_values\[0\] must hold no more than the 1 positions before'):
            model(ids, state=state._replace(seq_index=1))


def test_embeddings_of_an_own_module():
    model = MemoryAsGateTransformer(**{**TRANSFORMER, 'token_emb': nn.Embedding(16, 8)})
    with pytest.raises(ValueError, match=r'token_emb must return \(batch, length, dim=16\) .* got \(2, 10, 8\)'):
        model(torch.randint(0, 16, (2, 10)))
    with pytest.raises(TypeError, match='token_emb must be a torch.nn.Module'):
        MemoryAsGateTransformer(**{**TRANSFORMER, 'token_emb': torch.tanh})


SAMPLING = [
    (dict(temperature=-1), ValueError, 'temperature must be a finite number of at least 0, got -1'),
    (dict(temperature=NAN), ValueError, 'temperature must be a finite number of at least 0, got nan'),
    (dict(temperature='1'), TypeError, "temperature must be a number of at least 0, got '1'"),
    (dict(filter_fn=3), TypeError, 'filter_fn must be callable, got 3'),
    (dict(filter_kwargs=3), TypeError, 'filter_kwargs must be a mapping of keyword arguments, got 3'),
    (
        dict(filter_fn=lambda logits: None, filter_kwargs={}),
        ValueError,
        r'filter_fn must return logits \(2, 16\), got N',
    ),
    (dict(filter_kwargs={'min_p': 2}), ValueError, 'min_p must be a fraction .* from 0 to 1, got 2'),
    (dict(stop_tokens=[1, -1]), ValueError, r'stop_tokens must be in \[0, num_tokens=\d+\), got \[1, -1\]'),
    (dict(stop_tokens=torch.tensor(0.5)), TypeError, 'stop_tokens must be an integer, got'),
    (dict(stop_tokens='3'), TypeError, "stop_tokens must be integers, in one dimension, got '3'"),
    (dict(stop_tokens=[1, 2.5]), TypeError, r'stop_tokens\[1\] must be an integer, got 2.5'),
    (dict(pad_token=None), TypeError, 'pad_token must be an integer, got None'),
    (dict(seq_len=0), ValueError, 'seq_len must be a positive integer, got 0'),
    (
        dict(prompt=torch.full((2, 4), 16)),
        ValueError,
        r'prompt must hold token ids in \[0, num_tokens=16\), got ids in',
    ),
    (dict(compiled=1), TypeError, 'compiled must be True or False, got 1'),
]


@pytest.mark.parametrize(('kwargs', 'error', 'message'), SAMPLING)
def test_sampling_arguments(kwargs, error, message):
    model = MemoryAsGateTransformer(**TRANSFORMER)
    arguments = {'prompt': torch.randint(0, 16, (2, 4)), 'seq_len': 9, **kwargs}
    with pytest.raises(error, match=message):
        model.sample(**arguments, use_cache=True, show_progress=False)
    with pytest.raises(error, match=message):
        next(model.stream(**arguments))
    if 'filter_fn' not in kwargs and 'filter_kwargs' not in kwargs:
        with pytest.raises(error, match=message):
            model.stream(**arguments)  # before the first token is asked for


@pytest.mark.parametrize('use_cache', [False, True])
@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('value', [NAN, -INF])
def test_logits_that_leave_no_token(use_cache, temperature, value):
    model, prompt = MemoryAsGateTransformer(**TRANSFORMER), torch.randint(0, 16, (2, 4))
    message = r'logits must leave a token to choose, and those of a row hold NaN or \+inf, or are all -inf'

    def second_row(logits):
        return torch.stack((logits[0], torch.full_like(logits[1], value)))

    kwargs = {'filter_fn': second_row, 'filter_kwargs': {}, 'temperature': temperature, 'show_progress': False}
    with pytest.raises(ValueError, match=message):
        model.sample(prompt, 9, use_cache=use_cache, **kwargs)
    # what a row that has ended, or is still given, would get does not matter
    lengths = {'prompt_lengths': [4, 3], 'stop_tokens': range(16)}
    with pytest.raises(ValueError, match=message):
        model.sample(prompt, 9, use_cache=use_cache, **lengths, **kwargs)
    kwargs['filter_fn'] = lambda logits: second_row(logits.flip(0)).flip(0)
    assert model.sample(prompt, 4, use_cache=use_cache, **lengths, **kwargs).shape == (2, 1)
    with torch.no_grad():
        model.to_logits.weight.fill_(NAN)
    with pytest.raises(ValueError, match=message):
        model.sample(prompt, 9, use_cache=use_cache, show_progress=False, temperature=temperature)
    with pytest.raises(ValueError, match=message):
        gumbel_sample(torch.full((2, 4), value), temperature)
    with pytest.raises(ValueError, match='temperature must be a finite number of at least 0, got nan'):
        gumbel_sample(torch.zeros(2, 4), NAN)
    with pytest.raises(ValueError, match='min_p must be a finite number of at least 0, got nan'):
        min_p_filter(torch.zeros(2, 4), NAN)


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
    for network in (MemoryMLP, GatedResidualMemoryMLP, MemorySwiGluMLP):
        with pytest.raises(TypeError, match="expansion_factor must be a number above 0, got '2'"):
            network(4, 2, '2')
        for factor in (0, -1, NAN, INF):
            with pytest.raises(ValueError, match=f'expansion_factor must be a finite number above 0, got {factor}'):
                network(4, 2, factor)
        with pytest.raises(ValueError, match='expansion_factor must give a hidden layer of at least one feature'):
            network(4, 2, 0.01)
    with pytest.raises(TypeError, match="k must be a positive integer, got '2'"):
        FactorizedMemoryMLP(4, 2, '2')
    with pytest.raises(ValueError, match='scale must be a finite number above 0, got nan'):
        MemoryAttention(4, NAN)


def test_calls_of_attention():
    layer, seq = SegmentedAttention(16, 4, dim_head=4, heads=2), torch.randn(1, 3, 16)
    keys = torch.zeros(1, 2, 2, 4)
    for kwargs, error, message in [
        (dict(cache=keys), TypeError, 'cache must be a pair of keys and values, got a tensor'),
        (
            dict(cache=(keys, keys[:, :1])),
            ValueError,
            r'cache must be keys and values \(batch=1, heads=2, length, dim_h',
        ),
        (
            dict(cache=(keys, keys), position=1),
            ValueError,
            'cache must hold no more than the 1 positions before positi',
        ),
        (dict(output_gating=torch.ones(2, 3, 16)), ValueError, r'output_gating must broadcast to \(1, 3, 16\)'),
        (dict(disable_flex_attn=0), TypeError, 'disable_flex_attn must be True or False, got 0'),
        (dict(flex_attn_fn=0), TypeError, 'flex_attn_fn must be callable, got 0'),
    ]:
        with pytest.raises(error, match=message):
            layer(seq, **kwargs)
    with pytest.raises(TypeError, match='attend_kwargs must be a mapping of keyword arguments, got 1'):
        SegmentedAttention(16, 4, attend_kwargs=1)


def test_presets():
    with pytest.raises(ValueError, match=r"size must be one of .'170M', '340M', '760M'., got \['170M'\]"):
        preset(['170M'])
    with pytest.raises(TypeError, match="memory_batch must be a positive integer, got '16'"):
        preset('170M', '16')
    with pytest.raises(ValueError, match='dim_head must be a positive integer, got 0'):
        memory_settings(2, 0)
    with pytest.raises(TypeError, match="dim_head must be a positive integer, got '64'"):
        delta_rule_settings(2, '64')
