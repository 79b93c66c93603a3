"""Models as JSON: every architecture and option survives, and what cannot be stored is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from titans_pytorch import MemorySwiGluMLP
from titans_pytorch.configuration import ARCHITECTURES, build_model, memory_config, model_config
from titans_pytorch.presets import memory_settings

SIZES = dict(num_tokens=11, dim=8, depth=2, segment_len=4, heads=2, dim_head=4)


def test_arguments_of_a_memory():
    assert memory_config(heads=np.int64(2)) == {'heads': 2}
    with pytest.raises(TypeError, match='config must hold arguments of NeuralMemory; got bogus, headz'):
        memory_config(headz=2, bogus=1)
    with pytest.raises(TypeError, match='got headz'):
        model_config('mag', **SIZES, neural_memory_kwargs={'headz': 2})


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_a_model_built_from_json_equals_one_built_by_hand(architecture):
    settings = memory_settings(heads=2, dim_head=4, memory_batch=4)
    network = {'type': 'MemorySwiGluMLP', 'dim': 4, 'depth': 1}
    memory = {'neural_memory_batch_size': 4, 'neural_memory_kwargs': settings}
    config = model_config(architecture, **SIZES, neural_memory_model=network, **memory)
    model = build_model(json.loads(json.dumps(config)))

    by_hand = ARCHITECTURES[architecture](**SIZES, neural_memory_model=MemorySwiGluMLP(4, depth=1), **memory)
    by_hand.load_state_dict(model.state_dict())
    assert str(by_hand) == str(model)
    tokens = torch.randint(11, (2, 9))
    torch.testing.assert_close(model(tokens), by_hand(tokens), rtol=0, atol=0)


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match='store_memory_loss_fn must be a value that JSON can hold, got function'):
        memory_config(store_memory_loss_fn=lambda came, expected: (came - expected).square().mean(dim=-1))
    with pytest.raises(TypeError, match="neural_memory_model must hold arguments of MemoryMLP: .*'dpth'"):
        model_config('mac', **SIZES, neural_memory_model={'type': 'MemoryMLP', 'dim': 4, 'depth': 1, 'dpth': 3})
    with pytest.raises(TypeError, match="config must hold arguments of LongTermMemoryModel: .*'num_tokens'"):
        build_model({'architecture': 'lmm'})


def test_arguments_left_out_are_those_of_the_constructor():
    config = model_config('mac', **SIZES)
    assert config == {'architecture': 'mac', **SIZES}
    assert str(build_model(config)) == str(ARCHITECTURES['mac'](**SIZES))


def test_tuples_become_lists():
    config = model_config('mac', **SIZES, neural_memory_layers=(2,), neural_memory_kwargs={'chunk_size': (2, 2)})
    assert config['neural_memory_layers'] == [2]


def test_the_activation_is_stored_by_name():
    for activation in ('silu', nn.SiLU()):
        config = model_config('lmm', **SIZES, neural_memory_kwargs={'activation': activation})
        assert config['neural_memory_kwargs'] == {'activation': 'silu'}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'architecture': 'mamba'}, 'architecture must be one of'),
        ({'architecture': None}, 'architecture must be one of'),
        ({'dims': 8}, 'got dims'),
        ({'token_emb': nn.Identity()}, 'got token_emb'),
        ({'neural_memory_model': nn.Linear(4, 4)}, 'neural_memory_model must be a mapping'),
        ({'neural_memory_model': {'type': 'MLP'}}, "neural_memory_model\\['type'\\] must be one of"),
        ({'neural_memory_kwargs': {'activation': nn.GELU('tanh')}}, 'activation must be one of'),
        ({'neural_memory_kwargs': {'store_memory_loss_fn': len}}, 'must be a value that JSON can hold'),
        (
            {'neural_memory_kwargs': {'default_step_transform_max_lr': float('nan')}},
            'must be a value that JSON can hold',
        ),
        ({'neural_memory_kwargs': [1]}, 'neural_memory_kwargs must be a mapping'),
    ],
)
def test_refused(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model_config(**{'architecture': 'mac', **SIZES, **changes})


@pytest.mark.parametrize('config', [None, 3, {}, {'architecture': 'mac', 'size': 3, **SIZES}])
def test_a_refused_configuration(config):
    with pytest.raises((ValueError, TypeError), match='config must|architecture must'):
        build_model(config)
