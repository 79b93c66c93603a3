"""Steps of decoding: a single chunk stored, and its weights copied into buffers."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same

from titans_pytorch.memory.backends import DenseBackend, DualBackend
from titans_pytorch.memory.chunks import Chunks
from titans_pytorch.memory.fast_weights import MemoryWeights
from titans_pytorch.memory.reference import default_loss_fn
from titans_pytorch.memory.state import MemoryBuffers, copy_weights
from titans_pytorch.memory_models import MemoryMLP, PlainMLP, ResidualNorm
from titans_pytorch.ops.associative_scan import AssocScan

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def problem(depth, norm, dim=16):
    network = MemoryMLP(dim, depth)
    network = ResidualNorm(dim, network) if norm else network
    weights = {name: torch.randn(3, *p.shape, device=DEVICE) * 0.3 for name, p in network.named_parameters()}
    keys, values = torch.randn(2, 3, 1, 5, dim, device=DEVICE)
    step_sizes, decay = torch.rand(3, 1, 5, device=DEVICE), torch.randn(3, 1, device=DEVICE)
    momentum = torch.randn(3, 1, 1, device=DEVICE)
    return network, Chunks(keys, values, step_sizes, decay, momentum, None, None), weights


def backend(kind, network):
    return kind(network, PlainMLP.of(network), default_loss_fn, AssocScan(), None, True)


@pytest.mark.parametrize('depth', [1, 2, 3])
@pytest.mark.parametrize('norm', [True, False])
@torch.no_grad()
def test_gradients_of_a_chunk_are_equal_in_both_backends(depth, norm):
    network, chunk, at = problem(depth, norm)
    came, expected = (backend(kind, network).negative_gradients(chunk, at) for kind in (DualBackend, DenseBackend))
    assert [*came[0]] == [*at] == [*expected[0]]
    assert_same(came, expected, 2e-5)


def test_weights_after_a_chunk_are_laid_out_like_their_buffers():
    # so that one operation copies all of them
    network, chunk, newest = problem(2, True)
    momentum = {name: torch.zeros_like(w).unsqueeze(0) for name, w in newest.items()}
    before = MemoryWeights(newest, newest, momentum)
    after, _ = backend(DualBackend, network).store_chunk(chunk, before, None)
    for of_after, of_before in zip(after, before):
        assert {name: w.stride() for name, w in of_after.items()} == {name: w.stride() for name, w in of_before.items()}


def test_weights_of_several_buffers_are_copied_together():
    def buffers(dtype):
        weights = lambda: {'a': torch.randn(2, 3).to(dtype), 'b': torch.randn(4)}  # noqa: E731
        return MemoryBuffers(MemoryWeights(weights(), weights(), weights()), torch.zeros(1, 2, 3), None)

    targets, sources = [buffers(torch.float32) for _ in range(2)], [buffers(torch.float64) for _ in range(2)]
    sources[1] = sources[1]._replace(weights=sources[1].weights._replace(base=targets[1].weights.base))
    copied = [t for own in targets for weights in own.weights for t in weights.values()]
    expected = [t.float() for own in sources for weights in own.weights for t in weights.values()]
    copy_weights(zip(targets, sources))
    assert_same(copied, expected, 0.0)
    copy_weights([])
