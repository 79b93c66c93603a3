"""Conversion of training runs to Hugging Face folders and back, and tokenizers of their vocabularies."""

from __future__ import annotations

import json

import pytest
import torch
from compare import assert_same
from hf_models import model
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from titans_pytorch.hf import TitansForCausalLM, byte_tokenizer, pretrained_to_run, run_to_pretrained
from titans_pytorch.hf.tokenization import tokenizer_of, vocabulary_of
from titans_pytorch.training import BPEVocabulary, ByteVocabulary, describe_run, train_bpe, write_checkpoint
from titans_pytorch.training.runs import open_run

TEXTS = ['Titans  learn to memorise .<|end|>', 'Ā naïve 日本 🎉\n\t\r\n\0 Ā', ' leading', '']


def bpe() -> BPEVocabulary:
    return train_bpe([' '.join(TEXTS).encode() * 4], 270)


def bpe_with_a_special_token() -> BPEVocabulary:
    tokenizer = Tokenizer.from_str(json.dumps(bpe().to_dict()['tokenizer']))
    tokenizer.add_special_tokens(['<|end|>'])
    return BPEVocabulary(tokenizer)


@pytest.mark.parametrize('vocabulary', [ByteVocabulary(), bpe(), bpe_with_a_special_token()])
def test_a_tokenizer_has_the_token_ids_of_the_vocabulary(vocabulary, tmp_path):
    tokenizer_of(vocabulary).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == vocabulary.size
    for text in TEXTS:
        ids = tokenizer(text)['input_ids']
        assert ids == vocabulary.encode(text.encode()).tolist()
        assert tokenizer.decode(ids) == text
    again = vocabulary_of(tokenizer)
    assert type(again) is type(vocabulary)
    assert all(torch.equal(again.encode(t.encode()), vocabulary.encode(t.encode())) for t in TEXTS)
    assert again.decode(range(vocabulary.size)) == vocabulary.decode(range(vocabulary.size))


def test_padding_is_on_the_left_and_masked():
    padded = byte_tokenizer()(['a', 'bcd'], padding=True)
    assert padded['input_ids'] == [[0, 0, 97], [98, 99, 100]]
    assert padded['attention_mask'] == [[0, 0, 1], [1, 1, 1]]
    assert byte_tokenizer().decode([97, 0, 0], skip_special_tokens=True) == 'a'


@pytest.mark.parametrize('vocabulary', [ByteVocabulary(), bpe()])
def test_a_run_becomes_a_pipeline_and_a_run_again(vocabulary, tmp_path):
    own = model('MAC', num_tokens=vocabulary.size).float()
    run, folder, again = (tmp_path / name for name in ('run', 'folder', 'again'))
    run.mkdir()
    describe_run(run, own.config.model, vocabulary)
    write_checkpoint(run / 'checkpoint_batch_7.pt', {'batch': 7, 'model_state_dict': own.transformer.state_dict()})

    run_to_pretrained(run, folder)
    generator = pipeline('text-generation', str(folder))
    assert_same(generator.model.state_dict(), own.state_dict(), 0)
    prompt = vocabulary.encode(b'Titans')
    expected = own.transformer.sample(prompt[None], len(prompt) + 5, 0.0, stop_tokens=0, show_progress=False)[0]
    came = generator('Titans', do_sample=False, max_new_tokens=5, return_full_text=False)[0]['generated_text']
    assert came == vocabulary.decode(expected).decode(errors='replace').rstrip('\0')

    pretrained_to_run(folder, again)
    opened = open_run(again, device='cpu')
    assert_same(opened.model.state_dict(), own.transformer.state_dict(), 0)
    assert type(opened.vocabulary) is type(vocabulary)
    with pytest.raises(FileExistsError, match='there is a run in'):
        pretrained_to_run(folder, again)
    with pytest.raises(FileExistsError, match='config.json'):
        run_to_pretrained(run, run / 'config.json')


def test_a_checkpoint_is_converted_with_the_settings_it_was_trained_with(tmp_path):
    # resuming with other settings has described another model in the folder since
    own = model('MAC', num_tokens=256).float()
    settings = own.config.model
    memory = {**settings['neural_memory_kwargs'], 'default_step_transform_max_lr': 0.1}
    (tmp_path / 'run').mkdir()
    describe_run(tmp_path / 'run', {**settings, 'neural_memory_kwargs': memory}, ByteVocabulary())
    content = {'model': settings, 'model_state_dict': own.transformer.state_dict()}
    write_checkpoint(tmp_path / 'run' / 'checkpoint_batch_7.pt', content)
    run_to_pretrained(tmp_path / 'run', tmp_path / 'folder')
    loaded = TitansForCausalLM.from_pretrained(tmp_path / 'folder')
    tokens = torch.randint(0, 256, (1, 30))
    assert_same(loaded(tokens).logits, own(tokens).logits, 0)


def test_folders_without_a_whole_titans_model_are_refused(tmp_path):
    tokenizer = byte_tokenizer()
    llama = LlamaConfig(vocab_size=256, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    for part in (LlamaForCausalLM(llama), tokenizer):
        part.save_pretrained(tmp_path / 'llama')
    with pytest.raises(ValueError, match="folder must hold a Titans model, .* of type 'llama'"):
        pretrained_to_run(tmp_path / 'llama', tmp_path / 'run')

    own = model('MAG', num_tokens=256).float()
    weights = {name: w for name, w in own.state_dict().items() if 'to_logits' not in name}
    own.save_pretrained(tmp_path / 'titans', state_dict=weights)
    tokenizer.save_pretrained(tmp_path / 'titans')
    with pytest.raises(ValueError, match='folder must hold all parameters of its model, .*to_logits'):
        pretrained_to_run(tmp_path / 'titans', tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
