"""Filters of tokens and log-probabilities, compared with plain loops over sorted lists in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from compare import assert_same
from torch import Tensor

from titans_pytorch.generation.logits import (
    checked_min_p,
    filters,
    gumbel_noise,
    gumbel_sample,
    log_probabilities,
    min_p_filter,
    top_k_filter,
    top_p_filter,
)


def probabilities(row: list[float]) -> list[float]:
    total = math.fsum(map(math.exp, row))
    return [math.exp(logit) / total for logit in row]


def naive_top_k(row: list[float], top_k: int) -> list[bool]:
    return [logit >= sorted(row, reverse=True)[:top_k][-1] for logit in row]


def naive_top_p(row: list[float], top_p: float) -> list[bool]:
    kept, total = [], 0.0
    for logit, probability in sorted(zip(row, probabilities(row)), reverse=True):
        kept.append(logit)
        total += probability
        if total >= top_p:
            break
    return [logit >= kept[-1] for logit in row]


def naive_min_p(row: list[float], min_p: float) -> list[bool]:
    probs = probabilities(row)
    return [probability >= min_p * max(probs) for probability in probs]


def kept_by(naive: Callable[..., list[bool]], logits: Tensor, value: float) -> Tensor:
    keep = torch.tensor([naive(row, value) for row in logits.tolist()])
    return logits.masked_fill(~keep, float('-inf'))


def example(rows: int = 40) -> Tensor:
    return torch.randn(rows, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


CASES = [
    *[(top_k_filter, naive_top_k, value) for value in (1, 2, 7, 29, 30, 99)],
    *[(top_p_filter, naive_top_p, value) for value in (0.0, 0.01, 0.3, 0.5, 0.9, 0.999, 1.0)],
    *[(min_p_filter, naive_min_p, value) for value in (0.0, 0.01, 0.1, 0.5, 1.0)],
]


@pytest.mark.parametrize(('fn', 'naive', 'value'), CASES, ids=lambda value: getattr(value, '__name__', str(value)))
def test_filters_equal_a_loop(fn, naive, value):
    logits = example()
    assert torch.equal(fn(logits, value), kept_by(naive, logits, value))
    assert torch.equal(fn(logits[0], value), fn(logits, value)[0])
    low = logits.bfloat16()
    assert fn(low, value).dtype == torch.bfloat16
    assert (fn(low, value) > float('-inf')).any(dim=-1).all()


def test_tokens_as_likely_as_the_last_one_stay():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    expected = torch.tensor([[2.0, 1.0, 1.0, float('-inf')]])
    assert torch.equal(top_k_filter(logits, 2), expected)
    assert torch.equal(top_p_filter(logits, 0.7), expected)


def test_filters_are_applied_one_after_the_other():
    logits = example()
    expected = kept_by(naive_top_k, logits, 9)
    probs = torch.tensor([probabilities(row) for row in expected.tolist()])
    # a nucleus of the tokens that top-k leaves, whose probabilities add up to 1
    assert_same(probs.sum(dim=-1), torch.ones(len(logits)), 1e-6)
    assert torch.equal(filters(top_k=9, top_p=0.8)(logits), kept_by(naive_top_p, expected, 0.8))
    assert torch.equal(filters()(logits), logits)


def test_the_lowest_temperatures_pick_the_likeliest_token():
    logits = example()
    for dtype in (torch.float32, torch.float64):
        for temperature in (1e-37, 1e-40, 1e-46, 1e-310):
            assert torch.equal(gumbel_sample(logits.to(dtype), temperature), gumbel_sample(logits.to(dtype), 0.0))


def test_log_probabilities():
    logits = example()
    tokens = torch.arange(len(logits)) % 30
    expected = [math.log(probabilities(row)[token]) for row, token in zip(logits.tolist(), tokens.tolist())]
    assert_same(log_probabilities(logits, tokens), torch.tensor(expected, dtype=torch.float64), 1e-12)
    assert log_probabilities(logits.bfloat16(), tokens).dtype == torch.float32


def test_a_generator_replaces_the_global_random_state():
    logits, before = example(), torch.get_rng_state()
    draws = [gumbel_sample(logits, 1.3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(gumbel_sample(logits, 1.3), draws[0])
    noise = gumbel_noise(torch.zeros(100_000, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert abs(noise.mean().item() - 0.5772) < 0.02  # the Euler–Mascheroni constant


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        ({'top_k': 0}, ValueError, 'top_k must be a positive integer, got 0'),
        ({'top_k': 2.0}, TypeError, 'top_k must be a positive integer, got 2.0'),
        ({'top_p': 1.5}, ValueError, 'top_p must be a probability, from 0 to 1, got 1.5'),
        ({'top_p': -0.1}, ValueError, 'top_p must be a finite number of at least 0, got -0.1'),
    ],
    ids=str,
)
def test_malformed_filters_are_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        filters(**kwargs)


def test_malformed_min_p_is_refused():
    with pytest.raises(ValueError, match='min_p must be a fraction of the likeliest probability, from 0 to 1, got 2'):
        checked_min_p(2)
    with pytest.raises(TypeError, match="min_p must be a number of at least 0, got '1'"):
        checked_min_p('1')


@pytest.mark.parametrize(('dtype', 'temperature'), [(torch.float16, 1e-4), (torch.float32, 1e-38)])
def test_low_temperatures_take_the_likeliest_token(dtype, temperature):
    logits = torch.tensor([[8.0, 9.0, 10.0], [-9.0, -8.0, -10.0]], dtype=dtype)
    assert gumbel_sample(logits, temperature).flatten().tolist() == [2, 1]


@pytest.mark.parametrize('row', [[float('-inf')] * 2, [float('nan'), 1.0]])
def test_rows_without_a_valid_token_are_refused(row):
    with pytest.raises(ValueError, match='logits must leave a token to choose'):
        gumbel_sample(torch.tensor([[0.0, 1.0], row]), 1.0)
