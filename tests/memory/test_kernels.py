"""A whole memory whose operations run as kernels: against the dense engine, compiled, and in a CUDA graph."""

from __future__ import annotations

import importlib

import pytest
import torch
from compare import assert_same, gradients
from memories import inputs, memory

from titans_pytorch.memory.backends import fused_mlp, whole_batches
from titans_pytorch.memory.backends.fused_mlp import FusedMLP
from titans_pytorch.memory.backends.whole_batches import WholeBatches

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
OPERATIONS = ('inner_gradient', 'final_state', 'memory_batch_scan', 'retrieve_sequence', 'spectral_memory_scan')
OF_HEADS = ('short_convolution', 'gated_heads')
# matrices are no larger than a chunk's rows, and are formed; or are factored, but not stored by a scan
FORMED = ['spectral norm', 'two keys per token', 'linear memory']
# but on a GPU stored by a scan
FORMED_ON_CPU = ['two keys per token', 'linear memory']
BY_BATCH = ['soft clamp']
SCANNED = [
    *('plain', 'no momentum', 'momentum of order 3, combined', 'no residual norm', 'lookahead values'),
    'look-ahead gradients',
]


@pytest.fixture
def launched(kernels_everywhere, monkeypatch):
    """Kernels run on this device too; the names of those that ran."""
    launched = set()

    def noted(name, operation):
        return lambda *args: (launched.add(name), operation(*args))[1]

    files = [(name, 'triton', name) for name in OPERATIONS + OF_HEADS]
    for name, file, function in (*files, ('memory_batch_scan', 'triton_on_chip', 'memory_batch_scan_on_chip')):
        kernels = importlib.import_module(f'titans_pytorch.ops.{name}.{file}')
        monkeypatch.setattr(kernels, function, noted(name, getattr(kernels, function)))
    return launched


@pytest.mark.parametrize('switch', FORMED + BY_BATCH + SCANNED)
def test_a_memory_equals_the_dense_engine(launched, switch):
    dual = memory(switch, engine='dual').float().to(DEVICE)
    dense = memory(switch, engine='dense').to(DEVICE)
    dense.load_state_dict(dual.state_dict())
    seq = inputs(dense, 17).to(DEVICE)
    results = []
    for mem in (dual, dense):
        out, state = mem(seq.to(next(mem.parameters()).dtype))
        loss = out.double().sin().sum() + sum(w.double().sum() for w in state.states[0].values())
        results.append((out, state.states, gradients(mem, loss)))
    assert_same(*results, 3e-4)
    scanned = switch in SCANNED or (DEVICE == 'cuda' and switch in FORMED_ON_CPU)
    assert ('memory_batch_scan' in launched) == scanned
    under_spectral_norm = switch == 'spectral norm'
    assert ('spectral_memory_scan' in launched) == under_spectral_norm
    assert ('inner_gradient' in launched) == (not scanned and not under_spectral_norm)
    assert ('retrieve_sequence' in launched) == ('final_state' in launched or scanned)
    assert ('final_state' in launched) == (switch in BY_BATCH)


@pytest.mark.parametrize('switch', ['plain', 'spectral norm', 'soft clamp'])
def test_checkpoints_recompute_what_kernels_read(launched, switch):
    plain, checkpointed = (memory(switch, checkpoint_every=every).float().to(DEVICE) for every in (None, 8))
    checkpointed.load_state_dict(plain.state_dict())
    seq = inputs(plain, 24).float().to(DEVICE)
    expected, came = (gradients(mem, mem(seq)[0].sin().sum()) for mem in (plain, checkpointed))
    assert_same(came, expected, 1e-4)
    assert launched


@pytest.mark.parametrize('changes', [{}, {'qk_l2norm': True, 'post_rmsnorm': True, 'num_kv_per_token': 2}])
@pytest.mark.parametrize('channel_gate', [False, True])
def test_queries_keys_and_values_equal_those_of_the_dense_engine(launched, changes, channel_gate):
    options = {**changes, 'channel_gate': channel_gate}
    dual, dense = (memory('convolution', engine=engine, **options) for engine in ('dual', 'dense'))
    dense.to(DEVICE).load_state_dict(dual.float().to(DEVICE).state_dict())
    seq, mask = inputs(dense, 17).to(DEVICE), torch.rand(2, 17, device=DEVICE) < 0.7
    results = []
    for mem in (dual, dense):
        own = seq.to(next(mem.parameters()).dtype)
        first, state = mem(own[:, :7], store_mask=mask[:, :7])
        rest, state = mem(own[:, 7:], state=state, store_mask=mask[:, 7:])
        out = torch.cat((first, rest), dim=1)
        results.append((out, state.states, gradients(mem, out.double().sin().sum())))
    assert_same(*results, 3e-4)
    assert launched >= {*OF_HEADS}


def blocks_have_at_most(rows, monkeypatch):
    of = WholeBatches.of
    monkeypatch.setattr(WholeBatches, 'of', lambda *args: of(*args)._replace(most_rows=rows))


NORMALIZED = {'normalized_momentum': True, 'mem_model_norm_add_residual': False}


@pytest.mark.parametrize(
    ('switch', 'depth', 'changes'),
    [
        ('plain', 3, {}),
        ('no residual norm', 2, {'momentum': False}),
        ('proximal steps', 2, {}),
        ('proximal steps', 2, {**NORMALIZED, 'lookahead_gradients': True}),
        ('proximal steps', 3, {'mem_model_norm_add_residual': False}),
    ],
)
def test_deep_memories_equal_the_dense_engine(kernels_everywhere, switch, depth, changes, monkeypatch):
    # as on a GPU; memories of two matrices where no other kernel serves
    monkeypatch.setattr(whole_batches, 'has_deep_kernel', lambda *_: True)
    monkeypatch.setattr(FusedMLP, 'store_batches', FusedMLP.store_deep)
    blocks_have_at_most(whole_batches.MOST_ROWS_OF_DEEP, monkeypatch)
    blocks, scan = [], fused_mlp.deep_memory_scan
    monkeypatch.setattr(fused_mlp, 'deep_memory_scan', lambda *args: (blocks.append(args), scan(*args))[1])
    settings = {'default_model_kwargs': {'depth': depth}, 'default_step_transform_max_lr': 0.02, **changes}
    dual, dense = (memory(switch, 2, 4, engine=engine, **settings) for engine in ('dual', 'dense'))
    dense.to(DEVICE).load_state_dict(dual.float().to(DEVICE).state_dict())
    seq, mask = inputs(dense, 27).to(DEVICE), torch.rand(2, 27, device=DEVICE) < 0.8
    results = []
    for mem in (dual, dense):
        own = seq.to(next(mem.parameters()).dtype)
        first, state = mem(own[:, :9], store_mask=mask[:, :9])
        rest, state = mem(own[:, 9:], state=state, store_mask=mask[:, 9:])
        out = torch.cat((first, rest), dim=1)
        results.append((out, state.states, gradients(mem, out.double().sin().sum())))
    assert_same(*results, 3e-4)
    assert len(blocks) >= 2


@pytest.mark.parametrize('switch', SCANNED)
def test_states_are_kept_for_several_memory_batches(launched, switch, monkeypatch):
    # three memory batches in a block, and one that is left
    blocks_have_at_most(12, monkeypatch)
    dual = memory(switch, batch_size=4, engine='dual').float().to(DEVICE)
    dense = memory(switch, batch_size=4, engine='dense').to(DEVICE)
    dense.load_state_dict(dual.state_dict())
    seq = inputs(dense, 17).to(DEVICE)
    results = []
    for mem in (dual, dense):
        out, state = mem(seq.to(next(mem.parameters()).dtype))
        results.append((out, state.states, gradients(mem, out.double().sin().sum())))
    assert_same(*results, 3e-4)
    assert 'memory_batch_scan' in launched


def test_a_memory_compiles_to_few_operations(kernels_everywhere, fresh_compiler):
    mem, seen = memory().float().to(DEVICE), []
    seq = inputs(mem, 9).float().to(DEVICE)

    def loss(seq):
        out, state = mem(seq)
        return out.pow(2).sum() + sum(w.sum() for w in state.states[0].values())

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend('aot_eager')(graph, inputs)

    compiled = torch.compile(loss, fullgraph=True, backend=backend)(seq)
    counts = [sum(f'titans_pytorch.{name}' in target for target in seen) for name in OPERATIONS]
    assert counts == [0, 0, 1, 1, 0], seen
    expected = loss(seq)
    assert_same((compiled, gradients(mem, compiled)), (expected, gradients(mem, expected)), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('depth', [2, 3])
@pytest.mark.parametrize('low', [None, torch.bfloat16])
def test_a_step_of_a_memory_is_captured(low, depth):
    mem = memory(default_model_kwargs={'depth': depth}).float().cuda()
    seq = torch.empty_like(inputs(mem, 29)).float().cuda()

    def step():
        with torch.autocast('cuda', torch.bfloat16, enabled=low is not None, cache_enabled=False):
            out, state = mem(seq)
            loss = out.pow(2).sum() + sum(w.sum() for w in state.states[0].values())
        loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    mem.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for _ in range(2):
        seq.copy_(torch.randn_like(seq))
        mem.zero_grad(set_to_none=False)
        graph.replay()
        came = replayed.clone(), [p.grad.clone() for p in mem.parameters()]
        mem.zero_grad(set_to_none=False)
        assert_same(came, (step(), [p.grad.clone() for p in mem.parameters()]), 1e-5)
