"""States and models outside of a plain call: copies, inference mode, quantisation, offloading, tracing and export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_same, randomised
from memories import SWITCHES, inputs, memory
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.nn import Module

from titans_pytorch import (
    LongTermMemoryModel,
    MemoryAsContextTransformer,
    MemoryAsGateTransformer,
    MemoryAsLayerTransformer,
    MemoryMLP,
    NeuralMemory,
)

SMALL = {'num_tokens': 11, 'dim': 8, 'depth': 1, 'segment_len': 4, 'neural_memory_batch_size': 8}
HEADS = {'dim_head': 4, 'heads': 2}
MODELS: dict[str, Callable[..., Module]] = {
    'MAC': lambda **changes: MemoryAsContextTransformer(
        **SMALL | HEADS | {'neural_memory_batch_size': 6},
        neural_memory_segment_len=3,
        num_longterm_mem_tokens=2,
        num_persist_mem_tokens=2,
        num_residual_streams=1,
        **changes,
    ),
    'MAC, sliding': lambda **changes: MemoryAsContextTransformer(
        **SMALL | HEADS | {'depth': 2},
        neural_memory_segment_len=4,
        sliding_window_attn=True,
        neural_mem_weight_residual=True,
        num_residual_streams=1,
        **changes,
    ),
    'MAG': lambda **changes: MemoryAsGateTransformer(
        **SMALL | HEADS, num_residual_streams=2, num_persist_mem_tokens=1, **changes
    ),
    'MAL': lambda **changes: MemoryAsLayerTransformer(**SMALL | HEADS, num_residual_streams=1, **changes),
    'LMM': lambda **changes: LongTermMemoryModel(**SMALL, **changes),
}


def model_of(name: str, **changes: Any) -> Any:
    return randomised(MODELS[name](**changes), 0.1).eval()


def ids(length: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 11, (batch, length))


# states


@pytest.mark.parametrize('switch', SWITCHES)
def test_a_copy_of_a_state_is_cut_from_its_graph_and_shares_nothing(switch: str):
    mem = memory(switch)
    first, rest = inputs(mem, 7), inputs(mem, 6)
    _, state = mem(first)
    copied = copy.deepcopy(state)
    assert_same(copied, state.detach())
    want = mem(rest, state=state.detach())[0]
    for t in copy.deepcopy(state).detach().states[0].values():
        t.zero_()
    assert_same(mem(rest, state=copied)[0], want)
    assert not any(t.requires_grad for t in copied.states[0].values())


@pytest.mark.parametrize('name', MODELS)
def test_a_copy_of_a_model_state(name: str):
    model = model_of(name)
    _, state = model(ids(7), return_state=True)
    rest = ids(5)
    want = model(rest, state=state.detach())
    assert_same(model(rest, state=copy.deepcopy(state)), want, 1e-6)
    assert copy.deepcopy(state).memories[0].weights is not state.memories[0].weights


@pytest.mark.parametrize('switch', SWITCHES)
def test_training_goes_on_from_a_state_made_in_inference_mode(switch: str):
    mem = memory(switch)
    first, rest = inputs(mem, 7), inputs(mem, 6)
    with torch.inference_mode():
        _, made = mem(first)
    results = []
    for state in (made, made.detach(), mem(first)[1].detach()):
        mem.zero_grad()
        out, after = mem(rest, state=state)
        out.square().sum().backward()
        results.append((out, after, [p.grad for p in mem.parameters() if p.grad is not None]))
    assert_same(results[0], results[2])
    assert_same(results[1], results[2])


@pytest.mark.parametrize('name', MODELS)
def test_a_model_trains_on_from_a_state_made_in_inference_mode(name: str):
    model, first, rest = model_of(name), ids(7), ids(6)
    with torch.inference_mode():
        _, made = model(first, return_state=True)
    losses = []
    for state in (made, model(first, return_state=True)[1].detach()):
        loss = model(rest, return_loss=True, state=state)
        loss.backward()
        losses.append(loss.detach())
    assert_same(losses[0], losses[1], 1e-6)


# other forms of a model


@pytest.mark.filterwarnings('ignore:.*(deprecated|quantized engine).*')
@pytest.mark.parametrize('name', MODELS)
def test_dynamic_quantisation_samples_the_same_with_and_without_a_cache(name: str):
    model = torch.ao.quantization.quantize_dynamic(model_of(name), {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(model.to_logits, nn.Linear)
    prompt = ids(5)
    cached = model.sample(prompt, 18, temperature=0.0, show_progress=False)
    # activations are quantised by their range in a call, so that one token and a sequence agree but roughly
    logits = model(torch.cat((prompt, cached), dim=1)[:, :-1])[:, 4:]
    chosen = logits.gather(-1, cached.unsqueeze(-1)).squeeze(-1)
    assert (logits.amax(dim=-1) - chosen).max() < 0.1 * (logits.amax() - logits.amin())


def offload(model: Module) -> None:
    """Parameters on the meta device but in calls of the module that holds them, as by accelerate's `cpu_offload`."""
    for module in model.modules():
        kept = {name: p for name, p in module._parameters.items() if p is not None}
        away = {name: nn.Parameter(p.to('meta'), requires_grad=False) for name, p in kept.items()}
        if kept:
            module.register_forward_pre_hook(lambda module, _, kept=kept: module._parameters.update(kept))
            module.register_forward_hook(lambda module, *_, away=away: module._parameters.update(away))
            module._parameters.update(away)


@torch.no_grad()
@pytest.mark.parametrize('name', MODELS)
def test_offloaded_models_compute_and_sample_the_same(name: str):
    model, x = model_of(name), ids(10)
    want = model(x), model.sample(x, 16, temperature=0.0, show_progress=False)
    offload(model)
    assert {p.device.type for p in model.parameters()} == {'meta'}
    assert_same((model(x), model.sample(x, 16, temperature=0.0, show_progress=False)), want, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize('switch', SWITCHES)
def test_offloaded_memories_compute_the_same(switch: str):
    mem = memory(switch)
    seq = inputs(mem, 9)
    want, _ = mem(seq)
    offload(mem)
    assert_same(mem(seq)[0], want)


@pytest.mark.filterwarnings('ignore:.*jit.trace.*')
def test_a_trace_names_export():
    with pytest.raises(RuntimeError, match=r'torch\.export'):
        torch.jit.trace(memory(), torch.randn(2, 8, memory().dim, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r'torch\.export'):
        torch.jit.trace(model_of('MAG'), ids(6))


# export


EXPORTED: dict[str, dict[str, Any]] = {
    'plain': {},
    'one memory batch': {'batch_size': None},
    'deep memory': {'default_model_kwargs': {'depth': 3}},
    'look-ahead gradients': {'normalized_momentum': True, 'lookahead_gradients': True},
    'everything': {
        'heads': 2,
        'dim_head': 4,
        'momentum_order': 2,
        'learned_momentum_combine': True,
        'max_grad_norm': 1.0,
        'per_parameter_lr_modulation': True,
        'spectral_norm_surprises': True,
        'gated_transition': True,
        'conv_kernel': 3,
        'num_kv_per_token': 2,
    },
}


def exported(module: Module, x: Tensor, per: int, **kwargs: Any) -> Callable[..., Any]:
    """Of a length that is a multiple of `per`."""
    shapes = ShapesCollection()
    shapes[x] = {1: per * Dim('parts', min=2)}
    program = torch.export.export(module, (x,), kwargs, dynamic_shapes=shapes.dynamic_shapes(module, (x,), kwargs))
    return program.module()


@torch.no_grad()
@pytest.mark.parametrize(('name', 'with_state'), [('plain', False), *((name, True) for name in EXPORTED)])
def test_an_exported_memory_serves_all_lengths(name: str, with_state: bool):
    mem = NeuralMemory(8, **{'chunk_size': 2, 'batch_size': 4, 'default_step_transform_max_lr': 0.1} | EXPORTED[name])
    mem = randomised(mem, 0.1).double().eval()

    def seq(length: int) -> Tensor:
        return torch.randn(2, length, 8, dtype=torch.float64)

    kwargs = {'state': mem(seq(7))[1]} if with_state else {}
    program = exported(mem, seq(8), 2, **kwargs)
    for length in (4, 6, 18):
        x = seq(length)
        assert_same(program(x, **kwargs), mem(x, **kwargs))


@torch.no_grad()
@pytest.mark.parametrize('name', MODELS)
def test_an_exported_model_serves_all_lengths(name: str):
    # around the smallest memory: others are exported by themselves above
    smallest = {'neural_memory_model': MemoryMLP(8, depth=1), 'neural_memory_kwargs': {'momentum': False}}
    model = model_of(name, **smallest).double()
    kwargs: dict[str, Any] = {'return_state': True}
    kwargs['state'] = model(ids(4), **kwargs)[1]
    program = exported(model, ids(12), 4, **kwargs)
    for length in (8, 20, 28):
        x = ids(length)
        (logits, after), (want, state) = program(x, **kwargs), model(x, **kwargs)
        assert_same((logits, after), (want, state), 1e-6)
        assert after.seq_index == state.seq_index


@torch.no_grad()
@pytest.mark.filterwarnings('ignore:While compiling, we found certain side effects')
@pytest.mark.parametrize('strict', [False, True])
def test_a_program_of_one_length(strict: bool):
    mem = memory('different views')
    seq, rest = inputs(mem, 9), inputs(mem, 7)
    state = mem(seq)[1]
    program = torch.export.export(mem, (rest,), {'state': state}, strict=strict).module()
    assert_same(program(rest, state=state), mem(rest, state=state))


@torch.no_grad()
def test_what_cannot_be_exported_says_what_to_change():
    dense = memory(engine='dense')
    with pytest.raises(ValueError, match="engine='dual'"):
        torch.export.export(dense, (inputs(dense, 9),))
    gated = memory('gated residual memory')
    with pytest.raises(ValueError, match='MemoryMLP'):
        exported(gated, inputs(gated, 24), 8)
