"""Decoding steps equal one pass, with state of constant size; stop tokens, prompts of several lengths, caches."""

from __future__ import annotations

import gc
import types
import weakref
from unittest.mock import patch

import pytest
import torch
from compare import all_in_float64, assert_same, leaves, randomised
from mac_configurations import CONFIGURATIONS, TOKENS, ids, transformer
from memories import SWITCHES, inputs, memory
from torch import nn

from titans_pytorch import LongTermMemoryModel, MemoryAsContextTransformer, MemoryMLP
from titans_pytorch.generation.stepper import Stepper, _signature
from titans_pytorch.memory.state import copy_weights
from titans_pytorch.ops.sinkhorn import sinkhorn

GREEDY = {'temperature': 0.0, 'show_progress': False}


@pytest.fixture(autouse=True)
def float64():
    with all_in_float64():
        yield


def stepper(model, tokens) -> Stepper:
    _, cache = model(tokens, return_cache=True)
    return Stepper.of(model, cache, cuda_graphs=None)


def steps(model, tokens, start: int) -> torch.Tensor:
    """Logits from token `start` on, one step per token."""
    step = stepper(model, tokens[:, :start])
    return torch.stack([step(token).clone() for token in tokens[:, start:].unbind(1)], dim=1)


# steps


@pytest.mark.parametrize('index', range(len(CONFIGURATIONS)))
@torch.no_grad()
def test_steps_equal_one_pass(index):
    # several windows (5 tokens each), chunks (at most 8 positions each) and memory batches
    model, tokens = transformer(index), ids(30)
    expected = model(tokens)
    for start, end in ((1, 30), (5, 17), (12, 24)):
        assert_same(steps(model, tokens[:, :end], start), expected[:, start:end], 1e-9)


@pytest.mark.parametrize(
    'changes',
    [
        {'neural_memory_layers': ()},
        {'neural_memory_segment_len': 1, 'neural_memory_batch_size': 3},
        {'segment_len': 1, 'num_longterm_mem_tokens': 2, 'sliding_window_attn': True},
        {'neural_memory_kwargs': {'spectral_norm_surprises': True, 'momentum_order': 2, 'attn_pool_chunks': True}},
        {'neural_memory_kwargs': {'gated_transition': True, 'per_parameter_lr_modulation': True}},
    ],
    ids=str,
)
@torch.no_grad()
def test_steps_equal_one_pass_with_other_arguments(changes):
    changes = {'neural_memory_segment_len': 3, **changes}
    model, tokens = transformer(3, **changes), ids(30)
    assert_same(steps(model, tokens, 4), model(tokens)[:, 4:], 1e-9)


@pytest.mark.parametrize('switch', SWITCHES)
@pytest.mark.parametrize('chunk_size', [1, 3])
@pytest.mark.filterwarnings('ignore:store_with_lookahead_value')
@torch.no_grad()
def test_steps_of_a_memory_equal_one_call(switch, chunk_size):
    mem = memory(switch, chunk_size, batch_size=2 * chunk_size)
    seq = inputs(mem, 17)
    expected, end = mem(seq)
    _, state = mem(seq[..., :4, :])
    buffers, outs = mem.to_buffers(state), []
    for position in range(4, 17):
        following = position + 1
        ends = following % chunk_size == 0, following % (2 * chunk_size) == 0
        in_chunk = torch.tensor([position % chunk_size])
        out, after = mem.step(seq[..., position:following, :], buffers, in_chunk, *ends)
        copy_weights([(buffers, after)])
        outs.append(out)
    assert_same(torch.cat(outs, dim=1), expected[:, 4:], 1e-9)
    assert_same(buffers.to_state(17, mem.buffer_sizes), end._replace(updates=None), 1e-9)


def steps_of_memory(mem, seq, state, first):
    """Results of steps with the tokens from `first` on, in chunks of 4 and memory batches of 8."""
    buffers, outs = mem.to_buffers(state), []
    for position in range(first, seq.shape[1]):
        in_chunk, ends = torch.tensor([position % 4]), ((position + 1) % 4 == 0, (position + 1) % 8 == 0)
        out, after = mem.step(seq[:, position : position + 1], buffers, in_chunk, *ends)
        copy_weights([(buffers, after)])
        outs.append(out)
    return torch.cat(outs, dim=1)


@torch.no_grad()
def test_steps_with_another_inner_norm_equal_a_call():
    mem = memory('plain', 4, qk_rmsnorm=True)
    mem.q_norm.rmsnorm = nn.LayerNorm(mem.q_norm.gamma.shape[-1], elementwise_affine=False)
    seq = inputs(mem, 12)
    assert_same(steps_of_memory(mem, seq, mem(seq[:, :5])[1], 5), mem(seq)[0][:, 5:], 1e-9)


@torch.no_grad()
def test_steps_after_a_state_in_lower_precision_equal_a_call():
    mem = memory('plain', 4).to(torch.float32)
    seq = inputs(mem, 40).to(torch.float32)
    state = mem(seq[:, :5])[1].to(torch.bfloat16)
    assert_same(steps_of_memory(mem, seq, state, 5), mem(seq[:, 5:], state=state)[0], 1e-5)


@torch.no_grad()
def test_weights_may_come_in_any_order():
    mem = memory('deep memory', 4)
    seq = inputs(mem, 9)
    _, state = mem(seq)
    sorted_last = {name: state.states[0][name] for name in sorted(state.states[0].keys(), reverse=True)}
    again = state._replace(states=(sorted_last, *state.states[1:]))
    assert_same(mem.recall(seq, again), mem.recall(seq, state), 0.0)
    buffers = [mem.to_buffers(own) for own in (state, again)]
    outs = [mem.step(seq[:, :1], own, torch.tensor([1]), False, False)[0] for own in buffers]
    assert_same(*outs, 0.0)


@torch.no_grad()
def test_a_state_with_a_mask_is_refused():
    mem = memory('plain', 4)
    seq = inputs(mem, 6)
    _, state = mem(seq, store_mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match='state has an open chunk with a store_mask'):
        mem.to_buffers(state)


@torch.no_grad()
def test_buffers_stay_in_place_and_keep_their_size():
    model = transformer(11)
    step = stepper(model, ids(7))
    before = {name: (t.data_ptr(), t.shape) for name, t in leaves(step._state).items()}
    sizes = set()
    for count in range(1, 130):
        step(ids(1)[:, 0])
        if count % 40 == 0:  # the same offset in window, chunk and memory batch
            sizes.add(sum(t.numel() for t in leaves(step.cache()).values()))
    assert {name: (t.data_ptr(), t.shape) for name, t in leaves(step._state).items()} == before
    assert len(sizes) == 1


@torch.no_grad()
def test_steps_of_one_kind_run_the_same_operations():
    """Captured graphs rely on this: operations and their shapes depend on the kind only."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert func is not torch.ops.aten._local_scalar_dense.default  # reads a value back
            self.calls.append((func, *(t.shape for t in args if isinstance(t, torch.Tensor))))
            return out

    def no_early_end(log_alpha, iters, eps):  # which runs on a CPU only
        return sinkhorn(log_alpha, iters)

    for index in (3, 9, 22):
        model, runs = transformer(index, num_longterm_mem_tokens=3), {}
        step = stepper(model, ids(4))
        plain_step = step._step

        def recorded(kind, plain_step=plain_step, runs=runs):
            with Recorder() as recorder:
                plain_step(kind)
            assert runs.setdefault(kind, recorder.calls) == recorder.calls

        step._step = recorded
        with patch('titans_pytorch.ops.token_hyper_connection.reference.loop_in_log_space', no_early_end):
            for token in ids(30).unbind(1):
                step(token)
        assert 3 <= len(runs) <= 6


# sampling


@pytest.mark.parametrize('index', [0, 6, 13, 27])
def test_samples_with_a_seed_are_those_without_a_cache(index):
    model, prompt = transformer(index), ids(6)
    results = []
    for use_cache in (False, True):
        torch.manual_seed(3)
        results.append(model.sample(prompt, 25, temperature=1.2, use_cache=use_cache, show_progress=False))
    assert torch.equal(*results)


@pytest.mark.parametrize('use_cache', [False, True])
@pytest.mark.parametrize('index', [1, 10, 30])
def test_prompts_of_different_lengths_equal_each_alone(index, use_cache):
    model, prompt, lengths = transformer(index), ids(13, batch=3), [4, 13, 9]
    together = model.sample(prompt, 22, prompt_lengths=lengths, pad_token=-1, use_cache=use_cache, **GREEDY)
    assert together.shape == (3, 18)
    for row, one, length in zip(together, prompt, lengths):
        alone = model.sample(one[None, :length], 22, use_cache=use_cache, **GREEDY)[0]
        assert torch.equal(row[: 22 - length], alone)
        assert (row[22 - length :] == -1).all()
    as_tensor = model.sample(prompt, 22, prompt_lengths=torch.tensor(lengths), pad_token=-1, use_cache=True, **GREEDY)
    assert torch.equal(as_tensor, together)


def test_a_cache_after_prompts_of_different_lengths():
    model, prompt, lengths = transformer(7), ids(8, batch=2), [8, 3]
    added, cache = model.sample(prompt, 14, prompt_lengths=lengths, return_cache=True, **GREEDY)
    rows = [torch.cat((own[:n], new[: 14 - n])) for own, new, n in zip(prompt, added, lengths)]
    more = model.sample(torch.stack(rows)[:, -1:], max_new_tokens=6, state=cache, **GREEDY)
    for row, own, length in zip(more, prompt, lengths):
        assert torch.equal(row, model.sample(own[None, :length], 20, **GREEDY)[0, 14 - length :])
    # rows that end at different positions would have read filler
    with pytest.raises(ValueError, match='return_cache=True needs rows that end together'):
        model.sample(prompt, max_new_tokens=4, prompt_lengths=lengths, return_cache=True, **GREEDY)

    def of_stream():
        yield (yield from model.stream(prompt, max_new_tokens=4, prompt_lengths=lengths, temperature=0.0))

    assert [*of_stream()][-1] is None


@pytest.mark.parametrize('use_cache', [False, True])
def test_stop_tokens_end_each_row(use_cache):
    model, prompt, lengths = transformer(7), ids(5, batch=6), [5, 3, 5, 4, 5, 5]
    kwargs = {'prompt_lengths': lengths, 'use_cache': use_cache, 'pad_token': 15, **GREEDY}
    free = model.sample(prompt, 30, **kwargs)
    stops = [*{int(row[6 + index]) for index, row in enumerate(free)}][:3]
    stopped = model.sample(prompt, 30, stop_tokens=stops, **kwargs)
    ends = []
    for row, own, length in zip(stopped, free, lengths):
        hits = [i for i, token in enumerate(own[: 30 - length].tolist()) if token in stops]
        end = hits[0] + 1 if hits else 30 - length
        assert torch.equal(row[:end], own[:end][: len(row)])
        assert (row[end:] == 15).all()
        ends.append(end + length - min(lengths))
    assert stopped.shape[1] == max(ends)
    one = stops[0]
    assert torch.equal(
        model.sample(prompt, 30, stop_tokens=one, **kwargs), model.sample(prompt, 30, stop_tokens=[one], **kwargs)
    )


def test_sampling_in_inference_mode():
    model, prompt = transformer(0), ids(7)
    expected = model.sample(prompt, 40, use_cache=True, **GREEDY)
    with torch.inference_mode():
        came, cache = model.sample(prompt, 25, use_cache=True, return_cache=True, **GREEDY)
    # the cache serves outside as well
    came = torch.cat((came, model.sample(torch.cat((prompt, came), dim=1), 40, cache=cache, **GREEDY)), dim=1)
    assert torch.equal(came, expected)


def test_all_rows_may_end_early():
    model, prompt = transformer(7), ids(5)
    out = model.sample(prompt, 60, stop_tokens=range(TOKENS), use_cache=True, **GREEDY)
    assert torch.equal(out, model.sample(prompt, 6, use_cache=True, **GREEDY))


def test_a_stream_yields_the_same_tokens():
    model, prompt = transformer(4), ids(9)
    expected = model.sample(prompt, 30, **GREEDY)
    model.train()
    stream = model.stream(prompt, 30, temperature=0.0)
    tokens = [next(stream) for _ in range(5)]
    assert not model.training and tokens[0].shape == (2,) and not torch.is_inference(tokens[0])
    tokens += stream
    assert model.training
    assert torch.equal(torch.stack(tokens, dim=1), expected)

    begun = model.stream(prompt, 30)
    next(begun)
    begun.close()
    assert model.training

    positions = [*model.stream(prompt, 12, temperature=0.0, prompt_lengths=[4, 9])]
    assert torch.equal(torch.stack(positions[:5], dim=1)[1], prompt[1, 4:])


def test_a_stream_shares_no_tensor_with_its_caller():
    model, prompt = transformer(4), ids(6)
    expected = model.sample(prompt, 16, **GREEDY)
    given = prompt.clone()
    stream = model.stream(given, 16, temperature=0.0)
    given.zero_()
    tokens = []
    for token in stream:
        tokens.append(token.clone())
        token.zero_()
    assert torch.equal(torch.stack(tokens, dim=1), expected)


def test_what_is_known_of_a_model_with_hooks_does_not_keep_it_alive():
    model = transformer(4)
    hook = model.norm.register_forward_hook(types.MethodType(lambda self, *_: None, model))
    known = _signature(model, ())
    assert known == _signature(model, ()) and hash(known) == hash(_signature(model, ()))
    hook.remove()
    assert known != _signature(model, ())
    alive = weakref.ref(model)
    del model, hook
    gc.collect()
    assert alive() is None


def test_streams_are_independent():
    model, prompts = transformer(4), [ids(9), ids(6)]
    streams = [model.stream(prompt, 30, temperature=0.0) for prompt in prompts]
    turns = [next(streams[count % 2]) for count in range(30)]
    for index, prompt in enumerate(prompts):
        expected = model.sample(prompt, prompt.shape[1] + 15, **GREEDY)
        assert torch.equal(torch.stack(turns[index::2], dim=1), expected)


@pytest.mark.parametrize('index', [2, 7, 15, 18, 31])
def test_a_cache_is_saved_and_loaded(index, tmp_path):
    model, prompt = transformer(index), ids(6)
    expected = model.sample(prompt, 50, **GREEDY)

    first, cache = model.sample(prompt, 23, return_cache=True, **GREEDY)
    torch.save(cache, tmp_path / 'cache.pt')
    loaded = torch.load(tmp_path / 'cache.pt', weights_only=True)
    assert_same(loaded, cache, 0.0)
    so_far = torch.cat((prompt, first), dim=1)
    # the user may insert tokens, here the ones that the model would have sampled
    so_far = torch.cat((so_far, expected[:, 17:20]), dim=1)
    second, after = model.sample(so_far, 40, cache=loaded, return_cache=True, **GREEDY)
    assert torch.equal(second, expected[:, 20:34])

    def rest(so_far):
        cache = yield from model.stream(so_far, 50, temperature=0.0, cache=after)
        assert cache.seq_index == model.seq_len_with_longterm_mem(49)

    third = torch.stack([*rest(torch.cat((so_far, second), dim=1))], dim=1)
    assert torch.equal(third, expected[:, 34:])

    # the same cache serves a call of the model
    tokens = torch.cat((prompt, expected), dim=1)
    assert_same(model(tokens, cache=cache, return_cache=True)[0], model(tokens)[:, 22:], 1e-9)


def test_a_cache_equals_that_of_one_pass():
    model, prompt = transformer(18), ids(6)
    added, cache = model.sample(prompt, 33, return_cache=True, **GREEDY)
    with torch.no_grad():
        _, expected = model(torch.cat((prompt, added), dim=1)[:, :-1], return_cache=True)
    assert_same(cache, expected, 1e-9)


def sampled(model, prompt, length: int, **kwargs):
    """Tokens, and the logits they were sampled from."""
    logits = []

    def kept(own):
        logits.append(own.clone())
        return own

    tokens = model.sample(prompt, length, use_cache=True, filter_fn=kept, filter_kwargs={}, **GREEDY, **kwargs)
    return tokens, torch.stack(logits)


def test_compiled_steps_are_reused(steps_compiled_eagerly):
    model, prompt = transformer(3, depth=2, neural_memory_layers=(2,)), ids(6)
    assert_same(sampled(model, prompt, 22, compiled=True), sampled(model, prompt, 22), 1e-9)
    kinds = len(steps_compiled_eagerly)

    # a stream interleaved with another call
    other = model.train().stream(prompt, 30, temperature=0.0, compiled=True)
    begun = [next(other) for _ in range(3)]
    assert_same(sampled(model, prompt, 22, compiled=True), sampled(model, prompt, 22), 1e-9)
    model.train()
    assert torch.equal(torch.stack([*begun, *other], dim=1), model.sample(prompt, 30, use_cache=True, **GREEDY))
    assert model.training

    # new parameter values, in place and by assignment
    with torch.no_grad():
        model.to_logits.weight.mul_(-1.0)
    assert_same(sampled(model, prompt, 12, compiled=True), sampled(model, prompt, 12), 1e-9)
    model.load_state_dict({name: t * 0.9 for name, t in model.state_dict().items()}, assign=True)
    assert_same(sampled(model, prompt, 12, compiled=True), sampled(model, prompt, 12), 1e-9)
    assert len(steps_compiled_eagerly) == kinds


@pytest.mark.parametrize('steps_compiled_eagerly', ['aot_eager'], indirect=True)
def test_compiled_steps_are_recompiled_when_necessary(steps_compiled_eagerly):
    model = LongTermMemoryModel(
        num_tokens=TOKENS,
        dim=8,
        depth=1,
        neural_memory_segment_len=3,
        num_residual_streams=1,
        neural_memory_model=MemoryMLP(8, depth=1),
        neural_memory_kwargs={'momentum': False},
    )
    model, prompt = randomised(model, 0.1).double(), ids(6)
    in_chunk, both_kinds = 9, 10  # lengths: the steps stay inside a chunk, or go on to its end

    def compiles(length, tolerance=1e-9):
        before = len(steps_compiled_eagerly)
        assert_same(sampled(model, prompt, length, compiled=True), sampled(model, prompt, length), tolerance)
        return len(steps_compiled_eagerly) - before

    assert compiles(in_chunk) == 1 and compiles(both_kinds) == 1 and compiles(both_kinds) == 0
    with torch.inference_mode():  # compiled steps cannot use inference tensors
        assert compiles(in_chunk) == 1
    hook = model.to_logits.register_forward_hook(lambda module, args, out: -out)
    assert compiles(in_chunk) == 1
    hook.remove()
    whole, prompt = prompt, prompt[:1]
    assert compiles(in_chunk) == 1
    prompt = whole
    assert compiles(both_kinds) == 0
    model.to(torch.float32)
    assert compiles(both_kinds, 1e-4) == 2
    with torch.autocast('cpu', torch.bfloat16):
        assert compiles(both_kinds, 3e-2) == 2


@pytest.mark.compiler
def test_compiled_steps():
    model = LongTermMemoryModel(num_tokens=TOKENS, dim=8, depth=1, neural_memory_segment_len=3)
    model, prompt = randomised(model, 0.1).double(), ids(5)
    assert_same(sampled(model, prompt, 12, compiled=True), sampled(model, prompt, 12), 1e-9)


@pytest.mark.parametrize('use_cache', [False, True])
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('pad_token', [-1, TOKENS])
def test_padding_outside_the_vocabulary(pad_token, device, use_cache):
    """The model never reads it: rows that have not ended get the same tokens as with a pad token in the vocabulary."""
    model, prompt = transformer(0).to(device), ids(6).to(device)
    kwargs = {'prompt_lengths': [6, 3], 'use_cache': use_cache, **GREEDY}
    unstopped = model.sample(prompt, 20, **kwargs)
    kwargs['stop_tokens'] = stops = unstopped[[1, 0], [4, 9]]  # the first token that ends each row
    expected = model.sample(prompt, 20, pad_token=0, **kwargs)
    came = model.sample(prompt, 20, pad_token=pad_token, **kwargs)
    ended = [torch.isin(row, stops).nonzero()[0].item() for row in expected]
    assert ended[1] <= 4 and ended[0] != ended[1]  # at different positions
    for row, (own, end) in enumerate(zip(came, ended)):
        assert torch.equal(own[: end + 1], expected[row, : end + 1])
        assert (own[end + 1 :] == pad_token).all()
    prompt[1, 3:] = pad_token  # as padding of the prompt too
    assert torch.equal(model.sample(prompt, 20, pad_token=pad_token, **kwargs), came)


@pytest.mark.filterwarnings('ignore:store_with_lookahead_value with chunks of a single row')
def test_lookahead_in_chunks_of_one_row_decodes():
    memories = {'dim_head': 8, 'heads': 2, 'store_with_lookahead_value': True}
    model = MemoryAsContextTransformer(
        num_tokens=TOKENS,
        dim=16,
        depth=2,
        dim_head=8,
        heads=2,
        segment_len=4,
        neural_memory_segment_len=1,
        neural_memory_batch_size=4,
        neural_memory_kwargs=memories,
    ).double()
    prompt = ids(5)
    cached, uncached = (model.sample(prompt, 20, use_cache=use_cache, **GREEDY) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.gpu
@pytest.mark.parametrize('use_cache', [False, True])
def test_logits_of_nan_on_a_gpu_are_found_at_the_end(use_cache):
    model, prompt = transformer(0).cuda(), ids(6).cuda()
    calls = []

    def filter_fn(logits):
        calls.append(len(logits))
        return torch.full_like(logits, float('nan')) if len(calls) == 3 else logits

    with pytest.raises(ValueError, match='logits must leave a token to choose'):
        model.sample(prompt, 16, use_cache=use_cache, filter_fn=filter_fn, filter_kwargs={}, show_progress=False)
    assert len(calls) == 10


def test_bad_arguments_of_sampling():
    model, prompt = transformer(0), ids(6)
    for lengths in ([3], [0, 4], [3, 7], [2.5, 3]):
        with pytest.raises(ValueError, match='prompt_lengths must be 2 integers from 1 to 6'):
            model.sample(prompt, 9, prompt_lengths=lengths, **GREEDY)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='cuda_graphs=True needs the model on a CUDA device'):
            model.sample(prompt, 9, use_cache=True, cuda_graphs=True, **GREEDY)


@pytest.mark.gpu
@pytest.mark.parametrize('index', [0, 7, 18])
def test_graphs_give_the_tokens_of_eager_steps(index, monkeypatch):
    model, prompt = transformer(index).cuda(), ids(6, batch=3).cuda()
    step = model.step

    def without_gradient(*args):
        assert not torch.is_grad_enabled()  # kernels do not run with gradients
        step(*args)

    monkeypatch.setattr(model, 'step', without_gradient)
    results = [model.sample(prompt, 60, use_cache=True, cuda_graphs=graphs, **GREEDY) for graphs in (False, True, True)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    with torch.no_grad():  # in place, as graphs hold the addresses of parameters
        model.to_logits.weight.mul_(-1.0)
    again = [model.sample(prompt, 60, use_cache=True, cuda_graphs=graphs, **GREEDY) for graphs in (False, True)]
    assert torch.equal(*again) and not torch.equal(again[0], results[0])
    with pytest.raises(ValueError, match='compiled=True is for a CPU'):
        model.sample(prompt, 60, use_cache=True, compiled=True, **GREEDY)


def test_sampling_restores_the_mode_of_each_module():
    model, prompt = transformer(0).train(), ids(4)
    model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    streams = [model.stream(prompt, 9) for _ in range(2)]
    for stream in streams:
        next(stream)
    assert not any(module.training for module in model.modules())
    streams[0].close()
    assert not any(module.training for module in model.modules())
    streams[1].close()
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_garbage_collection_may_close_streams_at_any_time(monkeypatch):
    model, prompt = transformer(0).train(), ids(4)
    change_mode = type(model).train

    def collect_and_change_mode(self, mode=True):
        gc.collect()
        return change_mode(self, mode)

    def abandon():
        stream = model.stream(prompt, 9)
        next(stream)
        cycle = [stream]
        cycle.append(cycle)

    monkeypatch.setattr(type(model), 'train', collect_and_change_mode)
    for _ in range(3):
        abandon()
        stream = model.stream(prompt, 9)
        next(stream)
        assert not model.training
        stream.close()
        gc.collect()
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize('length', [1, 6])
def test_a_cache_is_returned_where_no_token_is_added(length):
    model, prompt = transformer(0), ids(length)
    expected = model.sample(prompt, 14, **GREEDY)
    added, cache = model.sample(prompt, length, return_cache=True, **GREEDY)
    assert added.shape == (2, 0)
    if length == 1:  # nothing was read
        assert cache is None
    else:
        assert_same(cache, model(prompt[:, :-1], return_cache=True)[1], 1e-12)
    for _ in range(2):  # neither does a second call add a token
        assert torch.equal(model.sample(prompt, 14, cache=cache, **GREEDY), expected)
        assert torch.equal(model.sample(prompt[:, -1:], 15 - length, state=cache, **GREEDY), expected)
        _, cache = model.sample(prompt, length, cache=cache, return_cache=True, **GREEDY)
    so_far = torch.cat((prompt, expected[:, :5]), dim=1)
    _, cache = model.sample(so_far, 2, cache=cache, return_cache=True, **GREEDY)
    assert torch.equal(model.sample(so_far, 14, cache=cache, **GREEDY), expected[:, 5:])
