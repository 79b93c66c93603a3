"""Numbers, gradients, scans, states, sampling and bfloat16 training on a GPU, as on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from compare import assert_same, gradients, leaves
from memories import SWITCHES, inputs, memory

import train_mac
from titans_pytorch import MemoryAsContextTransformer
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.training import MicroStep, random_starts, windows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize('switch', SWITCHES)
def test_a_memory_gives_the_same_numbers_as_on_the_cpu(switch):
    mem = memory(switch)
    seq = inputs(mem, 27)
    there = copy.deepcopy(mem).cuda()
    _, state = mem(seq[..., :9, :])
    results = []
    for module, device in ((mem, 'cpu'), (there, 'cuda')):
        out, after = module(seq[..., 9:, :].to(device), state=state.detach().to(device))
        results.append((out, after._replace(updates=None), gradients(module, out.pow(2).sum())))
    on_cpu, on_gpu = results
    assert_same(_on_cpu(on_gpu), _on_cpu(on_cpu), 1e-9)


def _on_cpu(value):
    return {path: t.cpu() for path, t in leaves(value).items()}


@pytest.mark.parametrize('switch', ['plain', 'momentum of order 3, combined', 'everything'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_accelerated_scan_changes_no_number(switch, dtype):
    results = []
    for accelerated in (False, True):
        mem = memory(switch, use_accelerated_scan=accelerated).cuda().to(dtype)
        torch.manual_seed(0)
        seq = inputs(mem, 45).cuda().to(dtype)
        out, state = mem(seq)
        results.append((out, state, gradients(mem, out.pow(2).sum())))
    assert_same(*results, 1e-3 if dtype == torch.float32 else 1e-9)


def shipped_model(**changes) -> MemoryAsContextTransformer:
    return train_mac.build_model(train_mac.Config(PRESET='full', DEVICE='cuda', **changes))


def test_the_shipped_configuration_with_and_without_what_a_gpu_adds():
    tokens = torch.randint(0, 256, (2, 513), device='cuda')
    plain = shipped_model(USE_ACCELERATED_SCAN=False, USE_FLEX_ATTN=False)
    fast = shipped_model(USE_ACCELERATED_SCAN=True, USE_FLEX_ATTN=True)
    fast.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, fast):
        loss = model(tokens, return_loss=True)
        results.append((loss, gradients(model, loss)))
    assert_same(results[0][0], results[1][0], 1e-4)
    for name, gradient in results[0][1].items():
        error = (results[1][1][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 0.02, f'{name}: {error:.3f}'


def test_cached_samples_equal_uncached_in_float64():
    model = shipped_model(DEPTH=4, NEURAL_MEM_LAYERS=(2, 4), USE_ACCELERATED_SCAN=True, USE_FLEX_ATTN=True).double()
    prompt = torch.randint(0, 256, (2, 50), device='cuda')
    kwargs = {'temperature': 0.0, 'show_progress': False}
    assert torch.equal(model.sample(prompt, 90, use_cache=True, **kwargs), model.sample(prompt, 90, **kwargs))


def test_training_in_bfloat16_learns():
    model = shipped_model(DEPTH=2, NEURAL_MEM_LAYERS=(2,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, 256, (2, 129), device='cuda')
    losses = []
    for _ in range(20):
        with torch.autocast('cuda', torch.bfloat16):
            loss = model(tokens, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_state_travels_from_the_gpu_through_a_file(tmp_path):
    mem = memory('attention memory').cuda()
    seq = inputs(mem, 18).cuda()
    out, state = mem(seq[:, :11])
    torch.save(state, tmp_path / 'state.pt')
    loaded = torch.load(tmp_path / 'state.pt', weights_only=True, map_location='cpu')
    expected, _ = mem(seq[:, 11:], state=state)
    came, _ = mem.cpu()(seq[:, 11:].cpu(), state=loaded)
    assert_same(came, expected.cpu())


# CUDA graphs and the compiler


@pytest.mark.parametrize('switch', ['plain', 'everything'])
def test_a_step_of_a_memory_is_captured(switch):
    mem = memory(switch).cuda()
    seq = torch.empty_like(inputs(mem, 29)).cuda()

    def step():
        out, state = mem(seq)
        loss = out.pow(2).sum() + sum(w.sum() for w in state.states[0].values())
        loss.backward()
        return loss.detach()

    replay, replayed = captured(mem, step)
    for _ in range(2):
        seq.copy_(torch.randn_like(seq))
        replay()
        came = replayed.clone(), [p.grad.clone() for p in mem.parameters()]
        mem.zero_grad(set_to_none=False)
        expected = step(), [p.grad.clone() for p in mem.parameters()]
        mem.zero_grad(set_to_none=False)
        assert_same(came, expected, 1e-9)


def captured(module, step):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    module.zero_grad(set_to_none=False)
    return graph.replay, result


@pytest.mark.parametrize('compiles', [False, True])
def test_training_by_graph_equals_training_without(compiles):
    losses = []
    for graphs in (True, False):
        config = train_mac.Config(
            **{'PRESET': 'full', 'DEPTH': 2, 'NEURAL_MEM_LAYERS': (1, 2), 'PRECISION': 'fp32', 'BATCH_SIZE': 2},
            USE_CUDA_GRAPHS=graphs,
            COMPILE=compiles and graphs,
        )
        model, generator = train_mac.build_model(config), torch.Generator().manual_seed(0)
        step = MicroStep(model, train_mac.choose_machine(config))
        # the script's rate: AdamW's first steps have the signs of gradients, so that rounding moves a weight by it
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.LEARNING_RATE, fused=True)
        text = torch.randint(0, 256, (4096,), generator=generator)
        starts = random_starts(text, config.BATCH_SIZE, config.SEQ_LEN, generator)
        inputs = windows(text, starts, config.SEQ_LEN + 1)
        losses.append([])
        for number in range(4):
            losses[-1].append(step(inputs).item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=number % 2 == 0)
    assert losses[0][-1] < losses[0][0]
    assert_same(torch.tensor(losses[0]), torch.tensor(losses[1]), 1e-3)


def test_a_memory_compiles_with_inductor():
    mem = memory('plain').cuda()
    seq = inputs(mem, 21).cuda()

    def loss(seq):
        out, state = mem(seq)
        return out.pow(2).sum() + sum(w.sum() for w in state.states[0].values())

    compiled = torch.compile(loss, fullgraph=True)(seq)
    assert_same(gradients(mem, compiled), gradients(mem, loss(seq)), 1e-9)


def test_a_layer_replays_cuda_graphs_in_a_loop_of_ones_own():
    mem = memory('plain').float().cuda()
    compiled = torch.compile(mem, mode='reduce-overhead')
    for _ in range(4):  # two to compile and record
        seq = inputs(mem, 32).float().cuda()
        loss = compiled(seq)[0].pow(2).sum()
        came = gradients(mem, loss)
        expected = mem(seq)[0].pow(2).sum()
        assert_same((loss, came), (expected, gradients(mem, expected)), 1e-3)


def test_a_transformer_compiles_with_inductor():
    config = train_mac.Config(PRESET='full', DEPTH=1, NEURAL_MEM_LAYERS=(1,), SEQ_LEN=128, PRECISION='fp32')
    model = train_mac.build_model(config)
    tokens = torch.randint(0, 256, (1, 129), device='cuda')
    loss = model(tokens, return_loss=True)
    compiled = torch.compile(lambda tokens: model(tokens, return_loss=True), fullgraph=True)(tokens)
    assert_same(compiled, loss, 1e-4)
    came, expected = gradients(model, compiled), gradients(model, loss)
    for name, gradient in expected.items():
        error = (came[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 0.02, f'{name}: {error:.3f}'


@pytest.mark.parametrize('sliding', [False, True])
@pytest.mark.parametrize(
    ('dtype', 'segment', 'tolerance'),
    [(torch.float32, 128, 1e-3), (torch.bfloat16, 128, 0.05), (torch.bfloat16, 32, 0.05)],
)
def test_flex_attention_equals_windows_in_long_sequences(sliding, dtype, segment, tolerance):
    attention = SegmentedAttention(
        64, segment, num_persist_mem_tokens=2, num_longterm_mem_tokens=4, heads=1, sliding=sliding, use_flex_attn=True
    ).cuda()
    seq = torch.randn(1, 8448, 64, device='cuda')
    expected, _ = attention(seq, disable_flex_attn=True)
    with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
        came, _ = attention(seq)
    assert_same(came.float(), expected, tolerance / 10)
    assert_same(gradients(attention, came.sin().sum()), gradients(attention, expected.sin().sum()), tolerance)


@pytest.mark.parametrize('length', [16, 32, 36, 130])
def test_flex_attention_equals_windows_in_short_sequences(length):
    torch.compiler.reset()
    attention = SegmentedAttention(
        64, 8, num_persist_mem_tokens=2, num_longterm_mem_tokens=4, heads=4, sliding=True, use_flex_attn=True
    ).cuda()
    seq = torch.randn(3, length, 64, device='cuda')
    expected, _ = attention(seq, disable_flex_attn=True)
    with torch.autocast('cuda', torch.bfloat16):
        came, _ = attention(seq)
    assert_same(came.float(), expected, 5e-3)
    assert_same(gradients(attention, came.sin().sum()), gradients(attention, expected.sin().sum()), 0.05)
