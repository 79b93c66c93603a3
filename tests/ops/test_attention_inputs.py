"""Inputs of attention: a definition pair by pair, and the kernels against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from compare import assert_no_worse, assert_same, gradients, randomised
from torch.utils._pytree import tree_leaves, tree_map

from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.memory.packing import PackedDocuments
from titans_pytorch.ops import attention_inputs as operation
from titans_pytorch.ops.attention_inputs import attention_inputs, reference

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
LOW = torch.bfloat16 if DEVICE == 'cuda' else torch.float16
# batch, tokens, heads, features of a head, persistent tokens
SHAPES = [(2, 5, 3, 8, 2), (1, 70, 2, 64, 4), (2, 9, 2, 20, 0), (1, 1, 1, 4, 1), (1, 3, 2, 256, 3), (35, 2, 2, 4, 40)]
CHECKS = ('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic')


def problem(batch, tokens, heads, dim, persistent, dtype=torch.float32, mixes=True):
    """A projection, frequencies, and keyword arguments, of which the mixture comes from another projection."""
    random = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731
    projected, first_layer = (random(batch, tokens, 3 * heads * dim).to(dtype) for _ in range(2))
    options = {'persistent': random(2, heads, persistent, dim)} if persistent else {}
    if mixes:
        share = random(batch, tokens, heads, 1).to(dtype).sigmoid().transpose(1, 2)
        options['mix'] = reference.heads_of(first_layer, heads)[2], share
    return projected, 10000.0 ** (-torch.arange(0, dim, 2, device=DEVICE) / dim), options


def learned(projected, heads, frequencies, positions, options):
    """Queries, keys and values, and gradients of the projection, the mixture and persistent tokens."""
    options = tree_map(lambda t: t.detach().requires_grad_(), options)
    projected = projected.detach().requires_grad_()
    outs = attention_inputs(projected, heads, frequencies, positions, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outs]
    # as attention leaves gradients: some with heads side by side
    weights[0] = weights[0].transpose(1, 2).contiguous().transpose(1, 2)
    given = [projected, *tree_leaves(options)]
    return [out.detach() for out in outs], torch.autograd.grad(outs, given, weights)


def exactly(projected, heads, frequencies, positions, options):
    options = tree_map(torch.Tensor.double, options)
    return learned(projected.double(), heads, frequencies.double(), positions, options)


@pytest.fixture
def kernels(kernels_everywhere):
    from titans_pytorch.ops.attention_inputs import triton as kernels

    return kernels


def test_it_is_the_definition():
    projected, frequencies, options = problem(2, 5, 3, 8, 2, dtype=torch.float64)
    persistent, (residual, share) = options['persistent'], options['mix']
    came = attention_inputs(projected, 3, frequencies, 7, **options | {'persistent': persistent.double()})
    for b in range(2):
        for head in range(3):
            assert_same([t[b, head, :2] for t in came[1:]], [*persistent[:, head]], 0.0)
            for token in range(5):
                query, key, value = projected[b, token].unflatten(0, (3, 3, 8))[:, head]
                for pair, angle in enumerate(((7 + token) * frequencies).tolist()):
                    turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
                    turn = torch.tensor(turn).to(query)
                    own = slice(2 * pair, 2 * pair + 2)
                    assert_same(came[0][b, head, token, own], turn @ query[own], 1e-6)
                    assert_same(came[1][b, head, 2 + token, own], turn @ key[own], 1e-6)
                mixed = value + share[b, head, token] * (residual[b, head, token] - value)
                assert_same(came[2][b, head, 2 + token], mixed, 1e-12)


@pytest.mark.parametrize('positions', ['from 0', 'from 1000000', 'given'])
@pytest.mark.parametrize('mixes', [True, False])
@pytest.mark.parametrize('shape', SHAPES)
def test_kernels_equal_the_reference(kernels, poisoned, shape, mixes, positions):
    projected, frequencies, options = problem(*shape, mixes=mixes)
    positions = {
        'from 0': 0,
        'from 1000000': 1_000_000,
        'given': torch.randint(0, 3000, shape[:2], device=DEVICE),
    }[positions]
    exact = exactly(projected, shape[2], frequencies, positions, options)
    assert_same(learned(projected, shape[2], frequencies, positions, options), exact, 1e-5)


def test_a_projection_that_is_part_of_a_wider_one(kernels, poisoned):
    projected, frequencies, options = problem(2, 5, 3, 8, 2)
    wide = torch.cat((projected, projected), dim=-1)[..., 72:]
    expected = learned(projected, 3, frequencies, 3, options)
    assert_same(learned(wide, 3, frequencies, 3, options), expected, 0.0)


def test_precision_is_that_of_the_reference(kernels, poisoned):
    projected, frequencies, options = problem(2, 40, 3, 32, 4, dtype=LOW)
    exact = exactly(projected, 3, frequencies, 500, options)
    assert_no_worse(lambda: learned(projected, 3, frequencies, 500, options), exact, floor=1e-6)


def test_other_inputs_take_the_reference(kernels, monkeypatch):
    monkeypatch.setattr(kernels, 'attention_inputs', None)
    for shape in ((1, 2, 1, 258, 0), (1, 0, 2, 8, 1), (1, 3, 2, 5, 1)):
        projected, frequencies, options = problem(*shape)
        frequencies = frequencies[: shape[3] // 2]
        arguments = projected, shape[2], frequencies, 0
        expected = reference.attention_inputs(*arguments, options['mix'], options.get('persistent'))
        assert_same(attention_inputs(*arguments, **options), expected, 0.0)


def test_frequencies_that_are_learned_have_a_gradient(kernels):
    projected, frequencies, options = problem(1, 6, 2, 8, 1)
    grads = []
    for dtype in (torch.float32, torch.float64):
        learnable = frequencies.to(dtype).requires_grad_()
        given = tree_map(lambda t: t.to(dtype), options)  # noqa: B023
        queries, keys, _ = attention_inputs(projected.to(dtype), 2, learnable, 3, **given)
        grads.append(torch.autograd.grad((queries * keys[..., 1:, :]).sin().sum() + keys.sin().sum(), learnable)[0])
    assert grads[1].abs().max() > 0.1
    assert_same(grads[0], grads[1], 1e-4)


def test_the_operation_is_registered_correctly(kernels):
    projected, frequencies, options = problem(2, 5, 3, 8, 2)
    tensors = projected, *options['mix'], options['persistent']
    tensors = [t.detach().requires_grad_() for t in tensors]
    positions = torch.arange(10, device=DEVICE).unflatten(0, (2, 5))
    for given, first in ((None, 3), (positions, 0)):
        arguments = tensors[0], frequencies, given, *tensors[1:], 3, first
        torch.library.opcheck(kernels.attention_inputs, arguments, test_utils=CHECKS)


@pytest.mark.parametrize('sliding', [False, True])
def test_attention_takes_them(switch_kernel, note_launches, sliding):
    """Whole sequences, pieces after a cache, and packed documents."""
    layer = randomised(SegmentedAttention(16, 5, 3, 2, 8, 2, sliding, accept_value_residual=True)).to(DEVICE)
    seq = torch.randn(2, 29, 16, device=DEVICE)
    ids = torch.tensor([[0] * 11 + [1] * 18, [0] * 25 + [1] * 4], device=DEVICE)
    positions = torch.stack([torch.cat((torch.arange(n), torch.arange(29 - n))) for n in (11, 25)]).to(DEVICE)
    documents = PackedDocuments(torch.ones_like(ids, dtype=torch.bool), ids, positions, resets=ids.bool())
    launches, results = note_launches(operation), []
    for use in (False, True):
        switch_kernel(operation, use)
        outs, cache = [], None
        for piece in seq.split([12, 1, 10, 6], dim=1):
            out, (_, cache) = layer(piece, residual_of(piece), cache=cache)
            outs.append(out)
        outs.append(layer(seq, residual_of(seq))[0])
        if sliding:
            outs.append(layer(seq, residual_of(seq), documents=documents)[0])
        results.append((outs, gradients(layer, sum(out.square().sum() for out in outs))))
    assert len(launches) == len(outs)
    assert_same(results[1], results[0], 1e-4)


def residual_of(seq):
    return seq.unflatten(-1, (2, 8)).transpose(1, 2).cos()
