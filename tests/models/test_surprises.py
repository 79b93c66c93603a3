"""Surprises of every memory layer: of one call, of its pieces, and of sampling."""

from __future__ import annotations

import pytest
import torch
from architectures import architectures, build, ids, variants
from compare import all_in_float64, assert_same, gradients

from titans_pytorch.neural_memory import Surprises

QUIET = {'temperature': 0.0, 'show_progress': False}


@pytest.fixture(autouse=True)
def float64():
    with all_in_float64():
        yield


def joined(parts: list[dict[int, Surprises]]) -> dict[int, Surprises]:
    return {layer: Surprises.joined([part[layer] for part in parts]) for layer in parts[0]}


def of_memories(model, tokens) -> dict[int, Surprises]:
    """Surprises as each memory returns them when it is called by itself with the inputs that it gets in the model."""
    inputs: dict[int, list] = {}
    hooks = [
        block.memory.register_forward_pre_hook(
            lambda memory, args, kwargs, layer=layer: inputs.setdefault(layer, []).append((memory, args, kwargs)),
            with_kwargs=True,
        )
        for layer, block in enumerate(model.layers, start=1)
        if block.memory is not None
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return {
        layer: Surprises.joined(
            [memory(*args, **{**kwargs, 'return_surprises': True})[2] for memory, args, kwargs in calls]
        )
        for layer, calls in inputs.items()
    }


@architectures
@variants
@torch.no_grad()
def test_surprises_of_a_model_are_those_of_its_memories(name, variant):
    model, tokens = build(name, variant), ids(26)
    logits, surprises = model(tokens, return_surprises=True)
    assert torch.equal(logits, model(tokens))
    assert_same(surprises, of_memories(model, tokens), 1e-12)
    layers = (2,) if variant == 'streams, some layers' else (1, 2)
    assert tuple(surprises) == layers
    complete = model.num_positions(26) // model.neural_memory_segment_len * model.neural_memory_segment_len
    for own in surprises.values():
        assert own.losses.shape == own.step_sizes.shape == (2, 2, complete)


@architectures
@variants
@torch.no_grad()
def test_pieces_equal_one_call(name, variant):
    model, tokens = build(name, variant), ids(26)
    _, after, expected = model(tokens, return_state=True, return_surprises=True)
    state, pieces = None, []
    for piece in tokens.split([1, 1, 9, 2, 13], dim=1):
        _, state, surprises = model(piece, state=state, return_state=True, return_surprises=True)
        pieces.append(surprises)
    assert_same(joined(pieces), expected, 1e-12)
    assert_same(state, after, 1e-12)


@architectures
@pytest.mark.parametrize('variant', ['plain', 'memory batches'])
def test_surprises_in_sampling(name, variant):
    model, prompt = build(name, variant), ids(7)
    kwargs = {'return_surprises': True, **QUIET}
    uncached = model.sample(prompt, 24, **kwargs)
    cached = model.sample(prompt, 24, use_cache=True, **kwargs)
    tokens = torch.cat((prompt, uncached.tokens), dim=1)
    with torch.no_grad():
        _, expected = model(tokens[:, :-1], return_surprises=True)
    assert uncached.logprobs is None
    assert_same(uncached.surprises, expected, 1e-12)
    assert_same(cached, uncached, 1e-12)

    stream = [*model.stream(prompt, 24, temperature=0.0, return_surprises=True)]
    assert_same(joined([position.surprises for position in stream]), expected, 1e-12)
    # the first position comes after reading the prompt, each further one after reading one more token
    with torch.no_grad():
        _, of_prompt = model(prompt, return_surprises=True)
    assert_same(stream[0].surprises, of_prompt, 1e-12)


def test_surprises_of_turns_are_those_of_one_call():
    model, prompt = build('MAC'), ids(7)
    kwargs = {'return_surprises': True, 'return_cache': True, **QUIET}
    first = model.sample(prompt, 15, **kwargs)
    so_far = torch.cat((prompt, first.tokens, ids(4)), dim=1)
    second = model.sample(so_far, 30, cache=first.cache, **kwargs)
    tokens = torch.cat((so_far, second.tokens), dim=1)
    with torch.no_grad():
        _, state, expected = model(tokens[:, :-1], return_state=True, return_surprises=True)
    assert_same(joined([first.surprises, second.surprises]), expected, 1e-12)
    assert_same(second.cache, state, 1e-12)


@pytest.mark.parametrize('use_cache', [False, True])
def test_surprises_of_a_prompt_to_which_nothing_is_added(use_cache):
    model, prompt = build('MAG'), ids(9)
    kwargs = {'return_surprises': True, 'use_cache': use_cache, **QUIET}
    came = model.sample(prompt, max_new_tokens=0, **kwargs)
    with torch.no_grad():
        _, expected = model(prompt[:, :-1], return_surprises=True)
    assert came.tokens.shape == (2, 0)
    assert_same(came.surprises, expected, 1e-12)
    assert model.sample(prompt[:, :1], max_new_tokens=0, **kwargs).surprises == {}


@pytest.mark.parametrize(
    'memory',
    [
        {'num_kv_per_token': 2},
        {'store_with_lookahead_value': True, 'momentum': False},
        {'spectral_norm_surprises': True, 'conv_kernel': 3},
        {'engine': 'dense', 'attn_pool_chunks': True},
    ],
    ids=str,
)
def test_surprises_with_other_memories(memory):
    model = build('LMM', neural_memory_kwargs={'dim_head': 8, 'heads': 2, **memory})
    prompt = ids(5)
    cached, uncached = (
        model.sample(prompt, 18, use_cache=use_cache, return_surprises=True, **QUIET) for use_cache in (True, False)
    )
    rows = 15 * memory.get('num_kv_per_token', 1) - 5 * memory.get('store_with_lookahead_value', False)
    assert cached.surprises[2].losses.shape == (2, 2, rows)
    assert_same(cached, uncached, 1e-12)


@torch.no_grad()
def test_nothing_is_stored_without_storing():
    model, tokens = build('MAG'), ids(12)
    _, state, _ = model(tokens, return_state=True, return_surprises=True)
    _, surprises = model(tokens, state=state, store=False, return_surprises=True)
    assert surprises[1].losses.shape == (2, 2, 0)
    came = model.sample(tokens, 18, use_cache=True, store=False, return_surprises=True, **QUIET)
    assert came.surprises[1].losses.shape == (2, 2, 0)


def test_surprises_have_gradients():
    tokens = ids(12)
    for checkpoint_layers in (False, True):
        model = build('MAG', checkpoint_layers=checkpoint_layers)
        loss, surprises = model(tokens, return_loss=True, return_surprises=True)
        came = gradients(model, sum(own.losses.sum() for own in surprises.values()))
        assert all(gradient.isfinite().all() for gradient in came.values())
        assert any('to_values' in name and gradient.abs().max() > 0 for name, gradient in came.items())
        assert_same(loss, model(tokens, return_loss=True), 0.0)


def test_models_without_memory_have_no_surprises():
    model, tokens = build('MAG', neural_memory_layers=()), ids(6)
    assert model(tokens, return_surprises=True)[1] == {}
    assert model.sample(tokens, 9, use_cache=True, return_surprises=True, **QUIET).surprises == {}


def test_padded_rows_are_refused():
    model = build('MAG')
    with pytest.raises(ValueError, match='leave out mask and document_ids'):
        model(ids(6), mask=torch.ones(2, 6, dtype=torch.bool), return_surprises=True)
