"""Activation checkpointing of layers, by `checkpoint_layers` or by wrapping a block."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from architectures import CLASSES, build, ids
from compare import assert_same, gradients
from torch.utils.checkpoint import checkpoint

from titans_pytorch import MemorySwiGluMLP, NeuralMemory


def absolute_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction - target).abs().mean(dim=-1)


VARIANTS = {
    'plain': {},
    'streams': {'num_residual_streams': 4},
    'dense': {'neural_memory_kwargs': {'dim_head': 8, 'heads': 2, 'engine': 'dense'}},
}
MAC_VARIANTS = {
    **VARIANTS,
    'weight residual': {'neural_mem_weight_residual': True, 'depth': 3},
    'separate views': {'neural_memory_qkv_receives_diff_views': True, 'depth': 3},
    'both, four streams': {
        'neural_mem_weight_residual': True,
        'neural_memory_qkv_receives_diff_views': True,
        'num_residual_streams': 4,
        'depth': 3,
    },
}
CASES = [(name, variant) for name in CLASSES for variant in (MAC_VARIANTS if name == 'MAC' else VARIANTS)]


@pytest.mark.parametrize(('name', 'variant'), CASES)
def test_gradients_are_the_same(name: str, variant: str):
    model = build(name, **MAC_VARIANTS[variant])
    x = ids(21)
    loss = model(x, return_loss=True)
    expected = gradients(model, loss)

    def assert_unchanged(label: str):
        again = model(x, return_loss=True)
        assert_same((again, gradients(model, again)), (loss, expected), label=label)

    model.checkpoint_layers = True
    assert_unchanged('by the argument')
    model.checkpoint_layers = False
    for block in model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert_unchanged('by hand')


@pytest.mark.parametrize('name', CLASSES)
def test_with_a_state(name: str):
    model = build(name, checkpoint_layers=True)
    assert model.checkpoint_layers
    x = ids(21)
    _, state = model(x[:, :8], return_state=True)
    came = gradients(model, model(x[:, 8:], state=state).square().sum())
    model.checkpoint_layers = False
    _, state = model(x[:, :8], return_state=True)
    assert_same(came, gradients(model, model(x[:, 8:], state=state).square().sum()))


NETWORKS = {
    'MemorySwiGluMLP': {'neural_memory_model': MemorySwiGluMLP(8)},
    'MemoryMLP': {},
    'another loss': {'neural_memory_kwargs': {'dim_head': 8, 'heads': 2, 'store_memory_loss_fn': absolute_error}},
}


@pytest.mark.parametrize('changes', NETWORKS.values(), ids=NETWORKS)
def test_compiled_models_are_checkpointed_whatever_their_memory(changes):
    if 'neural_memory_model' in changes:
        changes = {**changes, 'neural_memory_kwargs': {'dim_head': 8, 'heads': 2}}
    model, x = build('MAG', checkpoint_layers=True, **changes), ids(9)
    expected = gradients(model, model(x, return_loss=True))
    torch.compiler.reset()
    compiled = torch.compile(model, backend='aot_eager')
    assert_same(gradients(model, compiled(x, return_loss=True)), expected)
    assert_same(gradients(model, model(x, return_loss=True)), expected)


def test_a_compiled_memory_is_checkpointed_whatever_its_network():
    mem = NeuralMemory(8, chunk_size=4, model=MemorySwiGluMLP(8), checkpoint_every=4).double()
    seq = torch.randn(2, 10, 8, dtype=torch.float64)
    expected = gradients(mem, mem(seq)[0].square().sum())
    torch.compiler.reset()
    compiled = torch.compile(mem, backend='aot_eager')
    assert_same(gradients(mem, compiled(seq)[0].square().sum()), expected)


def test_less_is_saved_for_the_backward_pass():
    def num_saved(model: torch.nn.Module) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(ids(40), return_loss=True)
        return sum(sizes)

    model = build('MAC', depth=4)
    everything = num_saved(model)
    model.checkpoint_layers = True
    assert num_saved(model) < everything / 4
