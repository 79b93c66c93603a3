"""A single chunk, stored by fused operations, and what it leaves taken over."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same

from titans_pytorch.memory import engines
from titans_pytorch.memory.engines import Chunks, default_loss_fn
from titans_pytorch.memory.state import StepState, take_over
from titans_pytorch.memory.token_step import descents, store_one_chunk
from titans_pytorch.memory_models import MemoryMLP, ResidualNorm

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def problem(depth, norm, dim=16):
    model = MemoryMLP(dim, depth)
    model = ResidualNorm(dim, model) if norm else model
    # so many heads and rows; a state holds vectors as they are and matrices by their parameters' shapes
    weights = {name: torch.randn(3, *p.shape, device=DEVICE) * 0.3 for name, p in model.named_parameters()}
    keys, values = torch.randn(2, 3, 1, 5, dim, device=DEVICE)
    step_sizes, decay = torch.rand(3, 1, 5, device=DEVICE), torch.randn(3, 1, device=DEVICE)
    momentum = torch.randn(3, 1, 1, device=DEVICE)
    return model, Chunks(keys, values, step_sizes, decay, momentum, None, None), weights


@pytest.mark.parametrize('depth', [1, 2])
@pytest.mark.parametrize('norm', [True, False])
def test_fused_descents_are_those_of_autograd(kernels_everywhere, depth, norm, monkeypatch):
    model, chunk, at = problem(depth, norm)
    calls, gradient = [], engines.inner_gradient
    monkeypatch.setattr(engines, 'inner_gradient', lambda *args: (calls.append(None), gradient(*args))[1])
    came = descents(model, default_loss_fn, chunk, at, broadcasts=True)
    assert len(calls) == 1
    expected = descents(model, default_loss_fn, chunk, at, broadcasts=False)
    assert len(calls) == 1 and [*came] == [*at] == [*expected]
    assert_same(came, expected, 2e-5)


def test_weights_after_a_chunk_lie_as_their_buffers_do():
    # all are then copied at once
    model, chunk, last = problem(2, True)
    descent = descents(model, default_loss_fn, chunk, last, broadcasts=True)
    momentum = {name: torch.zeros_like(w).unsqueeze(0) for name, w in last.items()}
    for after, before in zip(store_one_chunk(descent, chunk, last, momentum, None, True), (last, momentum)):
        assert {name: w.stride() for name, w in after.items()} == {name: w.stride() for name, w in before.items()}


def test_states_are_taken_over_together():
    def state(dtype):
        weights = lambda: {'a': torch.randn(2, 3).to(dtype), 'b': torch.randn(4)}  # noqa: E731
        return StepState(weights(), weights(), weights(), torch.zeros(1, 2, 3), None)

    buffers, after = [state(torch.float32) for _ in range(2)], [state(torch.float64) for _ in range(2)]
    after[1] = after[1]._replace(base=buffers[1].base)
    places = [t for own in buffers for weights in own[:3] for t in weights.values()]
    expected = [t.float() for own in after for weights in own[:3] for t in weights.values()]
    take_over(zip(buffers, after))
    assert_same(places, expected, 0.0)
    take_over([])
