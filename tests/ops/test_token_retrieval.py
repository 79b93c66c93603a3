"""Retrieval for a single token: the kernel equals the reference, and both equal a whole call."""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from compare import assert_same, randomised
from torch import nn
from torch.func import functional_call

from titans_pytorch import MemoryAsContextTransformer, NeuralMemory, without_kernels
from titans_pytorch.generation.stepper import Stepper
from titans_pytorch.memory.modules import L2Norm, MultiheadRMSNorm, SplitHeads
from titans_pytorch.memory.state import copy_weights
from titans_pytorch.memory.token_retrieval import PlainRetrieval
from titans_pytorch.memory_models import MemoryMLP, PlainMLP, ResidualNorm
from titans_pytorch.ops import token_retrieval as token_retrieval_ops

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


@pytest.fixture
def kernel(switch_kernel):
    """The kernel runs on this device too; its module."""
    switch_kernel(token_retrieval_ops, True)
    from titans_pytorch.ops.token_retrieval import triton as kernel

    return kernel


@pytest.fixture
def launches(launches_of):
    return launches_of(token_retrieval_ops)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


class Parts(NamedTuple):
    """Modules of a memory that retrieval runs through."""

    heads: int
    network: nn.Module
    query_norm: nn.Module
    value_norm: nn.Module
    gate: nn.Sequential | None
    dtype: torch.dtype = torch.float32

    def plain(self):
        return PlainRetrieval.of(
            self.heads,
            PlainMLP.of(self.network),
            SplitHeads(self.heads),
            self.query_norm,
            self.value_norm,
            self.gate,
            self.dtype,
        )


def problem(dim_head, hidden=None, heads=3, query_norm=True, norm=True, gate=True, batch=2, dtype=torch.float32):
    """Arguments of `retrieve`, of which queries and input are not dense; one matrix without `hidden`."""
    depth, factor = (1, 1.0) if hidden is None else (2, hidden / dim_head)
    model = MemoryMLP(dim_head, depth, factor)
    model = ResidualNorm(dim_head, model) if norm else model
    weights = {
        name: random(batch * heads, *p.shape) * (0.5 if p.ndim == 1 else p.shape[0] ** -0.5)
        for name, p in model.named_parameters()
    }
    to_gates = nn.Sequential(nn.Linear(21, heads, bias=False), SplitHeads(heads), nn.Sigmoid())
    parts = Parts(
        heads=heads,
        network=model,
        query_norm=randomised(MultiheadRMSNorm(dim_head, heads)).to(DEVICE) if query_norm else nn.Identity(),
        value_norm=nn.Identity(),
        gate=to_gates.to(DEVICE) if gate else None,
    )
    projected = random(batch, 1, heads * dim_head + 3, dtype=dtype)[..., :-3]
    return parts, weights, projected, random(batch, 2, 21)[:, 1:]


def retrieve(parts, weights, projected, normed):
    return parts.plain()(weights, projected, normed)


def exact(parts, weights, projected, normed):
    """The same in float64, module by module."""
    network, query_norm, gate = (deepcopy(m) for m in (parts.network, parts.query_norm, parts.gate))
    queries = query_norm.double()(projected.double().unflatten(-1, (parts.heads, -1)).transpose(1, 2))
    doubled = {name: w.double() for name, w in weights.items()}
    values = torch.func.vmap(lambda own, rows: functional_call(network, own, (rows,)))(doubled, queries.flatten(0, 1))
    values = values.unflatten(0, (-1, parts.heads))
    if gate is not None:
        values = values * gate.double()(normed.double())
    return values.transpose(1, 2).flatten(2)


def by_reference(*given):
    with without_kernels():
        return retrieve(*given)


@pytest.mark.parametrize('gate', [True, False])
@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('query_norm', [True, False])
@pytest.mark.parametrize('hidden', [None, 32])
def test_the_kernel_equals_the_reference(hidden, query_norm, norm, gate, launches, poisoned):
    given = problem(16, hidden, query_norm=query_norm, norm=norm, gate=gate)
    came = retrieve(*given)
    assert len(launches) == 1 and came.is_contiguous()
    assert_same(came, by_reference(*given), 1e-5)
    assert_same(came, exact(*given), 1e-5)


@pytest.mark.parametrize(
    ('dim_head', 'hidden'), [(1, 3), (8, 8), (24, 60), (64, 128), (64, 256), (96, None), (100, 7), (128, 300)]
)
@pytest.mark.parametrize(('tile', 'block'), [(16384, 512), (512, 8)])
def test_any_width_and_blocks_of_units(dim_head, hidden, tile, block, launches, kernel, poisoned, monkeypatch):
    monkeypatch.setattr(kernel, 'TILE', tile)
    monkeypatch.setattr(kernel, 'BLOCK', block)
    for heads in (1, 2):
        given = problem(dim_head, hidden, heads)
        assert_same(retrieve(*given), exact(*given), 1e-5)
    assert len(launches) == 2


def test_no_number_stays_with_its_entry_and_head(kernel):
    parts, weights, projected, normed = problem(16, 32)
    expected = retrieve(parts, weights, projected, normed)
    projected[0, 0, 20] = float('nan')  # of the second head
    came = retrieve(parts, weights, projected, normed)
    of_second = slice(16, 32)
    assert came[0, 0, of_second].isnan().all()
    came[0, 0, of_second] = expected[0, 0, of_second]
    assert torch.equal(came, expected)
    weights['model.weights.1'][4, 3, 2] = float('nan')  # of the second entry's second head
    assert retrieve(parts, weights, projected, normed)[1, 0, of_second].isnan().all()


def test_no_entries(kernel):
    assert retrieve(*problem(16, 32, batch=0)).shape == (0, 1, 48)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_queries_in_low_precision(dtype, launches):
    given = problem(16, 32, dtype=dtype)
    came = retrieve(*given)
    assert len(launches) == 1 and came.dtype == torch.float32
    assert_same(came, exact(*given), 1e-5)


def test_what_the_operation_is_not_for():
    parts, *_ = problem(16, 32)

    class Changed(MemoryMLP):
        pass

    channels = nn.Sequential(nn.Linear(21, 48), SplitHeads(3), nn.Sigmoid()).to(DEVICE)
    assert parts.plain() is not None
    for changes in (
        {'gate': channels},
        {'query_norm': L2Norm()},
        {'value_norm': MultiheadRMSNorm(16, 3).to(DEVICE)},
        {'network': ResidualNorm(16, Changed(16, 2))},
        {'network': MemoryMLP(16, 3)},
        {'dtype': torch.bfloat16},
    ):
        assert parts._replace(**changes).plain() is None

    parts.gate[0].register_forward_hook(lambda *_: None)
    assert parts.plain() is None


def test_what_the_kernel_is_not_for(kernel, monkeypatch):
    monkeypatch.setattr(kernel, 'token_retrieval', None)
    parts, weights, projected, normed = problem(16, 32)
    transposed = {name: w.mT.contiguous().mT if w.ndim > 2 else w for name, w in weights.items()}
    retrieve(parts, transposed, projected, normed)
    with torch.enable_grad():
        assert retrieve(parts, weights, projected.clone().requires_grad_(), normed).requires_grad
    double = {name: w.double() for name, w in weights.items()}
    retrieve(parts._replace(query_norm=nn.Identity(), gate=None), double, projected.double(), normed)
    monkeypatch.setattr(token_retrieval_ops, 'LARGEST', 16 * 32 - 1)
    retrieve(parts, weights, projected, normed)


@pytest.mark.parametrize('gate', [True, False])
@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('query_norm', [True, False])
@pytest.mark.parametrize('hidden', [None, 24])
def test_the_reference_equals_the_modules(hidden, query_norm, norm, gate):
    given = problem(12, hidden, query_norm=query_norm, norm=norm, gate=gate)
    parts, weights, projected, normed = given
    doubled = {name: w.double() for name, w in weights.items()}
    of_doubles = parts._replace(
        query_norm=deepcopy(parts.query_norm).double(),
        gate=None if parts.gate is None else deepcopy(parts.gate).double(),
        dtype=torch.float64,
    )
    came = retrieve(of_doubles, doubled, projected.double(), normed.double())
    assert_same(came, exact(*given), 1e-12)


# a memory


def memory(dim=24, heads=2, **kwargs):
    kwargs = {'dim_head': 24 if heads == 1 else 16, 'chunk_size': 3, 'batch_size': 6, **kwargs}
    return randomised(NeuralMemory(dim, heads=heads, **kwargs)).to(DEVICE)


def token_by_token(memory, seq, start):
    """What is retrieved from `start` on."""
    _, state = memory(seq[:, :start])
    buffers, outs = memory.to_buffers(state), []
    for number in range(start, seq.shape[1]):
        in_chunk = torch.tensor([number % 3], device=DEVICE)
        ends_chunk, ends_batch = (number + 1) % 3 == 0, (number + 1) % 6 == 0
        out, after = memory.step(seq[:, number : number + 1], buffers, in_chunk, ends_chunk, ends_batch)
        copy_weights([(buffers, after)])
        outs.append(out)
    return torch.cat(outs, dim=1)


SERVED = [
    {},
    {'heads': 1},
    {'qk_rmsnorm': True, 'conv_kernel': 3, 'activation': nn.SiLU()},
    {'mem_model_norm_add_residual': False, 'pre_rmsnorm': False},
    {'default_model_kwargs': {'depth': 1}},
    {'per_head_learned_parameters': False, 'engine': 'dense'},
]
NOT_SERVED = [
    {'qk_l2norm': True},
    {'post_rmsnorm': True},
    {'channel_gate': True},
    {'default_model_kwargs': {'depth': 3}},
]


@pytest.mark.parametrize('kwargs', SERVED + NOT_SERVED, ids=str)
def test_steps_equal_one_pass(kwargs, launches):
    one, seq = memory(**kwargs), random(2, 14, 24)
    came = token_by_token(one, seq, 4)
    assert len(launches) == 10 * (kwargs in SERVED)
    assert_same(came, one.double()(seq.double())[0][:, 4:], 1e-5)


@pytest.mark.parametrize('kwargs', SERVED, ids=str)
def test_steps_under_autocast(kwargs, launches, switch_kernel):
    one, seq = memory(**kwargs), random(2, 8, 24)
    results = []
    for use in (True, False):
        switch_kernel(token_retrieval_ops, use)
        with torch.autocast(DEVICE, torch.bfloat16):
            results.append(token_by_token(one, seq, 4).float())
    assert len(launches) == 4
    assert_same(*results, 2e-2)


def test_a_transformer_decodes_by_the_kernel(launches, switch_kernel):
    model = MemoryAsContextTransformer(
        num_tokens=16, dim=24, depth=2, segment_len=4, heads=2, dim_head=8, num_persist_mem_tokens=2,
        num_longterm_mem_tokens=1, neural_memory_layers=(1, 2), neural_memory_segment_len=2,
        neural_memory_kwargs={'dim_head': 8, 'heads': 2, 'qk_rmsnorm': True},
    )  # fmt: skip
    model = randomised(model, 0.1).to(DEVICE)
    tokens, results = torch.randint(0, 16, (2, 11), device=DEVICE), []
    for use in (False, True):
        switch_kernel(token_retrieval_ops, use)
        _, state = model(tokens[:, :3], return_state=True)
        step = Stepper.of(model, state, cuda_graphs=False)
        results.append(torch.stack([step(token).clone() for token in tokens[:, 3:].unbind(1)]))
        assert len(launches) == use * 2 * (model.num_positions(11) - model.num_positions(3))
    assert_same(*results, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize('hidden', [None, 128, 256, 1024])
def test_kernel_in_a_cuda_graph(hidden, launches):
    given = problem(64, hidden, heads=4, batch=3)
    _, weights, projected, _ = given
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        retrieve(*given)  # compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        came = retrieve(*given)
    assert len(launches) == 2
    for _ in range(5):
        projected.normal_()
        for w in weights.values():
            w.add_(torch.randn_like(w) * 0.01)
        graph.replay()
        assert_same(came, exact(*given), 1e-5)
