"""Both backends against the reference implementation: a loop over chunks that states the equations of the paper."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same, gradients
from memories import SWITCHES, inputs, memory

from titans_pytorch.memory.fast_weights import MemoryWeights
from titans_pytorch.memory.reference import store_and_retrieve


def by_reference(mem, seq, prev_weights=None):
    """`mem(seq)` from an empty memory, its recurrence by `store_and_retrieve`."""
    store_seq, queries_seq = (seq[1:], seq[0]) if mem.qkv_receives_diff_views else (seq, seq)
    batch, length = queries_seq.shape[:2]
    chunk, context = mem.store_chunk_size, mem.conv_context
    complete = length // chunk * chunk
    padding = seq.new_zeros(*store_seq.shape[:-2], context, store_seq.shape[-1])
    chunks, pooled = mem._project_chunks(torch.cat((padding, store_seq[..., :complete, :]), dim=-2), None)
    leading = int(mem.mixes_tokens and chunk > 1)
    rows = torch.cat((queries_seq.new_zeros(batch, context + leading, queries_seq.shape[-1]), queries_seq), dim=1)
    normed, queries = mem._queries(rows)

    base = dict(mem.init_weights(batch).items())
    momentum = {} if mem.to_momentum is None else dict(mem.init_momentum(batch).items())
    retrieved, weights, losses = store_and_retrieve(
        mem._network,
        mem.store_memory_loss_fn,
        queries,
        chunks,
        MemoryWeights(base, base, momentum),
        chunk_size=chunk,
        batch_size=mem.batch_size,
        transition=mem._transition,
        max_grad_norm=mem.max_grad_norm,
        spectral_norm=mem.spectral_norm_surprises,
        residual=mem._weight_residual(prev_weights, pooled, 0),
        leading=leading,
        num_proximal_steps=mem._backend.num_proximal_steps,
    )
    return mem._combine(retrieved, normed)[:, leading:], weights, losses


# other modules are always dense
CASES = [(switch, 'dense') for switch in SWITCHES] + [(switch, 'dual') for switch in SWITCHES if 'module' not in switch]


@pytest.mark.parametrize(('switch', 'engine'), CASES)
def test_a_memory_equals_the_reference(switch, engine):
    mem = memory(switch, engine=engine)
    seq = inputs(mem, 23)
    expected, weights, losses = by_reference(mem, seq)
    out, state, surprises = mem(seq, return_surprises=True)
    assert_same(out, expected, 1e-10, 'output ')
    for came, own in zip((state.weights, *state.states), weights):
        assert_same(dict(came.items()), own, 1e-10, 'weights ')
    rows = surprises[0].shape[-1]
    assert_same(surprises[0].flatten(0, 1), losses.flatten(1)[:, :rows], 1e-10, 'losses ')
    direction = torch.randn_like(out)
    assert_same(
        gradients(mem, (out * direction).sum()), gradients(mem, (expected * direction).sum()), 1e-8, 'gradient '
    )


@pytest.mark.parametrize('engine', ['dual', 'dense'])
def test_a_weight_residual_equals_the_reference(engine):
    first, second = memory(engine=engine), memory(accept_weight_residual=True, engine=engine)
    seq = inputs(first, 23)
    updates = first(seq)[1].updates
    expected, weights, _ = by_reference(second, seq, updates)
    out, state = second(seq, prev_weights=updates)
    assert_same(out, expected, 1e-10)
    assert_same(dict(state.states[0].items()), weights.newest, 1e-10)
