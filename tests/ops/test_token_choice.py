"""`token_choice`: its reference and its Triton kernel."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same

from titans_pytorch.generation.logits import gumbel_noise, min_p_filter
from titans_pytorch.ops import token_choice as operation
from titans_pytorch.ops.token_choice import reference, token_choice

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
NAN, INF = float('nan'), float('inf')


@pytest.fixture
def kernel(switch_kernel, monkeypatch):
    """The kernel runs on this device too, in blocks of 16 tokens."""
    pytest.importorskip('triton')
    from titans_pytorch.ops.token_choice import triton

    switch_kernel(operation, True)
    monkeypatch.setattr(triton, 'BLOCK', 16)
    return triton


def problem(rows, count, dtype=torch.float32):
    """Logits, whose rows are not dense, and uniform noise."""
    logits = 3 * torch.randn(rows, count + 3, device=DEVICE)
    return logits.to(dtype)[:, :count], torch.rand(rows, count, device=DEVICE)


def test_reference_is_the_gumbel_max_trick():
    logits, uniform = problem(50, 20)
    torch.manual_seed(3)
    noise = gumbel_noise(logits)
    torch.manual_seed(3)
    uniform.uniform_()
    scores = (min_p_filter(logits, 0.2) - logits.amax(dim=-1, keepdim=True)) / 0.7 + noise
    tokens, best = token_choice(logits, uniform, 0.7, 0.2)
    assert torch.equal(tokens, scores.argmax(dim=-1))
    assert_same(best, scores.amax(dim=-1), 1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('min_p', [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize('random', [True, False])
@pytest.mark.parametrize('count', [1, 13, 40])
def test_kernel_equals_the_reference(count, random, min_p, dtype, kernel, poisoned):
    logits, uniform = problem(30, count, dtype)
    given = logits, uniform if random else None, 1.3, min_p
    with torch.no_grad():
        tokens, best = token_choice(*given)
    expected, best_expected = reference.token_choice(*given)
    assert torch.equal(tokens, expected)
    assert_same(best, best_expected.float(), 1e-5)
    # the noise decides, and the filter
    likeliest = logits.argmax(dim=-1)
    assert torch.equal(tokens, likeliest) == (not random or min_p == 1.0 or count == 1)


def test_kernel_prefers_the_first_of_equal_tokens(kernel):
    logits = torch.zeros(2, 40, device=DEVICE)
    logits[1, [21, 22, 39]] = 1.0
    with torch.no_grad():
        assert token_choice(logits, None, 0.0, 0.1)[0].tolist() == [0, 21]


@pytest.mark.filterwarnings('ignore:invalid value')  # of NumPy, in the interpreter
@pytest.mark.parametrize('random', [True, False])
@pytest.mark.parametrize('row', [[NAN, 1.0], [1.0, NAN], [-INF, -INF], [INF, 0.0], [INF, NAN], [-INF, 1.0]], ids=str)
def test_kernel_tells_rows_without_a_valid_token(row, random, kernel):
    logits = torch.full((2, 40), -INF, device=DEVICE)
    logits[0, 5], logits[1, 15:17] = 0.0, torch.tensor(row)
    for min_p in (None, 0.1):
        given = logits, torch.rand(2, 40, device=DEVICE) if random else None, 1.0, min_p
        with torch.no_grad():
            best = token_choice(*given)[1]
        expected = reference.token_choice(*given)[1]
        assert torch.equal(best > -INF, expected > -INF)


def test_kernel_takes_any_shape_without_gradients(kernel, launches_of):
    launches = launches_of(operation)
    logits, uniform = (t.reshape(2, 3, 40) for t in problem(6, 40))
    token_choice(logits, uniform, 1.0, None)
    with torch.no_grad():
        token_choice(logits.double(), uniform.double(), 1.0, None)
        assert not launches
        assert [t.shape for t in token_choice(logits, uniform, 1.0, None)] == [(2, 3), (2, 3)]
        assert [t.shape for t in token_choice(logits[:0], uniform[:0], 1.0, None)] == [(0, 3), (0, 3)]
    assert len(launches) == 2


@pytest.mark.gpu
@pytest.mark.parametrize('count', [256, 50_000])
def test_kernel_in_sizes_of_models(count, poisoned):
    logits, uniform = problem(64, count)
    with torch.no_grad():
        tokens, best = token_choice(logits, uniform, 1.5, 0.1)
    expected, best_expected = reference.token_choice(logits.double(), uniform.double(), 1.5, 0.1)
    assert torch.equal(tokens, expected)
    assert_same(best, best_expected.float(), 1e-4)
