"""Activation checkpointing of layers, by `checkpoint_layers` or by wrapping a block."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from architectures import CLASSES, build, ids
from compare import assert_same, gradients
from torch.utils.checkpoint import checkpoint

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
