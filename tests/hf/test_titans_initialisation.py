"""Initial values: those of the constructor for new models, for missing keys, and after the meta device."""

from __future__ import annotations

import random

import pytest
import torch
from accelerate import init_empty_weights
from compare import assert_same
from hf_models import MEMORY, architectures, config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from titans_pytorch.configuration import build_model
from titans_pytorch.hf import TitansForCausalLM, TitansModel

# biases that are not zero at first, which transformers would set to 0
BIASED = {**MEMORY, 'init_decay_bias': -5.0, 'init_momentum_bias': 2.0, 'attn_pool_chunks': True, 'conv_kernel': 3}


def seed() -> None:
    torch.manual_seed(3)
    random.seed(3)


def values(own) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in own.named_parameters()}


@architectures
def test_a_new_model_is_that_of_the_constructor(name):
    settings = config(name, neural_memory_kwargs=BIASED)
    results = []
    for build in (
        lambda: TitansForCausalLM(settings).transformer,
        lambda: AutoModelForCausalLM.from_config(settings).transformer,
        lambda: build_model(settings.model),
    ):
        seed()
        results.append(values(build()))
    assert_same(results[0], results[2], 0)
    assert_same(results[1], results[2], 0)


@architectures
def test_missing_parameters_are_drawn_and_loaded_ones_kept(name, tmp_path, monkeypatch):
    own = TitansForCausalLM(config(name, neural_memory_kwargs=BIASED, num_tokens=300))
    expected = values(own)
    own.save_pretrained(tmp_path)
    path, empty_like = tmp_path / 'model.safetensors', torch.empty_like
    stored = load_file(path)

    def poisoned(*args, **kwargs):
        new = empty_like(*args, **kwargs)
        return new if new.is_meta else new.fill_(float('nan'))

    monkeypatch.setattr(torch, 'empty_like', poisoned)
    for half in (0, 1):
        kept = [key for index, key in enumerate(sorted(stored)) if index % 2 == half]
        save_file({key: torch.full_like(stored[key], 7.0) for key in kept}, path, metadata={'format': 'pt'})
        for key, came in values(TitansForCausalLM.from_pretrained(tmp_path)).items():
            drawn = expected[key]
            if key in kept:
                assert (came == 7.0).all(), key
            elif drawn.numel() > 1 and (drawn == drawn.flatten()[0]).all():
                assert_same(came, drawn, 0, key)
            else:
                bound = 10 * drawn.abs().max() if drawn.numel() > 30 else 10.0
                assert came.isfinite().all() and came.abs().max() < bound, key
                assert drawn.numel() < 30 or 0.5 < came.std() / drawn.std() < 2.0, key


def test_a_model_from_the_meta_device_is_reset_like_the_constructor():
    settings = config('MAC', neural_memory_kwargs=BIASED)
    for context in (torch.device('meta'), init_empty_weights()):
        with context:
            own = TitansForCausalLM(settings)
        assert all(p.is_meta for p in own.parameters())
        own.to_empty(device='cpu')
        with torch.no_grad():
            for p in own.parameters():
                p.fill_(float('nan'))
        seed()
        own.reset_parameters()
        seed()
        assert_same(values(own), values(TitansForCausalLM(settings)), 0)


def test_the_weights_of_an_empty_model_can_be_drawn_by_transformers():
    with torch.device('meta'):
        own = TitansModel(config('MAC', neural_memory_kwargs=BIASED))
    own.to_empty(device='cpu')
    with torch.no_grad():
        for p in own.parameters():
            p.fill_(float('nan'))
    own.init_weights()
    assert all(p.isfinite().all() for p in own.parameters())


@pytest.mark.parametrize('tied', [False, True])
def test_grown_embeddings_are_drawn_as_the_first_were(tied):
    own = TitansForCausalLM(config(num_tokens=300, tie_word_embeddings=tied))
    before = values(own)
    own.resize_token_embeddings(900, mean_resizing=False)
    weight = own.get_input_embeddings().weight
    assert_same(weight[:300], before['transformer.token_emb.weight'], 0)
    assert 0.9 < weight[300:].std() < 1.1
