"""Every architecture: pieces, steps and one pass agree; causality; gradients; documents; features; states."""

from __future__ import annotations

import random
import weakref
from itertools import product

import pytest
import torch
from architectures import CLASSES, DIM, TOKENS, architectures, build, ids, smallest_memory, variants
from compare import all_in_float64, assert_same, gradients
from torch import nn

from titans_pytorch import (
    MemoryAttention,
    ModelState,
)
from titans_pytorch.generation.stepper import Stepper
from titans_pytorch.models.documents import Documents, group_by_length
from titans_pytorch.presets import SIZES, preset


@pytest.fixture(autouse=True)
def float64():
    with all_in_float64():
        yield


def in_pieces(model, x, sizes, **kwargs):
    state, outs = None, []
    for piece in x.split(sizes, dim=1):
        out, state = model(piece, state=state, return_state=True, **kwargs)
        outs.append(out)
    return torch.cat(outs, dim=1), state


# one pass, pieces, steps


@architectures
@variants
def test_pieces_of_any_length_equal_one_pass(name, variant):
    model, tokens = build(name, variant), ids(32)
    whole = model(tokens)
    weights = torch.randn_like(whole)
    expected = gradients(model, (whole * weights).sum())
    for sizes in ([7, 1, 20, 4], [1] * 32):
        came, state = in_pieces(model, tokens, sizes)
        assert_same(came, whole, 1e-9)
        assert state.seq_index == model.num_positions(32)
    assert_same(gradients(model, (in_pieces(model, tokens, [7, 1, 20, 4])[0] * weights).sum()), expected, 1e-7)


@architectures
@variants
@torch.no_grad()
def test_steps_equal_one_pass(name, variant):
    model, tokens = build(name, variant), ids(32)
    expected = model(tokens)
    for start in (1, 6, 11):
        _, state = model(tokens[:, :start], return_state=True)
        step = Stepper.of(model, state, cuda_graphs=None)
        came = torch.stack([step(token).clone() for token in tokens[:, start:].unbind(1)], dim=1)
        assert_same(came, expected[:, start:], 1e-9)
        rest, _ = model(tokens[:, -1:], state=step.cache(), return_state=True)  # and back to a state
        following = torch.cat((tokens, tokens[:, -1:]), dim=1)
        assert_same(rest, model(following)[:, -1:], 1e-9)


@architectures
@pytest.mark.parametrize('steps_compiled_eagerly', ['aot_eager'], indirect=True)
def test_compiled_steps_are_the_same(name, steps_compiled_eagerly):
    model, prompt = build(name, depth=1, num_residual_streams=4 if name == 'LMM' else 1), ids(5)
    runs, following = [], ids(14)
    for compiled in (True, False):
        with torch.no_grad():
            _, state = model(prompt, return_state=True)
            step = Stepper.of(model, state, cuda_graphs=None, compiled=compiled)
            runs.append(torch.stack([step(token).clone() for token in following.unbind(1)]))
    assert_same(*runs, 1e-9)
    kinds = {model.step_kind(position) for position in range(model.num_positions(5), model.num_positions(19))}
    assert len(steps_compiled_eagerly) == len(kinds)


@architectures
def test_cached_samples_equal_uncached(name):
    model, prompt = build(name, 'as in the paper'), ids(5)
    kwargs = {'temperature': 0.0, 'show_progress': False}
    cached = model.sample(prompt, 27, use_cache=True, **kwargs)
    assert cached.shape == (2, 22)
    assert torch.equal(cached, model.sample(prompt, 27, use_cache=False, **kwargs))


@architectures
@variants
def test_is_causal_and_every_parameter_has_a_gradient(name, variant):
    model, tokens = build(name, variant), ids(24)
    changed = tokens.clone()
    changed[:, 13] = (changed[:, 13] + 1) % TOKENS
    before, after = model(tokens), model(changed)
    assert_same(after[:, :13], before[:, :13], 1e-12)
    assert (after[:, 13] - before[:, 13]).abs().max() > 1e-6
    came = gradients(model, model(ids(31), return_loss=True))
    assert came.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


@architectures
def test_memory_reaches_past_attention(name):
    model, tokens = build(name, depth=1), ids(40)
    changed = tokens.clone()
    changed[:, 1] = (changed[:, 1] + 1) % TOKENS
    assert (model(tokens) - model(changed))[:, 30:].abs().max() > 1e-9


@architectures
def test_the_loss_compiles_once_without_graph_breaks(name):
    torch.compiler.reset()
    model = build(name, depth=1, num_residual_streams=1, **smallest_memory())
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for attempt in range(2):
        tokens = ids(13)
        expected = model(tokens, return_loss=True)
        of_eager = gradients(model, expected)
        with torch.compiler.set_stance('fail_on_recompile' if attempt else 'default'):
            came = compiled(tokens, return_loss=True)
            assert_same((came, gradients(model, came)), (expected, of_eager), 1e-7)


# padded rows, and rows of several documents


def documents_of(lengths, pads_left):
    """Rows of 30 tokens that hold several documents, and the location of each document."""
    tokens, mask = ids(30, len(lengths)), torch.zeros(len(lengths), 30, dtype=torch.bool)
    document_ids, alone = torch.zeros(len(lengths), 30, dtype=torch.long), []
    for row, own in enumerate(lengths):
        start = 30 - sum(own) if pads_left else 0
        for number, length in enumerate(own):
            span = slice(start, start + length)
            mask[row, span], document_ids[row, span] = True, number
            alone.append((row, span))
            start += length
    return tokens, mask, document_ids, alone


@architectures
@pytest.mark.parametrize('pads_left', [False, True])
def test_documents_and_padding_do_not_change_results(name, pads_left):
    model = build(name)
    tokens, mask, document_ids, alone = documents_of([[4, 11, 8], [17], [1, 2, 20]], pads_left)
    came = model(tokens, mask=mask, document_ids=document_ids)
    losses = []
    for row, span in alone:
        document = tokens[row : row + 1, span]
        assert_same(came[row : row + 1, span], model(document), 1e-9)
        if document.shape[1] > 1:
            losses.append((model(document, return_loss=True), document.shape[1] - 1))
    expected = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    loss = model(tokens, return_loss=True, mask=mask, document_ids=document_ids)
    assert_same(loss, expected, 1e-9)
    assert_same(gradients(model, loss), gradients(model, expected), 1e-7)


def test_padding_between_documents_separates_them():
    model, tokens = build('MAG'), ids(12, batch=1)
    mask = torch.tensor([[True] * 5 + [False] * 3 + [True] * 4])
    document_ids = torch.tensor([[0] * 5 + [1] * 3 + [0] * 4])
    for kwargs in ({'mask': mask}, {'mask': mask, 'document_ids': document_ids}):
        assert_same(model(tokens, **kwargs)[:, 8:], model(tokens[:, 8:]), 1e-9)


def test_a_batch_with_nothing_to_predict_has_a_loss_of_zero():
    model, tokens = build('MAG'), ids(8)
    single = torch.arange(16).view(2, 8)
    last = torch.zeros(2, 8, dtype=torch.bool)
    last[:, -1] = True
    for kwargs in ({'document_ids': single}, {'mask': last}):
        loss = model(tokens, return_loss=True, **kwargs)
        assert loss.item() == 0 and all((g == 0).all() for g in gradients(model, loss).values())


def test_padding_at_most_doubles_the_number_of_tokens():
    document_ids = torch.tensor([[0] * 40 + [*range(1, 25)]])
    groups = Documents.of(None, document_ids, (1, 64), document_ids.device).groups()
    assert sum(group.indices.numel() for group in groups) <= 2 * 64
    assert torch.cat([group.indices[group.real] for group in groups]).sort().values.equal(torch.arange(64))


def cost_of_groups(groups, lengths, tokens_of_call):
    """Padded tokens, and these with those of calls."""
    padded = sum(len(own) * max(lengths[number] for number in own) for own in groups)
    return padded, padded + len(groups) * tokens_of_call


@pytest.mark.parametrize('tokens_of_call', [0, 10, 100, 10_000])
def test_documents_are_grouped_in_the_least_time(tokens_of_call):
    for seed in range(20):
        draw = random.Random(seed)
        lengths = [2 ** draw.randrange(8) for _ in range(draw.randint(1, 10))]
        groups = group_by_length(lengths, tokens_of_call)
        assert sorted(sum(groups, [])) == [*range(len(lengths))]
        # all ways to cut the documents in order of length
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        costs = []
        for cuts in product([False, True], repeat=len(order) - 1):
            ends = [*(end for end, cut in enumerate(cuts, 1) if cut), len(order)]
            pieces = [order[start:end] for start, end in zip([0, *ends], ends)]
            padded, cost = cost_of_groups(pieces, lengths, tokens_of_call)
            costs += [cost] if padded <= 2 * sum(lengths) else []
        padded, cost = cost_of_groups(groups, lengths, tokens_of_call)
        assert padded <= 2 * sum(lengths) and cost == min(costs)


def test_documents_without_padding_and_padding_without_documents():
    model = build('MAG')
    tokens, mask, document_ids, alone = documents_of([[12, 18], [30]], False)
    assert mask.all()
    assert_same(model(tokens, document_ids=document_ids), model(tokens, mask=mask, document_ids=document_ids), 0.0)
    assert_same(model(tokens, mask=mask), model(tokens), 1e-12)


@architectures
def test_reductions_of_the_loss(name):
    model = build(name)
    tokens, mask, document_ids, _ = documents_of([[12, 18], [1, 9, 4]], True)
    given = {'return_loss': True, 'mask': mask, 'document_ids': document_ids}
    each = model(tokens, reduction='none', **given)
    count = (each != 0).sum()
    assert each.shape == (len(tokens), tokens.shape[1] - 1) and count == 11 + 17 + 8 + 3
    total = model(tokens, reduction='sum', **given)
    assert_same((total, each.sum() / count), (each.sum(), model(tokens, **given)), 1e-12)

    # a batch in parts
    parts = [{key: t[[row]] if torch.is_tensor(t) else t for key, t in given.items()} for row in range(len(tokens))]
    summed = sum(model(tokens[[row]], reduction='sum', **part) for row, part in enumerate(parts))
    assert_same(gradients(model, summed / count), gradients(model, model(tokens, **given)), 1e-9)
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'average'"):
        model(tokens, return_loss=True, reduction='average')


# other modules in place of the model's


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@architectures
@pytest.mark.parametrize('kind', [nn.Linear, nn.RMSNorm])
def test_linear_layers_and_norms_may_be_wrapped(name, kind):
    """As by adapters written by hand."""
    model, tokens = build(name), ids(20)
    loss, sample = model(tokens, return_loss=True), model.eval().sample(tokens[:, :5], 9, 0.0, show_progress=False)
    of_kind = [
        (parent, key) for parent in model.modules() for key, part in parent.named_children() if type(part) is kind
    ]
    for parent, key in of_kind:
        parent.register_module(key, Wrapped(getattr(parent, key)))
    assert_same(model(tokens, return_loss=True), loss, 1e-12)
    assert_same(model(model.token_emb(tokens)), model(tokens), 1e-12)
    for use_cache in (False, True):
        again = model.sample(tokens[:, :5], 9, 0.0, use_cache=use_cache, show_progress=False)
        assert torch.equal(again, sample)


# embeddings and features as input, hidden states as output


@architectures
def test_embeddings_features_and_hidden_states(name):
    model, tokens = build(name), ids(20)
    embeddings = model.token_emb(tokens)
    assert_same(model(embeddings), model(tokens), 1e-12)
    hidden = model(tokens, return_hidden=True)
    assert hidden.shape == (2, 20, DIM)
    assert_same(model.to_logits(hidden), model(tokens), 1e-12)

    of_features = build(name, num_tokens=None, token_emb=nn.Linear(5, DIM))
    features = torch.randn(2, 20, 5, dtype=torch.float64)
    out = of_features(features)
    assert out.shape == (2, 20, DIM)
    assert_same(in_pieces(of_features, features, [3, 17])[0], out, 1e-9)
    trained = {name for name, p in of_features.named_parameters() if p.requires_grad}
    assert gradients(of_features, out.sin().sum()).keys() == trained


# states


@architectures
def test_a_state_is_saved_moved_detached_and_reordered(name, tmp_path):
    model, tokens = build(name, 'as in the paper'), ids(23, batch=3)
    _, state = model(tokens[:, :14], return_state=True)
    expected = model(tokens[:, 14:], state=state)

    torch.save(state, tmp_path / 'state.pt')
    loaded = torch.load(tmp_path / 'state.pt', weights_only=True)
    assert isinstance(loaded, ModelState)
    assert_same(model(tokens[:, 14:], state=loaded), expected, 0.0)
    assert_same(model(tokens[:, 14:], state=state.to('cpu').to(torch.float64)), expected, 0.0)
    for entries in ([2, 0, 0], torch.tensor([1]), [-1]):
        assert_same(model(tokens[entries, 14:], state=state.select(entries)), expected[entries], 1e-12)

    for part in torch.utils._pytree.tree_leaves(state.detach()):
        assert not getattr(part, 'requires_grad', False)
    detached = gradients(model, model(tokens[:, 14:], state=state.detach()).sum())
    attached = gradients(model, model(tokens[:, 14:], state=state).sum())
    assert max((attached[key] - detached[key]).norm() for key in detached) > 1e-6


@torch.no_grad()
def test_sampling_continues_from_a_state():
    model, prompt = build('MAC'), ids(9)
    kwargs = {'temperature': 0.0, 'show_progress': False}
    whole = model.sample(prompt, 30, use_cache=True, **kwargs)
    first, state = model.sample(prompt, 20, return_cache=True, **kwargs)
    second = model.sample(first[:, -1:], 11, state=state, **kwargs)
    assert torch.equal(torch.cat((first, second), dim=1), whole)
    with pytest.raises(ValueError, match='pass cache .* or state .*, not both'):
        model.sample(prompt, 30, state=state, cache=state, **kwargs)


@architectures
def test_a_state_does_not_grow(name):
    model = build(name)

    def numbers(length):
        with torch.no_grad():
            _, state = model(ids(length), return_state=True)
        return sum(t.numel() for t in torch.utils._pytree.tree_leaves(tuple(state)) if isinstance(t, torch.Tensor))

    assert numbers(120 + 7 * 18) == numbers(120)  # at the same offset in a segment and in a chunk


# arguments


BAD = [
    ('MAC, paper order', {'num_longterm_mem_tokens': 2}, 'num_longterm_mem_tokens cannot be combined with paper_order'),
    ('MAC, paper order', {'sliding_window_attn': True}, 'sliding_window_attn cannot be combined with paper_order=True'),
    ('MAC, paper order', {'neural_memory_segment_len': 4}, 'segment_len must be a multiple of neural_memory_segment'),
    ('MAC, paper order', {'neural_memory_model': MemoryAttention(8)}, 'neural_memory_model mixes them'),
    ('MAG', {'neural_memory_layers': (3,)}, r'neural_memory_layers must be layers from 1 to depth=2, got \[3\]'),
    ('MAL', {'num_tokens': 0}, 'num_tokens must be a positive integer, got 0'),
    ('LMM', {'depth': 0}, 'depth must be a positive integer, got 0'),
    ('MAG', {'neural_memory_model': nn.Linear(8, 4)}, 'neural_memory_model must keep the shape of its input'),
    ('MAC', {'neural_memory_model': nn.ReLU()}, 'neural_memory_model must have parameters that are not frozen'),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'changes', 'message'), BAD)
def test_arguments(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(name, **changes)


def test_calls():
    model, tokens = build('MAG'), ids(10)
    _, state = model(tokens, return_state=True)
    mask = torch.ones(2, 10, dtype=torch.bool)
    for kwargs, error, message in [
        ({'state': state, 'cache': state}, ValueError, 'with state, pass the tokens after the cache as x'),
        ({'cache': state, 'return_loss': True}, ValueError, 'with return_loss, pass the tokens after the cache as x'),
        ({'document_id': 1}, TypeError, "unexpected keyword argument 'document_id'"),
        ({'state': state.select([0])}, ValueError, 'state must be of a batch of 2, as x is, got one of 1'),
        ({'state': state.to(torch.float32)}, TypeError, r'state.key_values\[0\] must be torch.float64, as the param'),
        ({'state': state.to('meta')}, ValueError, 'cached keys and values must be on cpu, as the input is, got meta'),
        ({'state': state.memories[0]}, TypeError, 'state must be a ModelState, got NeuralMemState'),
        ({'cache': state}, ValueError, 'x must go beyond the 10 tokens in the cache, got 10'),
        ({'mask': mask, 'return_state': True}, ValueError, 'leave out state, cache and return_state'),
        ({'mask': mask[:, :9]}, ValueError, r'mask must be \(batch=2, length=10\), got \(2, 9\)'),
        ({'mask': mask.double()}, TypeError, 'mask must be a boolean tensor'),
        ({'mask': ~mask}, ValueError, 'mask must leave at least one token'),
        ({'document_ids': torch.rand(2, 10)}, TypeError, 'document_ids must hold integers'),
        ({'state': build('MAL', depth=3)(tokens, return_state=True)[1]}, ValueError, 'state must be of a model'),
        ({'state': build('MAG', segment_len=2)(tokens, return_state=True)[1]}, ValueError, 'windows of this length'),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            model(tokens, **kwargs)
    with pytest.raises(ValueError, match=r'x must be \(batch, length, dim=16\), got \(2, 10, 15\)'):
        model(torch.randn(2, 10, 15, dtype=torch.float64))
    with pytest.raises(ValueError, match='x must be token ids'):
        model(torch.randn(2, 10, 16, dtype=torch.float64), return_loss=True)
    with pytest.raises(ValueError, match='without num_tokens'):
        build('MAG', num_tokens=None, token_emb=nn.Embedding(4, DIM)).sample(ids(3) % 4, 6)
    for entries in ([2], 0, torch.tensor([True, False]), [[0]]):
        with pytest.raises((ValueError, TypeError), match='entries must be|has no len'):
            state.select(entries)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', CLASSES)
def test_presets_have_the_papers_sizes(name, size):
    kwargs = {'paper_order': True} if 'order' in name else {}
    with torch.device('meta'):
        model = CLASSES[name](num_tokens=32000, segment_len=64, **preset(size, 64), **kwargs)
    depth, dim, _ = SIZES[size]
    assert len(model.layers) == depth
    per_layer = sum(p.numel() for p in model.layers.parameters()) / depth / dim**2
    assert (8 if name == 'LMM' else 16) < per_layer < 18  # 4 or less for each of attention, memory; 8 for feedforward
    with pytest.raises(ValueError, match="size must be one of .*, got '1B'"):
        preset('1B')


def test_random_pieces_equal_one_pass():
    model, tokens = build('MAC, paper order', 'as in the paper'), ids(30)
    whole, drawn = model(tokens), random.Random(0)
    for _ in range(4):
        sizes, left = [], 30
        while left:
            sizes.append(drawn.randint(1, left))
            left -= sizes[-1]
        assert_same(in_pieces(model, tokens, sizes)[0], whole, 1e-9)


@torch.no_grad()
def test_layers_free_keys_and_values_that_no_later_token_sees():
    model, keys, alive = build('MAG', depth=3), [], []

    def hook(module, args, out):
        alive.append(sum(ref() is not None for ref in keys))
        keys.append(weakref.ref(out[1].cached_key_values[0]))

    for block in model.layers:
        block.attention.register_forward_hook(hook)
    model(ids(40), return_state=True)
    assert alive == [0, 0, 0]


@architectures
def test_shapes_on_the_meta_device(name):
    """As for counting operations, without computing anything."""
    with torch.device('meta'):
        model = build(name).to('meta')
        tokens = torch.zeros(2, 13, dtype=torch.long)
        logits, state = model(tokens, return_state=True)
        assert logits.is_meta and logits.shape == model.to_logits(model(tokens, return_hidden=True)).shape
        assert state.seq_index == model.num_positions(13) and model(tokens, return_loss=True).is_meta
