"""Attention of a single position: the kernel equals the reference, and both equal a pass over the sequence."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from compare import assert_same, randomised

from titans_pytorch import MemoryAsContextTransformer, MemoryAsGateTransformer, without_kernels
from titans_pytorch.attention.context import ContextAttention
from titans_pytorch.attention.rotary import frequencies
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.generation.stepper import Stepper
from titans_pytorch.ops import token_attention as token_attention_ops
from titans_pytorch.ops.attention_inputs import heads_of
from titans_pytorch.ops.token_attention import WIDEST, Position, RingLayout, ValueMix, token_attention

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
RINGS = [
    RingLayout(num_persistent, num_positions, keys_per_position, slides)
    for num_persistent in (0, 3)
    for num_positions, keys_per_position in ((6, 1), (1, 1), (5, 2))
    for slides in (False, True)
]


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


@pytest.fixture
def kernel(switch_kernel):
    """The kernel runs on this device too; its module."""
    switch_kernel(token_attention_ops, True)
    from titans_pytorch.ops.token_attention import triton as kernel

    return kernel


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def at(number: int, frequencies=None, dim_head: int = 8) -> Position:
    if frequencies is None:
        frequencies = torch.rand(3, dim_head // 2, device=DEVICE)
    return Position(torch.tensor([number], device=DEVICE), frequencies)


def problem(ring: RingLayout, heads: int, dim_head: int, dtype: torch.dtype, mixes: bool, batch: int = 2):
    """Arguments of `token_attention` up to the position, and the mix. Nothing but the buffers is contiguous."""
    num_slots = ring.num_persistent + ring.num_positions * ring.keys_per_position
    buffers = tuple(random(batch, heads, num_slots, dim_head, dtype=dtype) for _ in range(2))
    projected = random(ring.keys_per_position, batch, 3 * heads * dim_head + 2, dtype=dtype).transpose(0, 1)[..., :-2]
    mix = None
    if mixes:
        first_layer = random(batch, 1, 3 * heads * dim_head, dtype=dtype)
        weight, bias = random(heads, 20, dtype=dtype) * 0.2, random(heads, dtype=dtype)
        mix = ValueMix(random(batch, 1, 21, dtype=dtype)[..., 1:], weight, bias, heads_of(first_layer, heads)[2])
    return projected, buffers, ring, mix


def both(projected, buffers, ring, mix, position, layer=1):
    """Output and buffers, by the kernel and by the reference."""
    results = []
    for context in (nullcontext, without_kernels):
        own = tuple(buffer.clone() for buffer in buffers)
        with context():
            results.append((token_attention(projected, own, ring, position, layer, mix), own))
    return results


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('ring', RINGS, ids=str)
def test_the_kernel_equals_the_reference(ring, dtype, kernel, poisoned):
    given = problem(ring, 3, 8, dtype, mixes=ring.keys_per_position == 1)
    for number in {0, 1, ring.num_positions - 1, ring.num_positions, 3 * ring.num_positions + 2}:
        came, expected = both(*given, at(number))
        assert came[0].dtype == dtype and came[0].is_contiguous()
        assert_same(came, expected, 1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize('dim_head', [2, 16, 24, 64, 128])
@pytest.mark.parametrize(('tile', 'block'), [(4096, 512), (256, 8)])
def test_any_width_and_blocks_of_slots(dim_head, tile, block, kernel, poisoned, monkeypatch):
    monkeypatch.setattr(kernel, 'TILE', tile)
    monkeypatch.setattr(kernel, 'BLOCK', block)
    for number in (7, 40, 200):
        given = problem(RingLayout(4, 37, 1, True), 2, dim_head, torch.float32, mixes=True)
        assert_same(*both(*given, at(number, dim_head=dim_head)), 1e-5)


def test_slots_that_are_not_seen_may_hold_anything(kernel):
    for slides in (False, True):
        projected, buffers, ring, mix = problem(RingLayout(2, 9, 1, slides), 2, 8, torch.float32, mixes=True)
        (expected, _), _ = both(projected, buffers, ring, mix, position := at(3))
        for buffer in buffers:
            buffer[:, :, 5:] = float('nan')  # its own slot, and those after
        (came, (keys, values)), _ = both(projected, buffers, ring, mix, position)
        assert torch.equal(came, expected)
        assert keys[:, :, :6].isfinite().all() and keys[:, :, 6:].isnan().all() and values[:, :, 5].isfinite().all()


def test_other_precision_in_the_buffers(kernel):
    projected, buffers, ring, mix = problem(RingLayout(2, 9, 1, True), 2, 8, torch.float32, mixes=True)
    (expected, written), _ = both(projected, buffers, ring, mix, position := at(12))
    low = tuple(buffer.half() for buffer in buffers)
    assert_same(token_attention(projected, low, ring, position, 1, mix), expected, 4e-3)
    assert_same(low, written, 4e-3)


# a layer


def layer(kind=SegmentedAttention, **kwargs):
    made = kind(24, 5, dim_head=8, heads=2, num_persist_mem_tokens=2, **kwargs)
    return randomised(made).to(DEVICE)


def step_by_step(layer, seq, start, **inputs):
    """The outputs from `start` on."""
    before = {name: t[:, :start] if t.ndim == 3 else t[..., :start, :] for name, t in inputs.items()}
    cache = None
    for position in range(start):  # a call does not go beyond its segment in `ContextAttention`
        now = {name: t[..., position : position + 1, :] for name, t in before.items()}
        _, (_, cache) = layer(seq[:, position : position + 1], cache=cache, position=position, **now)
        cache = layer.trimmed(cache, position + 1)
    buffers, outs = layer.to_buffers(cache, start), []
    for number in range(start, seq.shape[1]):
        now = {name: t[..., number : number + 1, :] for name, t in inputs.items()}
        position = at(number, frequencies(layer.rotary_emb, seq.device)[None])
        outs.append(layer.step(seq[:, number : number + 1], buffers, position, 0, **now)[0])
    return torch.cat(outs, dim=1), layer.from_buffers(buffers, seq.shape[1])


@pytest.mark.parametrize('use', [False, True])
@pytest.mark.parametrize('kwargs', [{}, {'sliding': True, 'num_longterm_mem_tokens': 1}], ids=str)
def test_steps_of_a_layer_equal_one_pass(kwargs, use, switch_kernel):
    switch_kernel(token_attention_ops, use)
    one, seq = layer(accept_value_residual=True, **kwargs), random(2, 23, 24)
    inputs = {'value_residual': random(2, 2, 23, 8), 'output_gating': random(2, 23, 24)}
    expected, (_, cache) = one(seq, **inputs)
    cache = one.trimmed(cache, 23)
    for start in (1, 5, 12):
        came, after = step_by_step(one, seq, start, **inputs)
        assert_same(came, expected[:, start:], 1e-5)
        assert_same(after, cache, 1e-5)


@pytest.mark.parametrize('use', [False, True])
def test_steps_with_contexts_equal_whole_segments(use, switch_kernel):
    switch_kernel(token_attention_ops, use)
    one, seq, context = layer(ContextAttention), random(2, 13, 24), random(2, 13, 24)
    segments = zip(seq.split(5, dim=1), context.split(5, dim=1), (0, 5, 10))
    expected = torch.cat([one(*segment, position=start)[0] for *segment, start in segments], dim=1)
    for start in (1, 5, 7):
        assert_same(step_by_step(one, seq, start, context=context)[0], expected[:, start:], 1e-5)
    with pytest.raises(ValueError, match='seq must not go beyond the segment of 5 positions .* 3 positions from 8 on'):
        one(seq[:, :3], context[:, :3], position=8)
    with pytest.raises(ValueError, match='context must be'):
        one(seq[:, :3], context[:, :4])


# a model


KWARGS = dict(
    num_tokens=16, dim=24, depth=3, segment_len=4, heads=2, dim_head=8, num_persist_mem_tokens=2,
    neural_memory_layers=(2,), neural_memory_segment_len=2, neural_memory_kwargs={'dim_head': 8, 'heads': 2},
)  # fmt: skip


@pytest.mark.parametrize(
    ('kind', 'changes'),
    [
        (MemoryAsContextTransformer, {'num_longterm_mem_tokens': 1}),
        (MemoryAsContextTransformer, {'sliding_window_attn': True, 'neural_mem_gate_attn_output': True}),
        (MemoryAsContextTransformer, {'paper_order': True}),
        (MemoryAsGateTransformer, {}),
    ],
)
def test_a_transformer_decodes_by_the_kernel(kind, changes, switch_kernel, note_launches):
    model = randomised(kind(**{**KWARGS, **changes}), 0.1).to(DEVICE)
    tokens = torch.randint(0, 16, (2, 11), device=DEVICE)
    launches, results = note_launches(token_attention_ops), []
    for use in (False, True):
        switch_kernel(token_attention_ops, use)
        _, state = model(tokens[:, :3], return_state=True)
        step = Stepper.of(model, state, cuda_graphs=False)
        results.append(torch.stack([step(token).clone() for token in tokens[:, 3:].unbind(1)]))
        assert len(launches) == use * 3 * (model.num_positions(11) - model.num_positions(3))
    assert_same(*results, 1e-4)


def test_the_kernel_is_for_no_gradient_and_float32_at_most(kernel, monkeypatch):
    monkeypatch.setattr(kernel, 'token_attention', None)
    projected, buffers, ring, mix = problem(RingLayout(2, 9, 1, True), 2, 8, torch.float32, mixes=False)
    double = tuple(buffer.double() for buffer in buffers)
    token_attention(projected.double(), double, ring, at(5), 1)
    with torch.enable_grad():
        out = token_attention(projected.requires_grad_(), buffers, ring, at(5), 1)
    assert out.requires_grad
    dim_head = 2 * WIDEST
    projected, buffers, ring, mix = problem(RingLayout(2, 9, 1, True), 1, dim_head, torch.float32, mixes=False)
    token_attention(projected, buffers, ring, at(5, dim_head=dim_head), 1)


@pytest.mark.gpu
@pytest.mark.parametrize('keys_per_position', [1, 2])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_kernel_in_a_cuda_graph(dtype, keys_per_position, kernel):
    ring = RingLayout(4, 37, keys_per_position, keys_per_position == 1)
    projected, buffers, ring, mix = problem(ring, 8, 64, dtype, mixes=keys_per_position == 1)
    position, expected_buffers = at(0, dim_head=64), tuple(buffer.clone().float() for buffer in buffers)

    def step():
        # a position of its own: it keeps what it has computed from its number
        here = Position(position.number, position.frequencies)
        out = token_attention(projected, buffers, ring, here, 1, mix)
        position.number.add_(1)
        return out

    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        came = step()
    position.number.zero_()
    exact = None if mix is None else ValueMix(*(t.float() for t in mix))
    for number in range(50):
        projected.normal_()
        graph.replay()
        here = at(number, position.frequencies)
        with without_kernels():
            expected = token_attention(projected.float(), expected_buffers, ring, here, 1, exact)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        assert_same((came, buffers), (expected, expected_buffers), tolerance)
