"""Hyper-connections for one token: the package's numbers, by plain operations and by the Triton kernel."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compare import all_in_float64, assert_same, randomised
from hyper_connections import mc_get_init_and_expand_reduce_stream_functions
from hyper_connections.mHCv2 import sinkhorn_knopps

from titans_pytorch import MemoryAsContextTransformer, connections
from titans_pytorch.connections import EPS, ITERATIONS, Unwritten, connect, folded, plain_read, written
from titans_pytorch.decoding import Stepper

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


@pytest.fixture
def kernel():
    pytest.importorskip('triton')
    from titans_pytorch.kernels import connections as kernel

    return kernel


def connection(streams, dim, adds=True, device=DEVICE):
    make, *_ = mc_get_init_and_expand_reduce_stream_functions(
        streams, dim=dim, disable=False, residual_mix_constraint_fn=sinkhorn_knopps
    )
    return randomised(make(add_branch_out_to_residual=adds)).to(device)


def chain(through, x, branches):
    """What each of some connections in a row reads, their branches' outputs given; and the streams at the end."""
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
    read, x = chain([partial(connect, one, folded(one)) for one in some], x, branches)
    return read, written(x)


@pytest.mark.parametrize('streams', [2, 4])
def test_plain_operations_equal_the_package(streams):
    with all_in_float64():
        some = [connection(streams, 16, device='cpu').double() for _ in range(3)]
        x, *branches = torch.randn(3, streams, 16).double(), *torch.randn(3, 3, 1, 16).double()
        assert_same(by_ours(some, x, branches), by_package(some, x, branches), 1e-12)


def test_a_connection_that_only_reads():
    with all_in_float64():
        one, x = connection(4, 16, adds=False, device='cpu').double(), torch.randn(3, 4, 16).double()
        branch_in, _ = connect(one, folded(one), x)
        assert_same(branch_in, one(x.view(12, 1, 16))[0], 1e-12)


@pytest.mark.parametrize('streams, dim', [(2, 5), (3, 37), (4, 96), (5, 130), (8, 33)])
def test_kernel_equals_the_package(streams, dim, kernel, monkeypatch):
    monkeypatch.setattr(connections, 'USE_KERNEL', True)
    some = [connection(streams, dim) for _ in range(3)]
    x, *branches = torch.randn(3, streams, dim, device=DEVICE), *torch.randn(3, 3, 1, dim, device=DEVICE)
    assert_same(by_ours(some, x, branches), by_package(some, x, branches), 1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize(
    'streams, dim, pending, adds',
    [
        (4, 384, True, True),
        (4, 70, False, True),
        (4, 20, True, False),
        (3, 7, True, True),
        (3, 40, False, False),
        (2, 33, True, False),
        (8, 1, True, True),
        (8, 18, False, True),
        (1, 20, True, True),
    ],
)
def test_kernel_equals_plain_operations(streams, dim, pending, adds, dtype, kernel, poisoned, monkeypatch):
    weights = folded(connection(streams, dim, adds))
    # none is dense: of the streams only the features are, of the branch's output not even they
    x = torch.randn(streams, 3, dim + 1, device=DEVICE).to(dtype).transpose(0, 1)[..., :dim]
    write = torch.rand(3, streams, 2, device=DEVICE).to(dtype)[..., 1:]
    branch_out = torch.randn(dim, 1, 3, device=DEVICE).permute(2, 1, 0)
    unwritten = (write, branch_out) if pending else None
    streams_now = written(Unwritten(x, *unwritten)) if pending else x

    for block in (512, 32):
        monkeypatch.setattr(kernel, 'BLOCK', block)
        came = kernel.read(x, unwritten, *weights, ITERATIONS, EPS)
        assert {t.dtype for t in came} == {dtype} and all(t.is_contiguous() for t in came)
        assert_same(came, plain_read(streams_now, weights), 1e-5 if dtype == torch.float32 else 4e-3)


def test_streams_of_zeros_and_what_is_not_a_number(kernel):
    weights = folded(connection(4, 20))
    x = torch.randn(3, 4, 20, device=DEVICE)
    x[0, 1] = 0
    x[1] = 0
    assert_same(kernel.read(x, None, *weights, ITERATIONS, EPS), plain_read(x, weights), 1e-5)
    x[1, 2, 3] = float('nan')
    for branch_in, residual, write in (kernel.read(x, None, *weights, ITERATIONS, EPS), plain_read(x, weights)):
        assert branch_in[1].isnan().any() and residual[1].isnan().any() and write[1, 2].isnan().all()
        assert all(t[::2].isfinite().all() for t in (branch_in, residual, write))


def transformer(**changes) -> MemoryAsContextTransformer:
    kwargs = dict(
        num_tokens=16, dim=24, depth=2, segment_len=4, heads=2, dim_head=8, num_longterm_mem_tokens=1,
        neural_memory_segment_len=2, neural_memory_kwargs={'dim_head': 8, 'heads': 2},
    )  # fmt: skip
    return randomised(MemoryAsContextTransformer(**{**kwargs, **changes}), 0.1).to(DEVICE)


@pytest.mark.parametrize('gates', [False, True])
def test_a_transformer_decodes_by_the_kernel(gates, kernel, monkeypatch):
    model = transformer(neural_mem_gate_attn_output=gates)
    tokens = torch.randint(0, 16, (1, 9), device=DEVICE)
    launches, read = [], kernel.read
    monkeypatch.setattr(kernel, 'read', lambda *args: (launches.append(None), read(*args))[1])
    results = []
    for use in (False, True):
        monkeypatch.setattr(connections, 'USE_KERNEL', use)
        _, cache = model(tokens[:, :3], return_cache=True)
        step = Stepper.of(model, cache, cuda_graphs=False)
        results.append(torch.stack([step(token).clone() for token in tokens[:, 3:].unbind(1)]))
        assert len(launches) == use * 6 * (6 + 2)  # of each connection at each position, two of memory tokens
    assert_same(*results, 1e-4)


def test_the_kernel_is_for_no_gradient_and_float32_at_most(kernel, monkeypatch):
    monkeypatch.setattr(connections, 'USE_KERNEL', True)
    monkeypatch.setattr(kernel, 'read', None)
    one = connection(4, 8)
    weights, x = folded(one), torch.randn(1, 4, 8, device=DEVICE)
    connect(one, weights, x.double())
    with torch.enable_grad():
        branch_in, _ = connect(one, weights, x.requires_grad_())
    assert branch_in.requires_grad
    one = connection(kernel.LARGEST + 1, 8)
    connect(one, folded(one), torch.randn(1, kernel.LARGEST + 1, 8, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_kernel_in_a_cuda_graph(dtype, kernel):
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
