"""`NeuralMemory`: one pass, any split and token by token agree; causality; gradients; state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from compare import assert_same, gradients, leaves, randomised
from hypothesis import given, settings
from hypothesis import strategies as st
from memories import HEAD, SWITCHES, carried, inputs, memory, scalar
from torch import nn

from titans_pytorch import MemoryMLP, NeuralMemory, NeuralMemState, mem_state_detach

every_switch = pytest.mark.parametrize('switch', SWITCHES)


def in_pieces(mem, seq, sizes, **kwargs):
    """Outputs, last state and surprises of a sequence fed in pieces."""
    state, outs, surprises = None, [], []
    masks = kwargs.pop('store_mask', None)
    start = 0
    for size in sizes:
        piece = slice(start, start + size)
        mask = None if masks is None else masks[:, piece]
        out, state, surprise = mem(seq[..., piece, :], state=state, return_surprises=True, store_mask=mask, **kwargs)
        outs.append(out)
        surprises.append(surprise)
        start += size
    return torch.cat(outs, dim=1), state, [torch.cat(s, dim=-1) for s in zip(*surprises)]


def assert_pieces_equal_one_pass(mem, seq, sizes, **kwargs):
    whole_out, whole_state, whole_surprises = in_pieces(mem, seq, [seq.shape[-2]], **kwargs)
    out, state, surprises = in_pieces(mem, seq, sizes, **kwargs)
    assert_same(out, whole_out, label='output ')
    assert state.seq_index == whole_state.seq_index
    assert_same(carried(state), carried(whole_state), label='state ')
    assert_same(surprises, whole_surprises, label='surprise ')
    assert_same(gradients(mem, scalar(out, state)), gradients(mem, scalar(whole_out, whole_state)), 1e-8, 'gradient ')


@every_switch
def test_uneven_pieces_equal_one_pass(switch):
    mem = memory(switch)
    assert_pieces_equal_one_pass(mem, inputs(mem, 27), [3, 1, 9, 6, 8])


@every_switch
def test_token_by_token_equals_one_pass(switch):
    mem = memory(switch)
    assert_pieces_equal_one_pass(mem, inputs(mem, 18), [1] * 18)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_pieces_equal_one_pass(data):
    switch = data.draw(st.sampled_from([*SWITCHES]))
    chunk_size = data.draw(st.sampled_from([1, 2, 3, 4, 5]))
    needs_batches = not SWITCHES[switch].keys().isdisjoint(('proximal_steps', 'lookahead_gradients'))
    per_batch = data.draw(st.sampled_from([1, 2, 3] if needs_batches else [None, 1, 2, 3]))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    masked = data.draw(st.booleans())

    mem = memory(switch, chunk_size, per_batch and per_batch * chunk_size)
    seq = inputs(mem, sum(sizes))
    mask = torch.rand(2, sum(sizes)) > 0.4 if masked else None
    assert_pieces_equal_one_pass(mem, seq, sizes, store_mask=mask)


@every_switch
def test_is_causal(switch):
    mem = memory(switch)
    seq = inputs(mem, 22)
    changed = seq.clone()
    changed[..., 13, :] += 1.0
    before, after = mem(seq)[0], mem(changed)[0]
    assert_same(after[:, :13], before[:, :13], 1e-12)
    difference = (after - before).abs().amax(dim=(0, 2))
    # the token itself, and all from the end of its chunk on
    assert difference[13] > 1e-6 and difference[15:].min() > 1e-9


@every_switch
def test_every_parameter_has_a_gradient(switch):
    mem = memory(switch)
    out, state = mem(inputs(mem, 22))
    came = gradients(mem, out.sum())
    assert came.keys() == {name for name, _ in mem.named_parameters()}
    assert all(g.abs().max() > 0 for name, g in came.items() if 'attn_logits.bias' not in name)


@every_switch
def test_a_memory_that_never_forgets_or_never_stores(switch):
    """Whose gates are exactly 0: the numbers of a gate that is all but 0."""
    results = []
    for changes in ({'init_decay_bias': -float('inf')}, {'init_decay_bias': -1000.0}):
        torch.manual_seed(0)
        mem = memory(switch, **changes)
        out, state = mem(inputs(mem, 13))
        results.append((out, carried(state), gradients(mem, scalar(out, state))))
    assert_same(*results, 1e-12)

    mem = memory(switch, init_decay_bias=-float('inf'), default_step_transform_max_lr=0)
    out, state = mem(inputs(mem, 13))
    initial = mem(inputs(mem, 1))[1].weights
    newest = state.weights if state.states is None else state.states[0]
    assert_same(newest, initial)
    assert all(g.isfinite().all() for g in gradients(mem, scalar(out, state)).values())


def test_a_token_reads_the_chunks_complete_with_it():
    mem = memory(chunk_size=4, batch_size=None, momentum=False)
    seq = inputs(mem, 11)
    out, state = mem(seq)
    for token in range(11):
        complete = (token + 1) // 4
        weights = {name: w[:, complete] for name, w in state.updates.items()}
        assert_same(out[:, token], mem.retrieve_memories(seq[:, token : token + 1], weights)[:, 0])


@pytest.mark.parametrize('sizes', [(2, 4), (4, 2), (3, 2), (1, 4), (8, 1)])
def test_retrieve_chunk_size_changes_no_number(sizes):
    together = memory(chunk_size=sizes[1], batch_size=sizes[1] * 2)
    pair = memory(chunk_size=sizes, batch_size=sizes[1] * 2)
    seq = inputs(pair, 21)
    assert_same(pair(seq), together(seq), 1e-12)


def test_batch_size_per_call_equals_that_of_the_constructor():
    seq = inputs(memory(), 30)
    given_later = memory(batch_size=None)(seq, ttt_batch_size=8)
    assert_same(given_later, memory(batch_size=8)(seq), 1e-12)
    assert (given_later[0] - memory(batch_size=None)(seq)[0]).abs().max() > 1e-3


def test_storing_something_else_than_the_queries():
    mem = memory()
    seq, store = inputs(mem, 20), inputs(mem, 20)
    _, expected = mem(store)
    out, state = mem(seq, store_seq=store)
    assert_same(carried(state), carried(expected))
    assert_same(out, mem.retrieve_memories(seq, state.updates))


def test_single_tokens_without_a_length_axis():
    for switch in ('plain', 'different views'):
        mem = memory(switch)
        seq = inputs(mem, 9)
        expected, _ = mem(seq)
        state = None
        for token in range(9):
            out, state = mem(seq[..., token, :], state=state)
            assert_same(out[:, 0], expected[:, token])


def test_store_and_retrieve_apart_equal_the_call():
    mem = memory(batch_size=None)
    seq = inputs(mem, 18)
    out, state, surprises = mem(seq, return_surprises=True)
    updates, stored, stored_surprises = mem.store_memories(seq)
    assert_same((updates, stored, stored_surprises), (state.updates, state, surprises), 1e-12)
    assert_same(mem.retrieve_memories(seq, updates), out, 1e-12)


def test_a_module_of_linears_equals_the_same_matrices():
    ours = memory(model=MemoryMLP(HEAD, depth=2))
    linears = nn.Sequential(nn.Linear(HEAD, HEAD * 2, bias=False), nn.GELU(), nn.Linear(HEAD * 2, HEAD, bias=False))
    theirs = memory(model=linears)
    state = ours.state_dict()
    for index in (1, 2):
        state[f'memory_model_parameters.{index}'] = state[f'memory_model_parameters.{index}'].mT
    theirs.load_state_dict(state)
    seq = inputs(ours, 18)
    assert_same(theirs(seq)[0], ours(seq)[0], 1e-12)


# masks


def test_masked_tokens_leave_no_trace_but_in_the_gates():
    """With gates that do not depend on the input, masked tokens may hold anything."""
    mem = memory('no momentum')
    with torch.no_grad():
        mem.to_decay_factor[0].weight.zero_()
    seq, mask = inputs(mem, 20), torch.rand(2, 20) > 0.5
    other = torch.where(mask.unsqueeze(-1), seq, torch.randn_like(seq))
    _, state = mem(seq, store_mask=mask)
    _, other_state = mem(other, store_mask=mask)
    assert_same(other_state.states, state.states, 1e-12)
    assert_same(mem(seq, store_mask=torch.ones_like(mask))[0], mem(seq)[0], 1e-12)


def test_a_mask_leaves_the_state_with_the_chunk_that_it_belongs_to():
    mem = memory('plain')
    seq, mask = inputs(mem, 30), torch.rand(2, 6) > 0.5
    _, state = mem(seq[:, :6], store_mask=mask)
    assert state.cache_store_segment.mask is not None
    _, in_chunk = mem(seq[:, 6:7], state=state)
    assert in_chunk.cache_store_segment.mask is not None
    _, after = mem(seq[:, 6:11], state=state)
    assert isinstance(after.cache_store_segment, torch.Tensor)
    mem.to_buffers(after)
    assert isinstance(mem(seq[:, :8], store_mask=torch.rand(2, 8) > 0.5)[1].cache_store_segment, torch.Tensor)


def test_entries_of_a_state_with_parts_missing():
    mem = memory('plain')
    _, state = mem(inputs(mem, 6))
    for missing in ({'states': None}, {'weights': None}):
        part = state._replace(**missing).select([1])
        assert part.batch_size == 1
        assert_same(part.cache_store_segment, state.cache_store_segment[1:], 0.0)
    with pytest.raises(ValueError, match='cache_store_segment of the state must hold the tokens of its open chunk'):
        state._replace(cache_store_segment=None).select([1])
    empty = NeuralMemState(0, None, None, None, None)
    assert empty.select([3]) is empty


def test_a_fully_masked_chunk_with_soft_clamp_is_an_update_of_zero():
    mem = memory('soft clamp')
    seq, mask = inputs(mem, 16), torch.ones(2, 16, dtype=torch.bool)
    mask[:, 4:8] = False
    out, state = mem(seq, store_mask=mask)
    assert_same(out, out)  # finite
    assert all(torch.isfinite(g).all() for g in gradients(mem, scalar(out, state)).values())

    without = memory('plain')
    without.load_state_dict(mem.state_dict())
    none = torch.zeros_like(mask)
    assert_same(mem(seq, store_mask=none)[1].states, without(seq, store_mask=none)[1].states, 1e-12)


# weight residual


def test_weight_residual_in_pieces_equals_one_pass():
    first, second = memory(), memory(accept_weight_residual=True)
    seq = inputs(first, 27)

    def run(sizes):
        states, outs = [None, None], []
        for piece in seq.split(sizes, dim=1):
            out, states[0] = first(piece, state=states[0])
            out, states[1] = second(out, state=states[1], prev_weights=states[0].updates)
            outs.append(out)
        return torch.cat(outs, dim=1), carried(states[1])

    whole, pieces = run([27]), run([3, 1, 9, 6, 8])
    assert_same(pieces, whole)
    parameters = [*first.parameters(), *second.parameters()]
    of_pieces, of_whole = (torch.autograd.grad(scalar(out, state), parameters) for out, state in (pieces, whole))
    assert_same(of_pieces, of_whole, 1e-8)

    alone = memory()
    alone.load_state_dict(second.state_dict(), strict=False)
    assert (whole[0] - alone(first(seq)[0])[0]).abs().max() > 1e-4


# registered tensors


def test_optimizer_step_and_loading_with_several_heads():
    mem, other = memory(), randomised(memory())
    optimizer = torch.optim.AdamW(mem.parameters(), lr=1e-2)
    seq = inputs(mem, 18)
    before = mem(seq)[0].pow(2).mean()
    for _ in range(5):
        optimizer.zero_grad()
        loss = mem(seq)[0].pow(2).mean()
        loss.backward()
        optimizer.step()
    assert loss < before
    storages = {p.untyped_storage().data_ptr() for p in mem.parameters()}
    assert len(storages) == len([*mem.parameters()])
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in mem.parameters())

    other.load_state_dict(mem.state_dict())
    assert_same(other(seq)[0], mem(seq)[0], 1e-12)
    heads = mem.memory_model_parameters[1]
    assert (heads[0] - heads[1]).abs().max() > 1e-3


def test_distributed_data_parallel_with_default_settings(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        mem = memory('everything')
        parallel = nn.parallel.DistributedDataParallel(mem)
        seq = inputs(mem, 18)
        for _ in range(3):  # a parameter without a gradient is refused in the iteration after
            parallel(seq)[0].sum().backward()
        # if it outlives the process group, PyTorch can wait for ever: its destructor joins a thread that needs the GIL
        del parallel
        assert all(p.grad is not None for p in mem.parameters())
    finally:
        dist.destroy_process_group()


def test_copies_and_pickles_are_whole():
    mem = memory('everything')
    seq = inputs(mem, 18)
    assert_same(copy.deepcopy(mem)(seq)[0], mem(seq)[0], 1e-12)
    assert_same(pickle.loads(pickle.dumps(mem))(seq)[0], mem(seq)[0], 1e-12)
    copied = copy.deepcopy(mem)
    copied.load_state_dict(randomised(memory('everything')).state_dict())
    assert (copied(seq)[0] - mem(seq)[0]).abs().max() > 1e-3


# state


def test_cache_is_another_name_for_state():
    mem = memory()
    seq = inputs(mem, 10)
    _, state = mem(seq)
    assert_same(mem(seq, cache=state), mem(seq, state=state), 0.0)
    with pytest.raises(ValueError, match='state and cache'):
        mem(seq, cache=state, state=state)


@pytest.mark.parametrize('switch', ['plain', 'attention memory', 'no momentum'])
def test_a_state_is_saved_and_loaded(switch, tmp_path):
    mem = memory(switch)
    seq = inputs(mem, 18)
    mask = torch.rand(2, 11) > 0.5
    _, state = mem(seq[:, :11], store_mask=mask)
    torch.save(state, tmp_path / 'state.pt')
    loaded = torch.load(tmp_path / 'state.pt', weights_only=True)
    assert isinstance(loaded, NeuralMemState)
    assert loaded.seq_index == state.seq_index
    assert_same(loaded, state, 0.0)
    assert_same(mem(seq[:, 11:], state=loaded), mem(seq[:, 11:], state=state), 0.0)
    assert_same(pickle.loads(pickle.dumps(state)), state, 0.0)


def test_a_state_is_moved_and_detached():
    mem = memory()
    seq = inputs(mem, 18)
    _, state = mem(seq)
    assert all(t.dtype == torch.float32 for t in leaves(state.to(torch.float32)).values())
    assert all(t.device.type == 'meta' for t in leaves(state.to('meta')).values())
    assert any(t.requires_grad for t in leaves(state).values())
    for detached in (state.detach(), mem_state_detach(state), mem(seq, detach_mem_state=True)[1]):
        assert not any(t.requires_grad for t in leaves(detached).values())
        assert_same(detached, state, 0.0)
    single = copy.deepcopy(mem).float()
    out, _ = single(seq.float(), state=state.to(torch.float32))
    assert_same(out, mem(seq, state=state)[0], 1e-3)


def test_a_state_does_not_keep_the_input():
    mem = memory()
    _, state = mem(inputs(mem, 4 * 50 + 2))
    assert state.cache_store_segment.untyped_storage().nbytes() == state.cache_store_segment.nbytes


def test_float32_and_autocast_stay_near_float64():
    exact, seq = memory(), inputs(memory(), 30)
    expected, _ = exact(seq)
    single = copy.deepcopy(exact).float()
    assert_same(single(seq.float())[0], expected, 1e-4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out, state = single(seq.float())
    assert all(t.dtype == torch.float32 for t in leaves((state.weights, state.states)).values())
    assert (out.double() - expected).norm() / expected.norm() < 0.1


# activation checkpointing


@pytest.mark.parametrize('switch', ['plain', 'two keys per token', 'different views', 'attention memory', 'everything'])
def test_checkpointing_changes_no_number(switch):
    keeping, recomputing = memory(switch), memory(switch, checkpoint_every=7)
    recomputing.load_state_dict(keeping.state_dict())
    seq = inputs(keeping, 29)
    mask, results = torch.rand(2, 29) > 0.3, []
    for mem in (keeping, recomputing):
        first, state = mem(seq[..., :5, :])
        out, state, surprises = mem(seq[..., 5:, :], state=state, store_mask=mask[:, 5:], return_surprises=True)
        results.append((first, out, carried(state), surprises, gradients(mem, scalar(out, state))))
    assert_same(*results, 1e-9)
    assert recomputing(seq)[1].updates is None
    with torch.no_grad():
        assert recomputing(seq)[1].updates is not None


def test_checkpointing_bounds_what_a_step_holds():
    def held(length, **kwargs):
        """Bytes kept for the backward, without tensors of the size of the input."""
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        mem = memory('plain', 4, 8, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out, _ = mem(inputs(mem, length))
        return sum(s.nbytes() for s in storages.values())

    # bytes per further token
    kept, recomputed = ((held(512, **kw) - held(256, **kw)) / 256 for kw in ({}, {'checkpoint_every': 128}))
    assert recomputed < kept / 8


NO_ROW = pytest.mark.filterwarnings('ignore:store_with_lookahead_value with chunks of a single row')


@NO_ROW
@pytest.mark.parametrize('batch_size', [None, 4])
@pytest.mark.parametrize('engine', ['dual', 'dense'])
@pytest.mark.parametrize(
    'switch', ['plain', 'soft clamp', 'spectral norm', 'momentum of order 2', 'step size per parameter']
)
def test_lookahead_in_chunks_of_one_row_stores_nothing(switch, engine, batch_size):
    """Forgetting goes on, as where a mask stores nothing."""
    kwargs = {'chunk_size': 1, 'batch_size': batch_size, 'engine': engine}
    mem, plain = memory(switch, store_with_lookahead_value=True, **kwargs), memory(switch, **kwargs)
    seq = inputs(mem, 6)
    out, state, (losses, step_sizes) = mem(seq, return_surprises=True)
    expected, masked = plain(seq, store_mask=torch.zeros(2, 6, dtype=torch.bool))
    assert losses.shape == step_sizes.shape == (2, 2, 0)
    assert_same((out, state.weights, state.states), (expected, masked.weights, masked.states), 1e-12)
    came, wanted = (gradients(m, o.square().sum()) for m, o in ((mem, out), (plain, expected)))
    assert_same(came, wanted, 1e-10)  # a zero where a parameter has no effect, not none
    pieces, before = [], None
    for piece in seq.split([1, 3, 2], dim=1):
        retrieved, before = mem(piece, state=before)
        pieces.append(retrieved)
    assert_same(torch.cat(pieces, dim=1), out, 1e-12)


@pytest.mark.parametrize('switch', ['convolution', 'attention memory', 'convolution, attention memory'])
@pytest.mark.parametrize('length', [5, 6, 8])
def test_a_state_of_store_memories_goes_on_like_that_of_a_call(switch, length):
    mem = memory(switch)
    seq = inputs(mem, length + 7)
    first, rest = seq.split([length, 7], dim=1)
    _, stored, _ = mem.store_memories(first)
    with_base = mem(first, ttt_batch_size=64)[1]  # all gradients at the initial weights
    assert_same(mem(rest, state=stored)[0], mem(rest, state=with_base)[0])


def test_weights_over_time_are_not_changed_in_place():
    mem = memory('plain')
    updates = mem(inputs(mem, 9))[1].updates
    for change in (lambda: updates.zero_(), lambda: updates.update({}), lambda: updates.pop('norm.gamma')):
        with pytest.raises(AttributeError, match='would change weights that are formed anew each time'):
            change()
    assert not any(w.any() for w in updates.clone().zero_().values())


def test_retrieval_needs_weights_for_all_chunks():
    mem = memory('plain')
    seq = inputs(mem, 4 * mem.store_chunk_size)
    updates = mem(seq[:, : 2 * mem.store_chunk_size])[1].updates
    with pytest.raises(ValueError, match='weights must be constant or hold 5 steps for .* tokens .*, got 3'):
        mem.retrieve_memories(seq, updates)


def test_a_memory_that_is_only_read_needs_no_weights_of_another():
    mem = NeuralMemory(8, chunk_size=2, accept_weight_residual=True).double()
    seq = torch.randn(1, 5, mem.dim, dtype=torch.float64)
    assert mem(seq, store=False)[0].shape == seq.shape
    with pytest.raises(ValueError, match='prev_weights must be given'):
        mem(seq)
