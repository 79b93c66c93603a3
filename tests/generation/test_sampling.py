"""Options and results of sampling: filters, generators, lengths and log-probabilities, with a cache and without."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from architectures import build, ids
from compare import all_in_float64, assert_same

from titans_pytorch.generation import sampling
from titans_pytorch.generation.logits import filters, min_p_filter
from titans_pytorch.generation.sampling import Sampled

QUIET = {'show_progress': False}
cached = pytest.mark.parametrize('use_cache', [False, True])


@pytest.fixture(autouse=True)
def float64():
    with all_in_float64():
        yield


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('name', ['MAC', 'MAC, paper order', 'MAG'])
def test_a_generator_gives_the_same_tokens(name):
    model, prompt = build(name), ids(5)
    before = torch.get_rng_state()
    results = [
        model.sample(prompt, max_new_tokens=12, use_cache=use_cache, generator=seeded(3), **QUIET)
        for use_cache in (False, True, True)
    ]
    streamed = torch.stack([*model.stream(prompt, max_new_tokens=12, generator=seeded(3))], dim=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tokens, streamed) for tokens in results)
    torch.manual_seed(3)
    assert torch.equal(model.sample(prompt, 17, **QUIET), streamed)
    other = model.sample(prompt, max_new_tokens=12, use_cache=True, generator=seeded(4), **QUIET)
    assert not torch.equal(other, streamed)


def every_filter(logits: torch.Tensor, min_p: float = 0.0, **kwargs: float) -> torch.Tensor:
    return min_p_filter(filters(**kwargs)(logits), min_p)


def test_a_min_p_of_none_is_refused():
    with pytest.raises(TypeError, match='min_p must be a number of at least 0, got None'):
        build('MAG').sample(ids(5), max_new_tokens=1, filter_kwargs={'min_p': None}, **QUIET)


def test_tokens_without_a_valid_logit_are_reported_at_the_end_on_a_gpu(monkeypatch):
    model, prompt, steps = build('MAG'), ids(5), []

    def keep_nothing_once(logits):
        steps.append(None)
        return logits.fill_(float('-inf')) if len(steps) == 3 else logits

    monkeypatch.setattr(sampling, 'values_are_at_hand', lambda tensor: False)
    for more in (1, 30):
        steps.clear()
        monkeypatch.setattr(sampling, '_MOST_UNCHECKED', 20)
        with pytest.raises(ValueError, match='logits must leave a token to choose'):
            model.sample(
                prompt, max_new_tokens=3 + more, use_cache=True, filter_fn=keep_nothing_once, filter_kwargs={}, **QUIET
            )
        assert len(steps) == 3 + more


@cached
def test_filters_replace_the_default_filter(use_cache):
    model, prompt = build('MAG'), ids(5)

    def tokens(**kwargs):
        return model.sample(prompt, 11, use_cache=use_cache, generator=seeded(), **kwargs, **QUIET)

    every = {'top_k': 7, 'top_p': 0.8, 'min_p': 0.05}
    for kwargs in ({'top_k': 3}, {'top_p': 0.5}, {'min_p': 0.3}, every):
        as_function = tokens(filter_fn=partial(every_filter, **kwargs), filter_kwargs={})
        assert torch.equal(tokens(**kwargs), as_function)
        streamed = [*model.stream(prompt, 11, generator=seeded(), **kwargs)]
        assert torch.equal(torch.stack(streamed, dim=1), as_function)
    assert torch.equal(tokens(min_p=0.1), tokens())
    assert torch.equal(tokens(top_k=1), tokens(temperature=0.0))
    assert not torch.equal(tokens(top_k=99, temperature=3.0), tokens(temperature=3.0))


@cached
def test_each_row_gets_as_many_new_tokens(use_cache):
    model, prompt, lengths = build('MAC'), ids(9, batch=3), [4, 9, 6]
    kwargs = {'temperature': 0.0, 'use_cache': use_cache, 'pad_token': -1, **QUIET}
    together = model.sample(prompt, max_new_tokens=5, prompt_lengths=lengths, **kwargs)
    assert together.shape == (3, 5)
    for row, one, length in zip(together, prompt, lengths):
        assert torch.equal(row[None], model.sample(one[None, :length], length + 5, **kwargs))
    assert model.sample(prompt, max_new_tokens=0, prompt_lengths=lengths, **kwargs).shape == (3, 0)
    stopped = model.sample(prompt, max_new_tokens=5, prompt_lengths=lengths, stop_tokens=range(16), **kwargs)
    assert torch.equal(stopped[:, 0], together[:, 0])
    assert (stopped[:, 1:] == -1).all()


@cached
def test_a_prompt_may_hold_tokens_that_are_never_sampled(use_cache):
    model = build('MAG', token_emb=torch.nn.Embedding(24, 16))
    prompt = torch.randint(16, 24, (2, 5))
    tokens = model.sample(prompt, max_new_tokens=6, use_cache=use_cache, generator=seeded(), **QUIET)
    assert tokens.shape == (2, 6) and tokens.max() < 16
    with pytest.raises(ValueError, match='prompt must hold token ids in .0, num_tokens=24., got ids in .*24'):
        model.sample(prompt + 8, max_new_tokens=6, use_cache=use_cache, **QUIET)


def test_filters_may_change_logits_in_place():
    model, prompt = build('MAC'), ids(5)

    def in_place(logits):
        logits[:, 8:] = float('-inf')
        return logits

    kwargs = {'max_new_tokens': 3, 'temperature': 0.0, 'filter_kwargs': {}, 'return_logprobs': True, **QUIET}
    came = model.sample(prompt, filter_fn=in_place, **kwargs)
    expected = model.sample(prompt, filter_fn=lambda logits: in_place(logits.clone()), **kwargs)
    assert torch.equal(came.tokens, expected.tokens)
    assert_same(came.logprobs, expected.logprobs, 0.0)


@cached
@pytest.mark.parametrize('name', ['MAC', 'LMM'])
def test_log_probabilities_are_those_of_one_uncached_call(name, use_cache):
    # of the model's own distribution: temperature and filters have no influence
    model, prompt = build(name), ids(5)
    came = model.sample(
        prompt,
        max_new_tokens=11,
        temperature=0.7,
        top_k=5,
        use_cache=use_cache,
        generator=seeded(),
        return_logprobs=True,
        **QUIET,
    )
    assert isinstance(came, Sampled)
    assert came.cache is None
    assert came.surprises is None
    assert came.tokens.shape == came.logprobs.shape == (2, 11)
    with torch.no_grad():
        logits = model(torch.cat((prompt, came.tokens), dim=1))[:, 4:-1]
    expected = logits.log_softmax(dim=-1).gather(-1, came.tokens.unsqueeze(-1)).squeeze(-1)
    assert_same(came.logprobs, expected, 1e-12)


@cached
def test_log_probabilities_of_padded_rows(use_cache):
    model, prompt, lengths = build('MAG'), ids(8, batch=3), [8, 5, 3]
    kwargs = {'temperature': 0.0, 'use_cache': use_cache, 'return_logprobs': True, **QUIET}
    free = model.sample(prompt, 16, prompt_lengths=lengths, **kwargs)
    stop = free.tokens[0, 2].item()
    came = model.sample(prompt, 16, prompt_lengths=lengths, stop_tokens=stop, pad_token=-1, **kwargs)
    assert (came.tokens[0, 3:] == -1).all()
    for row, length in enumerate(lengths):
        alone = model.sample(prompt[row : row + 1, :length], 16, stop_tokens=stop, **kwargs)
        number = alone.tokens.shape[1]
        assert_same(came.logprobs[row : row + 1, :number], alone.logprobs, 1e-12)
        assert (came.logprobs[row, number:] == 0).all()


def test_a_stream_yields_log_probabilities():
    model, prompt = build('MAL'), ids(6)
    expected = model.sample(prompt, 15, return_logprobs=True, return_cache=True, generator=seeded(), **QUIET)
    stream, came = model.stream(prompt, 15, return_logprobs=True, generator=seeded()), []
    while True:
        try:
            came.append(next(stream))
        except StopIteration as end:
            cache = end.value
            break
    assert torch.equal(torch.stack([position.tokens for position in came], dim=1), expected.tokens)
    assert_same(torch.stack([position.logprobs for position in came], dim=1), expected.logprobs, 0.0)
    assert_same(cache, expected.cache, 0.0)


@pytest.mark.parametrize('hooked', [False, True])
def test_every_runner_of_steps_gives_the_same_results(hooked, steps_compiled_eagerly):
    model, prompt = build('LMM', depth=1, num_residual_streams=1), ids(6)
    if hooked:
        model.layers[0].register_forward_hook(lambda *_: None)
    kwargs = {'top_p': 0.9, 'return_logprobs': True, 'return_surprises': True, **QUIET}
    runners = [{}, {'use_cache': True}, *([] if hooked else [{'use_cache': True, 'compiled': True}])]
    results = [model.sample(prompt, 16, generator=seeded(), **runner, **kwargs) for runner in runners]
    for came in results[1:]:
        assert torch.equal(came.tokens, results[0].tokens)
        assert_same(came, results[0], 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize('name', ['MAC', 'MAG'])
def test_options_on_a_gpu(name):
    model, prompt = build(name).cuda(), ids(5).cuda()
    kwargs = {'top_k': 9, 'return_logprobs': True, 'return_surprises': True, **QUIET}
    results = []
    for runner in ({}, {'use_cache': True, 'cuda_graphs': False}, {'use_cache': True}, {'use_cache': True}):
        generator = torch.Generator('cuda').manual_seed(0)
        results.append(model.sample(prompt, 40, generator=generator, **runner, **kwargs))
    for came in results[1:]:
        assert torch.equal(came.tokens, results[0].tokens)
        assert_same(came, results[0], 1e-9)


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        ({'seq_len': 9, 'max_new_tokens': 3}, ValueError, 'pass either seq_len, the total length, or max_new_tokens'),
        ({}, ValueError, 'pass either seq_len, the total length, or max_new_tokens'),
        ({'seq_len': 2**63}, ValueError, r'seq_len must give rows of fewer than 2\*\*63 tokens, prompt included'),
        ({'max_new_tokens': 2**63 - 1}, ValueError, r'max_new_tokens must give rows of fewer than 2\*\*63 tokens'),
        ({'max_new_tokens': -1}, ValueError, 'max_new_tokens must be an integer of at least 0, got -1'),
        ({'seq_len': 9, 'top_k': 0}, ValueError, 'top_k must be a positive integer, got 0'),
        ({'seq_len': 9, 'top_p': 2.0}, ValueError, 'top_p must be a probability'),
        (
            {'seq_len': 9, 'top_k': 3, 'filter_fn': torch.relu, 'filter_kwargs': {}},
            ValueError,
            'pass filter_fn with filter_kwargs, or top_k, top_p and min_p, not both',
        ),
        ({'seq_len': 9, 'min_p': 0.2, 'filter_kwargs': {'min_p': 0.1}}, ValueError, 'not both'),
        ({'seq_len': 9, 'generator': 3}, TypeError, 'generator must be a torch.Generator, got 3'),
        ({'seq_len': 9, 'return_logprobs': 1}, TypeError, 'return_logprobs must be True or False, got 1'),
        ({'seq_len': 9, 'return_surprises': 1}, TypeError, 'return_surprises must be True or False, got 1'),
    ],
)
def test_malformed_options_are_refused(kwargs, error, message):
    model, prompt = build('MAG'), ids(5)
    with pytest.raises(error, match=message):
        model.sample(prompt, **kwargs, **QUIET)
    with pytest.raises(error, match=message):
        model.stream(prompt, **kwargs)


def test_a_generator_on_another_device_is_refused():
    model = build('MAG')
    with pytest.raises(ValueError, match='generator must be on the device of prompt, meta, got cpu'):
        model.sample(ids(5).to('meta'), 9, generator=seeded(), **QUIET)
