"""`TitansConfig`: fields of every constructor, survival of JSON, and refusals that name the field."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
from hf_models import architectures, config
from transformers import AutoConfig

from titans_pytorch import configuration
from titans_pytorch.hf import TitansConfig
from titans_pytorch.presets import preset


def test_there_is_a_field_for_every_constructor_argument():
    arguments = {name for cls in configuration.ARCHITECTURES.values() for name in inspect.signature(cls).parameters} - {
        *configuration.NOT_STORED
    }
    assert arguments | {'architecture'} <= {field.name for field in fields(TitansConfig)}


@architectures
def test_a_saved_configuration_describes_the_same_model(name, tmp_path):
    own = config(name)
    own.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TitansConfig
    assert loaded.model == own.model
    assert str(configuration.build_model(loaded.model)) == str(configuration.build_model(own.model))


@pytest.mark.parametrize('architecture', configuration.ARCHITECTURES)
def test_arguments_left_out_are_those_of_the_constructor(architecture):
    left_out = TitansConfig(architecture=architecture, dim=16, depth=2)
    sizes = {'num_tokens': 256, 'dim': 16, 'depth': 2, 'segment_len': 32}
    by_hand = configuration.build_model(configuration.model_config(architecture, **sizes))
    assert str(configuration.build_model(left_out.model)) == str(by_hand)
    assert left_out.heads == 8 and left_out.num_residual_streams == (4 if architecture == 'mac' else 1)


def test_the_names_of_other_models_are_aliases():
    aliases = {'vocab_size': 100, 'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 4, 'head_dim': 8}
    own = TitansConfig(**aliases)
    assert (own.num_tokens, own.dim, own.depth, own.heads, own.dim_head) == (100, 32, 3, 4, 8)
    assert {name: getattr(own, name) for name in aliases} == aliases


def test_presets_fit():
    own = TitansConfig(architecture='mag', num_tokens=256, segment_len=64, **preset('170M'))
    assert own.neural_memory_kwargs['activation'] == 'silu'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'architecture': 'mamba'}, 'architecture must be one of'),
        ({'architecture': 'lmm', 'paper_order': True}, 'LongTermMemoryModel.*paper_order'),
        ({'depht': 3}, "has no argument 'depht'; did you mean 'depth'"),
        ({'numtokens': 3}, "has no argument 'numtokens'; did you mean 'num_tokens'"),
        ({'dim': 0}, 'dim must be a positive integer, got 0'),
        ({'hidden_size': -8}, 'dim must be a positive integer, got -8'),
        ({'num_tokens': '256'}, "num_tokens must be a positive integer, got '256'"),
        ({'depth': 1.5}, 'depth must be a positive integer, got 1.5'),
        ({'neural_memory_model': {'type': 'MLP'}}, "neural_memory_model\\['type'\\] must be one of"),
        ({'neural_memory_kwargs': [3]}, 'neural_memory_kwargs must be a mapping'),
        ({'neural_memory_kwargs': {'store_memory_loss_fn': len}}, 'must be a value that JSON can hold'),
    ],
)
def test_refused(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TitansConfig(**changes)
