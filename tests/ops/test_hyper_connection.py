"""Hyper-connections, for one token and for a sequence: the package's numbers, by plain operations and by kernels."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from compare import all_in_float64, assert_same, gradients, randomised
from hyper_connections import mc_get_init_and_expand_reduce_stream_functions
from hyper_connections.mHCv2 import sinkhorn_knopps

from titans_pytorch import (
    LongTermMemoryModel,
    MemoryAsContextTransformer,
    MemoryAsGateTransformer,
    MemoryAsLayerTransformer,
)
from titans_pytorch.generation.stepper import Stepper
from titans_pytorch.ops import hyper_connection
from titans_pytorch.ops.hyper_connection import (
    EPS,
    ITERATIONS,
    HyperConnection,
    Unwritten,
    connect,
    connected,
    folded,
    plain_connect,
    plain_connect_backward,
    plain_read,
    written,
)
from titans_pytorch.ops.sinkhorn import sinkhorn

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


@pytest.fixture
def kernel():
    pytest.importorskip('triton')
    from titans_pytorch.ops.hyper_connection import triton_token as kernel

    return kernel


def connection(streams, dim, adds=True, device=DEVICE, constraint=sinkhorn_knopps, **changes):
    """The package's; or, with our `sinkhorn` and no other change, the one that models have."""
    if constraint is sinkhorn and not changes:
        return randomised(HyperConnection(streams, dim, adds)).to(device)
    make, *_ = mc_get_init_and_expand_reduce_stream_functions(
        streams, dim=dim, disable=False, residual_mix_constraint_fn=constraint
    )
    return randomised(make(add_branch_out_to_residual=adds, **changes)).to(device)


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


@pytest.mark.parametrize(('streams', 'dim'), [(2, 5), (3, 37), (4, 96), (5, 130), (8, 33)])
def test_kernel_equals_the_package(streams, dim, kernel, monkeypatch):
    monkeypatch.setattr(hyper_connection, 'USE_KERNEL', True)
    some = [connection(streams, dim) for _ in range(3)]
    x, *branches = torch.randn(3, streams, dim, device=DEVICE), *torch.randn(3, 3, 1, dim, device=DEVICE)
    assert_same(by_ours(some, x, branches), by_package(some, x, branches), 1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ('streams', 'dim', 'pending', 'adds'),
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
        monkeypatch.setattr(hyper_connection, 'USE_KERNEL', use)
        _, cache = model(tokens[:, :3], return_cache=True)
        step = Stepper.of(model, cache, cuda_graphs=False)
        results.append(torch.stack([step(token).clone() for token in tokens[:, 3:].unbind(1)]))
        assert len(launches) == use * 6 * (6 + 2)  # of each connection at each position, two of memory tokens
    assert_same(*results, 1e-4)


def test_the_kernel_is_for_no_gradient_and_float32_at_most(kernel, monkeypatch):
    monkeypatch.setattr(hyper_connection, 'USE_KERNEL', True)
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


# a sequence


@pytest.fixture
def sequence_kernel(monkeypatch):
    pytest.importorskip('triton')
    from titans_pytorch.ops.hyper_connection import triton as kernel

    monkeypatch.setattr(hyper_connection, 'USE_KERNEL', True)
    return kernel


def sequence(batch, tokens, streams, dim, dtype=torch.float32, device=DEVICE):
    """Streams, and three outputs of branches."""
    x = torch.randn(batch * streams, tokens, dim, device=device).to(dtype)
    return x, *torch.randn(3, batch, tokens, dim, device=device).to(dtype)


@torch.enable_grad()
def with_gradients(some, x, branches, through, of=slice(None), run=chain):
    """What a chain of connections reads and ends with; gradients of the streams, branches' outputs and parameters."""
    x, *branches = (t.detach().requires_grad_() for t in (x, *branches))
    read, end = run([partial(through, one) for one in some], x, branches)
    results = [*read, written(end)]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(t) for t in results]
    loss = sum((t * weight).sum() for t, weight in [*zip(results, weights)][of])
    learned = [x, *branches, *(p for one in some for p in one.parameters())]
    gradients = torch.autograd.grad(loss, learned, allow_unused=True)
    return results, [torch.zeros_like(t) if g is None else g for t, g in zip(learned, gradients)]


def by_module(some, x, branches, **kwargs):
    """The package's modules, in float64."""
    with all_in_float64():
        some = [copy.deepcopy(one).double() for one in some]
        return with_gradients(some, x.double(), [t.double() for t in branches], lambda one, x: one(x), **kwargs)


@pytest.mark.parametrize('streams', [2, 4])
def test_plain_sequences_equal_the_package(streams, monkeypatch):
    monkeypatch.setattr(hyper_connection, '_kernels_serve', lambda *_: True)
    some = [connection(streams, 16, constraint=sinkhorn).double() for _ in range(3)]
    x, *branches = sequence(2, 5, streams, 16, torch.float64)
    assert_same(with_gradients(some, x, branches, connected), by_module(some, x, branches), 1e-10)


@pytest.mark.parametrize(
    ('batch', 'tokens', 'streams', 'dim', 'of'),
    [
        (2, 3, 4, 36, slice(None)),
        (3, 1, 3, 130, slice(None)),
        # only what the third reads, and only the streams at the end
        (1, 3, 4, 20, slice(2, 3)),
        (1, 3, 4, 20, slice(3, 4)),
    ],
)
def test_a_chain_by_kernels_equals_the_package(batch, tokens, streams, dim, of, sequence_kernel, poisoned):
    some = [connection(streams, dim, constraint=sinkhorn) for _ in range(3)]
    x, *branches = sequence(batch, tokens, streams, dim)
    assert_same(with_gradients(some, x, branches, connected, of), by_module(some, x, branches, of=of), 1e-5)


def test_one_token_of_a_sequence_and_one_stream(sequence_kernel):
    for batch, tokens, streams in [(2, 1, 4), (3, 2, 1)]:
        some = [connection(streams, 8, constraint=sinkhorn) for _ in range(3)]
        x, *branches = sequence(batch, tokens, streams, 8)
        assert_same(with_gradients(some, x, branches, connected), by_module(some, x, branches), 1e-5)


def test_a_connection_of_a_sequence_that_only_reads(sequence_kernel, poisoned):
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
        modules = [copy.deepcopy(one).double() for one in (adds, reads)]
        expected = run(lambda one, x: one(x), *modules, x.double(), first.double())
    assert_same(run(connected, adds, reads, x, first), expected, 1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ('batch', 'tokens', 'streams', 'dim', 'pending', 'adds'),
    [(3, 3, 4, 36, True, True), (2, 4, 3, 7, True, True), (2, 3, 4, 130, False, True), (1, 3, 8, 5, True, True),
     (2, 3, 5, 130, True, False), (1, 7, 2, 33, False, False)],
)  # fmt: skip
def test_sequence_kernels_equal_plain_operations(
    batch, tokens, streams, dim, pending, adds, dtype, sequence_kernel, poisoned, monkeypatch
):
    weights = [p.detach() for p in hyper_connection._weights(connection(streams, dim, adds))]
    # of none are the positions dense; of the gates and the branch's output not even the features are
    x = [torch.randn(tokens, batch * streams, dim + 1, device=DEVICE).to(dtype).transpose(0, 1)[..., :dim]]
    if pending:
        x += [torch.rand(batch * streams, 2, tokens, device=DEVICE).mT[..., 1:]]
        x += [torch.randn(dim, tokens, batch, device=DEVICE).permute(2, 1, 0)]
    exact, exact_weights = [t.double() for t in x], [t.double() for t in weights]
    expected = plain_connect(exact, exact_weights)
    d_results = [torch.randn(t.shape, device=DEVICE) for t in expected[:3]]
    d_results[:2] = (t.to(dtype) for t in d_results[:2])
    d_expected = plain_connect_backward(*(t.double() for t in d_results), expected[3], exact, exact_weights)

    # one position for each warp, and several; one group for each program, and several
    for positions, warps, programs in [(2, 2, 99), (4, 2, 2)]:
        monkeypatch.setattr(sequence_kernel, 'FORWARD', (positions, warps))
        monkeypatch.setattr(sequence_kernel, 'BACKWARD', (positions, warps))
        monkeypatch.setattr(sequence_kernel, 'MOST_PROGRAMS', programs)
        *came, saved = sequence_kernel.forward(x, weights, ITERATIONS, EPS)
        d_came = sequence_kernel.backward(*d_results, saved, x, weights, ITERATIONS, EPS)
        assert [t.dtype for t in came] == [dtype, dtype, torch.float32]
        assert [t.dtype for t in d_came[0]] == [t.dtype for t in x] and all(t.is_contiguous() for t in came)
        assert_same([came, d_came], [expected[:3], d_expected], 1e-5 if dtype == torch.float32 else 8e-3)


def test_positions_of_zeros_and_what_is_not_a_number(sequence_kernel):
    weights = [p.detach() for p in hyper_connection._weights(connection(4, 20))]
    x = torch.randn(4, 3, 20, device=DEVICE)
    x[1, 0] = 0
    x[:, 1] = 0
    d_results = [torch.randn(t, device=DEVICE) for t in ((1, 3, 20), (4, 3, 20), (4, 3, 1))]

    def both(x, weights, forward, backward, *args):
        *came, saved = forward([x], weights, *args)
        return came, backward(*d_results, saved, [x], weights, *args)

    kernel = sequence_kernel
    came = both(x, weights, kernel.forward, kernel.backward, ITERATIONS, EPS)
    expected = both(x, weights, plain_connect, plain_connect_backward)
    # along streams of zeros a gradient is that of a division by 1e-12
    (d_x,), (d_expected,) = came[1][0], expected[1][0]
    assert ((d_x - d_expected).abs() <= 1e-4 * d_expected.abs().amax(dim=-1, keepdim=True).clamp(min=1)).all()
    assert_same([came[0], came[1][1]], [expected[0], expected[1][1]], 1e-4)

    x[2, 1, 3] = float('nan')
    (branch_in, mixed, write), ((d_x,), _) = both(x, weights, kernel.forward, kernel.backward, ITERATIONS, EPS)
    assert branch_in[:, 1].isnan().any() and mixed[:, 1].isnan().any() and write[2, 1].isnan().all()
    assert all(t[:, ::2].isfinite().all() for t in (branch_in, mixed, write, d_x))


def test_sequence_kernels_are_for_plain_connections(sequence_kernel, monkeypatch):
    monkeypatch.setattr(sequence_kernel, 'forward', None)
    x = torch.randn(2 * 4, 3, 8, device=DEVICE)
    one, other = connection(4, 8, constraint=sinkhorn), connection(4, 8)
    assert_same(connected(other, x)[0], other(x)[0], 0)
    assert_same(connected(one.double(), x.double())[0], one(x.double())[0], 0)
    for changes in (dict(dropout=0.1), dict(num_dynamic_alpha_proposals=2), dict(channel_first=True)):
        one = connection(4, 8, constraint=sinkhorn, **changes)
        t = x.mT if 'channel_first' in changes else x
        assert_same(connected(one, t)[0], one(t)[0], 0)
    make, *_ = mc_get_init_and_expand_reduce_stream_functions(1, dim=8, disable=True)
    branch_in, add_residual = connected(make(), x)
    assert branch_in is x and torch.equal(add_residual(x), 2 * x)
    monkeypatch.setattr(hyper_connection, 'MOST_STREAMS', 3)
    connected(connection(4, 8, constraint=sinkhorn), x)


def test_connections_of_a_sequence_are_compiled_whole(sequence_kernel):
    some = [connection(2, 6, constraint=sinkhorn) for _ in range(3)]
    x, *branches = sequence(1, 2, 2, 6)
    compiled = torch.compile(chain, backend='aot_eager', fullgraph=True)
    assert_same(with_gradients(some, x, branches, connected, run=compiled), by_module(some, x, branches), 1e-5)


@pytest.mark.parametrize('adds', [True, False])
def test_the_operation_is_what_it_says_to_the_compiler(adds):
    weights = [p.detach().clone().requires_grad_() for p in hyper_connection._weights(connection(4, 6, adds))]
    x, write, branch_out = torch.randn(8, 3, 6), torch.rand(8, 3, 1), torch.randn(2, 3, 6)
    unwritten = [t.to(DEVICE).requires_grad_() for t in (x, write, branch_out)]
    with torch.enable_grad():
        for inputs in (unwritten[:1], unwritten):
            torch.library.opcheck(
                hyper_connection._connect,
                (inputs, weights),
                test_utils=('test_schema', 'test_faketensor', 'test_autograd_registration'),
            )


def test_kernels_and_connections_agree_on_the_streams(sequence_kernel):
    assert hyper_connection.MOST_STREAMS == sequence_kernel.LARGEST


WHOLE = {
    'MAC': (MemoryAsContextTransformer, {'num_longterm_mem_tokens': 1}),
    'MAC that gates': (MemoryAsContextTransformer, {'neural_mem_gate_attn_output': True}),
    'MAC in the order of the paper': (MemoryAsContextTransformer, {'paper_order': True}),
    'MAG': (MemoryAsGateTransformer, {}),
    'MAL': (MemoryAsLayerTransformer, {}),
    'LMM': (LongTermMemoryModel, {}),
}


@pytest.mark.parametrize('name', WHOLE)
def test_models_with_and_without_the_kernels(name, kernel, monkeypatch):
    """A loss, its gradients, and hidden states of a piece that follows on a state."""
    kind, kwargs = WHOLE[name]
    sizes = {'num_tokens': 11, 'dim': 4, 'depth': 1, 'dim_head': 4, 'heads': 1, 'segment_len': 2}
    memory = {'default_step_transform_max_lr': 0.1}
    model = kind(
        **sizes, neural_memory_segment_len=2, num_residual_streams=2, neural_memory_kwargs=memory, **kwargs
    ).to(DEVICE)
    randomised(model, 0.1)
    tokens = torch.randint(0, 11, (1, 6), device=DEVICE)
    called, connect = [], hyper_connection._connect
    monkeypatch.setattr(hyper_connection, '_connect', lambda *args: called.append(args) or connect(*args))

    def results(use):
        monkeypatch.setattr(hyper_connection, 'USE_KERNEL', use)
        called.clear()
        with torch.enable_grad():
            loss = model(tokens, return_loss=True)
            grads = gradients(model, loss)
        _, state = model(tokens[:, :3], return_state=True)
        return loss, grads, model(tokens[:, 3:], state=state, return_hidden=True)

    expected = results(False)
    assert not called
    assert_same(results(True), expected, 1e-4)
    # three times through the model
    assert len(called) == 3 * sum(connection is not None for block in model._blocks for connection in block.connections)


def test_connections_of_ones_own_and_transforms_are_the_modules(kernel, monkeypatch):
    monkeypatch.setattr(hyper_connection, 'USE_KERNEL', True)
    one, x = connection(2, 8), torch.randn(4, 3, 8, device=DEVICE)

    def read(x):
        return connected(one, x)[0].square().sum()

    _, along = torch.func.jvp(read, (x,), (torch.ones_like(x),))
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(read(leaf := x.clone().requires_grad_()), leaf)
    assert_same(along, slope.sum(), 1e-4)

    seen = []
    one.register_forward_hook(lambda *_: seen.append(True))
    connected(one, x)
    assert seen
