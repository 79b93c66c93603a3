"""Memories in decoders of transformers: unchanged at first, exact under padding and `generate`, saved and removed."""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

transformers = pytest.importorskip('transformers')

from transformers import (  # noqa: E402
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from titans_pytorch.hf import (  # noqa: E402
    MemoryCheckpoints,
    add_memory,
    load_memory,
    memory_parameters,
    remove_memory,
    save_memory,
)
from titans_pytorch.hf.layer_memory import MemoryStates  # noqa: E402

transformers.logging.set_verbosity_error()  # missing kernels of the hybrid model

SIZES = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=4, linear_value_head_dim=4, num_experts=2
)
EXPERTS = dict(num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8)
MEMORY = dict(layers=[1, 3], heads=2, dim_head=4, chunk_size=2, memory_batch=4)

BACKBONES = {
    'llama': lambda **changes: LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})),
    'qwen3': lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    'sliding windows': lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    ),
    'some sliding windows': lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    ),
    # three layers of linear attention, then one of full attention
    'hybrid': lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, **LINEAR, **EXPERTS)),
}
# the name of the cache in the calls of this version of transformers
CACHE = 'cache' if 'cache' in inspect.signature(LlamaForCausalLM.forward).parameters else 'past_key_values'
every_backbone = pytest.mark.parametrize('backbone', BACKBONES)


def gates(model):
    return [memory.gate for memory in model.get_decoder().neural_memories.values()]


def with_memory(backbone='llama', **changes):
    """A model whose gates are open."""
    model = add_memory(BACKBONES[backbone]().eval(), **{**MEMORY, **changes})
    for gate in gates(model):
        torch.nn.init.normal_(gate)
    return model


def tokens(*shape):
    return torch.randint(3, SIZES['vocab_size'], shape)


def padded(*lengths, left=True):
    """Token ids and mask of rows of these lengths, padded on one side."""
    ids = tokens(len(lengths), max(lengths))
    index = torch.arange(max(lengths))
    index = index.flip(0) if left else index
    mask = (index < torch.tensor(lengths).unsqueeze(1)).long()
    return ids * mask, mask


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def assert_close(actual, expected):
    # the backbones normalise in float32
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


# unchanged at first


@every_backbone
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_new_memory_changes_no_logit_and_no_gradient_of_the_backbone(backbone, dtype):
    model = BACKBONES[backbone]().to(dtype)
    ids, mask = padded(9, 5, 11)

    def run():
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        out.loss.backward()
        return out.logits, {name: p.grad for name, p in model.named_parameters() if 'neural_memories' not in name}

    logits, gradients = run()
    add_memory(model, **MEMORY)
    new_logits, new_gradients = run()
    assert torch.equal(new_logits, logits)
    assert new_gradients.keys() == gradients.keys()
    assert all(
        torch.equal(new_gradients[name], gradient) for name, gradient in gradients.items() if gradient is not None
    )
    assert all(parameter.dtype == torch.float32 for parameter in memory_parameters(model))
    assert all(gate.grad.abs().min() > 0 for gate in gates(model))


def test_memories_of_a_backbone_in_half_precision_can_be_converted_too():
    model = add_memory(BACKBONES['llama'](), **MEMORY).to(torch.bfloat16)
    ids = tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    assert all(gate.grad.dtype == torch.bfloat16 for gate in gates(model))
    assert model.generate(ids, max_new_tokens=3).shape == (2, 12)


def test_gates_learn_from_the_first_step_and_memories_from_the_second():
    model = add_memory(BACKBONES['llama'](), **MEMORY)
    optimizer = torch.optim.AdamW(memory_parameters(model), lr=1e-2)
    ids = tokens(2, 12)
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        norms.append([parameter.grad.norm().item() for parameter in memory_parameters(model)])
        optimizer.step()
    num_gates = len(gates(model))
    assert sum(norm > 0 for norm in norms[0]) == num_gates
    assert sum(norm > 0 for norm in norms[1]) > 0.9 * len(norms[1])


def test_a_frozen_backbone_stays_as_it_is_and_the_loss_falls():
    model = BACKBONES['llama']()
    model.lm_head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    add_memory(model, **MEMORY, freeze_backbone=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {*map(id, trained)} == {*map(id, memory_parameters(model))}

    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    ids, losses = tokens(2, 16), []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05

    remove_memory(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ['lm_head.weight']
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# padding


@pytest.mark.parametrize('by', ['position_ids', 'seq_idx', 'cu_seq_lens_q'])
def test_several_documents_in_a_row_are_refused(by):
    described = {
        'position_ids': torch.tensor([[0, 1, 2, 0, 1]]),
        'seq_idx': torch.tensor([[0, 0, 0, 1, 1]]),
        'cu_seq_lens_q': torch.tensor([0, 3, 5]),
    }
    with pytest.raises(ValueError, match=f'{by} must describe one document in each row'):
        with_memory()(tokens(1, 5), **{by: described[by]})


@every_backbone
@pytest.mark.parametrize('use_cache', [False, True])
@pytest.mark.parametrize('left', [False, True])
def test_a_padded_row_is_read_as_if_it_were_alone(backbone, use_cache, left):
    model = with_memory(backbone)
    ids, mask = padded(7, 12, 3, left=left)
    logits = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=use_cache).logits
    for row, real in enumerate(mask.bool()):
        assert_close(logits[row, real], model(ids[row : row + 1, real]).logits[0])


def test_gradients_of_a_padded_batch_are_those_of_its_rows():
    model = with_memory()
    ids, mask = padded(7, 12, 3)

    def gradients(*batches):
        model.zero_grad()
        for batch, real in batches:
            logits = model(batch, attention_mask=real, position_ids=positions(real), use_cache=False).logits
            labels = batch.masked_fill(real == 0, -100)[:, 1:]
            cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction='sum').backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    alone = [(ids[row : row + 1, real], mask[row : row + 1, real]) for row, real in enumerate(mask.bool())]
    for together, apart in zip(gradients((ids, mask)), gradients(*alone)):
        torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-3)


def test_a_mask_may_have_holes_and_rows_without_any_token():
    model = with_memory()
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 4:7] = 0
    mask[1, :9] = 0
    expected = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    cache, pieces = DynamicCache(config=model.config), []
    for piece in (slice(0, 6), slice(6, 7), slice(7, 12)):
        place = positions(mask)[:, piece]
        seen = mask[:, : piece.stop]
        pieces.append(model(ids[:, piece], attention_mask=seen, position_ids=place, **{CACHE: cache}).logits)
    assert_close(torch.cat(pieces, dim=1)[mask.bool()], expected[mask.bool()])


# state


@every_backbone
@pytest.mark.parametrize('sizes', [(13,), (1,) * 13, (5, 1, 7)])
def test_calls_with_a_cache_equal_one_pass(backbone, sizes):
    model, ids = with_memory(backbone), tokens(2, 13)
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, **{CACHE: cache}).logits for piece in ids.split(sizes, dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(ids, use_cache=False).logits)


def test_a_cache_without_a_config_holds_states_behind_all_layers():
    model, ids = with_memory(layers=[0, 2]), tokens(2, 9)
    cache = DynamicCache()
    pieces = [model(piece, **{CACHE: cache}).logits for piece in ids.split(4, dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(ids, use_cache=False).logits)
    assert [isinstance(entry, MemoryStates) for entry in cache.layers] == [False] * 4 + [True] * 2


def test_interleaved_sequences_do_not_mix():
    model = with_memory()
    first, second = tokens(2, 2, 10)
    caches, pieces = [DynamicCache(config=model.config) for _ in range(2)], ([], [])
    for start in range(0, 10, 2):
        for ids, cache, logits in zip((first, second), caches, pieces):
            logits.append(model(ids[:, start : start + 2], **{CACHE: cache}).logits)
    for ids, logits in zip((first, second), pieces):
        assert_close(torch.cat(logits, dim=1), model(ids, use_cache=False).logits)


@torch.no_grad()
def test_rows_of_a_cache_are_reordered_repeated_selected_copied_and_reset():
    model = with_memory()
    prompt, mask = padded(5, 8, 2)
    following = tokens(3, 4)

    def after(change, rows):
        cache = DynamicCache(config=model.config)
        model(prompt, attention_mask=mask, position_ids=positions(mask), **{CACHE: cache})
        full = torch.cat((mask, torch.ones_like(following)), dim=1)
        step = dict(attention_mask=full[:, :9], position_ids=positions(full)[:, 8:9])
        model(following[:, :1], **step, **{CACHE: cache})
        cache = change(cache) or cache
        ids, full = torch.cat((prompt, following), dim=1)[rows], full[rows]
        place = positions(full)
        out = model(ids[:, 9:], attention_mask=full, position_ids=place[:, 9:], **{CACHE: cache}).logits
        assert_close(out, model(ids, attention_mask=full, position_ids=place, use_cache=False).logits[:, 9:])

    after(lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0])
    after(lambda cache: cache.batch_select_indices(torch.tensor([1])), [1])
    after(lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2])
    after(copy.deepcopy, [0, 1, 2])

    def first_repeated(cache):
        cache.batch_select_indices(torch.tensor([0]))
        cache.batch_repeat_interleave(3)

    after(first_repeated, [0, 0, 0])

    cache = model(prompt, use_cache=True)[CACHE]
    cache.reset()
    assert [entry.groups for entry in cache.layers[4:]] == [[], []]


# generation

MODES = {
    'greedy': dict(do_sample=False),
    'sampling': dict(do_sample=True, num_return_sequences=2),
    'beams': dict(do_sample=False, num_beams=3, num_return_sequences=2),
}


@every_backbone
@pytest.mark.parametrize('mode', MODES)
def test_generate_equals_generate_without_a_cache(backbone, mode):
    model = with_memory(backbone)
    ids, mask = padded(5, 9)

    def generated(use_cache):
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=mask, max_new_tokens=7, use_cache=use_cache, **MODES[mode])

    assert torch.equal(generated(True), generated(False))


@every_backbone
def test_generate_continues_a_padded_row_as_if_it_were_alone(backbone):
    model = with_memory(backbone)
    ids, mask = padded(5, 9, 1)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    for row, real in enumerate(mask.bool()):
        alone = model.generate(ids[row : row + 1, real], max_new_tokens=9, do_sample=False)
        assert torch.equal(together[row, -9:], alone[0, -9:])


def test_a_conversation_continues_from_its_cache():
    model, prompt = with_memory(), tokens(1, 6)
    cache = DynamicCache(config=model.config)
    first = model.generate(prompt, max_new_tokens=5, do_sample=False, **{CACHE: cache})
    longer = torch.cat((first, tokens(1, 4)), dim=1)
    with_cache = model.generate(longer, max_new_tokens=5, do_sample=False, **{CACHE: cache})
    assert torch.equal(with_cache, model.generate(longer, max_new_tokens=5, do_sample=False, use_cache=False))


def test_taking_tokens_back_is_refused():
    model = with_memory()
    with pytest.raises(ValueError, match='cropped'):
        model.generate(tokens(1, 8), max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    cache = model(tokens(1, 8), use_cache=True)[CACHE]
    with pytest.raises(ValueError, match='already learned from the tokens'):
        cache.crop(-1)


def test_a_static_cache_is_refused():
    model, settings = with_memory(), dict(max_new_tokens=5, do_sample=False, cache_implementation='static')
    ids, mask = padded(5, 9)
    with pytest.raises(ValueError, match='cache must not be static'):
        model.generate(ids[1:], **settings)
    with pytest.raises(ValueError, match='attention_mask must be .* static caches'):
        model.generate(ids, attention_mask=mask, **settings)


def test_a_cache_that_has_read_padding_after_the_end_of_a_row_is_refused():
    model = with_memory()
    ids = tokens(2, 6)
    cache = model(ids, use_cache=True)[CACHE]
    text = torch.cat((ids, tokens(2, 3)), dim=1)
    mask = torch.ones_like(text)
    model(text[:, 6:7], attention_mask=mask[:, :7], **{CACHE: cache})
    mask[1, 4:7] = 0
    with pytest.raises(ValueError, match='which are 7 in row 1, got 4'):
        model(text[:, 7:], attention_mask=mask, **{CACHE: cache})
    mask[1, 4:7] = 1
    model(text[:, 7:], attention_mask=mask, **{CACHE: cache})


def test_an_offloaded_cache_is_refused(monkeypatch):
    monkeypatch.setattr(torch, 'Stream', lambda: None)  # the CPU has none
    with pytest.raises(ValueError, match='cache must not be offloaded'):
        with_memory(layers=[0]).generate(tokens(1, 4), max_new_tokens=2, cache_implementation='offloaded')


# training


@every_backbone
@pytest.mark.filterwarnings('ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning')  # its name until 5.23
def test_gradient_checkpointing_changes_no_gradient(backbone):
    model = with_memory(backbone).train()
    ids, mask = padded(7, 10)

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('with_lora', [False, True])
def test_trainer_trains_and_resumes(with_lora, tmp_path):
    from transformers import Trainer, TrainingArguments

    if with_lora:
        peft = pytest.importorskip('peft')

    data = [dict(input_ids=row, labels=row) for row in tokens(8, 12)]

    def trainer(steps):
        torch.manual_seed(0)
        model = BACKBONES['llama']()
        if with_lora:
            lora = peft.LoraConfig(target_modules=['q_proj', 'v_proj'], r=2, task_type='CAUSAL_LM')
            model = peft.get_peft_model(model, lora)
        model = add_memory(model, **MEMORY)
        arguments = TrainingArguments(
            output_dir=tmp_path,
            max_steps=steps,
            save_steps=2,
            logging_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type='constant',
            bf16=True,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        callbacks = [MemoryCheckpoints()] if with_lora else []
        return Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)

    whole = trainer(4)
    whole.train()
    assert all(gate.abs().min() > 0 for gate in gates(whole.model))
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=f'{tmp_path}/checkpoint-2')
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=1e-5)

    if with_lora:
        (tmp_path / 'checkpoint-2' / 'memory.safetensors').unlink()
        with pytest.raises(FileNotFoundError, match='must hold the memories of the model, memory.safetensors'):
            trainer(4).train(resume_from_checkpoint=f'{tmp_path}/checkpoint-2')


def test_the_best_memories_are_restored(tmp_path):
    from transformers import TrainerState, TrainingArguments

    model = add_memory(BACKBONES['llama'](), **MEMORY)
    best = [gate.clone() for gate in gates(model)]
    arguments = TrainingArguments(
        output_dir=tmp_path, load_best_model_at_end=True, eval_strategy='steps', save_strategy='steps', use_cpu=True
    )
    state = TrainerState(global_step=7, best_model_checkpoint=f'{tmp_path}/checkpoint-7')
    MemoryCheckpoints().on_save(arguments, state, None, model=model)
    with torch.no_grad():
        for gate in gates(model):
            gate.add_(1)
    MemoryCheckpoints().on_train_end(arguments, state, None, model=model)
    assert all(torch.equal(a, b) for a, b in zip(gates(model), best))


@pytest.mark.parametrize('lora_first', [True, False])
def test_lora_on_the_backbone(lora_first, tmp_path):
    peft = pytest.importorskip('peft')
    lora = peft.LoraConfig(target_modules=['q_proj', 'v_proj'], r=2)
    if lora_first:
        model = add_memory(peft.get_peft_model(BACKBONES['llama'](), lora), **MEMORY)
    else:
        model = peft.get_peft_model(add_memory(BACKBONES['llama'](), **MEMORY), lora)
        for parameter in memory_parameters(model):  # peft has frozen all that is not its own
            parameter.requires_grad_()
    for memory in model.get_decoder().neural_memories.values():
        torch.nn.init.normal_(memory.gate)
    ids = tokens(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all('lora_' in name or 'neural_memories' in name for name in trained)
    assert sum('lora_' in name for name in trained) == 2 * 2 * SIZES['num_hidden_layers']
    assert all(parameter.grad is not None for parameter in memory_parameters(model))

    expected = model(input_ids=ids).logits
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3)[:, :10], ids)
    save_memory(model, tmp_path)
    remove_memory(model)
    assert not torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(load_memory(model, tmp_path)(input_ids=ids).logits, expected)


# saving, copying and removing


def test_an_adapter_is_saved_and_loaded(tmp_path):
    settings = dict(model={'type': 'MemorySwiGluMLP', 'dim': 4}, init_decay_bias=-4.0)
    model, ids = with_memory(neural_memory_kwargs=settings), tokens(2, 10)
    backbone = copy.deepcopy(model)
    expected = model(ids).logits
    model.config.use_cache, model.config.pad_token_id = False, 5  # as Trainer does
    save_memory(model, tmp_path / 'memory')
    assert sorted(path.name for path in (tmp_path / 'memory').iterdir()) == ['memory.safetensors', 'memory_config.json']
    config = json.loads((tmp_path / 'memory/memory_config.json').read_text())
    assert config['layers'] == [1, 3]
    assert config['neural_memory_kwargs']['init_decay_bias'] == -4.0
    assert len(config['backbone_hash']) == 16
    assert config['backbone']['hidden_size'] == 16

    remove_memory(backbone)
    assert torch.equal(load_memory(backbone, tmp_path / 'memory', freeze_backbone=True)(ids).logits, expected)
    assert not backbone.lm_head.weight.requires_grad


def test_a_memory_of_another_backbone_is_refused(tmp_path):
    save_memory(with_memory(), tmp_path)
    with pytest.raises(ValueError, match="with model_type='llama', got .*, with model_type='qwen3'"):
        load_memory(BACKBONES['qwen3'](), tmp_path)
    other = BACKBONES['llama'](rope_parameters={'rope_type': 'default', 'rope_theta': 500.0})
    with pytest.raises(ValueError, match='with rope_parameters='):
        load_memory(other, tmp_path)
    assert 'neural_memories' not in dict(other.model.named_children())
    grown = BACKBONES['llama']()
    grown.resize_token_embeddings(40)
    assert load_memory(grown, tmp_path) is grown


def test_memories_that_cannot_be_loaded_leave_the_model_alone(tmp_path):
    saved, ids = with_memory(), tokens(2, 9)
    model = remove_memory(copy.deepcopy(saved))
    save_memory(saved, tmp_path)
    logits, weights = model(ids).logits, load_file(tmp_path / 'memory.safetensors')
    (tmp_path / 'memory.safetensors').unlink()
    with pytest.raises(FileNotFoundError):
        load_memory(model, tmp_path, freeze_backbone=True)
    save_file(dict([*weights.items()][1:]), tmp_path / 'memory.safetensors')
    with pytest.raises(RuntimeError, match=r'memory\.safetensors does not fit .*memory_config\.json: .*Missing key'):
        load_memory(model, tmp_path, freeze_backbone=True)
    (tmp_path / 'memory.safetensors').write_bytes(b'damaged')
    with pytest.raises(ValueError, match=r'memory\.safetensors is damaged: SafetensorError'):
        load_memory(model, tmp_path)
    config = (tmp_path / 'memory_config.json').read_text()
    for damaged in ('', '{}', '[]', '{"backbone": 1}'):
        (tmp_path / 'memory_config.json').write_text(damaged)
        with pytest.raises(ValueError, match=r'memory_config\.json describes no memories: '):
            load_memory(model, tmp_path)
    (tmp_path / 'memory_config.json').write_text(config)
    assert torch.equal(model(ids).logits, logits)
    assert all(parameter.requires_grad for parameter in model.parameters())
    save_file(weights, tmp_path / 'memory.safetensors')
    assert torch.equal(load_memory(model, tmp_path)(ids).logits, saved(ids).logits)


def test_removing_restores_the_model():
    model = BACKBONES['llama']().eval()
    ids, modules, keys = tokens(2, 9), [*map(str, model.named_modules())], [*model.state_dict()]
    logits = model(ids).logits
    add_memory(model, **MEMORY, freeze_backbone=True)
    for gate in gates(model):
        torch.nn.init.normal_(gate)
    assert not torch.equal(model(ids).logits, logits)
    assert remove_memory(model) is model
    assert torch.equal(model(ids).logits, logits)
    assert [*map(str, model.named_modules())] == modules
    assert [*model.state_dict()] == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_save_pretrained_holds_both_and_from_pretrained_reads_the_backbone(tmp_path):
    model, ids = with_memory(), tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    add_memory(loaded, **MEMORY)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    save_memory(model, tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    expected = model(ids).logits
    assert torch.equal(plain(ids).logits, remove_memory(model)(ids).logits)
    assert torch.equal(load_memory(plain, tmp_path)(ids).logits, expected)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_memories_of_its_own(duplicate):
    model, ids = with_memory(freeze_backbone=True), tokens(2, 9)
    expected = model(ids).logits
    copied = duplicate(model)
    for gate in gates(model):
        torch.nn.init.zeros_(gate)
    assert torch.equal(copied(ids).logits, expected)
    remove_memory(copied)
    assert torch.equal(copied(ids).logits, model(ids).logits)
    assert all(parameter.requires_grad for parameter in copied.parameters())


def test_a_model_on_the_meta_device():
    with torch.device('meta'):
        model = BACKBONES['llama']()
    add_memory(model, **MEMORY)
    assert all(parameter.is_meta for parameter in memory_parameters(model))


# bad arguments


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(layers=[4]), 'layers must be different integers from 0 to 3, at least one, got'),
        (dict(layers=[1, 1]), 'layers must be different'),
        (dict(layers=[]), 'layers must be different'),
        (dict(layers='1'), 'layers must be integers'),
        (dict(heads=0), 'heads must be a positive integer, got 0'),
        (dict(memory_batch=3), 'memory_batch must be a multiple of chunk_size=2, got 3'),
        (dict(chunk_size=2.0), 'chunk_size must be a positive integer, got 2.0'),
        (dict(freeze_backbone=1), 'freeze_backbone must be True or False, got 1'),
        (dict(neural_memory_kwargs=[1]), 'neural_memory_kwargs must be a mapping'),
        (dict(neural_memory_kwargs={'model': torch.nn.Linear(4, 4)}), 'model must be a mapping'),
        (dict(neural_memory_kwargs={'model': {'type': 'MLP'}}), "\\['type'\\] must be one of .*, got 'MLP'"),
        (dict(neural_memory_kwargs={'activation': 'swish'}), "activation must be one of .*, got 'swish'"),
        (dict(neural_memory_kwargs={'accept_weight_residual': True}), 'must leave out accept_weight_residual'),
        (dict(neural_memory_kwargs={'hedas': 2}), 'hedas'),
        (dict(neural_memory_kwargs={'chunk_size': 4}), "must not hold 'chunk_size': add_memory has chunk_size for it"),
        (
            dict(neural_memory_kwargs={'batch_size': 4}),
            "must not hold 'batch_size': add_memory has memory_batch for it",
        ),
    ],
)
def test_bad_arguments_are_refused_and_leave_the_model_alone(changes, message):
    model = BACKBONES['llama']()
    with pytest.raises((ValueError, TypeError), match=message):
        add_memory(model, **{**MEMORY, **changes})
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    add_memory(model)  # the defaults


def test_models_that_cannot_have_a_memory_are_refused():
    with pytest.raises(TypeError, match='model must be a decoder-only language model of transformers, got Linear'):
        add_memory(torch.nn.Linear(4, 4))
    with pytest.raises(TypeError, match='decoder-only'):
        add_memory(
            T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
        )
    bloom = add_memory(BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=2, n_head=2)))
    with pytest.raises(TypeError, match='must pass its keyword arguments on to its layers'):
        bloom(torch.zeros(1, 3, dtype=torch.long))


def test_memories_are_added_once_and_removed_once():
    model = with_memory()
    with pytest.raises(ValueError, match='model has memories already'):
        add_memory(model, **MEMORY)
    remove_memory(model)
    for missing in (remove_memory, memory_parameters, lambda model: save_memory(model, 'folder')):
        with pytest.raises(ValueError, match='model must have memories'):
            missing(model)


def test_whatever_is_learned_the_default_memory_stays_bounded():
    model = add_memory(BACKBONES['llama'](), layers=[1], heads=2, dim_head=4)
    memory = model.get_decoder().neural_memories['1'].memory.double()
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    seq = torch.randn(2, 20, memory.dim, dtype=torch.float64)[:, torch.randint(20, (2000,))]  # with repetitions
    _, state = memory(seq)
    values = memory.to_values(memory.store_norm(seq)).unflatten(-1, (2, 4))
    initial = memory.init_weights(2)['weights.0'].norm(dim=(-2, -1)).max()
    bound = initial + 4 * values.norm(dim=-1).max()
    assert state.states[0]['weights.0'].norm(dim=(-2, -1)).max() < bound


@pytest.mark.parametrize('changes', [{}, {'memory_batch': 4}, {'neural_memory_kwargs': {'num_kv_per_token': 2}}])
def test_the_largest_steps_of_the_default_memory_do_not_overshoot(changes):
    kwargs = {'init_adaptive_step_bias': 8.0, 'init_decay_bias': -20.0, 'conv_kernel': None}
    kwargs |= changes.get('neural_memory_kwargs', {})
    model = add_memory(
        BACKBONES['llama'](), layers=[1], heads=2, dim_head=4, **{**changes, 'neural_memory_kwargs': kwargs}
    )
    memory = model.get_decoder().neural_memories['1'].memory.double()
    seq = torch.randn(1, 1, memory.dim, dtype=torch.float64).expand(-1, 64, -1)  # one token, over and over
    with torch.no_grad():
        losses = memory(seq, return_surprises=True)[2].losses
    assert (losses[..., -1] < 0.01 * losses[..., 0]).all()


def test_hooks_on_a_memory_work_in_cached_steps_too():
    model = add_memory(BACKBONES['llama'](), layers=[1], heads=2, dim_head=4).eval()
    layer = model.get_decoder().neural_memories['1']
    torch.nn.init.ones_(layer.gate)
    layer.memory.register_forward_hook(lambda module, args, out: (out[0] * 0, *out[1:]))
    ids, cache = tokens(1, 8), DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [model(piece, **{CACHE: cache}).logits for piece in ids.split((5, 1, 1, 1), dim=1)]
        assert_close(torch.cat(pieces, dim=1), model(ids, use_cache=False).logits)
