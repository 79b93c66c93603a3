"""`max_grad_norm`: gradients that are zero but for rounding are not raised to half the bound."""

from __future__ import annotations

import pytest
import torch
from compare import all_in_float64, assert_same

from titans_pytorch import LongTermMemoryModel, MemoryAttention, NeuralMemory
from titans_pytorch.memory.soft_clamp import ROUNDING_ERRORS, soft_clamp_norm


def clamped_norm(norm: float, max_norm: float) -> float:
    """As the reference has it: (tanh(2x / max) + 1) · max / 2."""
    return (torch.tensor(norm * 2 / max_norm, dtype=torch.float64).tanh().item() + 1) * max_norm / 2


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('max_norm', [0.1, 4.0])
def test_norms_above_rounding_errors_are_the_reference_s(max_norm: float, dtype: torch.dtype):
    direction = torch.nn.functional.normalize(torch.randn(1, 1, 24, dtype=torch.float64), dim=-1)
    for norm in (1e-3, 0.5, 30.0):
        came = soft_clamp_norm((direction * norm).to(dtype).view(1, 1, 4, 6), max_norm)
        assert came.dtype == dtype
        expected = clamped_norm(norm, max_norm)
        assert came.double().norm().item() == pytest.approx(expected, rel=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_gradients_below_rounding_errors_stay(dtype: torch.dtype):
    floor = ROUNDING_ERRORS * torch.finfo(dtype).eps
    gradients = torch.zeros(1, 3, 4, dtype=dtype)
    gradients[0, 0, 0], gradients[0, 1, 1] = floor * 1.01, floor * 0.99
    gradients.requires_grad_()
    came = soft_clamp_norm(gradients, 1.0)
    assert came[0, 0].norm().item() == pytest.approx(0.5, rel=1e-4)
    assert torch.equal(came[0, 1:], gradients[0, 1:])
    assert torch.autograd.grad(came[0, 1:].sum(), gradients)[0].isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('engine', ['dual', 'dense'])
def test_repeated_tokens_in_one_call_and_token_by_token(engine: str, dtype: torch.dtype):
    # attention over equal tokens does not depend on its queries and keys: their gradients are zero
    kwargs = {'chunk_size': 3, 'batch_size': 3, 'qk_l2norm': True, 'max_grad_norm': 1.0}
    seq = torch.cat((torch.randn(1, 1, 8).repeat(1, 6, 1), torch.randn(1, 6, 8)), dim=1).to(dtype)
    for seed in range(4):
        torch.manual_seed(seed)
        mem = NeuralMemory(8, model=MemoryAttention(8), engine=engine, **kwargs).to(dtype)
        state, pieces = None, []
        for token in seq.split(1, dim=1):
            out, state = mem(token, state=state)
            pieces.append(out)
        assert_same(torch.cat(pieces, dim=1), mem(seq)[0], 1e-9 if dtype == torch.float64 else 1e-3)


def test_repeated_tokens_sampled_with_and_without_a_cache():
    memories = {'heads': 2, 'dim_head': 8, 'qk_l2norm': True, 'max_grad_norm': 1.0}
    prompt = torch.tensor([[3] * 9 + [1, 2]])
    for seed in range(4):
        torch.manual_seed(seed)
        with all_in_float64():
            model = LongTermMemoryModel(
                num_tokens=8,
                dim=16,
                depth=2,
                neural_memory_segment_len=3,
                neural_memory_batch_size=3,
                neural_memory_model=MemoryAttention(8),
                neural_memory_kwargs=memories,
            ).double()
            kwargs = {'temperature': 0.0, 'show_progress': False}
            cached = model.sample(prompt, 30, use_cache=True, **kwargs)
            assert torch.equal(cached, model.sample(prompt, 30, **kwargs))


@pytest.mark.parametrize('engine', ['auto', 'dense'])
def test_a_scalar_parameter(engine: str):
    class Scaled(torch.nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.factor = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return super().forward(x) * self.factor

    memory = NeuralMemory(4, chunk_size=2, model=Scaled(), max_grad_norm=1.0, engine=engine)
    _, state = memory(torch.randn(1, 6, 4))
    gradients = torch.tensor([[3.0, -0.2]])
    expected = torch.tensor([[clamped_norm(3.0, 1.0), -clamped_norm(0.2, 1.0)]])
    assert_same(soft_clamp_norm(gradients, 1.0), expected, 1e-6)
    assert state.weights['model.factor'].shape == (1,)
