"""`generate`, with and without a cache, in padded batches and row by row."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same
from hf_models import architectures, batch, model, rows
from transformers import set_seed

from titans_pytorch.hf import TitansCache
from titans_pytorch.hf.modeling import CACHE

GREEDY = {'do_sample': False, 'max_new_tokens': 7}


@pytest.mark.parametrize('padding', ['left', 'right'])
@architectures
def test_padded_rows_continue_as_if_they_were_alone(name, padding):
    own, (x, mask) = model(name), batch(padding)
    tokens = own.generate(x, attention_mask=mask, **GREEDY)
    assert torch.equal(tokens, own.generate(x, attention_mask=mask, use_cache=False, **GREEDY))
    in_pieces = own.generate(x, attention_mask=mask, prefill_chunk_size=4, **{CACHE: TitansCache()}, **GREEDY)
    assert torch.equal(tokens, in_pieces)
    for index, row in enumerate(rows(x, mask)):
        alone = own.transformer.sample(row, row.shape[1] + 7, 0.0, use_cache=True, show_progress=False)
        assert torch.equal(alone[0], tokens[index, -7:])


@pytest.mark.parametrize('name', ['MAC', 'LMM'])
def test_beams_with_a_cache_are_those_without(name):
    own, (x, mask) = model(name), batch()
    kwargs = dict(attention_mask=mask, num_beams=3, num_return_sequences=2, **GREEDY)
    tokens = own.generate(x, **kwargs)
    assert tokens.shape == (6, 16)
    assert torch.equal(tokens, own.generate(x, use_cache=False, **kwargs))
    assert torch.equal(tokens[4:, -7:], own.generate(x[2:, -2:], **{**kwargs, 'attention_mask': None})[:, -7:])


def test_sampling_with_a_cache_is_that_without():
    own, (x, mask) = model(), batch()
    kwargs = dict(attention_mask=mask, do_sample=True, top_k=5, num_return_sequences=2, max_new_tokens=7)
    results = []
    for use_cache in (False, True):
        set_seed(0)
        results.append(own.generate(x, use_cache=use_cache, **kwargs))
    assert results[0].shape == (6, 16) and torch.equal(*results)


def test_a_prompt_of_embeddings():
    own, (x, mask) = model(), batch()
    embedded = own.get_input_embeddings()(x)
    tokens = own.generate(inputs_embeds=embedded, attention_mask=mask, **GREEDY)
    assert torch.equal(tokens, own.generate(x, attention_mask=mask, **GREEDY)[:, 9:])


def test_rows_end_at_the_end_token():
    own, (x, _) = model(), batch()
    tokens = own.generate(x, **GREEDY)
    end = tokens[0, 11].item()
    stopped = own.generate(x, eos_token_id=end, **GREEDY)
    assert (stopped[0, 12:] == 0).all()
    assert torch.equal(stopped, own.generate(x, eos_token_id=end, use_cache=False, **GREEDY))


def test_a_conversation_goes_on_from_its_cache():
    own, (x, mask) = model('MAC'), batch()
    cache = TitansCache()
    first = own.generate(x, attention_mask=mask, **{CACHE: cache}, **GREEDY)
    assert cache.get_seq_length() == 15  # the last token has not been read
    longer = torch.cat((first, x[:, :3]), dim=1)
    longer_mask = torch.cat((mask, torch.ones(3, 10, dtype=torch.long)), dim=1)
    kwargs = dict(attention_mask=longer_mask, **GREEDY)
    again = own.generate(longer, **{CACHE: cache}, **kwargs)
    assert torch.equal(again, own.generate(longer, **kwargs))


def test_a_conversation_that_its_cache_does_not_fit():
    own, cache = model(), TitansCache()
    x = torch.tensor([[3, 1, 0, 5, 9, 2]])  # 0 is the padding token
    own(x, past_key_values=cache)
    for text in (x, x[:, :4], x[:, :1]):
        with pytest.raises(ValueError, match=f'input_ids must go beyond the 6 tokens .* has read, got {text.shape[1]}'):
            own.generate(text, **{CACHE: cache}, **GREEDY)
    embedded = own.get_input_embeddings()(x[:, :4])
    with pytest.raises(ValueError, match='inputs_embeds must go beyond the 6 tokens'):
        own.generate(inputs_embeds=embedded, **{CACHE: cache}, **GREEDY)

    longer = torch.cat((x, x[:, :1]), dim=1)
    with pytest.raises(ValueError, match='Without an attention_mask `generate` takes every padding token for padding'):
        own.generate(longer, **{CACHE: cache}, **GREEDY)
    mask = torch.ones_like(longer)
    expected = own.generate(longer, attention_mask=mask, **GREEDY)
    assert torch.equal(own.generate(longer, attention_mask=mask, **{CACHE: cache}, **GREEDY), expected)


def test_a_prompt_read_in_pieces():
    own, (x, mask) = model(), batch()
    tokens = own.generate(x, attention_mask=mask, prefill_chunk_size=3, **{CACHE: TitansCache()}, **GREEDY)
    assert torch.equal(tokens, own.generate(x, attention_mask=mask, **GREEDY))


def test_scores_are_logits_of_the_tokens_before():
    own, (x, _) = model(), batch()
    out = own.generate(x, return_dict_in_generate=True, output_logits=True, output_hidden_states=True, **GREEDY)
    assert_same(torch.stack(out.logits, dim=1), own(out.sequences).logits[:, 8:-1].float(), 1e-6)
    assert len(out.hidden_states) == 7 and out.hidden_states[3][-1].shape == (3, 1, 8)


def test_assisted_generation_is_refused():
    for kwargs in ({'prompt_lookup_num_tokens': 2}, {'assistant_model': model('LMM')}):
        with pytest.raises(ValueError, match='assisted generation is not supported with stateful models'):
            model().generate(batch()[0][:1], **GREEDY, **kwargs)
