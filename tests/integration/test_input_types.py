"""Inputs in the types that users have them in: token ids and masks of any integer dtype, labels, sizes from JSON files
and NumPy, single tokens; numbers equal those of the plain form."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from compare import all_in_float64, assert_same, gradients, randomised
from memories import DIM, inputs, memory
from torch import nn

from titans_pytorch import (
    GatedResidualMemoryMLP,
    LongTermMemoryModel,
    MemoryAsContextTransformer,
    MemoryAsGateTransformer,
    MemoryAsLayerTransformer,
    MemoryMLP,
    NeuralMemory,
)
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.implicit_mlp_attention import ImplicitMLPAttention

TOKENS = 16
CLASSES = [MemoryAsContextTransformer, MemoryAsGateTransformer, MemoryAsLayerTransformer, LongTermMemoryModel]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
GREEDY = {'temperature': 0.0, 'show_progress': False}

models = pytest.mark.parametrize('cls', CLASSES)


@pytest.fixture(autouse=True)
def float64():
    with all_in_float64():
        yield


def build(cls=MemoryAsGateTransformer, **changes):
    settings = {'num_tokens': TOKENS, 'dim': 8, 'depth': 2, 'dim_head': 4, 'heads': 2, 'segment_len': 4}
    memories = {'heads': 2, 'dim_head': 4, 'default_step_transform_max_lr': 0.3}
    return randomised(
        cls(**{**settings, 'neural_memory_segment_len': 2, 'neural_memory_kwargs': memories, **changes}), 0.1
    ).double()


def ids(length=9, batch=2):
    return torch.randint(0, TOKENS, (batch, length))


def cross_entropy(logits, targets, counts):
    """Of the targets that count, written out."""
    log_probabilities = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    losses = [
        -log_probabilities[row, place, targets[row, place]]
        for row in range(targets.shape[0])
        for place in range(targets.shape[1])
        if counts[row, place]
    ]
    return torch.stack(losses).mean()


# integers


@models
def test_token_ids_of_any_integer_dtype(cls):
    model, tokens = build(cls), ids()

    def results(dtype):
        of_dtype = tokens.to(dtype)
        loss = model(of_dtype, return_loss=True)
        samples = [
            model.sample(of_dtype, 13, use_cache=use_cache, stop_tokens=[3], **GREEDY) for use_cache in (False, True)
        ]
        return loss, gradients(model, loss), model(of_dtype), model(tokens, labels=of_dtype), samples

    expected = results(torch.int64)
    assert_same(model(tokens, labels=tokens), expected[0], 0.0)
    for dtype in INTEGERS[:-1]:
        assert_same(results(dtype), expected, 0.0, str(dtype))


def test_token_ids_of_an_own_embedding():
    class Bytes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Embedding(TOKENS, 8)

        def forward(self, x):
            return self.inner(x) * 2

    model, tokens = build(token_emb=Bytes()), ids()
    assert_same(model(tokens.to(torch.uint8), return_loss=True), model(tokens, return_loss=True), 0.0)


@pytest.mark.parametrize('dtype', INTEGERS)
def test_masks_of_zeros_and_ones(dtype):
    mem, seq = memory(), inputs(memory(), 10)
    store = torch.rand(2, 10) < 0.5
    assert_same(mem(seq, store_mask=store.to(dtype)), mem(seq, store_mask=store), 0.0)
    assert_same(mem.store_memories(seq, mask=store.to(dtype)), mem.store_memories(seq, mask=store), 0.0)

    model, tokens = build(), ids(10)
    mask = torch.tensor([[True] * 7 + [False] * 3, [False] * 2 + [True] * 8])
    assert_same(model(tokens, mask=mask.to(dtype)), model(tokens, mask=mask), 0.0)
    assert_same(model(tokens, return_loss=True, mask=mask.to(dtype)), model(tokens, return_loss=True, mask=mask), 0.0)


def test_masks_of_other_values_are_refused():
    mem, model, tokens = memory(), build(), ids(10)
    other = torch.full((2, 10), 2)
    with pytest.raises(ValueError, match=r'store_mask must hold the integers 0 and 1 only, got values in \[2, 2\]'):
        mem(inputs(mem, 10), store_mask=other)
    with pytest.raises(ValueError, match=r'mask must hold the integers 0 and 1 only, got values in \[-1, -1\]'):
        mem.store_memories(inputs(mem, 10), mask=other - 3)
    with pytest.raises(ValueError, match='mask must hold the integers 0 and 1 only'):
        model(tokens, mask=other)
    with pytest.raises(TypeError, match='mask must be a boolean tensor, or hold the integers 0 and 1, got torch.float'):
        model(tokens, mask=torch.ones(2, 10))


# labels


@models
def test_labels_are_aligned_with_the_input_and_shifted_inside(cls):
    model, tokens, labels = build(cls), ids(), ids()
    labels[0, 3], labels[1, 5:] = -100, -100
    expected = cross_entropy(model(tokens[:, :-1]), labels[:, 1:], labels[:, 1:] != -100)
    came = model(tokens, labels=labels)
    assert came.ndim == 0
    assert_same(came, expected, 1e-12)
    assert_same(gradients(model, came), gradients(model, expected), 1e-10)
    assert_same(model(tokens, return_loss=True, labels=labels), came, 0.0)
    # the first label has nothing before it
    assert_same(model(tokens, labels=torch.cat((labels[:, :1] * 0 - 100, labels[:, 1:]), dim=1)), came, 0.0)
    assert_same(model(tokens, labels=tokens), model(tokens, return_loss=True), 0.0)


def test_labels_that_are_all_left_out():
    model, tokens = build(), ids()
    loss = model(tokens, labels=torch.full_like(tokens, -100))
    assert loss.item() == 0.0
    assert all((g == 0).all() for g in gradients(model, loss).values())


@models
def test_labels_with_a_state(cls):
    """The last token of a piece is predicted in it, and read in the next."""
    model, tokens, labels = build(cls), ids(13), ids(13)
    labels[:, 6:8] = -100
    logits = model(tokens[:, :-1])
    state, sums = None, 0.0
    for start, stop in ((0, 5), (4, 8), (7, 13)):
        piece = slice(start, stop)
        loss, state = model(tokens[:, piece], labels=labels[:, piece], state=state, return_state=True)
        sums = sums + loss * (labels[:, start + 1 : stop] != -100).sum()
    assert state.seq_index == model.num_positions(12)
    counts = labels[:, 1:] != -100
    assert_same(sums / counts.sum(), cross_entropy(logits, labels[:, 1:], counts), 1e-10)


def test_labels_with_documents_and_padding():
    model, tokens, labels = build(), ids(10), ids(10)
    document_ids = torch.tensor([[0] * 6 + [1] * 4, [0] * 10])
    mask = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])
    labels[1, 6] = -100
    counts = torch.ones(2, 9, dtype=torch.bool)
    counts[0, 5] = counts[1, 5] = False  # the first of a document; and left out
    counts[1, :3] = False  # padding, and the first token after it
    logits = model(tokens, document_ids=document_ids, mask=mask)[:, :-1]
    came = model(tokens, labels=labels, document_ids=document_ids, mask=mask)
    assert_same(came, cross_entropy(logits, labels[:, 1:], counts), 1e-12)


def test_labels_for_embeddings():
    model, tokens, labels = build(), ids(), ids()
    embeddings = model.token_emb(tokens)
    assert_same(model(embeddings, labels=labels), model(tokens, labels=labels), 1e-12)
    with pytest.raises(ValueError, match='return_loss predicts tokens from tokens: x must be token ids'):
        model(embeddings, return_loss=True)


def test_labels_that_are_none():
    model, tokens = build(), ids()
    for bad, error, message in [
        (tokens.double(), TypeError, 'labels must hold integer token ids, got torch.float64'),
        (tokens[:, 1:], ValueError, r'labels must be \(batch=2, length=9\), got \(2, 8\)'),
        (
            tokens + TOKENS,
            ValueError,
            r'labels must be token ids in \[0, num_tokens=16\), or -100 to ignore',
        ),
        (tokens - 17, ValueError, 'labels must be token ids in'),
    ]:
        with pytest.raises(error, match=message):
            model(tokens, labels=bad)
    larger, beyond = build(token_emb=nn.Embedding(TOKENS + 4, 8)), tokens + TOKENS
    with pytest.raises(ValueError, match='labels must be .* with return_loss alone they are the tokens of x'):
        larger(beyond.clamp(max=TOKENS + 3), return_loss=True)
    with pytest.raises(ValueError, match='return_loss and labels need logits, and this model has no num_tokens'):
        build(num_tokens=None)(torch.randn(2, 9, 8).double(), labels=tokens)
    with pytest.raises(ValueError, match='return_hidden returns hidden states'):
        model(tokens, labels=tokens, return_hidden=True)
    with pytest.raises(ValueError, match='with labels, pass the tokens after the cache as x'):
        model(tokens, labels=tokens, cache=model(tokens[:, :3], return_cache=True)[1])


# sizes


def test_a_pair_of_chunk_sizes_as_a_list():
    pair, as_list = memory(chunk_size=(2, 4)), memory(chunk_size=json.loads('[2, 4]'))
    assert as_list.chunk_size == pair.chunk_size == (2, 4)
    seq = inputs(pair, 11)
    assert_same(as_list(seq), pair(seq), 0.0)


@pytest.mark.parametrize('integer', [np.int64, np.int32, np.uint8, torch.tensor])
def test_sizes_of_other_integer_types(integer):
    sizes = {'dim': 8, 'chunk_size': 2, 'batch_size': 4, 'dim_head': 4, 'heads': 2, 'momentum_order': 2}
    sizes |= {'num_kv_per_token': 2, 'conv_kernel': 3, 'checkpoint_every': 8}
    modules = {
        NeuralMemory: sizes,
        MemoryMLP: {'dim': 8, 'depth': 2, 'expansion_factor': 2},
        GatedResidualMemoryMLP: {'dim': 8, 'depth': 2},
        SegmentedAttention: {'dim': 8, 'segment_len': 4, 'dim_head': 4, 'heads': 2, 'num_persist_mem_tokens': 2},
        ImplicitMLPAttention: {'dim': 8, 'heads': 2, 'mlp_hiddens': [4, 5]},
    }
    factors = ('expansion_factor',)
    for cls, arguments in modules.items():
        changed = {
            name: [*map(integer, size)] if isinstance(size, list) else size if name in factors else integer(size)
            for name, size in arguments.items()
        }
        seq, made = torch.randn(2, 9, 8), []
        for kwargs in (arguments, changed):
            torch.manual_seed(0)
            made.append(cls(**kwargs))
        came, expected = (module(seq) for module in reversed(made))
        assert_same(came, expected, 0.0)
        assert {name: type(value) for name, value in vars(made[1]).items()} == {
            name: type(value) for name, value in vars(made[0]).items()
        }


@models
def test_sizes_of_a_model_from_numpy(cls):
    sizes = {'num_tokens': TOKENS, 'dim': 8, 'depth': 2, 'segment_len': 4, 'neural_memory_segment_len': 2}
    sizes |= {'neural_memory_batch_size': 4, 'dim_head': 4, 'heads': 2, 'num_persist_mem_tokens': 1}
    made = []
    for integer in (int, np.int64):
        torch.manual_seed(0)
        changed = {name: integer(size) for name, size in sizes.items()}
        made.append(cls(**changed, num_residual_streams=1, neural_memory_layers=[integer(2)], ff_mult=integer(2)))
    tokens = ids()
    assert_same(made[1](tokens), made[0](tokens), 0.0)
    assert all(type(getattr(made[1], name)) is int for name in sizes if hasattr(made[1], name))
    kwargs = {'prompt_lengths': np.array([9, 7]), 'use_cache': True, **GREEDY}
    came = made[1].sample(tokens, np.int64(14), stop_tokens=np.int64(3), pad_token=np.int64(0), **kwargs)
    kwargs['prompt_lengths'] = [9, 7]
    assert torch.equal(came, made[0].sample(tokens, 14, stop_tokens=3, pad_token=0, **kwargs))


def test_numbers_from_numpy():
    for name in ('max_grad_norm', 'default_step_transform_max_lr', 'init_decay_bias'):
        mem, of_numpy = memory(**{name: 0.5}), memory(**{name: np.float32(0.5)})
        seq = inputs(mem, 10)
        assert_same(of_numpy(seq), mem(seq), 0.0)


# tokens


def test_a_token_without_a_length_axis_gets_one():
    """As in the README, and as the reference does."""
    mem = memory()
    token = inputs(mem, 1)[:, 0]
    out, state = mem(token)
    assert out.shape == (2, 1, DIM)
    assert_same((out, state), mem(token.unsqueeze(1)), 0.0)


@pytest.mark.parametrize('dim_head', [3, 5])
def test_heads_of_odd_width_decode(dim_head):
    model, prompt = build(dim_head=dim_head), ids(5)
    cached, uncached = (model.sample(prompt, 16, use_cache=use_cache, **GREEDY) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
    with torch.no_grad():
        _, state = model(prompt, return_state=True)
        buffers = model.decoding_state(state)
        buffers.token.copy_(prompt[:, :1])
        model.step(buffers, model.step_kind(5))
    assert_same(buffers.logits, model(torch.cat((prompt, prompt[:, :1]), dim=1))[:, -1], 1e-9)


# none of this is in the way of the compiler


def test_calls_of_these_types_compile_whole_for_any_length():
    model = build(
        LongTermMemoryModel,
        depth=1,
        neural_memory_segment_len=4,
        num_residual_streams=1,
        neural_memory_model=MemoryMLP(4, depth=1),
        neural_memory_kwargs={'heads': 2, 'dim_head': 4, 'momentum': False},
    )
    mem = memory('linear memory', batch_size=None)
    compiled = torch.compile(
        lambda x, labels, state: model(x, labels=labels, state=state, return_state=True),
        fullgraph=True,
        backend='eager',
        dynamic=True,
    )
    came = expected = None
    for length in (5, 3):
        tokens = ids(length)
        loss, came = compiled(tokens.to(torch.int32), tokens, came)
        wanted, expected = model(tokens, return_loss=True, state=expected, return_state=True)
        assert_same(loss, wanted, 1e-12)
    masked = torch.compile(lambda seq, mask: mem(seq, store_mask=mask), fullgraph=True, backend='eager')
    seq, mask = inputs(mem, 10), torch.rand(2, 10) < 0.5
    assert_same(masked(seq, mask.int())[0], mem(seq, store_mask=mask)[0], 1e-12)


def test_states_pass_from_one_compiled_call_to_the_next():
    """PyTorch 2.11 returned an empty tuple where a named tuple's `_replace` had made it."""
    model = build(LongTermMemoryModel, depth=2, neural_memory_segment_len=4)

    def piece(tokens, state):
        logits, state = model(tokens, state=state, return_state=True)
        return logits, state.detach()

    compiled = torch.compile(piece, fullgraph=True, backend='eager')
    tokens, came, expected = ids(5), None, None
    for _ in range(2):
        logits, came = compiled(tokens, came)
        wanted, expected = piece(tokens, expected)
        assert_same((logits, came), (wanted, expected), 1e-12)
