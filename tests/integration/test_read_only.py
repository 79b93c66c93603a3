"""`store=False`: the memory is read, and not written."""

from __future__ import annotations

import pytest
import torch
from architectures import CLASSES, architectures, build, ids, variants
from compare import all_in_float64, assert_same, gradients
from memories import SWITCHES, inputs, memory

from titans_pytorch import NeuralMemory


@pytest.mark.parametrize('switch', SWITCHES)
def test_the_memory_stays_and_answers_as_its_newest_weights_do(switch: str):
    mem = memory(switch)
    seq = inputs(mem, 26)
    _, state = mem(seq[..., :11, :])
    answer, after = mem(seq[..., 11:, :], state=state, store=False)

    assert after.seq_index == state.seq_index
    assert_same(after.weights, state.weights, 0.0)
    assert_same(after.states, state.states, 0.0)
    assert after.num_tokens == state.num_tokens == 11
    if not (mem.mixes_tokens or mem.conv_context):
        queries = seq[0] if mem.qkv_receives_diff_views else seq
        assert_same(answer, mem.retrieve_memories(queries[:, 11:], state.states[0]))


@pytest.mark.parametrize('switch', SWITCHES)
def test_pieces_read_as_one_call(switch: str):
    mem = memory(switch)
    seq = inputs(mem, 26)
    _, state = mem(seq[..., :11, :])
    whole, after = mem(seq[..., 11:, :], state=state, store=False)
    pieces, at = [], state
    for piece in seq[..., 11:, :].split([1, 4, 10], dim=-2):
        answer, at = mem(piece, state=at, store=False)
        pieces.append(answer)
    assert_same(torch.cat(pieces, dim=1), whole)
    assert_same(at, after)


@pytest.mark.parametrize('switch', ['plain', 'different views'])
def test_storing_goes_on_as_if_nothing_had_been_read(switch: str):
    mem = memory(switch)
    seq = inputs(mem, 26)
    _, state = mem(seq[..., :11, :])
    _, after = mem(inputs(mem, 9), state=state, store=False)
    assert_same(mem(seq[..., 11:, :], state=after), mem(seq[..., 11:, :], state=state))


def test_a_convolution_reaches_the_tokens_that_were_read():
    mem = NeuralMemory(8, chunk_size=4, conv_kernel=3).double()
    seq = torch.randn(1, 20, 8, dtype=torch.float64)
    _, state = mem(seq[:, :9])
    # with its memory fixed a layer is a function of the last three tokens
    whole, _ = mem(seq[:, 9:], state=state, store=False)
    _, after = mem(seq[:, 9:13], state=state, store=False)
    assert_same(after.cache_store_segment.queries, seq[:, 11:13], 0.0)
    assert_same(mem(seq[:, 13:], state=after, store=False)[0], whole[:, 4:])


def test_a_mask_that_is_false_everywhere_is_not_the_same():
    mem = memory('plain')
    seq = inputs(mem, 8)
    _, state = mem(seq)
    _, masked = mem(seq, state=state, store_mask=torch.zeros(2, 8, dtype=torch.bool))
    assert masked.seq_index == 16
    moved = (masked.states[0]['norm.gamma'] - state.states[0]['norm.gamma']).abs().max()
    assert moved > 1e-3


def test_gradients_reach_the_state_and_what_is_read():
    mem = memory('plain')
    seq = inputs(mem, 21)
    _, state = mem(seq[:, :12])
    answer, _ = mem(seq[:, 12:], state=state, store=False)
    came = gradients(mem, answer.square().sum())
    expected = gradients(mem, mem.retrieve_memories(seq[:, 12:], mem(seq[:, :12])[1].states[0]).square().sum())
    assert_same(came, expected)
    assert 'to_keys.weight' in came


def test_checkpointing_reads_only():
    mem = memory('plain')
    kept = memory('plain', checkpoint_every=8)
    seq = inputs(mem, 21)
    _, state = mem(seq[:, :12])
    assert_same(kept(seq, state=state, store=False)[0], mem(seq, state=state, store=False)[0])


def test_nothing_to_store_may_be_given():
    mem = memory('plain')
    seq = inputs(mem, 4)
    with pytest.raises(ValueError, match='store=False'):
        mem(seq, store=False, store_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match='store=False'):
        mem(seq, store=False, store_seq=seq)


@architectures
@variants
def test_a_model_reads_on(name: str, variant: str):
    x = ids(29)
    with all_in_float64(), torch.no_grad():
        model = build(name, variant)
        _, state = model(x[:, :13], return_state=True)
        whole, after = model(x[:, 13:], state=state, return_state=True, store=False)
        pieces, at = [], state
        for piece in x[:, 13:].split([1, 6, 9], dim=1):
            logits, at = model(piece, state=at, return_state=True, store=False)
            pieces.append(logits)
        stored = model(x[:, 13:], state=state)
    assert_same(torch.cat(pieces, dim=1), whole)
    assert_same(at, after)
    assert after.seq_index == model.num_positions(29)
    for before, read in zip(state.memories, after.memories):
        assert before.num_tokens == read.num_tokens
        assert_same(read.states, before.states, 0.0)
    assert (stored - whole).abs().max() > 1e-6


@architectures
def test_a_model_writes_on_after_reading(name: str):
    x = ids(40)
    with all_in_float64(), torch.no_grad():
        model = build(name)
        _, state = model(x[:, :13], return_state=True)
        _, state = model(x[:, 13:15], state=state, return_state=True, store=False)  # the memory is now behind
        whole, after = model(x[:, 15:], state=state, return_state=True)
        for lengths in ([25], [4, 7, 14], [1] * 25):
            pieces, at = [], state
            for piece in x[:, 15:].split(lengths, dim=1):
                logits, at = model(piece, state=at, return_state=True)
                pieces.append(logits)
            assert_same(torch.cat(pieces, dim=1), whole)
            assert_same(at, after)


@pytest.mark.parametrize('name', CLASSES)
def test_sampling_without_writing(name: str):
    prompt = ids(9)
    kwargs = {'temperature': 0.0, 'show_progress': False, 'store': False}
    with all_in_float64():
        model = build(name).eval()
        cached, cache = model.sample(prompt, 21, return_cache=True, **kwargs)
        assert torch.equal(cached, model.sample(prompt, 21, **kwargs))
        assert all(memory.num_tokens == 0 for memory in cache.memories)
        # and goes on with writing, from memories that are behind
        read = torch.cat((prompt, cached), dim=1)
        more = model.sample(read, 28, cache=cache, temperature=0.0, show_progress=False)
        assert torch.equal(more[:, :1], model.sample(read, 22, **kwargs))
