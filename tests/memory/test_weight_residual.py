"""`prev_weights`: which of another memory's weights belong to which chunk."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same
from memories import inputs, memory

LENGTH = 27  # six chunks, and a part of the next


def residual_pair(switch: str = 'plain', **kwargs):
    """A memory, and one that takes its gradients at weights mixed with those of the first."""
    return memory(switch, **kwargs), memory(switch, accept_weight_residual=True, **kwargs)


def gradients(out, state, memories):
    scalar = out.square().sum() + sum(w.square().sum() for w in state.states[0].values())
    parameters = [p for mem in memories for p in mem.parameters()]
    return [g for g in torch.autograd.grad(scalar, parameters, allow_unused=True) if g is not None]


@pytest.mark.parametrize('engine', ['dual', 'dense'])
@pytest.mark.parametrize('switch', ['plain', 'spectral norm', 'deep memory'])
@pytest.mark.parametrize('sizes', [[8, 19], [3, 1, 9, 6, 8]])
def test_weights_over_the_whole_sequence_serve_each_of_its_calls(engine, switch, sizes):
    first, second = residual_pair(switch, engine=engine)
    seq = inputs(first, LENGTH)

    def run(sizes):
        over_time, state, outs = first(seq)[1].updates, None, []
        for piece in seq.split(sizes, dim=1):
            out, state = second(piece, state=state, prev_weights=over_time)
            outs.append(out)
        out = torch.cat(outs, dim=1)
        return out, state.states, gradients(out, state, (first, second))

    assert_same(run(sizes), run([LENGTH]))


def test_a_call_takes_weights_over_the_sequence_or_over_itself():
    first, second = residual_pair()
    seq = inputs(first, LENGTH)
    over_all = first(seq)[1].updates

    # calls of one chunk and of four: both kinds of weights, the last of them left out or not
    before, after = [None, None], None
    for piece in seq.split([5, 16, 6], dim=1):
        _, before[0] = first(piece, state=before[0])
        out, before[1] = second(piece, state=after, prev_weights=before[0].updates)
        assert_same(second(piece, state=after, prev_weights=over_all)[0], out)
        without_last = {name: w[:, :-1] for name, w in before[0].updates.items()}
        assert_same(second(piece, state=after, prev_weights=without_last)[0], out)
        after = before[1]


def test_stored_chunks_count_from_the_sequence_index():
    first, second = residual_pair(batch_size=None)
    seq = inputs(first, 24)
    over_all = first(seq)[1].updates
    _, state = second(seq[:, :8], prev_weights=over_all)
    stored, *_ = second.store_memories(
        seq[:, 8:], state.weights, past_state=state.states, seq_index=state.seq_index, prev_weights=over_all
    )
    assert_same(dict(stored.items()), {n: w[:, 2:] for n, w in second(seq, prev_weights=over_all)[1].updates.items()})


@pytest.mark.parametrize('steps', [1, 2, 5, 6])
def test_weights_of_no_clear_alignment_are_refused(steps):
    first, second = residual_pair()
    seq = inputs(first, LENGTH)
    over_all = first(seq)[1].updates
    _, state = second(seq[:, :12], prev_weights=over_all)

    # chunks 3, 4 and 5: three or four steps would be of this call, seven or more of the sequence
    some = {name: w[:, :steps] for name, w in over_all.items()}
    expected = (
        r'prev_weights must hold weights for each of the 3 chunks that this call completes \(4 steps\), '
        rf'or for all 6 chunks up to its end \(at least 7 steps\), got {steps}'
    )
    with pytest.raises(ValueError, match=expected):
        second(seq[:, 12:], state=state, prev_weights=some)


def test_parameters_have_equally_many_steps():
    first, second = residual_pair()
    seq = inputs(first, LENGTH)
    uneven = dict(first(seq)[1].updates.items())
    uneven['norm.gamma'] = uneven['norm.gamma'][:, :4]
    with pytest.raises(ValueError, match=r'prev_weights must hold equally many steps of each parameter, got \[4, 7\]'):
        second(seq, prev_weights=uneven)
    with pytest.raises(ValueError, match=r'weights must hold equally many steps of each parameter, got \[4, 7\]'):
        first.retrieve_memories(seq, uneven)
