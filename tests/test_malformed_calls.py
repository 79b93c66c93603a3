"""Seeded fuzzing of the public surface: a call with odd arguments either works, or raises a ValueError or TypeError
whose message names one of its arguments."""

from __future__ import annotations

import inspect
import random
import re
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from titans_pytorch import (
    FactorizedMemoryMLP,
    GatedResidualMemoryMLP,
    LongTermMemoryModel,
    MemoryAsContextTransformer,
    MemoryAsGateTransformer,
    MemoryAsLayerTransformer,
    MemoryAttention,
    MemoryMLP,
    MemorySwiGluMLP,
    ModelState,
    NeuralMemory,
    NeuralMemState,
    mem_state_detach,
)
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.generation.logits import gumbel_sample, min_p_filter
from titans_pytorch.implicit_mlp_attention import ImplicitMLPAttention
from titans_pytorch.nested_attention import NestedAttention
from titans_pytorch.presets import delta_rule_settings, memory_settings, preset

DIM, TOKENS = 8, 16
CALLS_PER_TARGET = 24

MEMORY = {'dim': DIM, 'heads': 2, 'dim_head': 4, 'chunk_size': 2, 'batch_size': 4, 'default_step_transform_max_lr': 0.1}
MODEL = {
    'num_tokens': TOKENS,
    'dim': DIM,
    'depth': 2,
    'dim_head': 4,
    'heads': 2,
    'segment_len': 4,
    'neural_memory_segment_len': 2,
    'neural_memory_kwargs': {'heads': 2, 'dim_head': 4, 'default_step_transform_max_lr': 0.1},
}
NETWORKS = [MemoryMLP, GatedResidualMemoryMLP, FactorizedMemoryMLP, MemorySwiGluMLP, MemoryAttention]
MODELS = [MemoryAsContextTransformer, MemoryAsGateTransformer, MemoryAsLayerTransformer, LongTermMemoryModel]


def seq(length: int = 5, batch: int = 2, dim: int = DIM) -> Tensor:
    return torch.linspace(-1, 1, batch * length * dim).view(batch, length, dim).sin()


def ids(length: int = 6, batch: int = 2) -> Tensor:
    return torch.arange(batch * length).view(batch, length) % TOKENS


# what calls are made on, built once


@cache
def memory(**changes: Any) -> NeuralMemory:
    torch.manual_seed(0)
    return NeuralMemory(**{**MEMORY, **changes})


@cache
def memory_state(**changes: Any) -> NeuralMemState:
    return memory(**changes)(seq())[1].detach()


@cache
def model(cls: type = MemoryAsContextTransformer, **changes: Any) -> Any:
    torch.manual_seed(0)
    random.seed(0)
    return cls(**{**MODEL, **changes}).eval()


@cache
def model_state(cls: type = MemoryAsContextTransformer) -> ModelState:
    return model(cls)(ids(), return_state=True)[1].detach()


# odd values


@cache
def oddities() -> list[Any]:
    numbers = [-7, -1, 0, 1, 2, 3, 5, 0.0, -1.0, 0.5, 2.0, 2.5, 1e-12, *map(float, ('nan', 'inf', '-inf')), 1j]
    plain = [None, True, False, '', '2', 'dual', b'2', [], (), {}, set(), [2, 2], (4, 4, 4), [1, None], {'a': 1}]
    of_numpy = [np.int64(2), np.float32(0.5), np.bool_(True), np.arange(3), np.zeros((2, 5, DIM))]
    tensors = [
        torch.tensor(2),
        torch.tensor(0.5),
        torch.tensor(True),
        torch.arange(3),
        torch.zeros(0),
        torch.zeros(2, 3),
        torch.zeros(2, 5, DIM, dtype=torch.complex64),
        ids(),
        ids() - 3,
        ids() + TOKENS,
        ids().bool(),
        ids().to(torch.uint8),
        seq(),
        seq().double(),
        seq(dim=DIM + 1),
        torch.stack((seq(),) * 3),
        torch.ones(2, 5),
        torch.ones(2, 5, dtype=torch.bool),
        torch.full((2, 5), 2),
        torch.full((2, TOKENS), float('nan')),
        torch.full((2, TOKENS), float('-inf')),
    ]
    # modules and functions that could be what is wanted: an error raised inside a user's own module is the user's
    objects = [object(), lambda x, *_, **__: x, nn.Identity()]
    states = [
        memory_state(),
        memory_state(heads=1, dim_head=None),
        memory_state(momentum=False),
        memory_state().weights,
        memory_state().updates,
        memory_state().states,
        model_state(),
        model_state(MemoryAsGateTransformer),
        model_state(LongTermMemoryModel),
        NeuralMemState(0, None, None, None, None),
        ModelState(0, [], []),
    ]
    return [*numbers, *plain, *of_numpy, *tensors, *objects, *states]


def neighbours(value: Any) -> list[Any]:
    """Values that are nearly right."""
    if isinstance(value, Tensor):
        near = [value[:1], value[..., :-1], value.unsqueeze(0), value.to(torch.int32), value.bool(), value.numpy()]
        near += [value.tolist(), value[0], value[..., :0], value.transpose(0, -1), value.double()]
        return near
    if isinstance(value, (NeuralMemState, ModelState)):
        odd = random.choice(oddities())
        return [value._replace(**{field: odd}) for field in value._fields] + [tuple(value), value[:-1], [*value]]
    if isinstance(value, Mapping) or hasattr(value, 'keys'):
        items = dict(value.items())
        changed = [{**items, key: random.choice(oddities())} for key in items]
        return [*changed, {**items, 'unknown': 1}, dict([*items.items()][1:])]
    if isinstance(value, (tuple, list)):
        odd = random.choice(oddities())
        replaced = [[*value[:i], odd, *value[i + 1 :]] for i in range(len(value))]
        return [*replaced, *map(tuple, replaced), [*value][:-1], [*value, odd]]
    if isinstance(value, nn.Module):
        return [MemoryMLP(4, 1), MemoryMLP(3, 2), nn.BatchNorm1d(4), nn.Linear(3, 4), nn.Embedding(4, DIM), torch.tanh]
    if isinstance(value, int):
        return [value + 1, -value, float(value), str(value), [value], [value, value], np.int32(value)]
    return []


# the targets: each call returns pairs of a tensor and the shape that it must have

Checked = list[tuple[Tensor, tuple[int, ...]]]


class Target(NamedTuple):
    call: Callable[..., Checked]
    arguments: Callable[[], dict[str, Any]]
    """Valid ones."""
    optional: tuple[str, ...] = ()
    """Names of further arguments."""
    named: tuple[str, ...] = ()
    """Names of what is passed on inside of these, which a message may say instead."""


def used(mem: NeuralMemory) -> Checked:
    tokens = seq(dim=mem.dim)
    previous = {name: w.unsqueeze(1).expand(-1, 9, *w.shape[1:]) for name, w in mem.init_weights(2).items()}
    out, state, (losses, _) = mem(
        torch.stack((tokens,) * 3) if mem.qkv_receives_diff_views else tokens,
        prev_weights=previous if mem.to_learned_weight_residual_mix is not None else None,
        return_surprises=True,
    )
    return [(out, (2, 5, mem.dim)), (losses, losses.shape), *((w, w.shape) for w in state.weights.values())]


def called(mem: NeuralMemory, **kwargs: Any) -> Checked:
    out, state, *surprises = mem(**kwargs)
    length = kwargs['seq'].shape[-2] if kwargs['seq'].ndim > 2 + mem.qkv_receives_diff_views else 1
    batch = state.weights['norm.gamma'].shape[0] // mem.heads
    assert bool(surprises) == bool(kwargs.get('return_surprises', False))
    return [(out, (batch, length, DIM)), *((w, w.shape) for w in state.weights.values())]


def stored(**kwargs: Any) -> Checked:
    updates, state, *_ = memory(batch_size=None).store_memories(**kwargs)
    return [(w, (4, *w.shape[1:])) for w in (*updates.values(), *state.weights.values())]


def selected(state: Any, entries: Any) -> Checked:
    chosen = state.select(entries)
    if isinstance(state, ModelState):
        return [(t, (len(entries), *t.shape[1:])) for t in chosen.key_values[0]]
    return [(w, (2 * len(entries), *w.shape[1:])) for w in chosen.weights.values()]


def of_model(made: Any) -> Checked:
    tokens = ids() if made.num_tokens is None or made.num_tokens > 11 else ids() % made.num_tokens
    x = tokens if made.token_emb is not None else seq(6, dim=made.dim)
    out, state = made(x, return_state=True)
    following, _ = made(x[:, :1], state=state, return_state=True)
    width = made.dim if made.num_tokens is None else made.num_tokens
    return [(out, (2, 6, width)), (following, (2, 1, width))]


def of_forward(cls: type, **kwargs: Any) -> Checked:
    made = model(cls)
    out = made(**kwargs)
    if kwargs.get('return_state') or kwargs.get('return_cache'):
        out, state = out
        assert isinstance(state, ModelState)
    if kwargs.get('return_loss') or kwargs.get('labels') is not None:
        return [(out, ())]
    x, cached = kwargs['x'], kwargs.get('cache')
    length = x.shape[1] - (0 if cached is None else made.num_tokens_until(cached[0]))
    return [(out, (x.shape[0], length, DIM if kwargs.get('return_hidden') else TOKENS))]


def sampled(method: str, **kwargs: Any) -> Checked:
    made = model()
    if method == 'stream':
        out = torch.stack([*made.stream(**kwargs)] or [kwargs['prompt'][:, 0]])
        return [(out.float(), (len(out), len(kwargs['prompt'])))]
    out = made.sample(**kwargs)
    if kwargs.get('return_cache'):
        out, cached = out
        assert cached is None or isinstance(cached, ModelState)
    assert out.dtype == torch.long
    return [(out.float(), (len(kwargs['prompt']), out.shape[1]))]


def attended(cls: type, x: Tensor, **kwargs: Any) -> Checked:
    made = cls(**kwargs)
    x = x[..., :1].expand(-1, -1, made.dim)
    residual = made.to_learned_v_mix is not None and torch.zeros(2, made.heads, 5, kwargs['dim_head'])
    out, _ = made(x, value_residual=residual if isinstance(residual, Tensor) else None)
    return [(out, (2, 5, made.dim))]


def experiment(cls: type, **kwargs: Any) -> Checked:
    made = cls(**kwargs)
    return [(made(seq(dim=made.dim)), (2, 5, made.dim))]


@cache
def attention(cls: type, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return cls(DIM, **kwargs)


def in_attention(module: Any, width_of: str, **kwargs: Any) -> Checked:
    out = module(**kwargs)
    return [(out[0] if isinstance(out, tuple) else out, tuple(kwargs[width_of].shape))]


def network(cls: type, **kwargs: Any) -> Checked:
    made = cls(**kwargs)
    return [(made(seq(dim=kwargs['dim'])), (2, 5, kwargs['dim']))]


def settings(function: Callable[..., Any], **kwargs: Any) -> Checked:
    made = function(**kwargs)
    if function is preset:
        made = made['neural_memory_kwargs']
        return [(torch.tensor(made['default_step_transform_max_lr']), ())]
    return used(NeuralMemory(DIM, **made))


def parameters(function: Callable[..., Any], *skipped: str) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name not in ('self', *skipped))


def targets() -> dict[str, Target]:
    accepts = memory(accept_weight_residual=True)
    views = memory(qkv_receives_diff_views=True)
    segmented = attention(SegmentedAttention, segment_len=4, dim_head=4, heads=2, num_persist_mem_tokens=1)
    mixing = attention(SegmentedAttention, segment_len=4, dim_head=4, heads=2, accept_value_residual=True)
    implicit = attention(ImplicitMLPAttention, mlp_hiddens=(4, 4), heads=2)
    nested = attention(NestedAttention, dim_head=4, heads=2)
    key_values = (torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4))
    of_memory = parameters(NeuralMemory)
    sampling = parameters(model().sample, 'compiled')  # compiling takes minutes
    greedy = {'prompt': ids(), 'seq_len': 9}
    quiet = {**greedy, 'show_progress': False}
    forward = parameters(NeuralMemory.forward)
    found = {
        'NeuralMemory': Target(lambda **kw: used(NeuralMemory(**kw)), lambda: dict(MEMORY), of_memory, ('depth',)),
        'NeuralMemory.forward': Target(
            lambda **kw: called(memory(), **kw), lambda: {'seq': seq(), 'state': memory_state()}, forward
        ),
        'NeuralMemory.forward, views': Target(
            lambda **kw: called(views, **kw), lambda: {'seq': torch.stack((seq(),) * 3)}, forward
        ),
        'NeuralMemory.forward, weight residual': Target(
            lambda **kw: called(accepts, **kw), lambda: {'seq': seq(), 'prev_weights': memory_state().updates}, forward
        ),
        'NeuralMemory.forward, masked': Target(
            lambda **kw: called(memory(), **kw),
            lambda: {'seq': seq(), 'store_mask': torch.ones(2, 5, dtype=torch.bool)},
            forward,
        ),
        'store_memories': Target(
            stored,
            lambda: {'seq': seq(), 'weights': memory().init_weights(2), 'past_state': memory_state().states},
            parameters(NeuralMemory.store_memories),
        ),
        'retrieve_memories': Target(
            lambda **kw: [(memory().retrieve_memories(**kw), tuple(kw['seq'].shape))],
            lambda: {'seq': seq(), 'weights': memory_state().updates},
        ),
        'recall': Target(
            lambda **kw: [(memory().recall(**kw), tuple(kw['seq'].shape))],
            lambda: {'seq': seq(), 'state': memory_state()},
        ),
        'mem_state_detach': Target(
            lambda state: used(memory()) if mem_state_detach(state) else [], lambda: {'state': memory_state()}
        ),
        'NeuralMemState.select': Target(lambda entries: selected(memory_state(), entries), lambda: {'entries': [1, 0]}),
        'ModelState.select': Target(lambda entries: selected(model_state(), entries), lambda: {'entries': [1, 0]}),
        'SegmentedAttention': Target(
            lambda **kw: attended(SegmentedAttention, seq(), **kw),
            lambda: {'dim': DIM, 'segment_len': 4, 'dim_head': 4, 'heads': 2},
            parameters(SegmentedAttention),
        ),
        'SegmentedAttention.forward': Target(
            lambda **kw: in_attention(segmented, 'seq', **kw),
            lambda: {'seq': seq(), 'cache': key_values, 'position': 3},
            parameters(SegmentedAttention.forward, 'flex_attn_fn'),
        ),
        'SegmentedAttention.forward, value residual': Target(
            lambda **kw: in_attention(mixing, 'seq', **kw),
            lambda: {'seq': seq(), 'value_residual': torch.zeros(2, 2, 5, 4)},
            parameters(SegmentedAttention.forward, 'flex_attn_fn'),
        ),
        'ImplicitMLPAttention': Target(
            lambda **kw: experiment(ImplicitMLPAttention, **kw),
            lambda: {'dim': DIM, 'mlp_hiddens': (4, 5, 4), 'heads': 2},
            parameters(ImplicitMLPAttention),
        ),
        'ImplicitMLPAttention.forward': Target(
            lambda **kw: in_attention(implicit, 'tokens', **kw),
            lambda: {'tokens': seq(), 'cache': implicit(seq(), return_kv_cache=True)[1]},
            parameters(ImplicitMLPAttention.forward),
        ),
        'NestedAttention': Target(
            lambda **kw: experiment(NestedAttention, **kw),
            lambda: {'dim': DIM, 'dim_head': 4, 'heads': 2},
            parameters(NestedAttention),
        ),
        'NestedAttention.forward': Target(
            lambda **kw: in_attention(nested, 'tokens', **kw),
            lambda: {'tokens': seq(), 'cache': nested(seq(), return_kv_cache=True)[1]},
            parameters(NestedAttention.forward),
        ),
        'preset': Target(
            lambda **kw: settings(preset, **kw), lambda: {'size': '170M'}, ('size', 'memory_batch', 'heads')
        ),
        'memory_settings': Target(
            lambda **kw: settings(memory_settings, **kw),
            lambda: {'heads': 2, 'dim_head': 4},
            ('memory_batch', 'qk_rmsnorm'),
        ),
        'delta_rule_settings': Target(
            lambda **kw: settings(delta_rule_settings, **kw),
            lambda: {'heads': 2, 'dim_head': 4},
            ('conv_kernel', 'qk_rmsnorm'),
        ),
        'sample': Target(
            lambda **kw: sampled('sample', **kw),
            lambda: dict(quiet),
            sampling,
            ('min_p',),
        ),
        'sample, cached': Target(
            lambda **kw: sampled('sample', **kw),
            lambda: {**quiet, 'use_cache': True, 'prompt_lengths': [6, 4], 'stop_tokens': [3], 'pad_token': 1},
            sampling,
            ('min_p',),
        ),
        'sample, from a state': Target(
            lambda **kw: sampled('sample', **kw),
            lambda: {**quiet, 'state': model_state()},
            sampling,
            ('min_p',),
        ),
        'stream': Target(
            lambda **kw: sampled('stream', **kw),
            lambda: {**greedy, 'prompt_lengths': torch.tensor([6, 4])},
            sampling,
            ('min_p',),
        ),
        'gumbel_sample': Target(
            lambda **kw: [(gumbel_sample(**kw).float(), (*kw['logits'].shape[:-1], 1))],
            lambda: {'logits': torch.zeros(2, TOKENS)},
            ('temperature',),
        ),
        'min_p_filter': Target(
            lambda **kw: [(min_p_filter(**kw).softmax(dim=-1).nan_to_num(), tuple(kw['logits'].shape))],
            lambda: {'logits': torch.zeros(2, TOKENS)},
            ('min_p',),
        ),
    }
    for cls in NETWORKS:
        arguments = {'dim': DIM} if cls is MemoryAttention else {'dim': DIM, 'depth': 2}
        found[cls.__name__] = Target(
            lambda cls=cls, **kw: network(cls, **kw), lambda arguments=arguments: dict(arguments), parameters(cls)
        )
    for cls in MODELS:
        found[cls.__name__] = Target(
            lambda cls=cls, **kw: of_model(cls(**kw)), lambda: dict(MODEL), parameters(cls), of_memory
        )
        skipped = ('kwargs', 'embedding_kwargs')
        names = tuple(
            {
                **dict.fromkeys(parameters(cls.forward, *skipped)),
                **dict.fromkeys(parameters(MODELS[1].forward, *skipped)),
            }
        )
        found[f'{cls.__name__}.forward'] = Target(
            lambda cls=cls, **kw: of_forward(cls, **kw), lambda: {'x': ids()}, names
        )
        found[f'{cls.__name__}.forward, state'] = Target(
            lambda cls=cls, **kw: of_forward(cls, **kw),
            lambda cls=cls: {'x': ids(), 'state': model_state(cls), 'return_state': True},
            names,
        )
    return found


TARGETS = targets()


def malformed(target: Target) -> dict[str, Any]:
    arguments = target.arguments()
    if 'model' in target.optional and random.random() < 0.1:
        arguments['model'] = nn.Linear(4, 4)
    names = [*dict.fromkeys((*arguments, *target.optional))]
    for name in random.sample(names, min(len(names), random.choice((1, 1, 1, 2)))):
        near = neighbours(arguments[name]) if name in arguments else []
        pool = near if near and random.random() < 0.4 else oddities()
        arguments[name] = random.choice(pool)
    if random.random() < 0.03:
        arguments['unknown'] = 1
    return arguments


def fault(target: Target, arguments: dict[str, Any]) -> str | None:
    """What is wrong with how a call of these arguments ends, or `None`."""
    names = {*arguments, *target.optional, *target.named}
    names |= {str(key) for value in arguments.values() if hasattr(value, 'keys') for key in value.keys()}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter('ignore')
            outputs = target.call(**arguments)
    except (ValueError, TypeError) as error:
        if any(re.search(rf'(?<!\w){re.escape(name)}(?!\w)', str(error)) for name in names):
            return None
        return f'names no argument: {type(error).__name__}: {error}'
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    for out, shape in outputs:
        if tuple(out.shape) != shape:
            return f'shape {tuple(out.shape)} instead of {shape}'
        if not out.isfinite().all():
            return 'not finite'
    return None


@pytest.mark.parametrize('name', TARGETS)
def test_malformed_calls_work_or_name_an_argument(name):
    random.seed(name)
    target = TARGETS[name]
    assert fault(target, target.arguments()) is None
    for _ in range(CALLS_PER_TARGET):
        arguments = malformed(target)
        came = fault(target, arguments)
        assert came is None, f'{name}({arguments}): {came}'
