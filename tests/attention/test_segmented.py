"""`SegmentedAttention`: its three implementations equal the definition, and so do their masks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compare import assert_same, randomised
from einops import rearrange
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

from titans_pytorch.attention import masks
from titans_pytorch.attention.flex import segmented_flex_attention
from titans_pytorch.attention.rotary import rotate
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.ops.attention_inputs import attention_inputs, with_persistent

VARIANTS = [
    {'sliding': sliding, 'num_persist_mem_tokens': persistent, 'num_longterm_mem_tokens': longterm}
    for sliding in (False, True)
    for persistent in (0, 3)
    for longterm in (0, 2)
]
every_variant = pytest.mark.parametrize('variant', VARIANTS)
LENGTH = 29


def attention(variant, **kwargs) -> SegmentedAttention:
    return randomised(SegmentedAttention(16, 5, dim_head=16, heads=2, **variant, **kwargs)).double()


def sees(query: int, key: int, window: int, sliding: bool) -> bool:
    """The definition for one pair of positions."""
    if key > query:
        return False
    return query - key <= window if sliding else query // window == key // window


def expected_output(layer: SegmentedAttention, seq: torch.Tensor) -> torch.Tensor:
    """Attention with a dense mask, by definition."""
    queries, keys, values = (
        rearrange(t, 'b n (h d) -> b h n d', h=2) for t in layer.to_qkv(layer.norm(seq)).chunk(3, dim=-1)
    )
    positions = torch.arange(seq.shape[1])
    queries, keys = (rotate(layer.rotary_emb, t, positions) for t in (queries, keys))
    if layer.persistent_memory is None:
        persistent_keys = persistent_values = keys[:, :, :0]
    else:
        persistent_keys, persistent_values = layer.persistent_memory.unsqueeze(1).expand(-1, len(seq), -1, -1, -1)

    window, length = layer.total_segment_len, seq.shape[1]
    visible = torch.tensor([[sees(i, j, window, layer.sliding) for j in range(length)] for i in range(length)])
    visible = torch.cat((torch.ones(seq.shape[1], layer.num_persist_mem_tokens, dtype=torch.bool), visible), dim=1)

    scores = queries @ torch.cat((persistent_keys, keys), dim=2).mT / 16**0.5
    weights = scores.masked_fill(~visible, float('-inf')).softmax(dim=-1)
    out = weights @ torch.cat((persistent_values, values), dim=2)
    return layer.to_out(rearrange(out, 'b h n d -> b n (h d)'))


def test_frequencies_have_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        layer = SegmentedAttention(16, 5, dim_head=16, heads=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    expected = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    assert_same(layer.rotary_emb.freqs, expected, 1e-15)


@every_variant
def test_windows_equal_the_definition(variant):
    layer, seq = attention(variant), torch.randn(2, LENGTH, 16, dtype=torch.float64)
    assert_same(layer(seq)[0], expected_output(layer, seq), 1e-12)


@every_variant
def test_cached_pieces_equal_the_definition(variant):
    layer, seq = attention(variant), torch.randn(2, LENGTH, 16, dtype=torch.float64)
    expected = expected_output(layer, seq)
    for sizes in ([1] * LENGTH, [7, 1, 12, 9]):
        for trims in (False, True):
            cache, position, outs = None, 0, []
            for piece in seq.split(sizes, dim=1):
                out, (_, cache) = layer(piece, cache=cache, position=position)
                position += piece.shape[1]
                cache = layer.trimmed(cache, position) if trims else cache
                outs.append(out)
            assert_same(torch.cat(outs, dim=1), expected, 1e-12)
            assert not trims or cache[0].shape[-2] <= layer.total_segment_len


@every_variant
@pytest.mark.filterwarnings('ignore:flex_attention called without torch.compile')
def test_flex_attention_equals_the_definition(variant):
    layer, seq = attention(variant).float(), torch.randn(2, LENGTH, 16)
    with torch.no_grad():  # on the CPU it has no backward; the GPU tests have
        inputs = partial(attention_inputs, layer.to_qkv(layer.norm(seq)), 2, layer.rotary_emb.freqs)
        persistent = layer.persistent_memory
        attend = segmented_flex_attention(
            LENGTH, layer.total_segment_len, layer.num_persist_mem_tokens, layer.sliding, seq.device
        )
        expected = expected_output(layer, seq)
        out = layer.to_out(layer.merge_heads(layer._attend_flex(*inputs(persistent=persistent), attend)))
        assert_same(out, expected, 1e-5)

        # the last queries, with the keys visible to them
        read = 2 * layer.total_segment_len + 3 * layer.sliding
        first = read - layer.total_segment_len * layer.sliding
        queries, keys, values = inputs()
        visible = with_persistent(keys[..., first:, :], values[..., first:, :], persistent)
        out = layer.to_out(layer.merge_heads(layer._attend_flex(queries[..., read:, :], *visible, None)))
        assert_same(out, expected[:, read:], 1e-5)


def test_block_masks_are_built_once_per_shape():
    first = masks.segmented_block_mask(LENGTH, 7, 2, True, torch.device('cpu'))
    assert masks.segmented_block_mask(LENGTH, 7, 2, True, torch.device('cpu')) is first
    assert masks.segmented_block_mask(LENGTH, 7, 2, False, torch.device('cpu')) is not first


def test_block_masks_serve_every_mode():
    masks._cached_block_mask.cache_clear()
    arguments = LENGTH, 7, 2, True, torch.device('cpu')
    with FakeTensorMode():
        assert isinstance(masks.segmented_block_mask(*arguments).kv_indices, FakeTensor)
    with torch.inference_mode():
        indices = masks.segmented_block_mask(*arguments).kv_indices
    assert not isinstance(indices, FakeTensor) and not indices.is_inference()


@pytest.mark.parametrize('sliding', [False, True])
@pytest.mark.parametrize('window', [3, 36, 128, 200, 700])
def test_block_masks_equal_those_of_all_pairs(window, sliding):
    fields = [
        f'{kind}{of}_{what}' for kind in ('', 'full_') for of in ('kv', 'q') for what in ('num_blocks', 'indices')
    ]
    for length, num_persistent in ((1, 0), (127, 1), (256, 4), (513, 0), (1000, 128), (1025, 300)):
        came = masks.segmented_block_mask(length, window, num_persistent, sliding, torch.device('cpu'))
        expected = create_block_mask(came.mask_mod, None, None, length, length + num_persistent, device='cpu')
        assert came.seq_lengths == expected.seq_lengths and came.BLOCK_SIZE == expected.BLOCK_SIZE
        for field in fields:
            assert getattr(came, field).dtype == torch.int32
            assert torch.equal(getattr(came, field), getattr(expected, field)), field


@pytest.mark.parametrize('sliding', [False, True])
def test_masks_equal_the_definition(sliding):
    positions = torch.arange(LENGTH)
    mask = masks.over_positions(masks.segmented(6, sliding), positions, positions)
    assert mask.tolist() == [[sees(i, j, 6, sliding) for j in range(LENGTH)] for i in range(LENGTH)]


def test_value_residual_and_gate():
    layer = attention({'sliding': True}, accept_value_residual=True)
    seq = torch.randn(2, 9, 16, dtype=torch.float64)
    own = layer(seq, value_residual=torch.zeros(2, 2, 9, 16, dtype=torch.float64))[1].value_residual
    with torch.no_grad():
        layer.to_learned_v_mix[0].weight.zero_()
        layer.to_learned_v_mix[0].bias.fill_(50.0)  # all of the residual
    residual = torch.randn_like(own)
    mixed, (values, (_, cached)) = layer(seq, value_residual=residual)
    assert_same(cached, residual, 1e-12)
    assert_same(values, own, 0.0)
    gate = torch.rand(2, 9, 16, dtype=torch.float64)
    assert_same(layer(seq, value_residual=residual, output_gating=gate)[0], mixed * gate, 0.0)


@pytest.mark.gpu
@every_variant
def test_flex_attention_on_a_gpu_equals_windows(variant):
    layer = attention(variant, use_flex_attn=True).float().cuda()
    seq = torch.randn(2, 600, 16, device='cuda', requires_grad=True)
    weights = torch.randn(2, 600, 16, device='cuda')
    results = []
    for disable in (False, True):
        out = layer(seq, disable_flex_attn=disable)[0]
        results.append((out, torch.autograd.grad((out * weights).sum(), [seq, *layer.parameters()][:2])))
    assert_same(*results, 2e-3)


@every_variant
def test_windows_are_counted_from_the_position(variant):
    layer, seq = attention(variant), torch.randn(2, LENGTH, 16, dtype=torch.float64)
    nothing = seq.new_zeros(2, 2, 0, 16)
    expected = layer(seq, cache=(nothing, nothing), position=2)[0]
    assert_same(layer(seq, position=2)[0], expected, 1e-12)
