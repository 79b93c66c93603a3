"""`spectral_update`: its kernel equals the same steps taken one by one."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same

from titans_pytorch.memory.backends.spectral import SpectralBackend
from titans_pytorch.memory.chunks import Chunks, WeightResidual
from titans_pytorch.memory.fast_weights import FastWeights, MemoryWeights
from titans_pytorch.memory_models import MemoryMLP, PlainMLP, ResidualNorm
from titans_pytorch.neural_memory import default_loss_fn
from titans_pytorch.ops import spectral_update as operation
from titans_pytorch.ops.associative_scan import AssocScan

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture
def launches(launches_of):
    return launches_of(operation)


def problem(dim, expansion, depth, norm, rows=3, heads=3, momentum=True, modulation=True, residual=True):
    """A backend, a chunk, weights and a weight residual."""
    network = MemoryMLP(dim, depth=depth, expansion_factor=expansion)
    if norm:
        network = ResidualNorm(dim, network)
    network = network.to(DEVICE)

    def draw(*shape):
        return torch.randn(*shape, device=DEVICE)

    def weights(scale=0.3):
        return {name: scale * draw(heads, *w.shape) for name, w in network.named_parameters()}

    base, newest, previous = weights(), weights(), weights()
    chunk = Chunks(
        keys=draw(heads, 1, rows, dim),
        values=draw(heads, 1, rows, dim),
        step_sizes=draw(heads, 1, rows).sigmoid(),
        decay_logits=draw(heads, 1),
        momentum_logits=draw(heads, 1, 1) if momentum else None,
        momentum_mix=None,
        modulation=draw(heads, 1, len(base)) if modulation else None,
    )
    before = MemoryWeights(base, newest, {name: w.unsqueeze(0) for name, w in weights(0.1).items()} if momentum else {})
    shared = FastWeights({name: w.unsqueeze(1) for name, w in previous.items()}, [], previous)
    taken = WeightResidual.of(shared, draw(heads, 1).sigmoid(), 0) if residual else None
    backend = SpectralBackend(network, PlainMLP.of(network), default_loss_fn, AssocScan(), None, True)
    return backend, chunk, before, taken


@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize(('dim', 'expansion', 'depth'), [(16, 2.0, 2), (20, 0.5, 2), (16, 1.0, 1), (12, 1.0, 2)])
def test_kernel_equals_the_steps_one_by_one(dim, expansion, depth, norm, launches, switch_kernel, poisoned):
    for given in ({}, {'momentum': False, 'modulation': False, 'residual': False, 'rows': 5}):
        backend, *chunk = problem(dim, expansion, depth, norm, **given)
        switch_kernel(operation, False)
        expected = backend.store_chunk(*chunk)
        switch_kernel(operation, True)
        came = backend.store_chunk(*chunk)
        # Newton–Schulz enlarges what is rounded
        assert_same(came, expected, 2e-4)
        for of_came, of_before in zip(came[0], chunk[1]):
            assert {name: w.stride() for name, w in of_came.items()} == {n: w.stride() for n, w in of_before.items()}
    assert len(launches) == 2


def test_gates_of_any_layout(launches, switch_kernel):
    backend, chunk, *rest = problem(16, 2.0, 2, True)
    spaced = torch.stack((chunk.modulation, torch.zeros_like(chunk.modulation)), dim=-1)[..., 0]
    chunk = chunk._replace(modulation=spaced)
    switch_kernel(operation, False)
    expected = backend.store_chunk(chunk, *rest)
    switch_kernel(operation, True)
    assert_same(backend.store_chunk(chunk, *rest), expected, 2e-4)
    assert len(launches) == 1


def test_the_kernel_is_for_short_chunks_and_one_order_of_momentum(launches):
    backend, chunk, *rest = problem(16, 2.0, 2, True, rows=operation.MOST_ROWS + 1)
    backend.store_chunk(chunk, *rest)
    backend, chunk, before, residual = problem(16, 2.0, 2, True)
    mixed = chunk._replace(momentum_mix=torch.rand(3, 1, 1, device=DEVICE))
    backend.store_chunk(mixed, before, residual)
    backend.max_grad_norm = 1.0
    backend.store_chunk(chunk, before, residual)
    assert not launches
    backend.max_grad_norm = None
    backend.store_chunk(chunk, before, residual)
    assert len(launches) == 1


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('heads', [4, 256])
def test_kernel_in_sizes_of_models(heads, dtype, launches, switch_kernel, poisoned):
    backend, *chunk = problem(64, 2.0, 2, True, rows=4, heads=heads)
    with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
        switch_kernel(operation, False)
        expected = backend.store_chunk(*chunk)
        switch_kernel(operation, True)
        came = backend.store_chunk(*chunk)
    assert len(launches) == 1
    assert_same(came, expected, 2e-4 if dtype == torch.float32 else 3e-2)
