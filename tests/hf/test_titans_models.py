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
from titans_pytorch.hf.modeling import CACHE


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


TOKENS = {'input_ids': torch.ones(1, 3).long()}
LABELS = {'labels': torch.ones(1, 3).long()}
PACKED = {'seq_idx': torch.tensor([[0, 0, 1]])}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({}, 'pass one of input_ids and inputs_embeds'),
        ({**TOKENS, 'inputs_embeds': torch.ones(1, 3, 8)}, 'pass one of'),
        ({**TOKENS, 'past_key_values': ()}, 'must be a TitansCache, got tuple'),
        ({**TOKENS, 'cache': cache_of_three()}, 'of a batch of 1.*, got one of 3'),
        ({**TOKENS, 'attention_mask': torch.zeros(1, 3).long()}, 'at least one token'),
        ({**TOKENS, 'attention_mask': torch.ones(1, 2).long()}, 'attention_mask must be'),
        ({**TOKENS, 'attention_mask': torch.ones(1, 1, 3, 3)}, 'attention_mask must'),
        ({'input_ids': torch.full((1, 3), 13)}, 'num_tokens|13'),
        ({'input_ids': torch.ones(3).long()}, r'input_ids must be \(batch, length\), got \(3,\)'),
        ({'input_ids': [[1, 2, 3]]}, 'input_ids must be a tensor, got list'),
        ({'inputs_embeds': torch.ones(1, 3).long()}, 'inputs_embeds must be a floating-point tensor'),
        ({'inputs_embeds': torch.ones(1, 3, 7).double()}, r'inputs_embeds must be \(batch, length, dim=8\)'),
        ({**TOKENS, 'attention_mask': torch.zeros(1, 3), 'use_cache': False}, 'at least one token'),
        ({**TOKENS, 'attention_mask': torch.ones(3)}, r'attention_mask must be \(batch=1, length=3\)'),
        ({**TOKENS, 'vocab_size': 1}, "unexpected keyword argument 'vocab_size'"),
        ({**TOKENS, **LABELS, **PACKED, 'shift_labels': LABELS['labels']}, 'shift_labels cannot go with'),
        ({'inputs_embeds': torch.ones(3, 8).double()}, r'inputs_embeds must be \(batch, length, dim=8\)'),
        ({**TOKENS, 'position_ids': torch.tensor(0)}, r'position_ids must be \(batch=1, length=3\)'),
        ({**TOKENS, 'attention_mask': [[1, 1, 1]]}, 'attention_mask must be a tensor, got list'),
        ({**TOKENS, 'labels': torch.ones(1, 4).long()}, r'labels must be \(batch=1, length=3\)'),
        ({**TOKENS, 'labels': torch.full((1, 3), 13)}, r'labels must be token ids in \[0, num_tokens=13\)'),
        ({**TOKENS, **LABELS, 'logits_to_keep': 1}, 'logits_to_keep cannot go with labels'),
        ({**TOKENS, 'mask': torch.ones(1, 3)}, "unexpected keyword argument 'mask'"),
        ({**TOKENS, 'attention_masks': torch.ones(1, 3)}, "unexpected keyword argument 'attention_masks'"),
        ({**TOKENS, 'is_causal': False}, "unexpected keyword argument 'is_causal'"),
        ({**TOKENS, 'position_ids': torch.arange(1, 4)[None]}, 'position_ids must count .* from 0'),
        ({**TOKENS, 'position_ids': torch.tensor([[0, 0, 2]])}, 'position_ids must count .* from 0'),
        ({**TOKENS, 'position_ids': torch.zeros(1, 4).long()}, r'position_ids must be \(batch=1, length=3\)'),
        ({**TOKENS, **PACKED, 'position_ids': torch.arange(3)[None]}, 'position_ids must count .* from 0'),
        ({**TOKENS, 'position_ids': torch.arange(3)[None], 'cache': TitansCache()}, 'position_ids cannot go with'),
        ({**TOKENS, 'seq_idx': torch.zeros(2, 3).long()}, r'seq_idx must be \(batch=1, length=3\)'),
        ({**TOKENS, 'cu_seq_lens_q': torch.tensor([0, 2])}, 'cu_seq_lens_q must increase from 0 to the 3 tokens'),
        ({**TOKENS, 'cu_seq_lens_q': torch.tensor([0, 4, 3])}, 'cu_seq_lens_q must increase from 0'),
        ({**TOKENS, 'cu_seq_lens_k': torch.tensor([0, 2])}, 'cu_seq_lens_k must increase from 0'),
        ({**TOKENS, **PACKED, 'use_cache': True}, 'leave no state to continue'),
        ({**TOKENS, **PACKED, 'output_hidden_states': True}, 'output_hidden_states needs rows of one document'),
    ],
)
def test_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model()(**arguments)


@pytest.mark.parametrize('described_by', ['position_ids', 'seq_idx', 'cu_seq_lens_q', 'document_ids', 'all'])
@architectures
def test_packed_documents_are_read_as_if_each_were_alone(name, described_by):
    """As `DataCollatorWithFlattening` passes them, and with other arguments of its."""
    own = model(name)
    documents = [torch.randint(1, 13, (1, length)) for length in (5, 1, 9)]
    x, bounds = torch.cat(documents, dim=1), torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    described = {
        'position_ids': torch.cat([torch.arange(5), torch.arange(1), torch.arange(9)])[None],
        'seq_idx': torch.tensor([0, 1, 2], dtype=torch.int32).repeat_interleave(bounds.diff())[None],
        'cu_seq_lens_q': bounds,
        'document_ids': torch.tensor([7, 3, 7]).repeat_interleave(bounds.diff())[None],
    }
    bounds_too = dict(cu_seq_lens_k=bounds, max_length_q=9, max_length_k=9)
    how = {**described, **bounds_too} if described_by == 'all' else {described_by: described[described_by]}
    out = own(x, labels=x, **how)
    alone = [own(document, labels=document) for document in documents if document.shape[1] > 1]
    assert_same(out.logits[:, :5], alone[0].logits)
    assert_same(out.logits[:, 6:], alone[1].logits)
    assert_same(out.loss, (4 * alone[0].loss + 8 * alone[1].loss) / 12)
    assert CACHE not in own(x, **how)


@pytest.mark.parametrize('padding', ['left', 'right'])
def test_documents_in_padded_rows(padding):
    own, (x, mask) = model('MAC'), batch(padding)
    positions = torch.where(mask.cumsum(dim=1) > 3, mask.cumsum(dim=1) - 4, mask.cumsum(dim=1) - 1)
    positions = torch.where(mask.bool(), positions, 1)  # those of padding do not matter
    out = own(x, attention_mask=mask, position_ids=positions, labels=x)
    losses = []
    for index, row in enumerate(rows(x, mask)):
        pieces = [own(piece, labels=piece) for piece in row.split([3, row.shape[1] - 3] if index < 2 else [2], dim=1)]
        assert_same(out.logits[index, mask[index].bool()], torch.cat([piece.logits for piece in pieces], dim=1)[0])
        losses += [piece.loss * (piece.logits.shape[1] - 1) for piece in pieces]
    assert_same(out.loss, sum(losses) / 11)


def test_positions_that_the_model_counts_itself_change_nothing():
    own, (x, mask) = model('MAL'), batch()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    out = own(x, attention_mask=mask, position_ids=positions)
    assert_same(out.logits, own(x, attention_mask=mask).logits, 0)
    assert CACHE in out
