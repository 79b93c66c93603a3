"""Tools of the ecosystem on a Hugging Face model of this package: Trainer, peft, pipeline, lm-eval, the compiler."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from compare import assert_same
from hf_models import batch, model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    DataCollatorForLanguageModeling,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from titans_pytorch.hf import TitansForCausalLM, byte_tokenizer

TEXTS = ['Titans', 'learn to', 'memorise', 'at test time']
GREEDY = {'do_sample': False, 'max_new_tokens': 6}


def byte_model(**changes) -> TitansForCausalLM:
    return model(num_tokens=256, **changes)


def continued(own: TitansForCausalLM, text: str) -> str:
    tokens = own.generate(torch.tensor([[*text.encode()]]), **GREEDY)[0, -6:]
    return bytes(tokens.tolist()).decode(errors='replace')


def test_a_pipeline_continues_a_batch_of_texts():
    own = byte_model()
    generator = pipeline('text-generation', model=own, tokenizer=byte_tokenizer())
    results = generator(TEXTS, batch_size=3, return_full_text=False, **GREEDY)
    assert [result['generated_text'] for (result,) in results] == [continued(own, text) for text in TEXTS]


def test_a_streamer_yields_the_text_as_it_comes():
    own, tokenizer = byte_model(), byte_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    inputs = tokenizer(TEXTS[0], return_tensors='pt')
    thread = Thread(target=own.generate, kwargs={**inputs, **GREEDY, 'streamer': streamer})
    thread.start()
    assert ''.join(streamer) == continued(own, TEXTS[0])
    thread.join()


# training


def trainer(own: TitansForCausalLM, folder, **changes) -> Trainer:
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = 'right'  # the Trainer also counts the first token after padding on the left
    settings = dict(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        optim='sgd',
        lr_scheduler_type='constant',
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        save_strategy='no',
    )
    return Trainer(
        own,
        TrainingArguments(**{**settings, **changes}),
        train_dataset=[tokenizer(text) for text in TEXTS * 4],
        eval_dataset=[tokenizer(text) for text in TEXTS],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def losses(trained: Trainer) -> list[float]:
    return [entry['loss'] for entry in trained.state.log_history if 'loss' in entry]


def test_accumulated_gradients_are_those_of_one_batch(tmp_path):
    own = [byte_model(), byte_model()]
    trainer(own[0], tmp_path, per_device_train_batch_size=4).train()
    trainer(own[1], tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2).train()
    assert_same(own[1].state_dict(), own[0].state_dict(), 1e-6)


def test_label_smoothing_is_of_the_next_token(tmp_path):
    own, smoothing = byte_model(), 0.1
    rows = trainer(own, tmp_path, label_smoothing_factor=smoothing)
    inputs = rows.data_collator(rows.eval_dataset[:2])
    log_probs = own(**inputs).logits[:, :-1].log_softmax(dim=-1)
    labels = inputs['labels'][:, 1:]
    counted = labels != -100
    of_labels = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = -((1 - smoothing) * of_labels + smoothing * log_probs.mean(dim=-1))[counted].mean()
    assert_same(rows.compute_loss(own, inputs), expected, 1e-6)


def test_the_base_model_is_the_model_without_its_logits():
    own, (tokens, mask) = byte_model(), batch('right')
    hidden = own.base_model(tokens, attention_mask=mask, use_cache=False).last_hidden_state
    expected = own(tokens, attention_mask=mask, use_cache=False).logits
    assert_same(own.get_output_embeddings()(hidden), expected)
    assert own.get_decoder().transformer is own.transformer and own.transformer.to_logits is not None


def test_a_mask_of_floating_point_numbers():
    own, (tokens, mask) = byte_model(), batch()
    assert torch.equal(own(tokens, attention_mask=mask.double()).logits, own(tokens, attention_mask=mask).logits)


@pytest.mark.filterwarnings('ignore:`gradient_checkpointing(_enable)?` is deprecated')
def test_a_resumed_training_is_that_without_interruption(tmp_path):
    own = [byte_model().float(), byte_model().float()]
    kwargs = dict(bf16=True, optim='adamw_torch', gradient_checkpointing=True, save_strategy='steps', save_steps=2)
    whole = trainer(own[0], tmp_path, eval_strategy='steps', eval_steps=2, **kwargs)
    whole.train()
    resumed = trainer(own[1], tmp_path, **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / 'checkpoint-2'))
    assert len(losses(whole)) == 4 and losses(whole)[-1] < losses(whole)[0]
    assert_same(own[1].state_dict(), own[0].state_dict(), 0)


@pytest.mark.parametrize('name', ['MAC', 'MAL'])
def test_lora_reaches_every_linear_layer_in_steps_too(name, tmp_path):
    (x, mask), own = batch(), model(name)
    adapted = get_peft_model(own, LoraConfig(task_type='CAUSAL_LM', target_modules='all-linear', r=2)).double()
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if 'lora_B' in key:
                parameter.normal_(std=0.3)
    adapted(x, attention_mask=mask, labels=x).loss.backward()
    trained = {key: p.grad for key, p in adapted.named_parameters() if p.requires_grad}
    assert all('lora' in key and gradient.abs().sum() > 0 for key, gradient in trained.items())

    tokens = adapted.generate(input_ids=x, attention_mask=mask, **GREEDY)
    assert torch.equal(tokens, adapted.generate(input_ids=x, attention_mask=mask, use_cache=False, **GREEDY))
    expected = adapted(x).logits
    adapted.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(model(name), tmp_path).double()(x).logits, expected)
    assert_same(adapted.merge_and_unload()(x).logits, expected)


def test_a_compiled_call_equals_an_eager_one():
    own, (x, mask) = model('MAL', depth=1, neural_memory_layers=[], num_residual_streams=1), batch()  # quick to trace
    arguments = dict(input_ids=x, attention_mask=mask, labels=x)
    compiled = torch.compile(own, backend='eager', fullgraph=True)
    assert_same(compiled(**arguments).loss, own(**arguments).loss)


# evaluation


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, own, index) for index, own in enumerate(arguments)]


def test_lm_eval_measures_the_likelihood_of_texts():
    own = byte_model().float()
    harness = HFLM(pretrained=own, tokenizer=byte_tokenizer(), batch_size=2, device='cpu', max_length=64)
    pairs = [('Titans', ' learn'), ('to', ' memorise at'), ('test', ' time')]
    results = harness.loglikelihood(requests('loglikelihood', *pairs), disable_tqdm=True)
    rolling = harness.loglikelihood_rolling(requests('loglikelihood_rolling', ('Titans',)), disable_tqdm=True)
    for (context, continuation), came in zip([*pairs, ('\0', 'Titans')], [*(value for value, _ in results), *rolling]):
        tokens = torch.tensor([[*(context + continuation).encode()]])
        log_probabilities = own(tokens).logits.log_softmax(dim=-1)[0, len(context) - 1 : -1]
        expected = log_probabilities.gather(1, tokens[0, len(context) :, None]).sum().item()
        assert came == pytest.approx(expected, rel=1e-5)


def test_lm_eval_generates():
    own = byte_model().float()
    harness = HFLM(pretrained=own, tokenizer=byte_tokenizer(), batch_size=4, device='cpu', max_length=64)
    kwargs = {'until': ['no such text'], 'max_gen_toks': 6, 'do_sample': False}
    came = harness.generate_until(requests('generate_until', *((text, kwargs) for text in TEXTS)), disable_tqdm=True)
    assert came == [continued(own, text) for text in TEXTS]
