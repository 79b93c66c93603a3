"""Models and memories under `torch.func`, forward-mode, checkpointing and offloading; and the switch of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from compare import all_in_float64, assert_same
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from titans_pytorch import (
    LongTermMemoryModel,
    MemoryAsContextTransformer,
    MemoryAsGateTransformer,
    MemoryAsLayerTransformer,
    NeuralMemory,
    without_kernels,
)
from titans_pytorch.models.residual_streams import complete, connect
from titans_pytorch.ops import _dispatch
from titans_pytorch.ops.sinkhorn import sinkhorn


@pytest.fixture
def float64():
    with all_in_float64():
        yield


def test_gradients_of_functions_without_checkpoints(float64):
    """Transforms do not support activation checkpointing, so nothing is recomputed."""
    mem = NeuralMemory(8, chunk_size=2)
    recomputing = NeuralMemory(8, chunk_size=2, checkpoint_every=4)
    recomputing.load_state_dict(mem.state_dict())
    seq = torch.randn(1, 9, 8)
    results = [grad(lambda seq, m=m: m(seq)[0].sin().sum())(seq) for m in (mem, recomputing)]
    assert_same(*results)

    model = MemoryAsGateTransformer(**SMALL | HEADS, checkpoint_layers=True).double()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x = torch.randint(0, 11, (2, 9))
    of_function = grad(lambda p: functional_call(model, p, (x,), {'return_loss': True}))(parameters)
    model(x, return_loss=True).backward()
    assert_same(of_function, {name: model.get_parameter(name).grad for name in parameters})


SMALL = {'num_tokens': 11, 'dim': 8, 'depth': 2, 'segment_len': 4, 'neural_memory_batch_size': 8}
HEADS = {'dim_head': 4, 'heads': 2}
MODELS: dict[str, Callable[[], Module]] = {
    'MAC': lambda: MemoryAsContextTransformer(
        **SMALL | HEADS, neural_memory_segment_len=4, num_longterm_mem_tokens=2, num_persist_mem_tokens=2
    ),
    'MAC, weight residual': lambda: MemoryAsContextTransformer(
        **SMALL | HEADS, neural_mem_weight_residual=True, neural_memory_qkv_receives_diff_views=True
    ),
    'MAC, paper order': lambda: MemoryAsContextTransformer(
        **SMALL | HEADS | {'neural_memory_batch_size': None}, neural_memory_segment_len=2, paper_order=True
    ),
    'MAG': lambda: MemoryAsGateTransformer(**SMALL | HEADS, num_residual_streams=2),
    'MAL': lambda: MemoryAsLayerTransformer(**SMALL | HEADS),
    'LMM': lambda: LongTermMemoryModel(**SMALL, num_residual_streams=3),
}


def randomised_model(name: str) -> Module:
    model = MODELS[name]().double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def loss_of(model: Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """The loss of one sequence as a function of the parameters."""

    def loss(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        return functional_call(model, parameters, (ids.unsqueeze(0),), {'return_loss': True})

    return loss


def detached(model: Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize('name', MODELS)
def test_gradients_of_each_sample(name: str, float64: None):
    model = randomised_model(name)
    ids = torch.randint(0, 11, (3, 10))
    came = vmap(grad(loss_of(model)), (None, 0))(detached(model), ids)
    for sample, row in enumerate(ids):
        model.zero_grad()
        model(row.unsqueeze(0), return_loss=True).backward()
        want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_same({name: came[name][sample] for name in want}, want)


@pytest.mark.parametrize('name', MODELS)
def test_losses_of_each_sample_without_a_gradient(name: str, float64: None):
    model = randomised_model(name)
    ids = torch.randint(0, 11, (3, 10))
    with torch.no_grad():
        came = vmap(loss_of(model), (None, 0))(detached(model), ids)
        assert_same(came, torch.stack([model(row.unsqueeze(0), return_loss=True) for row in ids]))


@pytest.mark.parametrize('name', MODELS)
def test_forward_mode_and_hessians_of_models(name: str, float64: None):
    model = randomised_model(name)
    ids = torch.randint(0, 11, (10,))
    loss, parameters = loss_of(model), detached(model)
    steps = {name: torch.randn_like(p) for name, p in parameters.items()}

    def scalar(moved: Tensor) -> Tensor:
        return loss({name: p + moved * steps[name] for name, p in parameters.items()}, ids)

    moved = torch.zeros((), dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(scalar(moved), moved, create_graph=True)[0]
    second = torch.autograd.grad(first, moved)[0]
    zero, one = torch.zeros_like(moved), torch.ones_like(moved)
    small = 1e-6
    assert_same(first.detach(), ((scalar(zero + small) - scalar(zero - small)) / (2 * small)).detach(), 1e-6)
    assert_same(jvp(scalar, (zero,), (one,))[1], first.detach())
    assert_same(jvp(lambda at: vjp(scalar, at)[1](one)[0], (zero,), (one,))[1], second)
    assert_same(hessian(scalar)(zero), second)
    with forward_ad.dual_level():
        assert_same(forward_ad.unpack_dual(scalar(forward_ad.make_dual(zero, one))).tangent, first.detach())


def test_transforms_leave_the_numbers_of_sinkhorn_and_its_gradient(float64: None):
    logits, d_out = torch.randn(2, 5, 3, 3, dtype=torch.float64) * 4, torch.randn(2, 5, 3, 3)
    leaf = logits.clone().requires_grad_()
    want = torch.autograd.grad(sinkhorn(leaf), leaf, d_out.double())[0]
    out, back = vjp(sinkhorn, logits)
    assert_same(out, sinkhorn(logits))
    assert_same(back(d_out.double())[0], want)
    assert_same(vmap(sinkhorn)(logits), sinkhorn(logits))


class OwnNetwork(Module):
    """No `linear`, so that it is served densely."""

    def __init__(self, dim: int):
        super().__init__()
        self.inner, self.out = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x)))


def own_loss(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs().pow(1.5).sum(dim=-1)


MEMORIES: dict[str, dict[str, Any]] = {
    'dual': {'engine': 'dual'},
    'dense': {'engine': 'dense'},
    'own network': {'model': OwnNetwork(8)},
    'own loss, dual': {'engine': 'dual', 'store_memory_loss_fn': own_loss},
    'own loss, dense': {'engine': 'dense', 'store_memory_loss_fn': own_loss},
}


def results(mem: NeuralMemory, seq: Tensor, around: Callable[..., Any], context: Any) -> tuple[Tensor, list[Tensor]]:
    mem.zero_grad()
    with context:
        out = around(lambda x: mem(x)[0], seq)
    out.square().sum().backward()
    return out.detach(), [p.grad for p in mem.parameters() if p.grad is not None]


@pytest.mark.parametrize('engine', MEMORIES)
def test_saved_tensors_may_be_computed_again_or_kept_elsewhere(engine: str):
    mem = NeuralMemory(8, chunk_size=2, batch_size=4, **MEMORIES[engine]).double()
    seq = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)

    def call(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return fn(x)

    def again(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return checkpoint(fn, x, use_reentrant=False)

    want = results(mem, seq, call, nullcontext())
    assert_same(results(mem, seq, again, nullcontext()), want)
    assert_same(results(mem, seq, call, torch.autograd.graph.save_on_cpu()), want)


# the switch


def test_kernels_are_off_within_the_switch_in_every_thread_of_it_and_under_transforms(kernels_everywhere):
    x = torch.ones(2)
    assert _dispatch.use_kernel([x])
    first, second = without_kernels(), without_kernels()
    first.__enter__()
    second.__enter__()
    assert not _dispatch.use_kernel([x])
    first.__exit__(None, None, None)
    assert not _dispatch.use_kernel([x])
    second.__exit__(None, None, None)
    assert _dispatch.use_kernel([x])

    asked = []

    def ask(x: Tensor) -> Tensor:
        asked.append(_dispatch.use_kernel([x]))
        return x.sum()

    grad(ask)(x)
    vmap(ask)(x.unsqueeze(0))
    jvp(ask, (x,), (x,))
    with forward_ad.dual_level():
        ask(forward_ad.make_dual(x, x))
    assert asked == [False] * 4
    assert _dispatch.use_kernel([x])


def streams_and_connection() -> tuple[Module, Tensor]:
    connection = MODELS['MAG']().layers[0].connections[0]
    for p in connection.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return connection, torch.randn(4, 5, 8, requires_grad=True)


def gradient_of_connection(connection: Module, x: Tensor) -> tuple[Tensor, Tensor]:
    branch_in, add = connect(connection, x)
    out = complete(add(branch_in.tanh())).square().sum()
    return out, torch.autograd.grad(out, x, create_graph=True)[0]


def test_a_second_derivative_through_a_kernel_names_the_switch(kernels_everywhere):
    connection, x = streams_and_connection()
    _, first = gradient_of_connection(connection, x)
    with pytest.raises(RuntimeError, match='without_kernels'):
        first.square().sum().backward()

    with without_kernels():
        _, plain = gradient_of_connection(connection, x)
        second = torch.autograd.grad(plain.square().sum(), x)[0]
    assert_same(first.detach(), plain.detach(), 1e-5)
    assert second.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize('name', MODELS)
def test_derivatives_of_models_on_a_gpu(name: str):
    model = randomised_model(name).float().cuda()
    ids = torch.randint(0, 11, (2, 10), device='cuda')
    loss, parameters = loss_of(model), detached(model)
    each = vmap(grad(loss), (None, 0))(parameters, ids)
    model(ids[:1], return_loss=True).backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same({name: each[name][0] for name in want}, want, 1e-3)

    steps = {name: torch.randn_like(p) for name, p in parameters.items()}

    def scalar(moved: Tensor) -> Tensor:
        return loss({name: p + moved * steps[name] for name, p in parameters.items()}, ids[0])

    zero = torch.zeros((), device='cuda', requires_grad=True)
    with without_kernels():
        first = torch.autograd.grad(scalar(zero), zero, create_graph=True)[0]
        second = torch.autograd.grad(first, zero)[0]
    assert_same(jvp(scalar, (zero.detach(),), (torch.ones_like(zero),))[1], first.detach(), 1e-3)
    assert_same(hessian(scalar)(zero.detach()), second, 1e-2)


@pytest.mark.gpu
def test_a_second_derivative_through_kernels_on_a_gpu_names_the_switch():
    mem = NeuralMemory(32, chunk_size=4, batch_size=16).cuda()
    seq = torch.randn(2, 32, 32, device='cuda', requires_grad=True)
    first = torch.autograd.grad(mem(seq)[0].square().sum(), seq, create_graph=True)[0]
    with pytest.raises(RuntimeError, match='without_kernels'):
        first.square().sum().backward()
