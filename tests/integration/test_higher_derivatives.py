"""Second and third derivatives, for meta-learning and gradient penalties, compared with finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compare import assert_same
from memories import SWITCHES, inputs, memory
from torch import Tensor
from torch.func import functional_call, hessian, jvp, vjp

from titans_pytorch import MemoryAttention, NeuralMemory
from titans_pytorch.ops.newton_schulz import newton_schulz
from titans_pytorch.ops.norms import l2_norm, layer_norm

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    'layer norm': lambda x: layer_norm(x, 1e-5),
    'l2 norm': l2_norm,
    'Newton-Schulz': lambda x: newton_schulz(x.unflatten(0, (1, -1)), steps=2),
}


def along_a_direction(mem: NeuralMemory, length: int = 9) -> Callable[[Tensor], Tensor]:
    """A scalar of the memory's results as a function of how far all parameters and inputs have moved."""
    seq = inputs(mem, length, batch=1)
    parameters = {name: p.detach() for name, p in mem.named_parameters()}
    steps = {name: torch.randn_like(p) for name, p in parameters.items()}
    seq_step, weight = torch.randn_like(seq), torch.randn(1, length, mem.dim, dtype=torch.float64)

    def scalar(moved: Tensor) -> Tensor:
        at = {name: p + moved * steps[name] for name, p in parameters.items()}
        return (functional_call(mem, at, (seq + moved * seq_step,))[0] * weight).sum()

    return scalar


def slope(scalar: Callable[[Tensor], Tensor], at: float) -> tuple[Tensor, Tensor]:
    moved = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(scalar(moved), moved, create_graph=True)[0], moved


@pytest.mark.parametrize('switch', SWITCHES)
@pytest.mark.parametrize('engine', ['auto', 'dense'])
def test_second_derivatives_of_a_memory(engine: str, switch: str):
    scalar = along_a_direction(memory(switch, engine=engine))
    first, moved = slope(scalar, 0.0)
    second = torch.autograd.grad(first, moved)[0]
    small = 1e-7
    difference = (slope(scalar, small)[0] - slope(scalar, -small)[0]) / (2 * small)
    assert_same(second, difference.detach(), 1e-5)


@pytest.mark.parametrize('engine', ['dual', 'dense'])
def test_forward_mode_and_hessians(engine: str):
    scalar = along_a_direction(memory('norms', engine=engine))
    first, moved = slope(scalar, 0.0)
    second = torch.autograd.grad(first, moved)[0]
    zero, one = torch.zeros_like(moved), torch.ones_like(moved)
    assert_same(jvp(scalar, (zero,), (one,))[1], first.detach())
    assert_same(jvp(lambda at: vjp(scalar, at)[1](one)[0], (zero,), (one,))[1], second)
    assert_same(hessian(scalar)(zero), second)


@pytest.mark.parametrize('norm', NORMS)
def test_third_derivatives_of_norms(norm: str):
    def gradient(x: Tensor, d_out: Tensor) -> Tensor:
        return torch.autograd.grad((NORMS[norm](x) * d_out).sum(), x, create_graph=True)[0]

    x, d_out = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if norm == 'Newton-Schulz':
        d_out = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(gradient, (x, d_out))


@pytest.mark.parametrize('norm', NORMS)
def test_norms_are_differentiable_twice_at_zero(norm: str):
    x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    out = NORMS[norm](x)
    first = torch.autograd.grad(out, x, torch.randn_like(out), create_graph=True)[0]
    assert first.isfinite().all()
    if first.requires_grad:
        assert torch.autograd.grad(first.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize('engine', ['dual', 'dense'])
def test_rows_of_zeros_leave_gradients_of_an_attention_memory_finite(engine: str):
    mem = NeuralMemory(8, chunk_size=4, batch_size=4, model=MemoryAttention(8), engine=engine).double()
    seq = torch.randn(1, 12, 8, dtype=torch.float64)
    seq[:, -2:] = 0.0
    mask = torch.arange(12).expand(1, -1) < 10

    def loss() -> Tensor:
        return mem(seq, store_mask=mask)[0].square().sum()

    parameters = dict(mem.named_parameters())
    came = torch.autograd.grad(loss(), [*parameters.values()], allow_unused=True)
    for (name, parameter), gradient in zip(parameters.items(), came):
        if gradient is None:
            continue
        assert gradient.isfinite().all(), name
        # one entry of each against a difference
        flat, small = parameter.data.view(-1), 1e-6
        before = flat[0].item()
        ends = []
        for moved in (small, -small):
            flat[0] = before + moved
            ends.append(loss().item())
        flat[0] = before
        assert gradient.flatten()[0].item() == pytest.approx((ends[0] - ends[1]) / (2 * small), rel=1e-4, abs=1e-6)


def test_an_l2_norm_keeps_nan():
    x = torch.randn(3, 4)
    x[1, 2] = float('nan')
    assert l2_norm(x).isnan().any(dim=-1).tolist() == [False, True, False]
