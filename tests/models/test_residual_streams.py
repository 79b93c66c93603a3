"""Residual streams of models: the `hyper_connections` package's numbers, for one token and for a sequence."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from compare import all_in_float64, assert_same, gradients, randomised
from hyper_connections import mc_get_init_and_expand_reduce_stream_functions
from hyper_connections.manifold_constrained_hyper_connections import ManifoldConstrainedHyperConnections
from hyper_connections.mHCv2 import sinkhorn_knopps
from torch import nn

from titans_pytorch import (
    LongTermMemoryModel,
    MemoryAsContextTransformer,
    MemoryAsGateTransformer,
    MemoryAsLayerTransformer,
    without_kernels,
)
from titans_pytorch.generation.stepper import Stepper
from titans_pytorch.models.residual_streams import (
    HyperConnection,
    StreamNorm,
    complete,
    connect,
    connect_token,
    folded,
    takes_tokens,
)
from titans_pytorch.ops import hyper_connection, token_hyper_connection
from titans_pytorch.ops.sinkhorn import sinkhorn

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


def connection(streams, dim, adds=True, device=DEVICE, constraint=sinkhorn_knopps, **changes):
    """The package's; or, with our `sinkhorn` and no other change, the one that models have."""
    if constraint is sinkhorn and not changes:
        return randomised(HyperConnection(streams, dim, adds)).to(device)
    make, *_ = mc_get_init_and_expand_reduce_stream_functions(
        streams, dim=dim, disable=False, residual_mix_constraint_fn=constraint
    )
    return randomised(make(add_branch_out_to_residual=adds, **changes)).to(device)


def of_the_package(one):
    """A copy of a connection that computes by the package's own code."""
    one = copy.deepcopy(one)
    one.__class__ = ManifoldConstrainedHyperConnections
    return one


def chain(through, x, branches):
    """Branch inputs of consecutive connections, for given branch outputs; and the streams after the last."""
    read = []
    for connection, branch_out in zip(through, branches):
        branch_in, add_residual = connection(x)
        x = add_residual(branch_out)
        read.append(branch_in)
    return read, x


def by_package(some, x, branches):
    batch, streams, dim = x.shape
    read, x = chain(some, x.reshape(batch * streams, 1, dim), branches)
    return read, x.view(batch, streams, dim)


def by_ours(some, x, branches):
    read, x = chain([partial(connect_token, one, folded(one)) for one in some], x, branches)
    return read, complete(x)


@pytest.mark.parametrize('streams', [2, 4])
def test_tokens_equal_the_package(streams):
    with all_in_float64():
        some = [connection(streams, 16, device='cpu').double() for _ in range(3)]
        x, *branches = torch.randn(3, streams, 16).double(), *torch.randn(3, 3, 1, 16).double()
        assert_same(by_ours(some, x, branches), by_package(some, x, branches), 1e-12)


def test_a_connection_that_only_reads():
    with all_in_float64():
        one, x = connection(4, 16, adds=False, device='cpu').double(), torch.randn(3, 4, 16).double()
        branch_in, _ = connect_token(one, folded(one), x)
        assert_same(branch_in, one(x.view(12, 1, 16))[0], 1e-12)


@pytest.mark.parametrize(('streams', 'dim'), [(2, 5), (3, 37), (4, 96), (5, 130), (8, 33)])
def test_tokens_by_the_kernel_equal_the_package(streams, dim, kernels_everywhere):
    some = [connection(streams, dim) for _ in range(3)]
    x, *branches = torch.randn(3, streams, dim, device=DEVICE), *torch.randn(3, 3, 1, dim, device=DEVICE)
    assert_same(by_ours(some, x, branches), by_package(some, x, branches), 1e-5)


def transformer(**changes) -> MemoryAsContextTransformer:
    kwargs = dict(
        num_tokens=16, dim=24, depth=2, segment_len=4, heads=2, dim_head=8, num_longterm_mem_tokens=1,
        neural_memory_segment_len=2, neural_memory_kwargs={'dim_head': 8, 'heads': 2},
    )  # fmt: skip
    return randomised(MemoryAsContextTransformer(**{**kwargs, **changes}), 0.1).to(DEVICE)


@pytest.mark.parametrize('gates', [False, True])
def test_a_transformer_decodes_by_the_kernel(gates, kernels_everywhere, note_launches):
    model = transformer(neural_mem_gate_attn_output=gates)
    tokens = torch.randint(0, 16, (1, 9), device=DEVICE)
    launches = note_launches(token_hyper_connection)

    def decoded():
        _, cache = model(tokens[:, :3], return_cache=True)
        step = Stepper.of(model, cache, cuda_graphs=False)
        return torch.stack([step(token).clone() for token in tokens[:, 3:].unbind(1)])

    with without_kernels():
        expected = decoded()
    assert not launches
    assert_same(decoded(), expected, 1e-4)
    assert len(launches) == 6 * (6 + 2)  # of each connection at each position, two of memory tokens


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_kernel_in_a_cuda_graph(dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    some = [connection(4, 384) for _ in range(5)]
    x, *branches = (torch.randn(3, rows, 384, device=DEVICE).to(dtype) for rows in (4, 1, 1, 1, 1, 1))
    by_ours(some, x, branches)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        came = by_ours(some, x, branches)
    for t in (x, *branches):
        t.normal_()
    graph.replay()
    expected = by_package(some, x.float(), [t.float() for t in branches])
    assert_same(came, expected, 1e-5 if dtype == torch.float32 else 3e-2)


# a sequence


def sequence(batch, tokens, streams, dim, dtype=torch.float32, device=DEVICE):
    """Streams, and three outputs of branches."""
    x = torch.randn(batch * streams, tokens, dim, device=device).to(dtype)
    return x, *torch.randn(3, batch, tokens, dim, device=device).to(dtype)


@torch.enable_grad()
def with_gradients(some, x, branches, through, of=slice(None), run=chain):
    """Branch inputs and final streams of a chain of connections, and gradients of all that enters it."""
    x, *branches = (t.detach().requires_grad_() for t in (x, *branches))
    read, end = run([partial(through, one) for one in some], x, branches)
    results = [*read, complete(end)]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(t) for t in results]
    loss = sum((t * weight).sum() for t, weight in [*zip(results, weights)][of])
    learned = [x, *branches, *(p for one in some for p in one.parameters())]
    gradients = torch.autograd.grad(loss, learned, allow_unused=True)
    return results, [torch.zeros_like(t) if g is None else g for t, g in zip(learned, gradients)]


def by_module(some, x, branches, **kwargs):
    """The package's modules, in float64."""
    with all_in_float64():
        some = [of_the_package(one).double() for one in some]
        return with_gradients(some, x.double(), [t.double() for t in branches], lambda one, x: one(x), **kwargs)


@pytest.mark.parametrize('streams', [2, 4])
def test_sequences_equal_the_package(streams):
    with all_in_float64():
        some = [connection(streams, 16, constraint=sinkhorn).double() for _ in range(3)]
        x, *branches = sequence(2, 5, streams, 16, torch.float64)
        assert_same(with_gradients(some, x, branches, connect), by_module(some, x, branches), 1e-10)


@pytest.mark.parametrize(
    ('batch', 'tokens', 'streams', 'dim', 'of'),
    [
        (2, 3, 4, 36, slice(None)),
        (3, 1, 3, 130, slice(None)),
        # only the third branch input, and only the final streams
        (1, 3, 4, 20, slice(2, 3)),
        (1, 3, 4, 20, slice(3, 4)),
    ],
)
def test_a_chain_by_kernels_equals_the_package(batch, tokens, streams, dim, of, kernels_everywhere, poisoned):
    some = [connection(streams, dim, constraint=sinkhorn) for _ in range(3)]
    x, *branches = sequence(batch, tokens, streams, dim)
    assert_same(with_gradients(some, x, branches, connect, of), by_module(some, x, branches, of=of), 1e-5)


def test_one_token_of_a_sequence_and_one_stream(kernels_everywhere):
    for batch, tokens, streams in [(2, 1, 4), (3, 2, 1)]:
        some = [connection(streams, 8, constraint=sinkhorn) for _ in range(3)]
        x, *branches = sequence(batch, tokens, streams, 8)
        assert_same(with_gradients(some, x, branches, connect), by_module(some, x, branches), 1e-5)


def test_a_connection_of_a_sequence_that_only_reads(kernels_everywhere, poisoned):
    """Its streams are read again by the next one."""
    reads, adds = connection(4, 20, False, constraint=sinkhorn), connection(4, 20, constraint=sinkhorn)
    x, first, *_ = sequence(2, 3, 4, 20)

    @torch.enable_grad()
    def run(through, before, reads, x, branch_out):
        x, branch_out = x.detach().requires_grad_(), branch_out.detach().requires_grad_()
        _, add_residual = through(before, x)
        x_next = add_residual(branch_out)
        only_read, unchanged = through(reads, x_next)
        assert unchanged(first) is first
        read, _ = through(before, x_next)
        learned = [x, branch_out, *before.parameters(), *reads.parameters()]
        return only_read, read, torch.autograd.grad((only_read.square() + read).sum(), learned)

    with all_in_float64():
        modules = [of_the_package(one).double() for one in (adds, reads)]
        expected = run(lambda one, x: one(x), *modules, x.double(), first.double())
    assert_same(run(connect, adds, reads, x, first), expected, 1e-5)


def test_only_plain_connections_take_the_operation(monkeypatch):
    monkeypatch.setattr('titans_pytorch.models.residual_streams.hyper_connection', None)
    x = torch.randn(2 * 4, 3, 8, device=DEVICE)
    other = connection(4, 8)
    assert_same(connect(other, x)[0], other(x)[0], 0)
    for changes in (dict(dropout=0.1), dict(num_dynamic_alpha_proposals=2), dict(channel_first=True)):
        one = connection(4, 8, constraint=sinkhorn, **changes)
        t = x.mT if 'channel_first' in changes else x
        assert_same(connect(one, t)[0], one(t)[0], 0)
    make, *_ = mc_get_init_and_expand_reduce_stream_functions(1, dim=8, disable=True)
    branch_in, add_residual = connect(make(), x)
    assert branch_in is x and torch.equal(add_residual(x), 2 * x)

    for of in ('', 'norm'):
        for register in ('register_forward_hook', 'register_full_backward_hook'):
            one, seen = connection(4, 8, constraint=sinkhorn), []
            getattr(one.get_submodule(of), register)(lambda *_, seen=seen: seen.append(True))
            with torch.enable_grad():
                connect(one, x.clone().requires_grad_())[0].sum().backward()
            assert seen, (of, register)


class DoubledNorm(StreamNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Doubled(nn.Identity):
    def forward(self, x):
        return 2 * x


class DoubledDropout(nn.Dropout):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(
    ('name', 'part'),
    [('norm', DoubledNorm(8)), ('residual_transform', Doubled()), ('dropout', DoubledDropout(0.0))],
)
def test_replaced_parts_of_connections_are_called(name, part):
    x, one = torch.randn(2 * 4, 3, 8, device=DEVICE), connection(4, 8, constraint=sinkhorn)
    assert takes_tokens(one)
    setattr(one, name, part.to(DEVICE))
    (branch_in, add_residual), (expected, adds) = connect(one, x), one(x)
    assert_same((branch_in, complete(add_residual(branch_in))), (expected, adds(expected)), 0)
    assert not takes_tokens(one)


@pytest.mark.parametrize('adds', [True, False])
def test_calls_of_connections_equal_the_operation(adds):
    """In float64 too: calls serve where a hook or a parametrization keeps the operation away."""
    hooked = connection(4, 16, adds, constraint=sinkhorn).double()
    plain = copy.deepcopy(hooked)
    hooked.norm.register_forward_hook(lambda *_: None)
    x, branch_out, *_ = sequence(2, 5, 4, 16, torch.float64)

    def run(one, x, branch_out):
        branch_in, add_residual = connect(one, x)
        return branch_in, complete(add_residual(branch_out))

    def with_gradients_of(one):
        leaves = [t.clone().requires_grad_() for t in (x, branch_out)]
        with torch.enable_grad():
            read, end = run(one, *leaves)
            loss = read.square().sum() + end.square().sum()
        gradients = torch.autograd.grad(loss, [*leaves, *one.parameters()], allow_unused=True)
        return read, end, [torch.zeros(()) if g is None or not g.any() else g for g in gradients]

    came, expected = with_gradients_of(hooked), with_gradients_of(plain)
    assert came[0].dtype == came[1].dtype == torch.float64
    assert_same(came, expected, 1e-12)
    half = [t.to(torch.bfloat16) for t in (x, branch_out)]
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same(run(hooked.bfloat16(), *half), run(plain.bfloat16(), *half), 2e-2)


def test_connections_of_a_sequence_are_compiled_whole(kernels_everywhere):
    some = [connection(2, 6, constraint=sinkhorn) for _ in range(3)]
    x, *branches = sequence(1, 2, 2, 6)
    compiled = torch.compile(chain, backend='aot_eager', fullgraph=True)
    assert_same(with_gradients(some, x, branches, connect, run=compiled), by_module(some, x, branches), 1e-5)


WHOLE = {
    'MAC': (MemoryAsContextTransformer, {'num_longterm_mem_tokens': 1}),
    'MAC that gates': (MemoryAsContextTransformer, {'neural_mem_gate_attn_output': True}),
    'MAC in the order of the paper': (MemoryAsContextTransformer, {'paper_order': True}),
    'MAG': (MemoryAsGateTransformer, {}),
    'MAL': (MemoryAsLayerTransformer, {}),
    'LMM': (LongTermMemoryModel, {}),
}


@pytest.mark.parametrize('name', WHOLE)
def test_models_with_and_without_the_kernels(name, kernels_everywhere, note_launches):
    """A loss, its gradients, and hidden states of a piece that follows on a state."""
    kind, kwargs = WHOLE[name]
    sizes = {'num_tokens': 11, 'dim': 4, 'depth': 1, 'dim_head': 4, 'heads': 1, 'segment_len': 2}
    memory = {'default_step_transform_max_lr': 0.1}
    model = kind(
        **sizes, neural_memory_segment_len=2, num_residual_streams=2, neural_memory_kwargs=memory, **kwargs
    ).to(DEVICE)
    randomised(model, 0.1)
    tokens = torch.randint(0, 11, (1, 6), device=DEVICE)
    launches = note_launches(hyper_connection)

    def results():
        with torch.enable_grad():
            loss = model(tokens, return_loss=True)
            grads = gradients(model, loss)
        _, state = model(tokens[:, :3], return_state=True)
        return loss, grads, model(tokens[:, 3:], state=state, return_hidden=True)

    with without_kernels():
        expected = results()
    assert not launches
    assert_same(results(), expected, 1e-4)
    # three times through the model
    connections = [connection for block in model._blocks for connection in block.connections if connection is not None]
    assert len(launches) == 3 * len(connections)


def test_transforms_of_a_connection(kernels_everywhere):
    one, x = connection(2, 8, constraint=sinkhorn), torch.randn(4, 3, 8, device=DEVICE)

    def read(x):
        return connect(one, x)[0].square().sum()

    _, along = torch.func.jvp(read, (x,), (torch.ones_like(x),))
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(read(leaf := x.clone().requires_grad_()), leaf)
    assert_same(along, slope.sum(), 1e-4)
