"""Calls of `TitansModel` and `TitansForCausalLM`, compared with the models that they wrap."""

from __future__ import annotations

import pytest
import torch
from compare import all_in_float64, assert_same, gradients
from hf_models import architectures, batch, model, rows
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from titans_pytorch.hf import TitansCache, TitansForCausalLM, TitansModel
from titans_pytorch.hf.cache import Group


@pytest.fixture(autouse=True)
def float64():
    with all_in_float64():
        yield


# registration, saving


@architectures
def test_a_saved_model_is_loaded_by_the_auto_classes(name, tmp_path):
    own, (x, _) = model(name), batch()
    own.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert type(loaded) is TitansForCausalLM and not any(info.values())
    assert_same(dict(loaded.named_parameters()), dict(own.named_parameters()), 0)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in own.parameters()]
    # constants of rotary embeddings are float32 until now; the last bits may depend on where parameters are in memory
    assert_same(loaded.double()(x).logits, own(x).logits, 1e-13)

    base, info = AutoModel.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert type(base) is TitansModel and not any(info.values())
    assert_same(base.double()(x).last_hidden_state, own.transformer(x, return_hidden=True), 1e-13)


def test_tied_embeddings_are_saved_once(tmp_path):
    own, (x, _) = model(tie_word_embeddings=True), batch()
    assert own.get_output_embeddings().weight is own.get_input_embeddings().weight
    own.save_pretrained(tmp_path)
    assert 'transformer.to_logits.weight' not in load_file(tmp_path / 'model.safetensors')
    loaded = TitansForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert_same(loaded.double()(x).logits, own(x).logits, 1e-13)


@architectures
def test_layers_stay_whole_when_a_model_is_distributed(name):
    own = model(name)
    assert all(type(layer).__name__ in own._no_split_modules for layer in own.transformer.layers)


def test_a_device_map_leaves_results_unchanged(tmp_path):
    own, (x, mask) = model(), batch()
    own.save_pretrained(tmp_path)
    loaded = TitansForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, device_map='auto').double()
    assert_same(loaded(x, attention_mask=mask).logits, own(x, attention_mask=mask).logits, 0)


def test_the_vocabulary_can_grow():
    own, (x, _) = model(), batch()
    before = own(x).logits
    own.resize_token_embeddings(17, mean_resizing=False)
    assert own.config.vocab_size == own.transformer.num_tokens == 17
    assert_same(own(x).logits[..., :13], before)
    assert own(torch.tensor([[16, 3]])).logits.shape == (1, 2, 17)


# calls


@architectures
def test_logits_hidden_states_and_loss_are_those_of_the_model(name):
    own, (x, _) = model(name), batch()
    inner = own.transformer
    out = own(x, labels=x, output_hidden_states=True)
    assert_same(out.logits, inner(x), 0)
    assert_same(out.loss, inner(x, return_loss=True))
    assert len(out.hidden_states) == 1 + own.config.depth
    assert_same(out.hidden_states[0], inner._token_rows(inner._embedded(x, 0), 0, 9), 0)
    assert_same(out.hidden_states[-1], inner(x, return_hidden=True), 0)
    assert_same(own(x, logits_to_keep=2).logits, out.logits[:, -2:])
    assert_same(own(x, return_dict=False, use_cache=False)[0], out.logits, 0)


@architectures
def test_embeddings_take_the_place_of_tokens(name):
    own, (x, _) = model(name), batch()
    assert_same(own(inputs_embeds=own.get_input_embeddings()(x)).logits, own(x).logits, 0)


def test_hidden_states_are_the_input_of_the_next_layer():
    own, (x, _) = model('MAG'), batch()
    layers = own(x, output_hidden_states=True).hidden_states
    seen = []
    own.transformer.layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    own(x)
    assert_same(layers[1], seen[0], 0)


@pytest.mark.parametrize(('padding', 'use_cache'), [('left', True), ('right', False)])
@architectures
def test_a_padded_row_is_read_as_if_it_were_alone(name, padding, use_cache):
    own, (x, mask) = model(name), batch(padding)
    labels = torch.where(mask.bool(), x, -100)
    out = own(x, attention_mask=mask, labels=labels, use_cache=use_cache, output_hidden_states=True)
    alone = [own(row, labels=row, output_hidden_states=True) for row in rows(x, mask)]
    for index, expected in enumerate(alone):
        real = mask[index].bool()
        assert_same(out.logits[index, real], expected.logits[0])
        for came, layer in zip(out.hidden_states, expected.hidden_states):
            assert_same(came[index, real], layer[0])
    assert_same(out.loss, sum(row.loss * (row.logits.shape[1] - 1) for row in alone) / 13)


def test_gradients_of_a_padded_batch_are_those_of_its_rows():
    own, (x, mask) = model('MAC'), batch()
    labels = torch.where(mask.bool(), x, -100)
    together = gradients(own, own(x, attention_mask=mask, labels=labels, use_cache=False).loss)
    losses = [own(row, labels=row).loss * (row.shape[1] - 1) for row in rows(x, mask)]
    assert_same(together, gradients(own, sum(losses) / 13))


def test_labels_of_padding_and_of_the_first_token_after_it_are_ignored():
    own, (x, mask) = model(), batch()
    labels = torch.where(mask.bool(), x, -100)
    assert_same(own(x, attention_mask=mask, labels=x).loss, own(x, attention_mask=mask, labels=labels).loss, 0)


@pytest.mark.filterwarnings('ignore:`gradient_checkpointing_(enable|disable)` is deprecated')
def test_gradient_checkpointing_recomputes_the_layers(monkeypatch):
    own, (x, _) = model(), batch()
    own.train()
    expected = gradients(own, own(x, labels=x).loss)
    calls = []
    noted = 'titans_pytorch.utils.functional.checkpoint'
    monkeypatch.setattr(noted, lambda fn, *args, **kw: calls.append(fn) or fn(*args))
    own(x, labels=x)
    assert not calls
    own.gradient_checkpointing_enable()
    assert own.gradient_checkpointing
    assert_same(gradients(own, own(x, labels=x).loss), expected)
    assert len(calls) == 2
    own.gradient_checkpointing_disable()
    assert not own.gradient_checkpointing


def cache_of_three() -> TitansCache:
    cache = TitansCache()
    cache.groups = [Group(range(3))]
    return cache


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({}, 'pass one of input_ids and inputs_embeds'),
        ({'input_ids': torch.ones(1, 3).long(), 'inputs_embeds': torch.ones(1, 3, 8)}, 'pass one of'),
        ({'input_ids': torch.ones(1, 3).long(), 'past_key_values': ()}, 'must be a TitansCache, got tuple'),
        ({'input_ids': torch.ones(1, 3).long(), 'cache': cache_of_three()}, 'of a batch of 1.*, got one of 3'),
        ({'input_ids': torch.ones(1, 3).long(), 'attention_mask': torch.zeros(1, 3).long()}, 'at least one token'),
        ({'input_ids': torch.ones(1, 3).long(), 'attention_mask': torch.ones(1, 2).long()}, 'attention_mask must be'),
        ({'input_ids': torch.ones(1, 3).long(), 'attention_mask': torch.ones(1, 1, 3, 3)}, 'attention_mask must'),
        ({'input_ids': torch.full((1, 3), 13)}, 'num_tokens|13'),
        ({'input_ids': torch.ones(1, 3).long(), 'position_ids': torch.arange(3)[None]}, 'position_ids'),
    ],
)
def test_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model()(**arguments)
